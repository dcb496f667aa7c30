"""Rows with a rule that the tiny base can learn, and recipes for them."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from safeside import Adapter
from safeside.train.loop import Progress
from safeside.train.recipe import Recipe
from safeside.train.run import run_recipe

# Live states come from batches of other lengths than stored ones: float32 sums in another order, amplified by Adam.
SAME_WEIGHTS = 2e-3
SAME_SCORE = 1e-5  # see test_score.py
WORDS = ("cat", "mat", "sat", "then", "they", "said", "how", "be")
TRAINING = {"epochs": 5, "batch_size": 16, "learning_rate": 0.01, "patience": 5}


def guard_rows(n: int, seed: int) -> list[dict[str, object]]:
    """A rule that a guard can learn: a text with a hat in it is harmful."""
    generator = random.Random(seed)
    rows = []
    for _ in range(n):
        words = generator.choices(WORDS, k=generator.randint(2, 7))
        label = int(generator.random() < 0.5)
        if label:
            words.insert(generator.randrange(len(words)), "hat")
        rows.append({"prompt": " ".join(words), "label": label, "soft": 0.9 if label else 0.1})
    return rows


def answer_rows(n: int, seed: int) -> list[dict[str, object]]:
    return [{"prompt": row["prompt"], "response": "no, not that"} for row in guard_rows(n, seed)]


def preference_rows(n: int, seed: int) -> list[dict[str, object]]:
    """Whatever is asked, the short answer is preferred."""
    answers = {"chosen": "no, not that", "rejected": "then they said how"}
    return [{"prompt": row["prompt"], **answers} for row in guard_rows(n, seed)]


def write(path: Path, rows: Sequence[object]) -> None:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))


def run_and_kill(values: Recipe, **options: object) -> None:
    """Run a recipe until its first epoch has ended, as a process that is killed there: its checkpoint stays."""

    def kill(progress: Progress) -> None:
        if progress.epoch == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_recipe(values, report=kill, **options)


def recipe(kind: str = "guard", **sections: object) -> Recipe:
    adapter = {"kind": "lst", "reduction": 2, "role": "guard" if kind == "guard" else "align"}
    data = dict(sections.pop("data", {}))
    files = {} if "task" in data else {name: [f"{kind}_{name}.jsonl"] for name in ("train", "validation")}
    values: dict[str, object] = {
        "name": "toy",
        "output": "unused",
        "data": {**files, "limit": sections.pop("limit", None), **data},
        "adapter": {**adapter, **sections.pop("adapter", {})},
        "training": {**TRAINING, **sections.pop("training", {})},
        **sections,
    }
    return Recipe.model_validate(values)


def weights(adapter: Adapter) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten().float() for parameter in adapter.parameters()])


def write_rows(root: Path) -> Path:
    """Training and validation rows for guards and for aligners, in ``root``."""
    for name, make in (("guard", guard_rows), ("answers", answer_rows)):
        write(root / f"{name}_train.jsonl", make(160, 1))
        write(root / f"{name}_validation.jsonl", make(80, 2))
    return root
