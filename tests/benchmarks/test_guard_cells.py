"""Cells of the guards benchmark: what a teacher gave is kept between runs, without the texts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import guard_cells
from benchmarks.made_rows import rows_of
from guard_cells import Cell
from guard_rows import Prepared, Setup, Split
from safeside.base.model import Base
from safeside.tasks.grounding import GROUNDING
from safeside.train.recipe import Recipe
from safeside.train.rows import Rows
from safeside.types import Example, Message


@pytest.fixture
def data(tiny_base: Base) -> Prepared:
    validation: Split = SimpleNamespace(rows=rows_of(["v", "w"], 30))  # type: ignore[assignment]
    train = rows_of(["a secret text", "another", "third"], 5)
    return Prepared(tiny_base, None, train, {"validation": validation})  # type: ignore[arg-type]


@pytest.mark.parametrize("is_kept", [False, True])
def test_a_teacher_is_trained_once_and_its_scores_are_kept_without_texts(
    data: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_kept: bool
) -> None:
    trained = []

    def taught(base: Base, recipe: Recipe, splits: tuple[Rows, Rows], folder: Path) -> Rows:
        assert recipe.seed == 0  # the same teacher for every seed of a student
        trained.append(folder)
        return replace(splits[0], soft=torch.tensor([[0.1], [1 / 3], [0.9]]))

    monkeypatch.setattr(guard_cells, "teacher_scores", taught)
    kept = tmp_path / "kept" if is_kept else None
    setup = Setup(tmp_path, (("tiny", "tiny", "print"),), tmp_path / "scratch", 8, 8, 1, teachers=kept)
    found = [
        guard_cells._taught(setup, Cell("hate", "tiny", method, seed), data).train
        for method, seed in (("lst_distilled", 0), ("standalone_distilled", 2))
    ]
    assert trained == [tmp_path / "scratch" / "teachers"]
    assert found[0].soft is not None
    assert found[1].soft is not None
    assert torch.equal(found[0].soft, found[1].soft)  # to the last bit
    (file,) = (kept or trained[0]).glob("*.json")
    assert "secret" not in file.read_text()

    data.train.labels[0] = 1.0  # other labels have another teacher
    guard_cells._taught(setup, Cell("hate", "tiny", "lst_distilled", 0), data)
    assert len(trained) == 2
    assert guard_cells._taught(setup, Cell("hate", "tiny", "lst", 0), data) is data


def test_steps_are_small_for_what_learns_in_the_loop() -> None:
    sizes = {method: guard_cells.batch_size_of(Cell("hate", "tiny", method, 0)) for method in guard_cells.METHODS}
    others = {"lora_full": 16, "lst_shared": 32, "probe": 32, "tfidf": 32, "length": 32, "prompted": 32}
    assert sizes == {**dict.fromkeys(guard_cells.METHODS, 8), **others}


def test_states_are_stored_for_what_reads_them() -> None:
    others = {name for name in guard_cells.METHODS if not guard_cells.reads_states(name)}
    standalones = {name for name in guard_cells.METHODS if name.startswith("standalone")}
    assert others == {*standalones, "tfidf", "length", "prompted", "lora_full"}


def test_epochs_of_claims_are_chosen_by_the_window_that_counts(
    tiny_base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four claims in two windows each; both supported ones have a window that does not support them."""
    logits = np.array([3.0, -1.0, -1.0, 3.0, 1.0, 1.0, 2.0, 1.0])
    monkeypatch.setattr(guard_cells, "guard_logits", lambda base, source, rows: logits[:, None])
    examples = [Example((Message("user", str(row)),), (float(row > 1),)) for row in range(4)]
    split = Split(examples, rows_of([str(window) for window in range(8)], 4), np.arange(8) // 2)
    data = Prepared(tiny_base, GROUNDING, split.rows, {"validation": split})
    metric = guard_cells.metric_of(data, None)  # type: ignore[arg-type]  # nothing is read
    assert metric() == 1.0
    logits[1] = 1.5
    assert metric() == 0.5
    logits[5] = np.nan
    assert np.isnan(metric())


def test_a_teacher_of_long_rows_has_fewer_epochs() -> None:
    setup = Setup(Path(), (("tiny", "tiny", "print"),), Path(), 10**6, 10**6, 5)
    epochs = {task: guard_cells.teacher_of(task)["epochs"] for task in ("hate", "grounding")}
    assert epochs == {"hate": 3, "grounding": 2}
    recipe = guard_cells.recipe_of(setup, Cell("grounding", "tiny", "lst_distilled", 0))
    assert recipe.teacher is not None
    assert recipe.teacher.epochs == 2
    assert guard_cells.recipe_of(setup, Cell("grounding", "tiny", "lora_full", 0)).training.epochs == 2


def setup_of(epochs: int) -> Setup:
    return Setup(Path(), (("tiny", "tiny", "print"),), Path(), 10**6, 10**6, epochs)


@pytest.mark.parametrize(
    ("task", "method", "epochs"),
    [
        ("hate", "lst", [5, 12]), ("hate", "standalone_distilled", [5, 12]), ("hate", "plr", [5, 12]),
        ("grounding", "lst", [5]), ("grounding", "standalone", [5]),
        ("hate", "lora_full", [3]), ("grounding", "lora_full", [2]),
        ("hate", "lst_shared", [5]), ("hate", "probe", [5]),
    ],
)  # fmt: skip
def test_all_that_learns_as_adapters_do_has_the_schedules_of_its_task(
    task: str, method: str, epochs: list[int]
) -> None:
    tried = guard_cells.schedules_of(setup_of(12), Cell(task, "tiny", method, 0))
    assert [guard_cells.recipe_of(setup_of(12), cell).training.epochs for cell in tried] == epochs
    quick = guard_cells.schedules_of(setup_of(1), Cell(task, "tiny", method, 0))
    assert len(quick) == 1
    keys = {guard_cells.key_of(setup_of(12), cell, "data") for cell in tried}
    assert len(keys) == len(epochs)


def test_validation_rows_choose_the_schedule_and_test_rows_do_not() -> None:
    def found(values: list[float], test: list[float], schedule: int) -> dict[str, object]:
        labels = {"validation": [0.0, 1.0, 0.0, 1.0], "test": [0.0, 1.0]}
        return {"labels": labels, "values": {"validation": values, "test": test}, "schedule": schedule}

    short, long = found([0.1, 0.9, 0.2, 0.1], [0.0, 1.0], 5), found([0.1, 0.9, 0.2, 0.8], [1.0, 0.0], 12)
    assert guard_cells.better_of([short, long]) is long
    assert guard_cells.better_of([short, found([0.1, 0.9, 0.2, 0.1], [1.0, 0.0], 12)]) is short  # equal: the first
    longer = found([0.1, float("nan"), 0.2, 0.8], [0.0, 1.0], 12)
    assert guard_cells.better_of([found([0.9, float("nan"), 0.2, 0.8], [0.0, 1.0], 5), longer]) is longer
    assert guard_cells.better_of([longer, found([0.1, float("nan"), 0.2, 0.9], [0.0, 1.0], 12)]) is longer


def test_a_schedule_changes_no_key_but_its_own_and_no_teacher() -> None:
    """Cells of five epochs at most are those of a benchmark that had no other schedule."""
    short, long = guard_cells.schedules_of(setup_of(12), Cell("hate", "tiny", "lst_distilled", 1))
    assert guard_cells.key_of(setup_of(12), short, "data") == guard_cells.key_of(
        setup_of(5), Cell("hate", "tiny", "lst_distilled", 1), "data"
    )
    recipes = [guard_cells.recipe_of(setup_of(12), cell) for cell in (short, long)]
    shared = [one.training.model_dump(exclude={*guard_cells.TEACHER, "soft_weight"}) for one in recipes]
    assert shared[0] == shared[1]  # what a teacher is known by
    assert recipes[0].teacher == recipes[1].teacher
