"""A recipe's training and validation rows, read from its files or its task and encoded for its base."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path

import torch

from safeside.base.model import Base
from safeside.chat import Encoded
from safeside.errors import ConfigError, InputError
from safeside.guards.blank import BlankIds
from safeside.tasks.leakage import text_of, without_leaks
from safeside.tasks.overlap import GOALS, drop_overlap
from safeside.tasks.rows import BadRow, for_one_label, kind_of, load_examples, messages_of
from safeside.tasks.sources import HUB, Row, load_place, read_rows
from safeside.tasks.task import LeftOut, Split, load_task, rows_of_tests
from safeside.train.recipe import DataSection, Recipe
from safeside.train.rows import Rows
from safeside.train.teacher import read_scores, with_scores
from safeside.types import Example

DEMO_PREFIX = "demo:"
_FILES = (".jsonl", ".jsonl.gz")  # what leave_out tells from a suite's name


@dataclass(frozen=True, slots=True)
class Found:
    """Rows of a split before they are encoded."""

    examples: list[Example]
    """Usable ones."""
    bad: list[BadRow]
    """The others, and why."""
    n_overlapping: int = 0
    """Rows that were left out because of an evaluation's goals."""
    n_in_tests: int = 0
    """Rows that were left out because they stand in a test set."""
    left_out: LeftOut | None = None
    """What a task did not use."""

    def without(self, goals: Sequence[str]) -> Found:
        """Those that overlap with none of ``goals`` (see ``safeside.tasks.overlap``)."""
        if not goals:
            return self
        overlap = drop_overlap(self.examples, goals)
        return replace(self, examples=overlap.kept, n_overlapping=self.n_overlapping + overlap.n_dropped)

    def apart_from(self, tests: Sequence[Example]) -> Found:
        """Those that are none of ``tests``, nor nearly (see ``safeside.tasks.leakage``)."""
        if not tests:
            return self
        kept, n_gone = without_leaks(self.examples, tests)
        return replace(self, examples=kept, n_in_tests=n_gone)


def find_data(name: str, root: Path) -> Path:
    """The file that a recipe names: ``demo:FILE`` is packaged, anything else lies under ``root``."""
    if name.startswith(DEMO_PREFIX):
        return Path(str(files("safeside.builtin") / "demo" / name.removeprefix(DEMO_PREFIX)))
    return root / name


def rows_at(place: str, root: Path) -> Iterator[Row]:
    """Rows of a set on the hub, or of a file as ``find_data`` finds it, with line numbers, or what is wrong there."""
    return read_rows(place if place.startswith(HUB) else str(find_data(place, root).resolve()), root)


def goals_to_leave_out(names: Sequence[str], root: Path) -> list[str]:
    """The goals of suites and files of prompts, whose first message is one; a bad or missing file is an InputError."""
    goals: list[str] = []
    suites = [name for name in names if not name.endswith(_FILES)]
    if suites:
        goals += GOALS.get("suites")(suites, root)
    for name in names:
        if name in suites:
            continue
        for row in rows_at(name, root):
            if isinstance(row, BadRow):
                raise InputError(f"{name}: line {row.line}: {row.problem}")
            try:
                goals.append(messages_of(row[1])[0].content)
            except InputError as error:
                raise InputError(f"{name}: line {row[0]}: {error}") from error
    return goals


