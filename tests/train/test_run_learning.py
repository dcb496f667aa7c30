"""Recipes that learn from more than one task, from a pruned start or from a teacher."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from recipes_for_tests import SAME_WEIGHTS, guard_rows, recipe, run_and_kill, weights, write, write_rows
from safeside import Adapter, Base, load_adapter, load_base
from safeside.errors import ConfigError
from safeside.train.loop import Progress
from safeside.train.objectives import guard_logits
from safeside.train.recipe import Recipe
from safeside.train.rows import Rows
from safeside.train.run import run_recipe
from safeside.train.taps import LiveTaps
from tiny import make_tiny
from twin import hash_of


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data"))


# ---- several tasks on one side network -------------------------------------------------------------------------------


def task_rows(n: int, seed: int, label: str) -> list[dict[str, object]]:
    """Rows of one task: they know whether there is a hat, or whether there is a cat."""
    return [{"prompt": row["prompt"], "label": int(label in str(row["prompt"]).split())} for row in guard_rows(n, seed)]


def known_labels(row: dict[str, object], *, knows_cat: bool) -> dict[str, object]:
    """The label of hats, and that of cats where it is known."""
    return {"hat": row["label"], **({"cat": int("cat" in str(row["prompt"]))} if knows_cat else {})}


def test_two_tasks_share_one_side_network(tiny_base: Base, tmp_path: Path) -> None:
    for place, label in enumerate(("hat", "cat")):
        for split, n in (("train", 160), ("validation", 60)):
            write(tmp_path / f"{label}_{split}.jsonl", task_rows(n, n + place, label))
    data = {
        "train": ["hat_train.jsonl", "cat_train.jsonl"],
        "validation": ["hat_validation.jsonl", "cat_validation.jsonl"],
        "label_of": {f"{label}_{split}.jsonl": label for label in ("hat", "cat") for split in ("train", "validation")},
    }
    values = recipe(adapter={"labels": ["hat", "cat"]}, data=data, training={"class_weights": "balanced"})
    done = run_recipe(values, data_root=tmp_path, output=tmp_path / "out", base=tiny_base)
    known = ~done.train.labels.isnan()
    assert known.sum(0).tolist() == [160, 160]
    assert (known.sum(1) == 1).all()
    assert done.outcome.best_metric > 0.9
    logits = guard_logits_of(tiny_base, done.adapter, done.validation)
    for label, some in enumerate(~done.validation.labels.isnan().T):
        scores = 1 / (1 + np.exp(-done.adapter.config.calibration.scale[label] * logits[some, label]
                                 - done.adapter.config.calibration.bias[label]))  # fmt: skip
        harmless = done.validation.labels[some, label].numpy() == 0
        assert (scores[harmless] >= done.adapter.thresholds[label]).mean() <= 0.05


def guard_logits_of(base: Base, guard: Adapter, rows: Rows) -> np.ndarray:
    return guard_logits(base, LiveTaps(base, guard), rows)


def test_rows_may_leave_labels_out(tiny_base: Base, tmp_path: Path) -> None:
    for split, n in (("train", 80), ("validation", 60)):
        rows = [
            {"prompt": row["prompt"], "label": known_labels(row, knows_cat=place % 2 == 0)}
            for place, row in enumerate(guard_rows(n, n))
        ]
        write(tmp_path / f"guard_{split}.jsonl", rows)
    adapter, short = {"labels": ["hat", "cat"]}, {"epochs": 1}
    files = {"train": ["guard_train.jsonl"], "validation": ["guard_validation.jsonl"]}
    partial = recipe(adapter=adapter, training=short, data={**files, "partial_labels": True})
    done = run_recipe(partial, data_root=tmp_path, output=tmp_path / "out", base=tiny_base)
    assert (~done.train.labels.isnan()).sum(0).tolist() == [80, 40]
    strict = run_recipe(
        recipe(adapter=adapter, training=short), data_root=tmp_path, output=tmp_path / "strict", base=tiny_base
    )
    assert (len(strict.train.ids), len(strict.train.bad)) == (40, 40)


def test_unknown_labels_do_not_depend_on_how_steps_are_split(tiny_base: Base, tmp_path: Path) -> None:
    """Rows know one label or both: every known label counts the same, in one batch or in four."""
    for split in ("train", "validation"):
        rows = [
            {"prompt": row["prompt"], "label": known_labels(row, knows_cat=place % 4 == 0)}
            for place, row in enumerate(guard_rows(32, 5))
        ]
        write(tmp_path / f"guard_{split}.jsonl", rows)
    files = {"train": ["guard_train.jsonl"], "validation": ["guard_validation.jsonl"], "partial_labels": True}
    found = []
    for batch_size in (32, 8):
        training = {"epochs": 2, "batch_size": batch_size, "accumulation": 32 // batch_size}
        values = recipe(adapter={"labels": ["hat", "cat"]}, training=training, data=files)
        found.append(run_recipe(values, data_root=tmp_path, output=tmp_path / str(batch_size), base=tiny_base))
    assert (weights(found[0].adapter) - weights(found[1].adapter)).abs().max() < SAME_WEIGHTS


def test_label_of_names_files_and_labels_that_exist(tiny_base: Base, data: Path) -> None:
    files = {"train": ["guard_train.jsonl"], "validation": ["guard_validation.jsonl"]}
    for label_of, problem in (
        ({"guard_train.jsonl": "hats"}, "label_of names hats; expected labels of the guard: harm"),
        ({"guard_trian.jsonl": "harm"}, r"names guard_trian\.jsonl, which is neither"),
    ):
        with pytest.raises(ConfigError, match=problem):
            run_recipe(recipe(data={**files, "label_of": label_of}), data_root=data, base=tiny_base)


# ---- pruned starts and soft targets ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wide_base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    """A tiny llama whose heads are as wide as a side network's."""
    changes = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
    return load_base(make_tiny("llama", tmp_path_factory.mktemp("wide"), **changes))


