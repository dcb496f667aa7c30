"""The bench of interception, on a tiny base and a few made-up rows."""

from __future__ import annotations

import gzip
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import cells
import intercept
from parts import read_parts


@pytest.fixture
def data(tmp_path: Path) -> Path:
    generator = random.Random(0)
    for name in ("toxic_chat/train", "toxic_chat/test"):
        path = tmp_path / f"{name}.jsonl.gz"
        path.parent.mkdir(exist_ok=True)
        with gzip.open(path, "wt") as file:
            for _ in range(120):
                words = generator.choices(("cat", "mat", "sat", "hat", "then"), k=6)
                file.write(json.dumps({"prompt": f"{name} {words}", "label": int("hat" in words)}) + "\n")
    return tmp_path


def test_it_writes_auroc_and_times_for_each_block(
    data: Path, tiny_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(intercept, "N_PROMPTS", 10)
    cells.prepare.cache_clear()
    small = ["--quick", "--data", str(data), "--base", str(tiny_folder("llama")), "--blocks", "1", "3", "--pairs", "2"]
    result = read_parts(intercept.main([*small, "--output", str(data)]))["intercept"]
    cells.prepare.cache_clear()
    found = [row for row in result["rows"] if row["metric"] == "auroc"]
    assert [row["block"] for row in found] == [1, 3]
    assert all(0 <= row["low"] <= row["value"] <= row["high"] <= 1 for row in found)
    times = [row for row in result["rows"] if row["metric"] == "prefill_ratio"]
    assert len(times) == 2 * len(intercept.BATCHES) * len(intercept.BLOCKED)
    for row in times:
        assert row["value"] > 0
        n_batches = -(-len_of_prompts(result) // row["batch"])
        blocked = {0.0: 0, 1.0: n_batches}
        assert row["blocked_batches"] == blocked.get(row["blocked"], row["blocked_batches"])
        if (row["blocked"], row["batch"]) == (0.1, 1):
            assert row["blocked_batches"] == round(0.1 * n_batches)


def len_of_prompts(result: dict[str, object]) -> int:
    return min(intercept.N_PROMPTS, result["notes"]["rows"]["validation_rows"])
