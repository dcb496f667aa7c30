"""The rows of the core benchmark: which files, what is left out of them and why, and what is held out."""

from __future__ import annotations

import hashlib
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from safeside.errors import InputError
from safeside.tasks.rows import BadRow, example_of, open_rows, parse_rows
from safeside.types import Example

LABELS = ("harm",)
HELD_OUT = 0.15  # share of the training rows that validate where a task has no validation file


@dataclass(frozen=True, slots=True)
class TaskFiles:
    """Files of a task under the data root; without ``validation`` part of ``train`` is held out."""

    train: str
    test: str
    validation: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name in (self.train, self.validation, self.test) if name)


TASKS = {
    "toxigen": TaskFiles("toxigen/train.jsonl.gz", "toxigen/test.jsonl.gz"),
    "pku_saferlhf_guard": TaskFiles(
        "pku_saferlhf_guard/train.jsonl.gz", "pku_saferlhf_guard/test.jsonl.gz", "pku_saferlhf_guard/val.jsonl.gz"
    ),
    "beavertails": TaskFiles("beavertails/train.jsonl.gz", "beavertails/test.jsonl.gz", "beavertails/val.jsonl.gz"),
    "toxic_chat": TaskFiles("toxic_chat/train.jsonl.gz", "toxic_chat/test.jsonl.gz"),
}


@dataclass(slots=True)
class Splits:
    """Rows to train on, to choose by and to measure on, and how many were left out for which reason."""

    train: list[Example]
    validation: list[Example]
    test: list[Example]
    counts: dict[str, int] = field(default_factory=dict)


def file_hashes(root: Path, task: str) -> dict[str, str]:
    """sha256 of the bytes of each file of ``task``; a missing file is an InputError."""
    missing = [name for name in TASKS[task].names if not (root / name).is_file()]
    if missing:
        raise InputError(
            f"{root} has no {', '.join(missing)}; expected the data sets of SOURCES.md. Name their folder with --data."
        )
    return {name: hashlib.sha256((root / name).read_bytes()).hexdigest() for name in TASKS[task].names}


def read_splits(root: Path, task: str) -> Splits:
    """The usable rows of ``task``.

    Rows flagged ``label_conflict`` are dropped from every split, and rows of one split whose normalised text stands in
    a later one (train, validation, test) from the earlier.  All are counted, and so are lines that cannot be read.
    """
    files, counts = TASKS[task], Counter({"label_conflicts_dropped": 0})
    train = _read(root / files.train, "train", counts)
    test = _read(root / files.test, "test", counts)
    validation = _read(root / files.validation, "validation", counts) if files.validation else []
    if not files.validation:
        held = [is_held_out(example) for example in train]
        validation = [example for example, out in zip(train, held, strict=True) if out]
        train = [example for example, out in zip(train, held, strict=True) if not out]
    train = _without(train, test, "train_rows_in_test_removed", counts)
    validation = _without(validation, test, "validation_rows_in_test_removed", counts)
    train = _without(train, validation, "train_rows_in_validation_removed", counts)
    return Splits(train, validation, test, dict(counts))


def _read(path: Path, split: str, counts: Counter[str]) -> list[Example]:
    examples = []
    bad = f"{split}_bad_rows"
    counts[bad] = 0
    with open_rows(path) as handle:
        for row in parse_rows(handle):
            if isinstance(row, BadRow):
                counts[bad] += 1
                continue
            if row[1].get("label_conflict"):
                counts["label_conflicts_dropped"] += 1
                continue
            try:
                examples.append(example_of(row[1], LABELS, row[0]))
            except InputError:
                counts[bad] += 1
    return examples


def _without(rows: Sequence[Example], others: Sequence[Example], name: str, counts: Counter[str]) -> list[Example]:
    seen = {normalised(example) for example in others}
    kept = [example for example in rows if normalised(example) not in seen]
    counts[name] = len(rows) - len(kept)
    return kept


def normalised(example: Example) -> str:
    """All of a row's text in one case and spacing."""
    return _normalise("\n".join(message.content for message in example.messages))


def is_held_out(example: Example) -> bool:
    """Whether the row validates: decided by its prompt alone, so one prompt never stands on both sides."""
    digest = hashlib.sha256(_normalise(example.messages[0].content).encode()).digest()
    return int.from_bytes(digest[:8], "big") < HELD_OUT * 2**64


def _normalise(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())