def test_a_pruned_start_is_trained_and_the_base_kept(wide_base: Base, data: Path, tmp_path: Path) -> None:
    before = hash_of(wide_base.model)
    runs = {
        start: run_recipe(
            recipe(adapter={"start": start, "start_rows": 8}, training={"epochs": 2, "learning_rate": 3e-3}),
            data_root=data,
            output=tmp_path / start,
            base=wide_base,
        )
        for start in ("random", "pruned")
    }
    assert hash_of(wide_base.model) == before
    assert not torch.equal(weights(runs["random"].adapter), weights(runs["pruned"].adapter))
    assert runs["pruned"].outcome.best_metric > 0.7
    assert torch.equal(weights(load_adapter(tmp_path / "pruned", wide_base)), weights(runs["pruned"].adapter))


def test_an_aligner_that_starts_pruned_starts_at_the_base(wide_base: Base, data: Path, tmp_path: Path) -> None:
    first = {}
    for start in ("random", "pruned"):
        losses: list[Progress] = []
        values = recipe(
            "answers", adapter={"start": start, "start_rows": 8}, training={"epochs": 1, "batch_size": 64}, limit=64
        )
        run_recipe(values, data_root=data, output=tmp_path / start, base=wide_base, report=losses.append)
        first[start] = losses[0].loss
    assert first["pruned"] == pytest.approx(first["random"], abs=1e-5)


def test_a_teacher_is_trained_first_and_learnt_from(tiny_base: Base, data: Path, tmp_path: Path) -> None:
    before = hash_of(tiny_base.model)
    teacher = {"rank": 8, "epochs": 5, "learning_rate": 2e-2, "batch_size": 8}
    training = {"soft_weight": 1.0, "epochs": 10}
    values = recipe(training=training, teacher=teacher)
    done = run_recipe(values, data_root=data, output=tmp_path, base=tiny_base)
    assert hash_of(tiny_base.model) == before
    assert done.train.soft is not None
    assert done.outcome.best_metric > 0.8  # from nothing but the teacher's scores
    (scores,) = tmp_path.glob("teacher-*.jsonl")
    assert len(scores.read_text().splitlines()) == 160
    again = recipe(training=training).model_dump()
    again["data"]["soft"] = str(scores)
    same = run_recipe(Recipe.model_validate(again), data_root=data, output=tmp_path / "again", base=tiny_base)
    assert torch.equal(weights(same.adapter), weights(done.adapter))


def test_another_start_or_other_scores_do_not_resume(wide_base: Base, data: Path, tmp_path: Path) -> None:
    short = {"epochs": 1, "soft_weight": 0.5}
    run_and_kill(recipe(training=short, limit=32), data_root=data, output=tmp_path, base=wide_base)
    pruned = recipe(training=short, limit=32, adapter={"start": "pruned", "start_rows": 4})
    with pytest.raises(ConfigError, match="was made by another run"):
        run_recipe(pruned, data_root=data, output=tmp_path, base=wide_base, resume=True)
    scored = recipe(training=short, limit=32).model_dump()
    write(tmp_path / "scores.jsonl", [{"prompt": row["prompt"], "soft": 0.5} for row in guard_rows(160, 1)])
    scored["data"]["soft"] = str(tmp_path / "scores.jsonl")
    with pytest.raises(ConfigError, match="was made by another run"):
        run_recipe(Recipe.model_validate(scored), data_root=data, output=tmp_path, base=wide_base, resume=True)
