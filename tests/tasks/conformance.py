"""What every task must do, whoever wrote it: ``make_data`` writes rows as its sources' columns want them."""

from __future__ import annotations

import gzip
import json
import random
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

from safeside.tasks.categories import CATEGORIES, VOCABULARIES
from safeside.tasks.sources import HUB, Fields, Part, Source
from safeside.tasks.task import TASKS, Task, load_task

WORDS = ("apple", "river", "stone", "cloud", "window", "garden", "letter", "winter", "music", "bridge", "candle")
N_ROWS = 60


def sentence(generator: random.Random, size: int = 12) -> str:
    return " ".join(f"{generator.choice(WORDS)}{generator.randrange(1000)}" for _ in range(size))


def raw_row(fields: Fields, part: Part, risky: bool, generator: random.Random) -> dict[str, object]:
    """A row that belongs to ``part``, with the columns that ``fields`` reads."""
    columns = list(fields.texts.values()) or ["prompt", "response"]
    row: dict[str, object] = {column: sentence(generator) for column in columns}
    for column, values in part.only.items():
        row[column] = values[0]
    for column in part.never:
        row.setdefault(column, "something else")
    if fields.above is not None:
        row.update(dict.fromkeys(fields.label, fields.above * (1 if risky else 0.1)))
    elif fields.values:
        row[fields.label[0]] = next(key for key, value in fields.values.items() if value == int(risky))
    else:
        row[fields.label[0]] = int(risky)
    if fields.categories is not None:
        names = list(VOCABULARIES[fields.categories.vocabulary])
        row[fields.categories.column] = generator.choice(names) if risky or not fields.categories.is_complete else ""
    return row


def make_data(task: Task, root: Path, seed: int = 0) -> None:
    """Rows of both labels at every place that ``task`` reads."""
    generator = random.Random(seed)
    readers: dict[str, list[tuple[Fields, Part]]] = defaultdict(list)
    for source in task.sources:
        for part in filter(None, (source.train, source.validation, source.test)):
            readers[part.place].append((source.fields, part))
    rows: dict[str, list[dict[str, object]]] = defaultdict(list)
    for place, several in readers.items():
        for own in several:
            for index in range(N_ROWS):  # with the columns that the others read there, too
                columns = [raw_row(*reader, bool(index % 2), generator) for reader in [*several, own]]
                rows[place].append({key: value for part in columns for key, value in part.items()})
    for place, content in rows.items():
        write_place(place, content, root)


def write_place(place: str, rows: list[dict[str, object]], root: Path) -> None:
    """Rows where ``place`` is read from: a file, or a copy of a hub set on disk."""
    if not place.startswith(HUB):
        path = root / place
        path.parent.mkdir(parents=True, exist_ok=True)
        text = "\n".join(map(json.dumps, rows))
        path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
        return
    name, _, rest = place.removeprefix(HUB).partition("@")
    revision, _, split = rest.partition("#")
    repository, _, config = name.partition(":")
    folder = root / "hub" / repository / revision
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    splits = sorted(path.stem for path in folder.glob("*.jsonl"))
    files = "".join(f"  - split: {split}\n    path: {split}.jsonl\n" for split in splits)
    (folder / "README.md").write_text(
        f"---\nconfigs:\n- config_name: {config or 'default'}\n  data_files:\n{files}---\n"
    )


def check_names(task: Task, root: Path) -> None:
    """Labels and sources have names; some source can be learnt from and some measured on."""
    assert all(task.labels)
    assert len(set(task.labels)) == len(task.labels)
    assert all(source.name for source in task.sources)
    assert any(source.train for source in task.sources)
    assert any(source.test for source in task.sources)


def check_places_are_apart(task: Task, root: Path) -> None:
    """No two parts of a task read the same rows of the same place."""

    def key(source: Source, part: Part) -> tuple[str, ...]:
        return part.place, repr(part.only), repr(part.share), repr(source.fields.texts)

    keys = [
        key(source, part)
        for source in task.sources
        for part in filter(None, (source.train, source.validation, source.test))
    ]
    assert len(set(keys)) == len(keys)


def check_its_rows_load(task: Task, root: Path) -> None:
    """Every row that is written as the sources say is used or counted, none is bad, and splits share no text."""
    make_data(task, root)
    found = load_task(task.name, root)
    assert found.task.labels == task.labels
    assert not [row for left in found.left_out.values() for row in left.bad]
    for (source, split), rows in found.rows.items():
        assert rows, f"{source} has no {split} rows"
        assert all(len(row.labels) == len(task.labels) for row in rows)
    for split in ("train", "validation", "test"):
        assert {row.labels[0] for row in found.of(split)} == {0.0, 1.0}
    texts = [{row.messages for row in found.of(split)} for split in ("train", "validation", "test")]
    assert not texts[0] & texts[1]
    assert not (texts[0] | texts[1]) & texts[2]


def check_categories_are_known_or_unknown(task: Task, root: Path) -> None:
    """With all categories under its head, a value is 0, 1 or NaN, and unsupported ones are named and gone."""
    make_data(task, root)
    wanted = (task.labels[0], *(name for name in CATEGORIES if name != task.labels[0]))
    found = load_task(task.name, root, labels=wanted)
    assert set(found.task.labels) | set(found.unsupported) == set(wanted)
    for row in [*found.of("train"), *found.of("validation"), *found.of("test")]:
        assert len(row.labels) == len(found.task.labels)
        assert row.labels[0] in (0.0, 1.0)
        assert all(value in (0.0, 1.0) or value != value for value in row.labels[1:])


CHECKS: tuple[Callable[[Task, Path], None], ...] = (
    check_names,
    check_places_are_apart,
    check_its_rows_load,
    check_categories_are_known_or_unknown,
)


def task_named(name: str) -> Task:
    """The registered task; its own name is the one that it is registered by."""
    task = TASKS.get(name)
    assert task.name == name
    return task
