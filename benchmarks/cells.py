"""One cell of the core benchmark: a guard of one method, trained on one task with one seed, then measured once."""

from __future__ import annotations

import functools
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import nn

from core_data import LABELS, read_splits
from safeside.adapters.sizing import adapter_matmuls, base_matmuls
from safeside.artifact import create_adapter
from safeside.base.model import Base, load_base
from safeside.errors import InputError, NotFiniteError
from safeside.evals.metrics import auroc, bootstrap
from safeside.guards.windows import windows
from safeside.provenance import config_hash, git_commit, machine
from safeside.train.loop import Loop
from safeside.train.objectives import guard_logits, guard_metric, guard_objective
from safeside.train.recipe import Recipe
from safeside.train.rows import Rows
from safeside.train.splits import encode_rows
from safeside.train.standalone import create_standalone, standalone_matmuls
from safeside.train.taps import Source, StoredTaps, TapStore
from safeside.types import Example

FORMAT = 1  # of a cell; raise it when cells of an older kind must not be used again
METHODS = {
    "plr": {"kind": "plr"},
    "rtb": {"kind": "rtb", "bottleneck": 32},
    "lst": {"kind": "lst", "reduction": 4},
    "standalone": {"kind": "lst", "reduction": 4},  # the adapter whose multiply-adds it equals
}
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True, slots=True)
class Setup:
    """What all cells of a run share.  ``fingerprint`` is the base's; limits are numbers of rows."""

    data: Path
    base: str
    fingerprint: str
    cells: Path
    limit: int
    evaluation_limit: int | None
    epochs: int
    device: str = "cpu"


@dataclass(frozen=True, slots=True)
class Cell:
    """One training run; only a ``final`` one sees the test rows."""

    task: str
    method: str
    seed: int
    learning_rate: float
    final: bool = True

    @property
    def title(self) -> str:
        end = f"seed {self.seed}" if self.final else f"learning rate {self.learning_rate:g}"
        return f"{self.task} {self.method} {end}"


@dataclass(slots=True)
class Prepared:
    """A task's encoded rows.  ``test`` holds windows, and ``row_of_window`` the row of each."""

    base: Base
    train: Rows
    validation: Rows
    test: Rows
    row_of_window: np.ndarray
    test_labels: np.ndarray
    counts: dict[str, int] = field(default_factory=dict)

    def rows(self, split: str) -> Rows:
        return {"train": self.train, "validation": self.validation, "test": self.test}[split]


def recipe_of(setup: Setup, cell: Cell) -> Recipe:
    """The cell as a recipe: everything about it but the bytes of data and base."""
    return Recipe.model_validate(
        {
            "name": f"{cell.task}-{cell.method}",
            "output": "none",
            "seed": cell.seed,
            "base": {"name": Path(setup.base).name},
            "data": {"train": (cell.task,), "validation": (cell.task,), "limit": setup.limit},
            "adapter": {**METHODS[cell.method], "labels": LABELS},
            "training": {"epochs": setup.epochs, "learning_rate": cell.learning_rate, "checkpoint_seconds": 1e9},
        }
    )


def key_of(setup: Setup, cell: Cell, hashes: dict[str, str]) -> str:
    """Hash of recipe, data, base and seed: the name of the cell's file."""
    return config_hash(
        {
            "format": FORMAT,
            "recipe": recipe_of(setup, cell).model_dump(exclude_defaults=True),
            "method": cell.method,
            "data": hashes,
            "base": setup.fingerprint,
            "final": cell.final,
            "evaluation_limit": setup.evaluation_limit,
        }
    )


@functools.lru_cache(maxsize=1)
def prepare(setup: Setup, task: str) -> Prepared:
    """Read and encode the rows of ``task``; kept in memory until another task is asked for."""
    base = load_base(setup.base, device=setup.device, dtype="float32")
    splits = read_splits(setup.data, task)
    train = encode_rows(base, splits.train, setup.limit)
    validation = encode_rows(base, splits.validation, setup.evaluation_limit)
    chosen = splits.test
    if setup.evaluation_limit is not None and len(chosen) > setup.evaluation_limit:
        chosen = random.Random(0).sample(chosen, setup.evaluation_limit)
    test, row_of_window, n_uncut = _windowed(base, chosen)
    counts = {
        **splits.counts,
        "train_rows": len(train.ids),
        "train_rows_too_long": train.n_too_long,
        "validation_rows": len(validation.ids),
        "validation_rows_too_long": validation.n_too_long,
        "test_rows": len(chosen),
        "test_rows_windowed": sum(row_of_window.count(row) > 1 for row in set(row_of_window)),
        "test_rows_not_cut": n_uncut,
    }
    labels = np.array([example.labels[0] for example in chosen])
    return Prepared(base, train, validation, test, np.array(row_of_window), labels, counts)


