"""The bench of the server on a tiny base: every row that it promises, and ratios to the base of the same round."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import serve
import serve_faults
import serve_load
from safeside import Base, load_base
from serve import rows_of
from serve_load import VARIANTS, Timing
from serve_process import Outcome

METRICS = {"tokens_per_s", "ttft_p50", "ttft_p99", "itl_p50", "itl_p99", "throughput_ratio"}


def test_it_writes_every_row(
    tiny_folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def opened(geometry: str, device: str) -> Base:
        return load_base(tiny_folder("llama"), device=device)

    monkeypatch.setattr(serve_load, "open_base", opened)
    monkeypatch.setattr(serve_load, "load_base", lambda name: opened(name, "cpu"))
    monkeypatch.setattr(serve_load, "SIZE", 0.2)
    small = ["--clients", "2", "--rounds", "1", "--tokens", "12", "--threads", "1"]
    small += ["--requests", "1", "--faults", "0", "--rows", "0"]
    monkeypatch.setattr(serve_load, "PROMPT", "x")
    path = serve.main([*small, "--geometries", "tiny", "--output", str(tmp_path)])
    result = json.loads(path.read_text())
    found = {(row["clients"], row["variant"], row["metric"]) for row in result["rows"]}
    assert {(2, name, metric) for name in VARIANTS for metric in METRICS - {"itl_p50", "itl_p99"}} <= found
    assert {metric for _, _, metric in found} <= METRICS
    assert [goal["clients"] for goal in result["notes"]["goals"]] == [2]


def test_a_ratio_is_to_the_base_of_the_same_round() -> None:
    rounds = {"base": [(1.0, 10), (2.0, 10)], "guarded": [(1.0, 9), (2.0, 9)], "second_model": [(1.0, 5), (2.0, 6)]}
    timings = {
        name: [Timing(seconds, n_tokens, ttft=[0.1, 0.3], itl=[0.01]) for seconds, n_tokens in values]
        for name, values in rounds.items()
    }
    rows = {(row["variant"], row["metric"]): row for row in rows_of({"clients": 1}, timings)}
    assert rows["guarded", "throughput_ratio"]["value"] == pytest.approx(0.9)
    assert rows["second_model", "throughput_ratio"]["value"] == pytest.approx(0.55)
    assert rows["base", "tokens_per_s"]["value"] == pytest.approx(7.5)
    assert rows["base", "ttft_p50"]["value"] == pytest.approx(0.2)
    assert {metric for _, metric in rows} == METRICS


def outcome(
    number: int, trace_id: str, *, policy: str = "house+even", line: float = 0.25, score: float = 0.5
) -> Outcome:
    verdict = {"stage": "prompt", "score": score, "threshold": line}
    safety = {"trace_id": trace_id, "policy": policy, "verdicts": [verdict]}
    return Outcome(number, {"choices": [{"message": {"content": f"answer {number}"}}], "safety": safety})


def test_what_is_lost() -> None:
    whole = [("even", "prompt", "allow"), ("even", "answer", "allow")]
    told, unlogged, half = outcome(0, "a"), outcome(0, "b"), outcome(0, "c")
    decisions = {"a": whole, "c": whole[:1], "d": whole}
    outcomes = [
        told,
        unlogged,
        half,
        Outcome(0),
        Outcome(0, refusal="audit_unavailable"),
        Outcome(0, refusal="timeout"),
    ]
    lost = {fault: serve_faults.lost(fault, outcomes, decisions) for fault in serve_faults.FAULTS}
    assert lost["sigkill"] == 2, "a client was told of two decisions that are not in the log"
    assert lost["sigterm"] == 3, "besides them one was begun that nobody was told of"
    assert lost["audit_disk_full"] == 4, "refusing is right then, but not for another reason"
    assert lost["disconnect"] == 5


def test_what_is_foreign() -> None:
    expected = {0: outcome(0, "a").answer, 1: outcome(1, "b", policy="house+odd", line=0.75, score=0.7).answer}
    log = {"a": [("even", "prompt", "allow")], "b": [("odd", "prompt", "allow")]}

    def is_foreign(found: Outcome) -> bool:
        return serve_faults.is_foreign(found, expected, log)

    assert not is_foreign(outcome(0, "a"))
    assert not is_foreign(Outcome(0, refusal="timeout"))
    assert is_foreign(outcome(0, "b")), "another tenant's record"
    assert is_foreign(outcome(0, "a", score=0.7))
    assert is_foreign(outcome(0, "a", line=0.75))
    assert is_foreign(outcome(0, "a", policy="house+odd"))
    text = replace(outcome(0, "a"), answer={**outcome(1, "a").answer, "safety": outcome(0, "a").answer["safety"]})
    assert is_foreign(text)
