"""The rows of the guards benchmark: a task's texts, drawn always alike, cut in windows and encoded for one base."""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from safeside.base.model import Base, load_base
from safeside.errors import InputError, MissingExtraError
from safeside.guards.windows import windows
from safeside.provenance import config_hash
from safeside.tasks.leakage import normalise, without_leaks
from safeside.tasks.rows import load_examples
from safeside.tasks.task import Task, TaskRows, load_task
from safeside.terminal import note
from safeside.train.rows import Rows
from safeside.train.splits import encode_rows
from safeside.types import Example

Array = NDArray[np.float64]

SPLITS = ("train", "validation", "test", "harmless")
# Rows of training, validation and test, at most: the longer a task's texts, the fewer; 400 claims taught nothing.
ROWS = {
    "hate": (1000, 600, 1000),
    "prompt_harm": (600, 400, 800),
    "response_harm": (600, 400, 800),
    "grounding": (1600, 300, 600),
}
# Schedules of adapters and standalones, of so many epochs at most: the learning rate falls more slowly in the longer
# one.  Training stops two epochs after its best on validation rows, which choose between the schedules too.  Claims
# mostly stop before five, and their epochs are long.
SCHEDULES = {"hate": (5, 12), "prompt_harm": (5, 12), "response_harm": (5, 12), "grounding": (5,)}
MOST_WINDOWS = 4  # a row that takes more is left out and counted: whole web pages would take most of the time
HARMLESS = {
    "xstest/prompts_test.jsonl.gz": 250,
    "benign_prompts/alpaca_test.jsonl.gz": 250,
}  # at most


@dataclass(frozen=True, slots=True)
class Setup:
    """What all cells of a run share.  ``bases`` are (what tables call it, what it is loaded by, its fingerprint).

    ``scratch`` keeps stored states and teachers, which a run can make again.
    """

    data: Path
    bases: tuple[tuple[str, str, str], ...]
    scratch: Path
    limit: int
    evaluation_limit: int
    epochs: int
    """At most, in every schedule."""
    teachers: Path | None = None
    """Keeps what teachers gave, without the texts; a folder in ``scratch`` unless given."""

    def most_rows(self, task: str) -> dict[str, int]:
        """Most rows of each split."""
        train, validation, test = ROWS[task]
        most = self.evaluation_limit
        return {"train": min(self.limit, train), "validation": min(most, validation), "test": min(most, test)}

    def schedules(self, task: str) -> tuple[int, ...]:
        """Most epochs of each schedule that a guard of ``task`` is trained by, rising."""
        return tuple(sorted({min(epochs, self.epochs) for epochs in SCHEDULES[task]}))

    def base_of(self, name: str) -> tuple[str, str]:
        return next((source, fingerprint) for label, source, fingerprint in self.bases if label == name)


@dataclass(slots=True)
class Split:
    """Rows of one split in windows: ``rows`` are windows, ``row_of_window`` the row of each."""

    examples: list[Example]
    rows: Rows
    row_of_window: NDArray[np.int64]
    sources: list[str] = field(default_factory=list)
    n_uncut: int = 0
    n_too_long: int = 0

    @property
    def labels(self) -> Array:
        return np.array([example.labels[0] for example in self.examples])

    @property
    def is_windowed(self) -> NDArray[np.bool_]:
        return np.bincount(self.row_of_window, minlength=len(self.examples)) > 1

    def combined(self, values: Array, how: str) -> Array:
        """A value for each row from those of its windows; a row that could not be cut has NaN."""
        worst = -np.inf if how == "max" else np.inf
        result = np.full(len(self.examples), worst)
        (np.maximum if how == "max" else np.minimum).at(result, self.row_of_window, values)
        return np.where(np.isinf(result), np.nan, result)


@dataclass(frozen=True, slots=True)
class Sources:
    """Where a task's rows come from."""

    test: list[str]
    """The source of each test row."""
    prompts: list[str]
    """What the prompt or document of each test row is known by; rows that share one are drawn together."""
    labels: list[float]
    """Their labels, to compare with those of cells."""
    shares: dict[str, float]
    """By source, the share of harmful rows among all that may be trained on; of all sources where it has none."""


@dataclass(slots=True)
class Prepared:
    """A task's rows, encoded for one base."""

    base: Base
    task: Task
    train: Rows
    splits: dict[str, Split]
    counts: dict[str, int] = field(default_factory=dict)

    def rows(self, split: str) -> Rows:
        return self.train if split == "train" else self.splits[split].rows


def installed(names: Sequence[str]) -> dict[str, Base]:
    """By name, the bases whose package is installed; the others are left out, and told."""
    found = {}
    for name in names:
        try:
            found[name] = load_base(name)
        except MissingExtraError as error:
            note(f"{name} is left out: {error}")
    return found