def _windowed(base: Base, examples: Sequence[Example]) -> tuple[Rows, list[int], int]:
    """Every row in as many windows as the base's context asks for, the row of each, and how many cannot be cut."""
    ids: list[tuple[int, ...]] = []
    row_of_window: list[int] = []
    n_uncut = 0
    for row, example in enumerate(examples):
        try:
            parts = windows(base, example.messages)
        except InputError:
            n_uncut += 1
            continue
        ids += [base.encode(part).ids for part in parts]
        row_of_window += [row] * len(parts)
    rows = Rows(ids, [0] * len(ids), torch.zeros(len(ids), len(LABELS)), None)
    return rows, row_of_window, n_uncut


def store_of(setup: Setup, task: str, split: str) -> TapStore:
    """The base's states at all layers for one split, shared by the task's cells; computed on first use."""
    data = prepare(setup, task)
    return TapStore.build(
        data.base, data.rows(split).ids, range(data.base.n_layers + 1), setup.cells / "taps" / task, batch_size=16
    )


def build_store(setup: Setup, task: str, split: str) -> float:
    """Seconds that it took to have the store of one split on disk, its rows read before."""
    prepare(setup, task)
    started = time.perf_counter()
    store_of(setup, task, split)
    return time.perf_counter() - started


def run_cell(setup: Setup, cell: Cell, key: str) -> dict[str, object]:
    """Train, keep the best validation weights, and for a final cell score the test rows."""
    started = time.perf_counter()
    data, recipe = prepare(setup, cell.task), recipe_of(setup, cell)
    model, sources, matmuls = _build(setup, cell, recipe)
    loop = Loop(
        model,
        data.train.lengths,
        guard_objective(data.base, sources["train"], data.train, recipe),
        guard_metric(data.base, sources["validation"], data.validation),
        recipe.training,
        seed=cell.seed,
    )
    facts = {"key": key, "task": cell.task, "method": cell.method, "seed": cell.seed, "final": cell.final}
    facts |= {"learning_rate": cell.learning_rate, "commit": git_commit(), "machine": machine(), "counts": data.counts}
    try:
        outcome = loop.run()
    except NotFiniteError as error:
        if cell.final:
            raise
        return {**facts, "validation": 0.0, "problem": str(error), "seconds": time.perf_counter() - started}
    facts |= {
        "validation": outcome.best_metric,
        "epochs": outcome.epochs,
        "train_seconds": outcome.train_seconds,
        "trainable_params": outcome.trainable_params,
        "matmuls": matmuls,
        "flops_share": matmuls / base_matmuls(data.base),
    }
    if cell.final:
        facts |= _measure(data, model, sources["test"])
    return {**facts, "seconds": time.perf_counter() - started}


def _build(setup: Setup, cell: Cell, recipe: Recipe) -> tuple[nn.Module, dict[str, Source], int]:
    """The module to train, what it reads for each split, and its multiply-adds a token."""
    base = prepare(setup, cell.task).base
    adapter = create_adapter(base, recipe.adapter_config(base), cell.seed)
    splits = SPLITS if cell.final else SPLITS[:2]
    if cell.method == "standalone":
        model = create_standalone(base, adapter, cell.seed)
        return model, dict.fromkeys(splits, model), standalone_matmuls(model)
    stores = {split: narrowed(store_of(setup, cell.task, split), adapter.config.layers) for split in splits}
    return adapter, {split: StoredTaps(store, adapter) for split, store in stores.items()}, adapter_matmuls(adapter)


def narrowed(store: TapStore, layers: Sequence[int]) -> TapStore:
    """The same store from the first to the last of ``layers`` only: a probe must not pay for reading them all."""
    span = slice(store.layers.index(layers[0]), store.layers.index(layers[-1]) + 1)
    return TapStore(store.states[:, span], store.layers[span], store.starts, store.lengths)


def _measure(data: Prepared, model: nn.Module, source: Source) -> dict[str, object]:
    """auroc on the test rows."""
    model.eval()
    scores = row_logits(data, source)
    scored = np.isfinite(scores)
    figure = bootstrap({"auroc": auroc}, data.test_labels[scored], scores[scored])["auroc"]
    return {
        "auroc": [figure.value, figure.low, figure.high],
        "n": int(scored.sum()),
        "n_unscored": int((~scored).sum()) + data.counts["test_bad_rows"],
    }


def row_logits(data: Prepared, source: Source) -> np.ndarray:
    """A logit for each test row: the highest of its windows, as when a guard judges long texts; -inf without one."""
    logits = np.full(len(data.test_labels), -np.inf)
    np.maximum.at(logits, data.row_of_window, guard_logits(data.base, source, data.test)[:, 0])  # NaN wins
    return logits
