"""What is recorded of an answer while the server around it changes."""

from __future__ import annotations

import asyncio
import contextlib
import math
import threading
from collections.abc import Sequence
from types import SimpleNamespace

import pytest
from prometheus_client.samples import Sample

from safeside.errors import AuditError, DeadlineError, ServingError
from safeside.serve.audit import AuditRecord
from safeside.serve.effective import Decision
from safeside.serve.keys import Caller
from safeside.serve.metrics import Metrics
from safeside.serve.row import Ended, Event, Failed, Judged, Piece
from safeside.serve.sampling import Token
from safeside.serve.service import Answering, Service
from safeside.types import Verdict

ALLOW, BLOCK = Decision("allow"), Decision("block")


def listening(
    records: list[AuditRecord],
    events: Sequence[Event],
    *,
    leaves: bool = False,
    has_ended: bool = False,
    metrics: Metrics | None = None,
) -> Service:
    """A service that has heard these events of an answer, until the client left or an error ended it."""
    base = SimpleNamespace(name="tiny")
    engine = SimpleNamespace(base=base, adapters={}, metrics=metrics or Metrics(), has_ended=has_ended)

    def append(new: Sequence[AuditRecord]) -> None:
        if any(record.text == "full" for record in new):
            raise AuditError("The disk is full.")
        records.extend(new)

    service = Service(engine, None, SimpleNamespace(append_all=append))  # type: ignore[arg-type]
    service.fingerprints = {"harm": "old"}
    policy = SimpleNamespace(name="p", version="1", audit_text=False)
    job = SimpleNamespace(ids=(1,), cancelled=threading.Event(), deadline=math.inf)

    async def listen() -> None:
        admission = SimpleNamespace(settle=lambda n_used: None)
        answering = Answering(Caller("shop"), policy, job, admission, asyncio.Queue(), "?")  # type: ignore[arg-type]
        for event in events:
            answering.inbox.put_nowait(event)
        async for _ in service.events(answering, lambda: asyncio.sleep(0, leaves and answering.inbox.empty())):
            service.fingerprints = {"harm": "new"}
            answering.polled = 0.0

    asyncio.run(listen())
    return service


def test_an_answer_is_recorded_with_the_adapters_that_it_began_with() -> None:
    """A slow reader hears the end of an answer after the adapters were exchanged."""
    records: list[AuditRecord] = []
    listening(records, [Judged((), ALLOW), Ended("stop", 1, (), ALLOW, 0.0)])
    assert [record.adapters for record in records] == [{"harm": "old"}, {"harm": "old"}]


@pytest.mark.parametrize("error", [DeadlineError("too late"), ServingError("broken"), RuntimeError("SECRET")])
def test_an_answer_that_failed_is_recorded(error: Exception) -> None:
    records: list[AuditRecord] = []
    with pytest.raises(type(error)):
        listening(records, [Judged((), ALLOW), Piece("the "), Piece("cat"), Failed(error)])
    assert [(record.stage, record.action) for record in records] == [("prompt", "allow"), ("answer", "failed")]
    reason = "RuntimeError" if isinstance(error, RuntimeError) and not isinstance(error, ServingError) else str(error)
    assert (records[1].reason, records[1].text) == (reason, "the cat")


def test_an_answer_whose_client_left_is_recorded() -> None:
    records: list[AuditRecord] = []
    listening(records, [Judged((), ALLOW), Piece("the ")], leaves=True)
    assert [(record.stage, record.action) for record in records] == [("prompt", "allow"), ("answer", "abandoned")]
    assert (records[1].text, records[1].adapters) == ("the ", {"harm": "old"})
    assert "client left" in records[1].reason


@pytest.mark.parametrize("ends", ["left", "failed", "whole"])
def test_the_tokens_of_every_answer_are_counted(ends: str) -> None:
    heard: list[Event] = [Judged((), ALLOW), Piece("the ", (Token(5), Token(6))), Piece("cat", (Token(7),))]
    last = {"left": [], "failed": [Failed(RuntimeError("SECRET"))], "whole": [Ended("stop", 4, (), ALLOW, 0.0)]}
    with pytest.raises(RuntimeError) if ends == "failed" else contextlib.nullcontext():
        listening([], [*heard, *last[ends]], leaves=ends == "left", metrics=(metrics := Metrics()))
    told = metrics.exposition().decode()
    assert f'safeside_tokens_total{{kind="answer"}} {4 if ends == "whole" else 3}.0' in told
    assert 'safeside_tokens_total{kind="prompt"} 1.0' in told


def test_a_prompt_that_nobody_read_is_not_counted() -> None:
    with pytest.raises(DeadlineError):
        listening([], [Failed(DeadlineError("too late"))], metrics=(metrics := Metrics()))
    assert 'safeside_tokens_total{kind="prompt"} 0.0' in metrics.exposition().decode()


def test_a_text_is_counted_once_for_each_guard_by_what_its_own_rules_did() -> None:
    verdicts = tuple(Verdict(guard, 0.9, 0.5, label, True) for guard in ("harm", "calm") for label in ("hate", "theft"))
    decision = Decision("block", guard="harm", by_guard={"harm": "block"})
    listening([], [Judged(verdicts, decision)], leaves=True, metrics=(metrics := Metrics()))
    counted = {sample.labels["guard"]: sample for sample in samples(metrics, "safeside_verdicts_total")}
    assert {name: (each.labels["action"], each.value) for name, each in counted.items()} == {
        "harm": ("block", 1.0),
        "calm": ("allow", 1.0),
    }


def samples(metrics: Metrics, name: str) -> list[Sample]:
    return [each for family in metrics.registry.collect() for each in family.samples if each.name == name]


def test_a_refused_prompt_has_one_record_whoever_listens() -> None:
    records: list[AuditRecord] = []
    listening(records, [Judged((), BLOCK)], leaves=True)
    assert [(record.stage, record.action) for record in records] == [("prompt", "block")]


def test_a_log_that_refuses_is_asked_once_and_its_error_is_told() -> None:
    records: list[AuditRecord] = []
    with pytest.raises(AuditError, match="full"):
        listening(records, [Judged((), ALLOW), Ended("stop", 1, (), ALLOW, 0.0, "full")])
    assert len(records) == 1


def test_an_answer_that_the_servers_end_cut_off_is_recorded_as_failed() -> None:
    """By its engine, which is stuck, or by uvicorn, which cancels what a slow client still reads."""
    for leaves in (False, True):
        records: list[AuditRecord] = []
        with contextlib.nullcontext() if leaves else pytest.raises(ServingError, match="server was stopped"):
            listening(records, [Judged((), ALLOW), Piece("the ")], leaves=leaves, has_ended=True)
        assert [(record.stage, record.action) for record in records] == [("prompt", "allow"), ("answer", "failed")]
        assert "server was stopped" in records[1].reason
