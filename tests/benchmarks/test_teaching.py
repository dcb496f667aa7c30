"""The bench of whole trainings: everything that comes before a guard is timed, in the order in which it is needed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import guard_cells
import guard_rows
import teaching
from parts import read_parts


def test_it_times_every_step_and_keeps_the_teacher_of_another_run(
    small_tasks: Path, tiny_folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(guard_rows.ROWS, "bench/prompts", (48, 40, 40))
    monkeypatch.setitem(guard_rows.SCHEDULES, "bench/prompts", (1, 2))
    monkeypatch.setitem(guard_cells.ADAPTERS, "lst_distilled", guard_cells.LST)  # heads too narrow for a pruned start
    words = ["--data", str(small_tasks), "--bases", str(tiny_folder("llama")), "--tasks", "bench/prompts"]
    folders = ["--teachers", str(tmp_path / "teachers"), "--output", str(tmp_path / "results")]
    rows = read_parts(teaching.main([*words, "--epochs", "1", *folders]))["teaching"]["rows"]
    found = {row["method"]: row for row in rows}
    assert list(found) == ["states", "importance", "teacher", *teaching.TRAINED]
    assert all(row["value"] > 0 and row["metric"] == "seconds" and row["n"] == 48 for row in rows)
    assert len(list((tmp_path / "teachers").iterdir())) == 1  # of lst_distilled, which had none
