"""Texts judged in the engine's thread: small parts, between which answers go on and the client is looked at."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise

import pytest

from safeside import Adapter, Base, Message
from safeside.errors import InputError, ServingError
from safeside.guards.score import Scores, Scoring, Window, score_conversations
from safeside.serve.engine import Engine
from safeside.serve.scoring import score_in_parts
from serving_for_tests import GREEDY, Listener, ask, effective, engine_of, scripted

Make = Callable[..., Adapter]
BOUND = 300
TALKS = [[Message("user", text)] for text in ("the cat " * 150, "the hat", "long " * 200, "x")]


@pytest.fixture
def guard(tiny_base: Base, random_guard: Make) -> Adapter:
    return random_guard(tiny_base)


async def here() -> bool:
    return False


def scored(
    engine: Engine, guard: Adapter, max_tokens: int = 10**6, is_gone: Callable[[], object] = here
) -> list[Scores] | None:
    return asyncio.run(score_in_parts(engine, {guard.name: guard}, TALKS, max_tokens, is_gone))  # type: ignore[arg-type]


def test_an_answer_goes_on_between_small_parts_of_a_long_text(
    tiny_base: Base, guard: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No call reads more than the bound, a token is written between any two, and the scores are those at once."""
    whole = score_conversations(tiny_base, [guard], TALKS)
    read, parts, listener = Scoring.read, [], Listener()

    def noted(self: Scoring, batch: Sequence[Window], attachment: object) -> int:
        parts.append((max(len(window.ids) for window in batch) * len(batch), len(listener.tokens)))
        return read(self, batch, attachment)  # type: ignore[arg-type]

    monkeypatch.setattr(Scoring, "read", noted)
    word = tiny_base.tokenizer("the cat", add_special_tokens=False)["input_ids"]
    with engine_of(tiny_base, [guard], judged_tokens=BOUND) as engine, scripted(tiny_base, word):
        ids = tiny_base.encode(TALKS[1]).ids
        listener = ask(engine, ids, effective(), replace(GREEDY, max_tokens=tiny_base.max_tokens - len(ids)))
        while not listener.tokens:
            time.sleep(0.001)
        found = scored(engine, guard)
        listener.wait()
    assert found is not None
    for row, expected in zip(found, whole, strict=True):
        assert row.by_guard["harm"] == pytest.approx(expected.by_guard["harm"], abs=1e-5)
        assert row.n_windows == expected.n_windows
    assert len(parts) > 5
    assert all(n_tokens <= BOUND for n_tokens, _ in parts)
    n_during = [n_written for _, n_written in parts if n_written < len(listener.tokens)]
    assert len(n_during) > 2
    assert all(later > earlier for earlier, later in pairwise(n_during))


def test_answers_get_as_much_time_as_tasks(tiny_base: Base) -> None:
    word = tiny_base.tokenizer("the cat", add_special_tokens=False)["input_ids"]
    ids = tiny_base.encode(TALKS[1]).ids
    with engine_of(tiny_base) as engine, scripted(tiny_base, word):
        running = ask(engine, ids, effective(), replace(GREEDY, max_tokens=tiny_base.max_tokens - len(ids)))
        while not running.tokens:
            time.sleep(0.001)
        began: list[float] = []

        def task(runner: object) -> None:
            began.append(time.monotonic())
            time.sleep(0.03)

        for asked in [engine.call(task) for _ in range(2)]:
            asked.result(timeout=60)
        is_running = engine.n_running == 1
        running.wait()
    assert is_running, "the answer is too short for this test"
    assert began[1] - began[0] >= 0.06


def test_more_tokens_than_one_request_may_take_are_refused(tiny_base: Base, guard: Adapter) -> None:
    n_tokens = Scoring(tiny_base, [guard], TALKS).n_tokens
    with engine_of(tiny_base, [guard]) as engine:
        with pytest.raises(InputError, match=f"{n_tokens:,} tokens to judge; one request may take {n_tokens - 1:,}"):
            scored(engine, guard, n_tokens - 1)
        assert scored(engine, guard, n_tokens) is not None


def test_what_waits_for_a_client_that_left_is_never_read(
    tiny_base: Base, guard: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It leaves while the engine is at something else."""
    free, read, asked = threading.Event(), [], []
    monkeypatch.setattr(Scoring, "read", lambda self, batch, attachment: read.append(batch))

    async def is_gone() -> bool:
        asked.append(True)
        return len(asked) > 1

    with engine_of(tiny_base, [guard]) as engine:
        engine.call(lambda runner: free.wait(30))
        assert scored(engine, guard, is_gone=is_gone) is None
        free.set()
        engine.call(lambda runner: None).result(timeout=60)
    assert read == []


def test_an_engine_that_is_stuck_at_its_end_is_not_waited_for(tiny_base: Base, guard: Adapter) -> None:
    free = threading.Event()
    with engine_of(tiny_base, [guard]) as engine:
        engine.call(lambda runner: free.wait(30))

        async def is_gone() -> bool:
            threading.Timer(0.05, engine.stop, [0.0]).start()
            return False

        with pytest.raises(ServingError, match="server was stopped"):
            scored(engine, guard, is_gone=is_gone)
        free.set()


def test_a_guard_that_was_exchanged_scores_nothing(tiny_base: Base, guard: Adapter, random_guard: Make) -> None:
    other = random_guard(tiny_base, seed=5)
    with engine_of(tiny_base, [other]) as engine, pytest.raises(ServingError, match="was exchanged"):
        scored(engine, guard)
