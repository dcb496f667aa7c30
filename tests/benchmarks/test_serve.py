"""The bench of the server on a tiny base: every row that it promises, and ratios to the base of the same round."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import serve
import serve_load
from safeside import Base, load_base
from serve import rows_of
from serve_load import VARIANTS, Timing

METRICS = {"tokens_per_s", "ttft_p50", "ttft_p99", "itl_p50", "itl_p99", "throughput_ratio"}


def test_it_writes_every_row(
    tiny_folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def opened(geometry: str, device: str) -> Base:
        return load_base(tiny_folder("llama"), device=device)

    monkeypatch.setattr(serve_load, "open_base", opened)
    monkeypatch.setattr(serve_load, "load_base", lambda name: opened(name, "cpu"))
    monkeypatch.setattr(serve_load, "SIZE", 0.2)
    small = ["--clients", "2", "--rounds", "1", "--requests", "1", "--tokens", "12", "--faults", "0", "--threads", "1"]
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
