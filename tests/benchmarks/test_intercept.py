"""The bench of interception, on a tiny base and a few made-up rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import intercept
from parts import read_parts
from safeside.guards.score import score_conversations
from task_guards import Lesson, Sizes


def test_it_writes_auroc_and_times_for_each_block(
    small_tasks: Path, tiny_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(intercept, "N_PROMPTS", 10)
    words = ["--data", str(small_tasks), "--base", str(tiny_folder("llama")), "--task", "bench/prompts"]
    small = ["--quick", "--blocks", "1", "3", "--pairs", "2", "--output", str(small_tasks / "results")]
    result = read_parts(intercept.main([*words, *small]))["intercept"]
    found = [row for row in result["rows"] if row["metric"] == "auroc"]
    assert [(row["task"], row["block"], row["n"]) for row in found] == [
        ("bench/prompts", 1, 200),
        ("bench/prompts", 3, 200),
    ]
    assert all(0 <= row["low"] <= row["value"] <= row["high"] <= 1 for row in found)
    times = [row for row in result["rows"] if row["metric"] == "prefill_ratio"]
    assert len(times) == 2 * len(intercept.BATCHES) * len(intercept.BLOCKED)
    n_blocked = {(0.0, 1): 0, (0.0, 8): 0, (0.1, 1): 1, (0.1, 8): 0, (1.0, 1): 10, (1.0, 8): 2}
    for row in times:
        assert row["value"] > 0
        assert row["blocked_batches"] == n_blocked[row["blocked"], row["batch"]]


def test_a_guard_of_few_layers_scores_stored_states_as_live_ones(
    small_tasks: Path, tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    place = (str(tiny_folder("llama")), small_tasks)
    lesson = Lesson.read(place, "bench/prompts", tmp_path / "taps", Sizes(train=64, evaluation=20, epochs=1))
    guard = lesson.guard(lesson.recipe(0, layers=range(2)))
    assert guard.config.layers == (0, 1)
    live = score_conversations(lesson.base, [guard], [row.messages for row in lesson.splits["test"].examples])
    ours = torch.tensor(lesson.last_scores("test", guard))
    theirs = torch.tensor([row.by_guard[guard.name][0] for row in live], dtype=ours.dtype)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)  # other batches, other sums
