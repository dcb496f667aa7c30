"""What a guardrail task is: labels, rows from named sources, and how windows of a long text are combined."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Literal

from safeside.errors import ConfigError, InputError, UnknownNameError
from safeside.registry import Registry, did_you_mean
from safeside.tasks.categories import CATEGORIES, supported_categories
from safeside.tasks.leakage import find_leaks, normalise, text_of
from safeside.tasks.rows import BadRow
from safeside.tasks.sources import Part, Source, example_from, read_rows
from safeside.types import Example

HELD_OUT = 0.15  # share of the training rows that validate where a source has no validation rows of its own
SPLITS = ("train", "validation", "test")

Split = Literal["train", "validation", "test"]
Place = tuple[str, str]  # source, split


@dataclass(frozen=True, slots=True)
class Task:
    """A question that a guard answers about a conversation, and the rows to learn and measure it on."""

    name: str
    """What recipes and tables call it."""
    labels: tuple[str, ...]
    """The task's own label, then names from ``CATEGORIES``; each is risky when 1."""
    sources: tuple[Source, ...]
    """Where its rows come from."""
    windows: Literal["max", "min"] = "max"
    """Of a text's windows the highest score counts, or the lowest (a claim that one window supports is supported)."""

    def __post_init__(self) -> None:
        names = [source.name for source in self.sources]
        unknown = [label for label in self.labels[1:] if label not in CATEGORIES]
        if not self.labels or not names or len(set(names)) != len(names):
            raise ConfigError(f"Task {self.name!r} needs a label, and sources with different names; got {names}.")
        if unknown:
            raise UnknownNameError(did_you_mean("category", unknown[0], list(CATEGORIES)))

    def narrowed(self, names: Sequence[str]) -> Task:
        """The task with these sources only; an unknown name is an UnknownNameError."""
        known = {source.name: source for source in self.sources}
        for name in names:
            if name not in known:
                raise UnknownNameError(did_you_mean(f"source of task {self.name!r}", name, list(known)))
        return replace(self, sources=tuple(known[name] for name in names))


TASKS: Registry[Task] = Registry("task")


def register_task(name: str, task: Task | str) -> None:
    """Make a task (or its lazy ``"module:TASK"``) known to recipes and ``load_task``.

    A stranger's task is called ``package/name``.  A name that is taken by another task is a ConfigError.
    """
    TASKS.register(name, task)


for _name, _target in (
    ("hate", "safeside.tasks.hate:HATE"),
    ("prompt_harm", "safeside.tasks.safety:PROMPT_HARM"),
    ("response_harm", "safeside.tasks.safety:RESPONSE_HARM"),
    ("grounding", "safeside.tasks.grounding:GROUNDING"),
    ("hub_toxigen", "safeside.tasks.hate:HUB_TOXIGEN"),
    ("hub_aegis2", "safeside.tasks.safety:HUB_AEGIS2"),
    ("hub_beavertails", "safeside.tasks.safety:HUB_BEAVERTAILS"),
    ("hub_summedits", "safeside.tasks.grounding:HUB_SUMMEDITS"),
):
    register_task(_name, _target)


@dataclass(slots=True)
class LeftOut:
    """What was not used of one split of one source, and why."""

    bad: list[BadRow] = field(default_factory=list)
    """Lines that cannot be used."""
    not_of_part: int = 0
    """Rows that the source's file holds for another purpose."""
    label_conflicts: int = 0
    """Rows flagged as such, and rows whose text has both labels (in train or validation, or in test)."""
    repeated: int = 0
    """Rows whose text was there before, in the same split."""
    exact: int = 0
    """Leaks: the normalised text stands in a later split (train, validation, test)."""
    near: int = 0
    """Leaks: a near duplicate stands there."""

    @property
    def summary(self) -> str:
        """The counts in one line, for people."""
        return (
            f"{self.exact + self.near:,} leaks ({self.exact:,} exact, {self.near:,} near), {self.repeated:,} repeated, "
            f"{self.label_conflicts:,} with labels in conflict, {self.not_of_part:,} of another split, "
            f"{len(self.bad):,} bad"
        )


@dataclass(slots=True)
class TaskRows:
    """The rows of a task by source and split, and all that was left out."""

    task: Task
    """The task with the labels that the rows have: unsupported categories are gone."""
    rows: dict[Place, list[Example]]
    """Usable rows by (source, split)."""
    left_out: dict[Place, LeftOut]
    """By (source, split), what was not used."""
    unsupported: tuple[str, ...] = ()
    """Categories without risky and harmless rows in train and validation: never scored."""

    def of(self, split: Split) -> list[Example]:
        """All rows of one split, source after source."""
        return [example for (_, part), examples in self.rows.items() if part == split for example in examples]

    def bad(self, split: Split) -> list[BadRow]:
        """The bad lines of one split; each problem begins with the source's name."""
        return [
            BadRow(row.line, f"{source}: {row.problem}")
            for (source, part), left in self.left_out.items()
            if part == split
            for row in left.bad
        ]

    def left_out_of(self, split: Split) -> LeftOut:
        """What was not used of one split, all its sources together."""
        parts = [left for (_, part), left in self.left_out.items() if part == split]
        return LeftOut(
            bad=self.bad(split),
            not_of_part=sum(left.not_of_part for left in parts),
            label_conflicts=sum(left.label_conflicts for left in parts),
            repeated=sum(left.repeated for left in parts),
            exact=sum(left.exact for left in parts),
            near=sum(left.near for left in parts),
        )


