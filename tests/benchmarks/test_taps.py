"""The bench of stored states, on a tiny base and a few rows."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import taps


def test_it_writes_both_sides_and_the_speed_up(tmp_path: Path, tiny_folder: Callable[[str], Path]) -> None:
    small = ["--adapters", "2", "--rows", "40", "--threads", "1", "--base", str(tiny_folder("llama"))]
    result = json.loads(taps.main([*small, "--output", str(tmp_path)]).read_text())
    assert result["benchmark"] == "taps"
    live, stored, speed_up = result["rows"]
    assert [(row["method"], row["metric"]) for row in result["rows"]] == [
        ("live", "train_seconds"),
        ("stored", "train_seconds"),
        ("stored", "speed_up"),
    ]
    assert live["value"] > 0
    assert stored["value"] > 0
    assert speed_up["low"] <= speed_up["value"] <= speed_up["high"]
    assert speed_up["n"] == 2
    assert result["notes"]["storing_seconds"] > 0


def test_storing_counts_once() -> None:
    times = taps.Times(live=[4.0, 6.0], stored=[1.0, 2.0], storing=2.0)
    assert times.speed_up([0, 1]) == 2.0
    assert times.speed_up([0, 0]) == 2.0
