"""The bench of the server on a tiny base: every row that it promises, and ratios to the base of the same round."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import serve
import serve_clients
import serve_load
from safeside import Base, load_base
from safeside.types import Message
from serve import few_samples, rows_of
from serve_clients import Timing
from serve_counts import is_foreign, is_own, lost
from serve_crowd import Asked, Outcome, heard
from serve_faults import FAULTS
from serve_load import VARIANTS, Job, Judged, judged_ids, spelling
from serve_process import Decision

METRICS = {"tokens_per_s", "ttft_p50", "ttft_p99", "itl_p50", "itl_p99", "throughput_ratio"}


def test_it_writes_every_row(
    tiny_folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def opened(geometry: str, device: str) -> Base:
        return load_base(tiny_folder("llama"), device=device)

    monkeypatch.setattr(serve_load, "open_base", opened)
    monkeypatch.setattr(serve_load, "load_base", lambda name: opened(name, "cpu"))
    monkeypatch.setattr(serve_load, "SIZE", 0.2)
    monkeypatch.setattr(serve_load, "served_apart", serve_load.served_here)  # a process would not know of the tiny base
    small = ["--clients", "2", "--rounds", "1", "--tokens", "12", "--threads", "1"]
    small += ["--requests", "1", "--faults", "0", "--rows", "0"]
    monkeypatch.setattr(serve_clients, "QUESTION", "x")
    path = serve.main([*small, "--geometries", "tiny", "--output", str(tmp_path)])
    result = json.loads(path.read_text())
    found = {(row["clients"], row["variant"], row["metric"]) for row in result["rows"]}
    assert {(2, name, metric) for name in VARIANTS for metric in METRICS} == found
    notes = result["notes"]["parts"]["load"]["notes"]
    few = {(row["variant"], row["metric"]) for row in notes["few_samples"]}
    assert few == {(name, metric) for name in VARIANTS for metric in ("ttft_p99", "itl_p99")}
    assert [goal["clients"] for goal in notes["goals"]] == [2, 2, 2]


def test_guarded_variants_differ_in_layers_and_in_what_is_judged_together(
    tiny_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve_load, "base_of", lambda geometry, device: load_base(tiny_folder("llama"), device=device))
    monkeypatch.setattr(serve_load, "SIZE", 1.0)
    monkeypatch.setattr(serve_load, "served", lambda base, adapters, policy, limits: (adapters, limits))
    found = {name: serve_load.served_here(Job(name, "tiny", "cpu", 1)) for name in VARIANTS[:-1]}
    n_layers = {name: [len(each.config.layers) for each in adapters] for name, (adapters, _) in found.items()}
    every = load_base(tiny_folder("llama")).n_layers + 1
    assert n_layers["base"] == []
    assert n_layers["guarded"] == [every, every]
    assert n_layers["guarded_3_taps"] == n_layers["guarded_3_taps_every_8"] == [min(3, every)] * 2
    groups = {name: limits.judge_every for name, (_, limits) in found.items()}
    assert groups == {"base": 1, "guarded": 1, "guarded_3_taps": 1, "guarded_3_taps_every_8": 8}


def test_a_ratio_is_to_the_base_of_the_same_round() -> None:
    rounds = {"base": [(1.0, 10), (2.0, 10)], "guarded": [(1.0, 9), (2.0, 9)], "second_model": [(1.0, 5), (2.0, 6)]}
    timings = {
        name: [Timing(seconds, n_tokens, ttft=[0.1, 0.3], itl=[0.01] * 50) for seconds, n_tokens in values]
        for name, values in rounds.items()
    }
    rows = {(row["variant"], row["metric"]): row for row in rows_of({"geometry": "Small", "clients": 1}, timings)}
    assert rows["guarded", "throughput_ratio"]["value"] == pytest.approx(0.9)
    assert rows["second_model", "throughput_ratio"]["value"] == pytest.approx(0.55)
    assert rows["base", "tokens_per_s"]["value"] == pytest.approx(7.5)
    assert rows["base", "ttft_p50"]["value"] == pytest.approx(0.2)
    assert rows["base", "ttft_p99"]["value"] == 0.3, "of four samples it is the slowest"
    assert {metric for _, metric in rows} == METRICS
    assert {row["metric"] for row in few_samples(list(rows.values()))} == {"ttft_p99"}, "2 rounds of 50 are enough"


def test_the_second_model_reads_as_many_tokens_as_the_answer_has(tiny_folder: Callable[[str], Path]) -> None:
    base = load_base(tiny_folder("llama"))
    prompt = base.encode([Message("user", "x")]).ids
    assert judged_ids(base, Judged(text="x", n_answer=0)).shape == (1, len(prompt))
    assert judged_ids(base, Judged(text="x", n_answer=7)).shape == (1, len(prompt) + 7)


def test_a_tokenizer_that_spells_every_id_reads_as_before() -> None:
    base = load_base("builtin")
    messages = [Message("user", "How is a boat built?")]
    before = base.encode(messages).ids
    base.tokenizer = spelling(base.tokenizer, 10_000)
    assert base.encode(messages).ids == before
    assert base.tokenizer.decode([4096, 9999]) == " w4096 w9999"


def answer_of(
    number: int, trace_id: str, *, policy: str = "house+even", line: float = 0.25, score: float = 0.5
) -> dict[str, object]:
    verdict = {"stage": "prompt", "score": score, "threshold": line}
    safety = {"trace_id": trace_id, "policy": policy, "verdicts": [verdict]}
    choices = [{"message": {"content": f"answer {number}"}}]
    return {"choices": choices, "safety": safety, "usage": {"completion_tokens": 16}}


def told(number: int, trace_id: str, **more: object) -> Outcome:
    return Outcome(Asked(number), answer_of(number, trace_id, **more))


EXPECTED = {("plain", 0): answer_of(0, ""), ("plain", 1): answer_of(1, "", policy="house+odd", line=0.75, score=0.7)}


def steps(*actions: str, number: int = 0) -> list[Decision]:
    made = [Decision("even", "prompt", "allow", Asked(number).text)]
    return made + [Decision("even", "answer", action, "") for action in actions]


def refused(code: str) -> Outcome:
    return Outcome(Asked(0), refusal=code)


def n_lost(fault: str, outcomes: list[Outcome], decisions: dict[str, list[Decision]]) -> int:
    return lost(FAULTS[fault].right, outcomes, decisions, EXPECTED)


@pytest.mark.parametrize("fault", FAULTS)
def test_an_answer_is_lost_whose_decisions_are_not_in_the_log(fault: str) -> None:
    outcomes = [told(0, "a"), told(0, "b"), told(0, "c"), told(0, "d")]
    assert n_lost(fault, outcomes, {"a": steps("allow"), "c": steps(), "d": steps("failed")}) == 3


def test_an_answer_is_lost_that_broke_without_an_error_that_says_so() -> None:
    broken = Outcome(Asked(0))
    for fault in set(FAULTS) - {"sigkill"}:
        assert n_lost(fault, [broken], {}) == 1, fault
        assert n_lost(fault, [broken], {"a": steps("abandoned")}) == 1, "the same request, as the log tells it"
        assert n_lost(fault, [broken], {"a": steps("failed")}) == 1
    assert n_lost("sigkill", [broken], {"a": steps()}) == 0
    assert n_lost("sigkill", [replace(broken, trace_id="a")], {}) == 1, "it was told of the decision on its prompt"


def test_a_server_that_stops_may_refuse_and_past_its_drain_may_cut() -> None:
    assert n_lost("sigterm", [refused("unreachable"), refused("unavailable")], {}) == 0
    assert n_lost("disconnect", [refused("unreachable"), refused("unavailable")], {}) == 2
    cut = [refused("unavailable")], {"a": steps("failed")}
    assert n_lost("sigterm", *cut) == 1, "there was time to end it"
    assert n_lost("sigterm_past_drain", *cut) == 0
    assert n_lost("sigterm_past_drain", [refused("unavailable")], {"a": steps("abandoned")}) == 1
    assert n_lost("sigterm_past_drain", [refused("unreachable")], {"a": steps("failed")}) == 1
    assert n_lost("sigterm_past_drain", [refused("internal_error")], {"a": steps("failed")}) == 1


def test_a_full_disk_may_refuse_for_that_reason_only() -> None:
    assert n_lost("audit_disk_full", [refused("audit_unavailable")], {"a": steps()}) == 0
    assert n_lost("audit_disk_full", [refused("timeout")], {}) == 1


def test_who_left_is_in_the_log_as_such() -> None:
    left = Outcome(Asked(0), trace_id="a", is_left=True)
    assert n_lost("disconnect", [left], {"a": steps("abandoned")}) == 0
    assert n_lost("disconnect", [left], {"a": steps()}) == 1, "it never came to an end"
    assert n_lost("disconnect", [left], {}) == 1
    assert n_lost("disconnect", [left], {"a": steps("abandoned"), "b": steps("abandoned")}) == 1, "who left there?"


def test_who_was_put_off_and_came_back_lost_nothing() -> None:
    again = replace(told(0, "b"), n_put_off=1)
    assert n_lost("adapter_unloaded", [again], {"a": steps("failed"), "b": steps("allow")}) == 0
    assert n_lost("adapter_unloaded", [told(0, "b")], {"a": steps("failed"), "b": steps("allow")}) == 1


def test_another_text_than_alone_is_lost() -> None:
    text, tokens = answer_of(0, "a"), answer_of(0, "a")
    text["choices"] = [{"message": {"content": "answer 0 changed midway"}}]
    tokens["usage"] = {"completion_tokens": 15}
    for answer in (text, tokens):
        assert not is_own(Outcome(Asked(0), answer), EXPECTED)
        assert n_lost("adapter_unloaded", [Outcome(Asked(0), answer)], {"a": steps("allow")}) == 1
    assert is_own(Outcome(Asked(0), answer_of(0, "a")), EXPECTED)


def test_what_a_stream_says() -> None:
    def line(**values: object) -> str:
        return f"data: {json.dumps({'id': 'chatcmpl-t1', 'choices': [], **values})}"

    safety = {"trace_id": "t1", "verdicts": []}
    words = [line(choices=[{"delta": {"content": word}}]) for word in ("a", "b")]
    lines = [*words, line(safety=safety), line(usage={"completion_tokens": 2}), "data: [DONE]"]
    whole = heard(Asked(0), lines).answer
    assert whole == {"choices": [{"message": {"content": "ab"}}], "safety": safety, "usage": {"completion_tokens": 2}}
    cut = heard(Asked(0), lines[:-1])
    assert (cut.is_broken, cut.trace_id) == (True, "t1")
    ended = heard(Asked(0), [words[0], 'data: {"error": {"code": "unavailable"}}'])
    assert (ended.is_broken, ended.refusal) == (False, "unavailable")
    assert heard(Asked(0), lines, 1).is_left


def test_what_is_foreign() -> None:
    log = {"a": steps("allow"), "b": [Decision("odd", "prompt", "allow", Asked(0).text)], "c": steps(number=2)}

    def found(outcome: Outcome) -> bool:
        return is_foreign(outcome, EXPECTED, log)

    assert not found(told(0, "a"))
    assert not found(refused("timeout"))
    assert found(told(0, "b")), "another tenant's record"
    assert found(told(0, "c")), "another prompt's record"
    assert found(told(0, "a", score=0.7))
    assert found(told(0, "a", line=0.75))
    assert found(told(0, "a", policy="house+odd"))
    assert found(Outcome(Asked(0), {**answer_of(1, "a"), "safety": answer_of(0, "a")["safety"]}))
