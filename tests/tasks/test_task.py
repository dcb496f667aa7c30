"""Loading a task: every row is used or counted, tests are clean, and bad data is named by its line."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path

import pytest

from safeside.errors import ConfigError, InputError, UnknownNameError
from safeside.tasks.categories import Annotation
from safeside.tasks.sources import Fields, Part, Source
from safeside.tasks.task import HELD_OUT, TASKS, LeftOut, Task, hash_of, load_task, register_task, rows_of_tests

Rows = list[dict[str, object] | bytes]
PLAIN = Fields()


def row(text: str, label: object = 0, **columns: object) -> dict[str, object]:
    return {"text": text, "label": label, **columns}


def unlike(n: int, start: int = 0) -> list[dict[str, object]]:
    """Rows whose texts have nothing in common."""
    return [row(sha256(str(index).encode()).hexdigest(), index % 2) for index in range(start, start + n)]


@pytest.fixture
def task(tmp_path: Path) -> Iterator[Callable[..., str]]:
    """``task(train=[...], test=[...])`` is the name of a task with these rows under ``tmp_path``."""
    made: list[str] = []

    def make(fields: Fields = PLAIN, only: dict[str, tuple[object, ...]] | None = None, **splits: Rows) -> str:
        name = f"tests/task{len(made)}"
        parts = {}
        for split, rows in splits.items():
            lines = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in rows]
            (tmp_path / f"{len(made)}_{split}.jsonl").write_bytes(b"\n".join(lines))
            parts[split] = Part(f"{len(made)}_{split}.jsonl", only=only or {})
        register_task(name, Task(name, ("harm",), (Source("one", **parts, fields=fields),)))
        made.append(name)
        return name

    yield make
    for name in made:
        TASKS.unregister(name)


def texts(found: object) -> list[str]:
    return [example.messages[0].content for example in found]


# ---- splits ----------------------------------------------------------------------------------------------------------


def test_a_source_without_validation_rows_holds_some_out_by_their_prompt(
    task: Callable[..., str], tmp_path: Path
) -> None:
    pairs = [
        {"prompt": f"{index:05x} " * 9, "response": word * 40, "label": 0} for index in range(300) for word in "ab"
    ]
    found = load_task(task(train=pairs), tmp_path)
    train, validation = set(texts(found.of("train"))), set(texts(found.of("validation")))
    assert not train & validation
    assert len(train | validation) == 300
    assert 0.5 * HELD_OUT < len(validation) / 300 < 1.5 * HELD_OUT
    assert all(hash_of(example) < HELD_OUT for example in found.of("validation"))


def test_parts_of_one_file_are_told_apart_by_column_and_by_share(task: Callable[..., str], tmp_path: Path) -> None:
    rows = [{**values, "part": "abc"[index % 3]} for index, values in enumerate(unlike(60))]
    found = load_task(task(only={"part": ("a",)}, train=rows, validation=unlike(0)), tmp_path)
    assert len(found.of("train")) == 20
    assert found.left_out["one", "train"].not_of_part == 40
    place = TASKS.get(found.task.name).sources[0].train.place
    low, high = Part(place, share=(0.0, 0.5)), Part(place, share=(0.5, 1.0))
    register_task(
        "tests/shares", Task("tests/shares", ("harm",), (Source("one", low, Part(place, {"part": ()}), high),))
    )
    halves = load_task("tests/shares", tmp_path)
    TASKS.unregister("tests/shares")
    assert sorted(texts(halves.of("train")) + texts(halves.of("test"))) == sorted(values["text"] for values in rows)
    assert {hash_of(example) < 0.5 for example in halves.of("train")} == {True}


def test_sources_can_be_picked(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps(values) for values in unlike(20, ord(name))))
    sources = tuple(Source(name, test=Part(f"{name}.jsonl")) for name in ("a", "b"))
    register_task("tests/two", Task("tests/two", ("harm",), sources))
    try:
        assert {place[0] for place in load_task("tests/two", tmp_path).rows} == {"a", "b"}
        assert {place[0] for place in load_task("tests/two", tmp_path, sources=["b"]).rows} == {"b"}
        with pytest.raises(UnknownNameError, match="Unknown source of task 'tests/two' 'c'"):
            load_task("tests/two", tmp_path, sources=["c"])
    finally:
        TASKS.unregister("tests/two")


def test_a_missing_file_is_an_error_with_its_path(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"There is no file .*toxigen/train.jsonl.gz"):
        load_task("hate", tmp_path)


# ---- what is left out ------------------------------------------------------------------------------------------------


def test_leaks_repeats_and_conflicts_are_left_out_and_counted(task: Callable[..., str], tmp_path: Path) -> None:
    long = "the quick brown fox jumps over the lazy dog and then it sleeps for a long while in the tall green grass"
    train = [
        *unlike(30),
        row("In the  TEST set, this one is"),  # exactly
        row(long + " today"),  # nearly
        row("said twice, with one label", 1),
        row("Said twice,  with one label", 1),
        row("said twice, with two labels", 1),
        row("said twice, with two labels", 0),
        row("flagged by its source", 1, label_conflict=True),
        row("in validation word for word", 1),
    ]
    name = task(
        train=train,
        validation=[row("in validation word for word", 1), row(long)],
        test=[row("in the test set, this one is", 1), row(long + " again"), row("kept", 1), row("kept", 1)],
    )
    found = load_task(name, tmp_path)
    assert texts(found.of("train")) == [*texts_of(unlike(30)), "said twice, with one label"]
    assert found.left_out["one", "train"] == LeftOut(label_conflicts=3, repeated=1, exact=2, near=1)
    assert texts(found.of("validation")) == ["in validation word for word"]
    assert found.left_out["one", "validation"] == LeftOut(near=1)
    assert len(found.of("test")) == 3
    assert found.left_out["one", "test"] == LeftOut(repeated=1)


def test_what_is_left_out_is_summed_over_the_sources(tmp_path: Path) -> None:
    test = [row("in the test set of both, word for word", 1), row("0123456789 stands there too", 1)]
    files = {
        "a": [*unlike(20), test[0]],
        "b": [*unlike(20, 100), test[1], row("said twice", 1), row("said twice", 1), row("odd", 2)],
    }
    for name, rows in files.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, test)))
    (tmp_path / "validation.jsonl").write_text("\n".join(map(json.dumps, unlike(4, 300))))
    validation, held = Part("validation.jsonl"), Part("test.jsonl")
    sources = (Source("a", Part("a.jsonl"), validation, held), Source("b", Part("b.jsonl"), validation, held))
    register_task("tests/sums", Task("tests/sums", ("harm",), sources))
    try:
        found = load_task("tests/sums", tmp_path)
    finally:
        TASKS.unregister("tests/sums")
    left = found.left_out_of("train")
    assert (left.exact, left.near, left.repeated, left.label_conflicts, left.not_of_part) == (2, 0, 1, 0, 0)
    assert left.bad == found.bad("train")
    assert left.summary == (
        "2 leaks (2 exact, 0 near), 1 repeated, 0 with labels in conflict, 0 of another split, 1 bad"
    )
    assert found.left_out_of("validation").repeated == 4


def texts_of(rows: list[dict[str, object]]) -> list[object]:
    return [values["text"] for values in rows]


def test_the_test_sets_of_other_tasks_count_when_named(task: Callable[..., str], tmp_path: Path) -> None:
    shared = row("a prompt that another task is measured on", 1)
    mine = task(train=[*unlike(20), shared], validation=[*unlike(5, 40), shared], test=unlike(5, 60))
    other = task(train=[shared], test=[shared])
    assert len(load_task(mine, tmp_path).of("validation")) == 6
    found = load_task(mine, tmp_path, against=[mine, other])
    assert [found.left_out["one", split].exact for split in ("train", "validation", "test")] == [1, 1, 0]
    assert len(found.of("train")) == 20


def test_a_narrowed_task_is_compared_with_its_other_sources_when_named(tmp_path: Path) -> None:
    shared = row("a prompt that another source is measured on", 1)
    for name, rows in {"a_train": [*unlike(20), shared], "a_test": unlike(5, 60), "b_test": [shared]}.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    parts = [
        Source("a", train=Part("a_train.jsonl"), test=Part("a_test.jsonl")),
        Source("b", test=Part("b_test.jsonl")),
    ]
    register_task("tests/parts", Task("tests/parts", ("harm",), tuple(parts)))
    try:
        n_leaks = [
            sum(load_task("tests/parts", tmp_path, sources=sources, against=against).left_out_of(split).exact
                for split in ("train", "validation"))
            for sources, against in (((), ()), (["a"], ()), (["a"], ["tests/parts"]))
        ]  # fmt: skip
        assert n_leaks == [1, 0, 1]
        assert len(rows_of_tests(["tests/parts"], tmp_path)) == 6
        assert len(rows_of_tests(["tests/parts"], tmp_path, sources=["a"])) == 5
    finally:
        TASKS.unregister("tests/parts")


def test_bad_lines_are_skipped_and_named(task: Callable[..., str], tmp_path: Path) -> None:
    """1% broken lines, of every kind; the rest is used."""
    good = unlike(396)
    bad = [b"{broken", b'{"text": "\xff\xfe", "label": 1}', json.dumps(row("a", 2)).encode(), row("  ", 1)]
    rows: list[object] = list(good)
    for index, line in enumerate(bad):
        rows.insert(100 * index, line)
    found = load_task(task(train=rows, validation=unlike(4, 1000)), tmp_path)
    assert len(found.of("train")) == 396
    assert [line.line for line in found.left_out["one", "train"].bad] == [1, 101, 201, 301]
    problems = [line.problem for line in found.bad("train")]
    assert [problem.startswith("one: ") for problem in problems] == [True] * 4
    for problem, words in zip(
        problems, ("not JSON", "not UTF-8", "expected 0 or 1", "text that is not empty"), strict=True
    ):
        assert words in problem
    assert found.bad("validation") == []


# ---- columns ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "columns", "expected"),
    [
        (Fields(label=("verdict",), values={"safe": 0, "unsafe": 1}), {"verdict": "unsafe"}, 1.0),
        (Fields(label=("is_safe",), values={True: 0, False: 1}), {"is_safe": True}, 0.0),
        (Fields(values={1: 0, 0: 1}), {"label": 1}, 0.0),
        (Fields(label=("a", "b"), above=5.5), {"a": 3, "b": 2.6}, 1.0),
        (Fields(label=("a", "b"), above=5.5), {"a": 3, "b": 2.5}, 0.0),
    ],
)
def test_labels_come_from_columns_as_data(
    task: Callable[..., str], tmp_path: Path, fields: Fields, columns: dict[str, object], expected: float
) -> None:
    found = load_task(task(fields=fields, test=[{"text": "x", **columns}]), tmp_path)
    assert [example.labels for example in found.of("test")] == [(expected,)]


@pytest.mark.parametrize(
    ("fields", "columns", "problem"),
    [
        (Fields(label=("verdict",), values={"safe": 0}), {"verdict": "maybe"}, "'verdict' is 'maybe'; expected one of"),
        (Fields(label=("verdict",), values={"safe": 0}), {"verdict": None}, "'verdict' is None"),
        (Fields(label=("verdict",), values={"safe": 0}), {"verdict": ["safe"]}, "'verdict' is"),
        (Fields(label=("a", "b"), above=5.5), {"a": 3}, "a and b must be numbers"),
        (Fields(label=("a", "b"), above=5.5), {"a": 3, "b": float("nan")}, "a and b must be numbers"),
        (Fields(), {"label": 2}, "expected 0 or 1"),
        (Fields(), {}, "expected 0 or 1"),
        (Fields(texts={"prompt": "question"}), {"label": 1}, "'prompt' must be text"),
    ],
)
def test_what_is_outside_the_set_is_a_bad_row(
    task: Callable[..., str], tmp_path: Path, fields: Fields, columns: dict[str, object], problem: str
) -> None:
    found = load_task(task(fields=fields, test=[{"text": "x", **columns}]), tmp_path)
    assert found.of("test") == []
    assert problem in found.bad("test")[0].problem


def test_columns_become_messages(task: Callable[..., str], tmp_path: Path) -> None:
    fields = Fields(texts={"document": "doc", "summary": "claim"})
    found = load_task(task(fields=fields, test=[{"doc": "d", "claim": "c", "text": "?", "label": 0}]), tmp_path)
    assert [(turn.role, turn.content) for turn in found.of("test")[0].messages] == [("user", "d"), ("assistant", "c")]


# ---- categories under one head ---------------------------------------------------------------------------------------


def test_rows_of_sources_without_categories_are_unknown_not_harmless(tmp_path: Path) -> None:
    places = {"named": Annotation("category", "beavertails"), "plain": None}
    for name in places:
        for split in ("train", "validation", "test"):
            rows = [
                {**values, "text": f"{name} {split} {values['text']}", "category": "privacy_violation"}
                for values in unlike(8, len(split) * 10)
            ]
            (tmp_path / f"{name}_{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    sources = tuple(
        Source(
            name,
            *(Part(f"{name}_{split}.jsonl") for split in ("train", "validation", "test")),
            fields=Fields(categories=annotation),
        )
        for name, annotation in places.items()
    )
    register_task("tests/named", Task("tests/named", ("harm",), sources))
    try:
        found = load_task("tests/named", tmp_path, labels=("harm", "privacy", "hate", "elections"))
    finally:
        TASKS.unregister("tests/named")
    assert found.task.labels == ("harm", "privacy")
    assert found.unsupported == ("hate", "elections")  # hate is only ever 0, elections never known
    assert {row.labels for row in found.rows["named", "train"]} == {(0.0, 0.0), (1.0, 1.0)}
    assert all(math.isnan(row.labels[1]) for row in found.rows["plain", "train"])
    assert {row.labels[0] for row in found.rows["plain", "train"]} == {0.0, 1.0}


def test_the_first_label_is_the_tasks_own(task: Callable[..., str], tmp_path: Path) -> None:
    name = task(test=unlike(2))
    with pytest.raises(ConfigError, match="The first label of task 'tests/task0' is 'harm'"):
        load_task(name, tmp_path, labels=("hate", "harm"))
    with pytest.raises(UnknownNameError, match="Unknown category 'hat'"):
        load_task(name, tmp_path, labels=("harm", "hat"))
