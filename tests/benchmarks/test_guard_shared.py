"""One network for all tasks: a row knows its own label, what a task holds out is not learnt, and it is trained once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import guard_shared
from benchmarks.made_rows import rows_of
from guard_rows import Setup
from guard_shared import SHARED_TASKS, Together, joined, logits_of, shared_guard
from safeside.base.model import Base
from safeside.train.objectives import guard_logits
from safeside.train.recipe import Recipe
from safeside.train.taps import LiveTaps


@pytest.fixture
def setup(tmp_path: Path) -> Setup:
    return Setup(tmp_path, (("tiny", "tiny", "print"),), tmp_path / "scratch", limit=8, evaluation_limit=8, epochs=1)


def test_a_row_knows_the_label_of_its_own_task() -> None:
    rows = joined([rows_of(["a", "b"], 5), rows_of(["c"], 9)])
    assert rows.ids == [(5, 5, 6), (6, 5, 6), (9, 9, 10)]
    expected = torch.tensor([[0.0, torch.nan], [1.0, torch.nan], [torch.nan, 0.0]])
    torch.testing.assert_close(rows.labels, expected, equal_nan=True)


def test_rows_that_another_task_holds_out_are_not_learnt(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    def prepared(setup: Setup, task: str, base_name: str) -> object:
        test = [f"{task} is asked of nobody but here"]
        if task == "hate":
            test.append("a prompt that another task learns from")
        train = [f"{task} {word} and more of it" for word in ("one", "two")]
        if task == "prompt_harm":
            train.append("A prompt  that another task learns from")
        splits = {
            "validation": SimpleNamespace(rows=rows_of(["v", "w"], 3), examples=[]),
            "test": SimpleNamespace(examples=rows_of(test, 3).examples),
        }
        return SimpleNamespace(train=rows_of(train, 3), splits=splits)

    monkeypatch.setattr(guard_shared, "prepare", prepared)
    together = guard_shared._together.__wrapped__(setup, "tiny")
    assert together.n_leaks == 1
    assert len(together.train.ids) == 2 * len(SHARED_TASKS)
    assert together.validation.labels.shape == (2 * len(SHARED_TASKS), len(SHARED_TASKS))


def test_it_is_trained_once_for_all_tasks(
    setup: Setup, tiny_base: Base, tiny_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = joined([rows_of(list("abcd"), 5 + 10 * place) for place in range(len(SHARED_TASKS))])
    trained = []

    def together(setup: Setup, base_name: str) -> Together:
        trained.append(base_name)
        return Together(rows, rows, 7)

    monkeypatch.setattr(guard_shared, "_together", together)

    def recipe(task: str, seed: int) -> Recipe:
        return Recipe.model_validate(
            {
                "name": task, "output": "none", "seed": seed, "base": {"name": "tiny"}, "data": {"task": task},
                "adapter": {"kind": "lst", "reduction": 4, "labels": SHARED_TASKS}, "training": {"epochs": 1},
            }
        )  # fmt: skip

    first, facts = shared_guard(setup, tiny_base, "tiny", recipe("hate", 0))
    again, same = shared_guard(setup, tiny_base, "tiny", recipe("grounding", 0))
    other, _ = shared_guard(setup, tiny_base, "tiny", recipe("hate", 1))
    assert trained == ["tiny", "tiny"]  # once for each seed
    assert (facts, facts.n_leaks) == (same, 7)
    states = [guard.state_dict() for guard in (first, again, other)]
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    assert not all(torch.equal(tensor, states[2][name]) for name, tensor in states[0].items())
    assert first.config.labels == SHARED_TASKS
    own = rows_of(list("abc"), 5)
    found = {task: logits_of(tiny_base, LiveTaps(tiny_base, first), own, task) for task in SHARED_TASKS}
    together = guard_logits(tiny_base, LiveTaps(tiny_base, first), replace(own, labels=torch.zeros(3, 4)))
    assert (np.stack(list(found.values()), 1) == together).all()