def encode_rows(
    base: Base, examples: Sequence[Example], limit: int | None = None, seed: int = 0, max_tokens: int | None = None
) -> Rows:
    """Token ids and labels of ``examples``; rows that are bad or too long are left out and counted.

    Too long is what exceeds ``max_tokens`` or the base's context.
    A preference is one row: it is left out when either of its answers is too long.  Rows with a rejected answer and
    rows without are a ConfigError in one set.
    """
    longest = min(base.max_tokens, max_tokens or base.max_tokens)
    encoded: list[tuple[Example, tuple[Encoded, ...]]] = []
    bad: list[BadRow] = []
    blank = BlankIds(base)
    for example in examples:
        try:
            encoded.append((example, _encoded_texts(base, example, blank)))
        except InputError as error:
            bad.append(BadRow(example.line, str(error)))
    fitting = [pair for pair in encoded if all(len(text.ids) <= longest for text in pair[1])]
    n_too_long = len(encoded) - len(fitting)
    if limit is not None and len(fitting) > limit:
        fitting = random.Random(seed).sample(fitting, limit)
    soft = [example.soft for example, _ in fitting]
    known = [values for values in soft if values is not None]
    rows = Rows(
        ids=[texts[0].ids for _, texts in fitting],
        answer_starts=[texts[0].answer_start for _, texts in fitting],
        labels=torch.tensor([example.labels for example, _ in fitting], dtype=torch.float32),
        soft=torch.tensor(known, dtype=torch.float32) if known and len(known) == len(soft) else None,
        bad=bad,
        n_too_long=n_too_long,
        beyond=[example for example, texts in encoded if len(texts) == 1 and len(texts[0].ids) > base.max_tokens],
        examples=[example for example, _ in fitting],
    )
    worse = [texts[1] for _, texts in fitting if len(texts) > 1]
    if worse and len(worse) < len(fitting):
        single = next(example.line for example, texts in fitting if len(texts) == 1)
        raise ConfigError(
            f"{len(worse)} rows are preferences and {len(fitting) - len(worse)} are not (line {single}); expected one "
            "kind. Put them into runs of their own."
        )
    if worse:
        starts = [text.answer_start for text in worse]
        rows.rejected = Rows([text.ids for text in worse], starts, torch.zeros(len(worse), 0), None)
    return rows


def _encoded_texts(base: Base, example: Example, blank: BlankIds) -> tuple[Encoded, ...]:
    """The encoded row; of a preference, the chosen and the rejected text."""
    text = base.encode(example.messages)
    blank.refuse(example.messages, text.ids)
    if example.rejected is None:
        return (text,)
    worse = base.encode((*example.messages[:-1], example.rejected))
    if worse.ids == text.ids:
        raise InputError("'chosen' and 'rejected' are the same tokens; expected two answers")
    return text, worse


def load_splits(base: Base, recipe: Recipe, root: Path, labels: tuple[str, ...]) -> tuple[Rows, Rows]:
    """Training and validation rows of a recipe; its file of scores, if it names one, gives the former soft targets.

    A split without a usable row or, for guards, without both kinds of rows for a label, a ``label_of`` that names no
    such file or label, and a category that the task has no rows for are a ConfigError.
    """
    data = recipe.data
    goals = goals_to_leave_out(data.leave_out, root)
    read = _from_files if data.task is None else _from_task
    train, validation = read(base, recipe, root, labels, goals)
    if data.soft is not None:
        train = with_scores(train, read_scores(find_data(data.soft, root), labels))
    if recipe.adapter.role == "guard":
        if not recipe.training.soft_weight:  # else scores teach what labels do not
            train.require_both_kinds("Training")
        validation.require_both_kinds("Validation")
    return train, validation


def load_benign(base: Base, recipe: Recipe, root: Path, labels: tuple[str, ...], train: Rows) -> Rows | None:
    """The harmless rows that a recipe names, labelled or not; None if it names none.

    A guard's presets are promised on them: rows whose text is among the training rows ``train`` promise nothing for
    others and are bad rows, and such as stand in a test set, of the recipe's task or of those in ``against``, are left
    out and counted.  An aligner is held near the base on them.
    """
    names = recipe.calibration.benign or recipe.data.benign
    if not names:
        return None
    found = [kind_of(rows_at(name, root), name, labels, is_harmful=False) for name in names]
    learnt = set(map(text_of, train.examples)) if recipe.calibration.benign else set()
    examples: list[Example] = []
    bad: list[BadRow] = []
    for name, (some, broken) in zip(names, found, strict=True):
        seen = [example for example in some if text_of(example) in learnt]
        examples += [example for example in some if text_of(example) not in learnt]
        bad += broken
        bad += [BadRow(row.line, f"{name}: a training row too, and a promise rests on unseen rows") for row in seen]
    goals = goals_to_leave_out(recipe.data.leave_out, root)
    data = recipe.data
    own = rows_of_tests([data.task], root, sources=data.sources or ()) if data.task is not None else []
    kept = Found(examples, bad).without(goals).apart_from([*own, *rows_of_tests(data.against, root)])
    return _encoded(base, kept, None, recipe, ", ".join(names))