def load_task(
    name: str,
    root: str | Path,
    *,
    labels: tuple[str, ...] | None = None,
    sources: Sequence[str] = (),
    against: Sequence[str] = (),
) -> TaskRows:
    """The rows of the task ``name``, read from files under ``root`` and from the hub.

    ``labels`` are the task's own label and categories to learn beside it; the task's when None.  ``sources`` narrows
    the task; test sets of its other sources are looked at where ``against`` names it too.  Rows of train or validation
    that stand in a test set, of this task or of those in ``against``, are left out, and so are training rows that stand
    in validation.  Nothing is left out without being counted.
    """
    task = TASKS.get(name)
    if labels is not None:
        if labels[:1] != task.labels[:1]:
            raise ConfigError(f"The first label of task {name!r} is {task.labels[0]!r}; got {labels}. Put it first.")
        task = replace(task, labels=labels)
    task = task.narrowed(sources) if sources else task
    found = TaskRows(task, {}, {})
    for source in task.sources:
        _read_source(found, source, Path(root))
    _drop_conflicts(found)
    _drop_repeated(found)
    others = [other for other in against if sources or other != name]
    other_tests = list(map(text_of, rows_of_tests(others, Path(root))))
    _drop_leaks(found, "validation", [*map(text_of, found.of("test")), *other_tests])
    _drop_leaks(found, "train", [*map(text_of, [*found.of("validation"), *found.of("test")]), *other_tests])
    return _with_supported_labels(found)


def hash_of(example: Example) -> float:
    """A number in [0, 1) that the first message alone decides, so no prompt or document is on two sides of a split."""
    digest = hashlib.sha256(normalise(example.messages[0].content).encode()).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) / 2**53


def _read_source(found: TaskRows, source: Source, root: Path) -> None:
    parts: Mapping[str, Part | None] = {"train": source.train, "validation": source.validation, "test": source.test}
    for split, part in parts.items():
        if part is not None:
            place = (source.name, split)
            found.left_out[place] = left = LeftOut()
            found.rows[place] = list(_examples(source, part, root, found.task.labels, left))
    if source.train is not None and source.validation is None:
        train = found.rows[source.name, "train"]
        found.left_out[source.name, "validation"] = LeftOut()
        found.rows[source.name, "validation"] = [row for row in train if hash_of(row) < HELD_OUT]
        found.rows[source.name, "train"] = [row for row in train if hash_of(row) >= HELD_OUT]


def _examples(source: Source, part: Part, root: Path, labels: tuple[str, ...], left: LeftOut) -> Iterator[Example]:
    for row in read_rows(part.place, root):
        if isinstance(row, BadRow):
            left.bad.append(row)
        elif not part.holds(row[1]):
            left.not_of_part += 1
        elif row[1].get("label_conflict"):
            left.label_conflicts += 1
        else:
            try:
                example = example_from(source.fields, row[1], labels, row[0])
            except InputError as error:
                left.bad.append(BadRow(row[0], str(error)))
                continue
            if part.share[0] <= hash_of(example) < part.share[1]:
                yield example
            else:
                left.not_of_part += 1


def rows_of_tests(names: Sequence[str], root: Path, *, sources: Sequence[str] = ()) -> list[Example]:
    """The test rows of the tasks ``names``, whose files lie under ``root``; what cannot be read there is none.

    ``sources`` narrows them all.
    """
    found: list[Example] = []
    for task in map(TASKS.get, names):
        for source in (task.narrowed(sources) if sources else task).sources:
            if source.test is not None:
                found += _examples(source, source.test, root, task.labels[:1], LeftOut())
    return found


def _drop_conflicts(found: TaskRows) -> None:
    for splits in (("train", "validation"), ("test",)):
        places = [place for place in found.rows if place[1] in splits]
        seen: dict[str, set[float]] = defaultdict(set)
        for example in chain.from_iterable(found.rows[place] for place in places):
            seen[text_of(example)].add(example.labels[0])
        for place in places:
            kept = [example for example in found.rows[place] if len(seen[text_of(example)]) == 1]
            found.left_out[place].label_conflicts += len(found.rows[place]) - len(kept)
            found.rows[place] = kept


def _drop_repeated(found: TaskRows) -> None:
    seen: set[tuple[str, str]] = set()
    for place, examples in found.rows.items():
        kept = []
        for example in examples:
            key = (place[1], text_of(example))
            if key not in seen:
                seen.add(key)
                kept.append(example)
        found.left_out[place].repeated = len(examples) - len(kept)
        found.rows[place] = kept


def _drop_leaks(found: TaskRows, split: Split, texts: Iterable[str]) -> None:
    places = [place for place in found.rows if place[1] == split]
    examples = [(place, example) for place in places for example in found.rows[place]]
    leaks = find_leaks([text_of(example) for _, example in examples], list(texts))
    gone = {*leaks.exact, *leaks.near}
    for index in leaks.exact:
        found.left_out[examples[index][0]].exact += 1
    for index in leaks.near:
        found.left_out[examples[index][0]].near += 1
    for place in places:
        found.rows[place] = []
    for index, (place, example) in enumerate(examples):
        if index not in gone:
            found.rows[place].append(example)


def _with_supported_labels(found: TaskRows) -> TaskRows:
    """Without the columns of categories that cannot be learnt."""
    labels = found.task.labels
    if len(labels) == 1:
        return found
    supported, unsupported = supported_categories(labels, found.of("train"), found.of("validation"))
    kept = [index for index, label in enumerate(labels) if index == 0 or label in supported]
    for place, examples in found.rows.items():
        found.rows[place] = [replace(row, labels=tuple(row.labels[index] for index in kept)) for row in examples]
    task = replace(found.task, labels=tuple(labels[index] for index in kept))
    return TaskRows(task, found.rows, found.left_out, tuple(label for label in unsupported if label != labels[0]))
