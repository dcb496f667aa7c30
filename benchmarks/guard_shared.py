"""The method ``lst_shared``: one side network for all tasks, a label for each, trained on the rows of all of them.

Its rows are those that the other methods learn from, less those that stand in a held-out split of another task.  A row
knows its own task's label only.  The cells of all tasks score with the one network of their base and seed.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from guard_rows import ROWS, Setup, prepare
from safeside.adapters.adapter import Adapter
from safeside.artifact import create_adapter
from safeside.base.model import Base
from safeside.provenance import config_hash
from safeside.tasks.leakage import find_leaks, text_of
from safeside.train.loop import Loop
from safeside.train.objectives import guard_logits, guard_metric, guard_objective
from safeside.train.recipe import Recipe
from safeside.train.rows import Rows
from safeside.train.taps import Source, StoredTaps, TapStore

SHARED = "lst_shared"
SHARED_TASKS = tuple(ROWS)


@dataclass(frozen=True, slots=True)
class Together:
    """Rows of all tasks, with a column of labels for each."""

    train: Rows
    validation: Rows
    n_leaks: int
    """Training rows that stand in a held-out split of another task."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What training cost, and what was left out."""

    train_seconds: float
    peak_bytes: int
    trainable_params: int
    epochs: int
    n_leaks: int


def shared_guard(setup: Setup, base: Base, base_name: str, recipe: Recipe) -> tuple[Adapter, Facts]:
    """The network of a base and seed, trained by the first task that asks for it."""
    adapter = create_adapter(base, recipe.adapter_config(base), recipe.seed)
    key = config_hash([recipe.model_dump(exclude={"name", "data"}), setup.base_of(base_name)[1], sizes_of(setup)])
    path = setup.scratch / "shared" / f"{key}.safetensors"
    facts = path.with_suffix(".json")
    if not facts.is_file():
        found = _trained(adapter, _together(setup, base_name), recipe, base, setup.scratch / "taps" / "shared")
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(adapter.state_dict(), path)
        facts.write_text(json.dumps(asdict(found)), encoding="utf-8")  # last: a run that was killed trains anew
    adapter.load_state_dict(load_file(path))
    return adapter.eval(), Facts(**json.loads(facts.read_text(encoding="utf-8")))


def sizes_of(setup: Setup) -> list[tuple[str, dict[str, int]]]:
    """How many rows of each task there are at most."""
    return [(task, setup.most_rows(task)) for task in SHARED_TASKS]


def _trained(adapter: Adapter, rows: Together, recipe: Recipe, base: Base, folder: Path) -> Facts:
    train, validation = (
        StoredTaps(TapStore.build(base, part.ids, adapter.config.layers, folder, batch_size=16), adapter)
        for part in (rows.train, rows.validation)
    )
    loop = Loop(
        adapter,
        rows.train.lengths,
        guard_objective(base, train, rows.train, recipe),
        guard_metric(base, validation, rows.validation),
        recipe.training,
        seed=recipe.seed,
    )
    done = loop.run()
    return Facts(done.train_seconds, done.peak_bytes, done.trainable_params, done.epochs, rows.n_leaks)


def logits_of(base: Base, source: Source, rows: Rows, task: str) -> NDArray[np.float64]:
    """(n,) logits of the label of ``task`` for rows that know that one only."""
    wide = replace(rows, labels=torch.full((len(rows.ids), len(SHARED_TASKS)), torch.nan))
    return guard_logits(base, source, wide)[:, SHARED_TASKS.index(task)]


@functools.lru_cache(maxsize=1)
def _together(setup: Setup, base_name: str) -> Together:
    """The rows of all tasks for one base."""
    train, validation, held_out = {}, {}, {}
    for task in SHARED_TASKS:
        data = prepare(setup, task, base_name)
        train[task], validation[task] = data.train, data.splits["validation"].rows
        held_out[task] = [text_of(row) for split in ("validation", "test") for row in data.splits[split].examples]
    n_leaks = 0
    for task, rows in train.items():
        others = [text for other, texts in held_out.items() if other != task for text in texts]
        leaks = find_leaks([text_of(row) for row in rows.examples], others)
        left_out = {*leaks.exact, *leaks.near}
        train[task] = rows.chosen([place for place in range(len(rows.ids)) if place not in left_out])
        n_leaks += len(left_out)
    return Together(joined(list(train.values())), joined(list(validation.values())), n_leaks)


def joined(parts: Sequence[Rows]) -> Rows:
    """Rows of one label each as rows of as many labels as there are parts: each knows that of its own part."""
    labels = [torch.full((len(part.ids), len(parts)), torch.nan) for part in parts]
    for column, (part, wide) in enumerate(zip(parts, labels, strict=True)):
        wide[:, column] = part.labels[:, 0]
    return Rows(
        ids=[ids for part in parts for ids in part.ids],
        answer_starts=[start for part in parts for start in part.answer_starts],
        labels=torch.cat(labels),
        soft=None,
    )