def _from_files(
    base: Base, recipe: Recipe, root: Path, labels: tuple[str, ...], goals: Sequence[str]
) -> tuple[Rows, Rows]:
    data = recipe.data
    unknown = sorted(set(data.label_of.values()) - set(labels))
    if unknown:
        raise ConfigError(f"label_of names {', '.join(unknown)}; expected labels of the guard: {', '.join(labels)}.")
    unread = sorted(set(data.label_of) - {*data.train, *data.validation})
    if unread:
        raise ConfigError(f"label_of names {', '.join(unread)}, which is neither a training nor a validation file.")
    splits, tests = [], rows_of_tests(data.against, root)
    for names, limit in ((data.train, data.limit), (data.validation, None)):
        found = Found(*read_files(names, root, labels, data)).without(goals).apart_from(tests)
        splits.append(_encoded(base, found, limit, recipe, ", ".join(names)))
    return splits[0], splits[1]


def read_files(
    names: Sequence[str], root: Path, labels: tuple[str, ...], data: DataSection | None = None
) -> tuple[list[Example], list[BadRow]]:
    """The usable rows of several files or hub sets in order, and the bad ones; a problem begins with its file's name.

    ``data`` says which files know one label only and whether rows may leave labels out.
    """
    label_of, partial = (data.label_of, data.partial_labels) if data else ({}, False)
    examples: list[Example] = []
    bad: list[BadRow] = []
    for name in names:
        only = (label_of[name],) if name in label_of else None
        if name.startswith(HUB):
            some, problems = load_place(name, root, only or labels, partial=partial)
        else:
            some, problems = load_examples(find_data(name, root), only or labels, partial=partial)
        examples += [for_one_label(example, only[0], labels) for example in some] if only else some
        bad += [BadRow(row.line, f"{name}: {row.problem}") for row in problems]
    return examples, bad


def _from_task(
    base: Base, recipe: Recipe, root: Path, labels: tuple[str, ...], goals: Sequence[str]
) -> tuple[Rows, Rows]:
    data = recipe.data
    task = load_task(str(data.task), root, labels=labels, sources=data.sources or (), against=data.against)
    if task.unsupported:
        raise ConfigError(
            f"Task {data.task!r} has no risky and harmless rows for {', '.join(task.unsupported)} in train and "
            f"validation; supported here: {', '.join(task.task.labels)}. Take the others off [adapter] labels."
        )
    limits: dict[Split, int | None] = {"train": data.limit, "validation": None}
    splits = [
        _encoded(
            base,
            Found(task.of(split), task.bad(split), left_out=task.left_out_of(split)).without(goals),
            limit,
            recipe,
            f"{split} of task {data.task!r}",
        )
        for split, limit in limits.items()
    ]
    return splits[0], splits[1]


def _encoded(base: Base, found: Found, limit: int | None, recipe: Recipe, name: str) -> Rows:
    rows = encode_rows(base, found.examples, limit, recipe.seed, recipe.data.max_tokens)
    rows.bad = [*found.bad, *rows.bad]
    rows.n_overlapping, rows.n_in_tests, rows.left_out = found.n_overlapping, found.n_in_tests, found.left_out
    if not rows.ids:
        first = f"; the first bad row: line {rows.bad[0].line}, {rows.bad[0].problem}" if rows.bad else ""
        long = f"; {rows.n_too_long} are longer than max_tokens or the base's context" if rows.n_too_long else ""
        same = f"; {rows.n_overlapping} overlap with what leave_out names" if rows.n_overlapping else ""
        test = f"; {rows.n_in_tests} stand in the test sets that task or against names" if rows.n_in_tests else ""
        raise ConfigError(f"No usable row in {name}{first}{long}{same}{test}. Check the files.")
    return rows
