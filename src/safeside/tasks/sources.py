"""Where the rows of a task come from, and how a raw row becomes one of ours: all of it data.

A place is a file under the data root (``.jsonl``, ``.jsonl.gz``), or a split of a public set on the Hugging Face hub at
a pinned revision, ``hub:owner/name@revision#split`` or ``hub:owner/name:config@revision#split``.  Both are read as rows
with line numbers by the same code.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from reprlib import repr as shortened

from safeside.errors import ConfigError, InputError, MissingExtraError
from safeside.registry import Registry
from safeside.tasks.categories import Annotation, category_labels
from safeside.tasks.rows import BadRow, example_of, examples_of, open_rows, parse_rows
from safeside.types import Example

HUB = "hub:"
_PINNED = re.compile(r"hub:(?P<name>[\w.-]+/[\w.-]+)(:(?P<config>[\w.-]+))?@(?P<revision>[0-9a-f]{40})#(?P<split>\w+)")
Row = tuple[int, dict[str, object]] | BadRow
Reader = Callable[[str, Path], Iterator[Row]]


@dataclass(frozen=True, slots=True)
class Part:
    """Rows of one split of a source."""

    place: str
    """A file under the data root, or ``hub:owner/name:config@revision#split``."""
    only: Mapping[str, tuple[object, ...]] = field(default_factory=dict)
    """Columns and the values that a row must have there to belong to the part."""
    never: Mapping[str, tuple[object, ...]] = field(default_factory=dict)
    """Columns and the values that it must not have."""
    share: tuple[float, float] = (0.0, 1.0)
    """From and below which hash in [0, 1) of its prompt or document a row belongs to the part."""

    def holds(self, row: Mapping[str, object]) -> bool:
        """Whether a raw row belongs to the part."""
        wanted = all(row.get(column) in values for column, values in self.only.items())
        return wanted and not any(row.get(column) in values for column, values in self.never.items())


@dataclass(frozen=True, slots=True)
class Fields:
    """Which columns of a raw row are what."""

    texts: Mapping[str, str] = field(default_factory=dict)
    """From a field of our rows (``text``, ``prompt``, ``response``, ...) to the column; the row as it is when empty."""
    label: tuple[str, ...] = ("label",)
    """The column with the label, or several numbers to be added up."""
    values: Mapping[object, int] = field(default_factory=dict)
    """From what stands there to 0 or 1 (risky), where it is not one of these already."""
    above: float | None = None
    """Risky when the sum of the label columns is above this number."""
    categories: Annotation | None = None
    """Where the row says which categories it violates."""

    def label_of(self, row: Mapping[str, object]) -> object:
        """The row's label, 1 when risky; what is outside the set is an InputError."""
        found = [row.get(column) for column in self.label]
        if self.above is not None:
            numbers = [value for value in found if isinstance(value, (int, float)) and value == value]
            if len(numbers) < len(found):
                raise InputError(f"{' and '.join(self.label)} must be numbers; got {shortened(found)}")
            return int(sum(numbers) > self.above)
        if not self.values:
            return found[0]
        if not isinstance(found[0], (str, int)) or found[0] not in self.values:
            known = ", ".join(map(repr, self.values))
            raise InputError(f"{self.label[0]!r} is {shortened(found[0])}; expected one of {known}")
        return self.values[found[0]]


@dataclass(frozen=True, slots=True)
class Source:
    """One named data set of a task."""

    name: str
    """What tables call it."""
    train: Part | None = None
    """Rows to learn from."""
    validation: Part | None = None
    """Rows for early stopping and calibration; without, a share of ``train`` is held out by its prompt's hash."""
    test: Part | None = None
    """Rows to measure on, and for nothing else."""
    fields: Fields = Fields()
    """How a raw row is read."""


def example_from(fields: Fields, row: Mapping[str, object], labels: tuple[str, ...], line: int) -> Example:
    """The raw row as an Example with one value for each of ``labels``: the first is the row's own label.

    The others are categories: 0, 1, or NaN where the row does not tell.  What cannot be read is an InputError.
    """
    ours = {name: row.get(column) for name, column in fields.texts.items()} if fields.texts else dict(row)
    example = example_of({**ours, "label": fields.label_of(row), "soft": None}, labels[:1], line)
    if len(labels) == 1:
        return example
    known = category_labels(fields.categories, row, example.labels[0] == 1)
    return replace(example, labels=(*example.labels, *(known.get(name, float("nan")) for name in labels[1:])))


@dataclass(frozen=True, slots=True)
class HubPlace:
    """A split of a public set at one commit."""

    name: str
    """``owner/name``."""
    config: str | None
    """One of the set's configurations; None: its only one."""
    revision: str
    """40 hex digits."""
    split: str
    """``train``, for example."""

    def copy_in(self, root: Path) -> Path:
        """The folder under ``root`` where a copy on disk is looked for first."""
        return root / "hub" / self.name / self.revision


def hub_place(place: str) -> HubPlace:
    """``hub:owner/name:config@revision#split``, taken apart; another form is a ConfigError, for a branch can change."""
    match = _PINNED.fullmatch(place)
    if match is None:
        raise ConfigError(
            f"{place!r} names no pinned set; expected hub:owner/name@REVISION#split or "
            "hub:owner/name:config@REVISION#split with a commit of 40 hex digits. Copy it from the set's page."
        )
    return HubPlace(match["name"], match["config"], match["revision"], match["split"])


def load_place(
    place: str, root: Path, labels: tuple[str, ...], *, partial: bool = False
) -> tuple[list[Example], list[BadRow]]:
    """All usable rows of a place whose rows have one of our shapes, and the bad ones; ``partial`` as in example_of."""
    return examples_of(read_rows(place, root), labels, partial=partial)


def read_rows(place: str, root: Path) -> Iterator[Row]:
    """Every row of a place with its line number, from 1, or what is wrong with it."""
    kind = "hub" if place.startswith(HUB) else "file"
    try:
        reader = READERS.get(kind)
    except ImportError as error:
        raise MissingExtraError(
            f"{place} needs {error.name!r}, which is not installed. Run: pip install 'safeside[data]'"
        ) from error
    yield from reader(place, root)


def read_file(place: str, root: Path) -> Iterator[Row]:
    """Rows of a file under ``root``."""
    with open_rows(root / place) as handle:
        yield from parse_rows(handle)


READERS: Registry[Reader] = Registry("kind of place")
READERS.register("file", read_file)
READERS.register("hub", "safeside.tasks.hub:read_hub")  # imported on first use: it needs an extra