def usable(path: Path, labels: Sequence[str]) -> list[Example]:
    """The rows of a file; those that cannot be used are left out, and told."""
    examples, bad = load_examples(path, labels)
    if bad:
        note(f"{len(bad)} rows of {path.name} were left out; line {bad[0].line}: {bad[0].problem}")
    return examples


@functools.lru_cache(maxsize=1)
def prepare(setup: Setup, task: str, base_name: str) -> Prepared:
    """Read and encode the rows of ``task``; kept in memory until another pair is asked for."""
    base = load_base(setup.base_of(base_name)[0], dtype="float32")
    found, most = _task_rows(task, setup.data), setup.most_rows(task)
    train = encode_rows(base, found.of("train"), most["train"])
    splits = {}
    for split in ("validation", "test"):
        splits[split] = _windowed(base, _sourced(found, split), found.task.windows, most[split])
    harmless, n_leaks = without_leaks(_harmless(setup, task), [*found.of("train"), *found.of("validation")])
    splits["harmless"] = _windowed(base, [("harmless", row) for row in harmless], found.task.windows)
    left_out = {"harmless_leaks": n_leaks} | {
        f"{split}_{reason}": 0 for split in ("train", "validation", "test") for reason in ("leaks", "bad")
    }
    for (_, split), left in found.left_out.items():
        left_out[f"{split}_leaks"] += left.exact + left.near
        left_out[f"{split}_bad"] += len(left.bad)
    counts = {**left_out, "train": len(train.ids), "train_too_long": train.n_too_long}
    counts |= {split: len(part.examples) for split, part in splits.items()}
    counts |= {f"{split}_too_long": part.n_too_long for split, part in splits.items()}
    counts |= {f"{split}_windowed": int(part.is_windowed.sum()) for split, part in splits.items() if part.examples}
    return Prepared(base, found.task, train, splits, counts)


def sources_of(setup: Setup, task: str, base_name: str) -> Sources:
    """The sources of the test rows of ``prepare``."""
    base = load_base(setup.base_of(base_name)[0], dtype="float32")
    found = _task_rows(task, setup.data)
    test = _windowed(base, _sourced(found, "test"), found.task.windows, setup.most_rows(task)["test"])
    train = _sourced(found, "train")
    overall = float(np.mean([row.labels[0] for _, row in train]))
    shares = {}
    for source in {name for name, _ in _sourced(found, "test")}:
        own = [row.labels[0] for name, row in train if name == source]
        shares[source] = float(np.mean(own)) if own else overall
    return Sources(test.sources, prompts_of(test.examples), test.labels.tolist(), shares)


def prompts_of(examples: Sequence[Example]) -> list[str]:
    """A hash of each row's first message: rows of one prompt or document are no draws apart from each other."""
    return [config_hash(normalise(example.messages[0].content)) for example in examples]


def _sourced(found: TaskRows, split: str) -> list[tuple[str, Example]]:
    """All rows of one split with the names of their sources, in the order of ``TaskRows.of``."""
    return [(source, row) for (source, part), rows in found.rows.items() if part == split for row in rows]


@functools.lru_cache(maxsize=1)
def _task_rows(task: str, root: Path) -> TaskRows:
    return load_task(task, root)


def _drawn(examples: Sequence[Example], limit: int) -> list[Example]:
    return list(examples) if len(examples) <= limit else random.Random(0).sample(list(examples), limit)


def _harmless(setup: Setup, task: str) -> list[Example]:
    """Harmless prompts that a guard of prompts should leave alone; none for tasks that judge answers and claims."""
    if task not in ("hate", "prompt_harm"):
        return []
    examples = []
    for name, limit in HARMLESS.items():
        rows = [row for row in load_examples(setup.data / name, ("harm",))[0] if row.labels[0] == 0]
        examples += _drawn(rows, limit)
    return examples


def _windowed(base: Base, examples: Sequence[tuple[str, Example]], how: str, limit: int | None = None) -> Split:
    """At most ``limit`` of the examples, each with its source, drawn always alike, in windows."""
    drawn = list(examples) if limit is None else random.Random(0).sample(list(examples), len(examples))
    found = Split([], Rows([], [], torch.zeros(0, 1), None), np.zeros(0, dtype=int))
    row_of_window: list[int] = []
    for source, example in drawn:
        if len(found.examples) == limit:
            break
        try:
            parts = windows(base, example.messages, combine="max" if how == "max" else "min")
        except InputError:
            parts = []
            found.n_uncut += 1
        if len(parts) > MOST_WINDOWS:
            found.n_too_long += 1
            continue
        found.rows.ids.extend(base.encode(part).ids for part in parts)
        row_of_window += [len(found.examples)] * len(parts)
        found.examples.append(example)
        found.sources.append(source)
    labels = torch.tensor([found.examples[row].labels[:1] for row in row_of_window]).reshape(-1, 1)
    found.row_of_window = np.array(row_of_window, dtype=int)
    found.rows = Rows(found.rows.ids, [0] * len(row_of_window), labels, None)
    return found
