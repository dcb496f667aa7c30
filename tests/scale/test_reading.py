"""Shards: every row of every file is in exactly one, in whatever order they are read."""

from __future__ import annotations

import json
import random
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from command_line import write
from safeside.errors import InputError
from safeside.scale.reading import ADDED, LineReader, Shard, Span, TableReader, as_json, find_files, open_reader
from safeside.tasks.rows import BadRow


def parquet(path: Path, n_rows: int, group: int = 100, **columns: list[object]) -> Path:
    table = pa.table({"text": [f"row {index}" for index in range(n_rows)], **columns})
    pq.write_table(table, path, row_group_size=group)
    return path


def read_in_any_order(file: Path, size: int, seed: int) -> list[tuple[int, str]]:
    """Lines and texts of all shards, sorted by line; each shard holds what was planned."""
    spans = list(open_reader(str(file)).spans(size))
    random.Random(seed).shuffle(spans)
    reader, found = open_reader(str(file)), []
    for span in spans:
        rows = reader.read(span).rows
        assert len(rows) == span.n_rows <= size
        found += [(line, str(values["text"])) for line, values in rows]
    return sorted(found)


@settings(max_examples=30)
@given(n_rows=st.integers(1, 60), size=st.integers(1, 70), group=st.integers(1, 40), seed=st.integers(0, 9))
def test_every_row_of_parquet_is_in_one_shard(
    tmp_path_factory: pytest.TempPathFactory, n_rows: int, size: int, group: int, seed: int
) -> None:
    path = parquet(tmp_path_factory.mktemp("rows") / "rows.parquet", n_rows, group)
    assert read_in_any_order(path, size, seed) == [(index + 1, f"row {index}") for index in range(n_rows)]


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
@settings(max_examples=30)
@given(blank=st.lists(st.booleans(), min_size=1, max_size=40), size=st.integers(1, 50), seed=st.integers(0, 9))
def test_every_line_that_is_a_row_is_in_one_shard(
    tmp_path_factory: pytest.TempPathFactory, suffix: str, blank: list[bool], size: int, seed: int
) -> None:
    rows = ["  " if is_blank else {"text": f"caf\u00e9 {index}"} for index, is_blank in enumerate(blank)]
    path = write(tmp_path_factory.mktemp("rows") / f"rows{suffix}", rows)
    expected = [(index + 1, f"caf\u00e9 {index}") for index, is_blank in enumerate(blank) if not is_blank]
    assert read_in_any_order(path, size, seed) == expected


def test_a_shard_of_a_later_row_group_leaves_the_earlier_ones_unread(tmp_path: Path) -> None:
    reader = open_reader(str(parquet(tmp_path / "rows.parquet", 100, group=10)))
    assert isinstance(reader, TableReader)
    assert reader.read(Span(1, 3, 3)).rows[0] == (1, {"text": "row 0"})
    assert reader.read(Span(95, 2, 2)).rows == [(95, {"text": "row 94"}), (96, {"text": "row 95"})]
    assert reader.position == 96
    assert reader.rest is not None
    assert reader.rest.num_rows == 4  # of the last group alone


def test_a_file_a_folder_a_pattern_and_a_url_are_found(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "_old").mkdir()
    first, second = write(tmp_path / "a.jsonl", [{}]), parquet(tmp_path / "deep" / "b.parquet", 1)
    for passed_over in ("notes.txt", ".hidden.jsonl", "_old/c.jsonl"):
        (tmp_path / passed_over).write_text("x")
    assert find_files(str(first)) == [str(first)]
    assert find_files(f"{tmp_path}/") == find_files(f"file://{tmp_path}") == [str(first), str(second)]
    assert find_files(f"{tmp_path}/deep/*.parquet") == [str(second)]
    with fsspec.open("memory://rows/a.jsonl", "wb") as handle:
        handle.write(b'{"text": "hi"}\n')
    (url,) = find_files("memory://rows")
    assert open_reader(url).read(Span(1, 1, 1)).rows == [(1, {"text": "hi"})]
    assert url == "memory://rows/a.jsonl"


@pytest.mark.parametrize(
    ("place", "problem"),
    [
        ("none.jsonl", "There is no file .*none.jsonl"),
        ("*.parquet", "There is no file"),
        ("notes.txt", "holds no rows by its name"),
        ("gone://bucket/rows.parquet", "cannot be opened: .*gone"),
    ],
)
def test_a_place_without_rows_is_told(tmp_path: Path, place: str, problem: str) -> None:
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(InputError, match=problem):
        find_files(place if "://" in place else str(tmp_path / place))


@pytest.mark.parametrize("name", ["rows.parquet", "rows.jsonl.gz"])
def test_a_damaged_file_is_told(tmp_path: Path, name: str) -> None:
    whole = parquet(tmp_path / name, 500) if name.endswith("t") else write(tmp_path / name, [{"text": "x"}] * 500)
    whole.write_bytes(whole.read_bytes()[:-20])
    with pytest.raises(InputError, match=f"{name} cannot be read"):
        list(open_reader(str(whole)).spans(10))


def test_what_scoring_adds_may_not_be_there_already(tmp_path: Path) -> None:
    path = parquet(tmp_path / "rows.parquet", 2, line=[1, 2])
    with pytest.raises(InputError, match="has a column 'line' already"):
        list(open_reader(str(path)).spans(10))
    reader = open_reader(str(write(tmp_path / "rows.jsonl", [{"text": "a", "verdicts": []}, {"text": "b"}])))
    assert isinstance(reader, LineReader)
    part = reader.read(Span(1, 2, 2))
    assert part.rows == [BadRow(1, "it has 'verdicts' already, which scoring adds; rename it"), (2, {"text": "b"})]
    assert part.original(0) == '{"text": "a", "verdicts": []}'


def broken_text(*texts: bytes) -> pa.Array:
    """A column of text that is not valid everywhere, as other writers leave it."""
    whole = pa.array([*texts], pa.binary())
    return pa.Array.from_buffers(pa.string(), len(texts), whole.buffers())


def unreadable(path: Path) -> Path:
    """Three rows: the first one's text is none, and no value of two other columns has a form in Python."""
    table = pa.table({
        "text": broken_text(b"\xff\xfe", b"one", b"two"),
        "summary": broken_text(b"fine", b"\xff", b"fine"),
        "day": pa.array([10**9, 1, None], pa.int32()).cast(pa.date32()),
        "when": pa.array([0, 1, 2], pa.timestamp("us", tz="Mars/Olympus")),
        "share": [0.5, float("nan"), float("inf")],
    })  # fmt: skip
    pq.write_table(table, path)
    return path


def test_what_python_cannot_hold_spoils_its_own_row_and_only_where_it_is_read(tmp_path: Path) -> None:
    path = unreadable(tmp_path / "rows.parquet")
    part = open_reader(str(path)).read(Span(1, 3, 3))
    bad, *good = part.rows
    assert isinstance(bad, BadRow)
    assert (bad.line, "column 'text' cannot be read: 'utf-8' codec" in bad.problem) == (1, True)
    assert [(line, values["text"]) for line, values in good] == [(2, "one"), (3, "two")]
    day, when = "<value out of range: 1000000000>", "1970-01-01 00:00:00.000000Z"
    assert part.original(0) == {"text": "\ufffd\ufffd", "summary": "fine", "day": day, "when": when, "share": 0.5}
    lines = [{"line": line, "verdicts": []} for line in (1, 2, 3)]
    (tmp_path / "scored.parquet").write_bytes(part.scored(lines, str(path)))
    scored, before = pq.read_table(tmp_path / "scored.parquet"), pq.read_table(path)
    same = [name for name in before.schema.names if name != "share"]  # NaN equals nothing
    assert scored.select(same).equals(before.select(same))
    assert scored["line"].to_pylist() == [1, 2, 3]


def test_what_is_read_of_a_row_is_of_its_shape(tmp_path: Path) -> None:
    table = pa.table({"prompt": ["hi"], "response": ["ho"], "text": broken_text(b"\xff"), "label": [1]})
    pq.write_table(table, tmp_path / "rows.parquet")
    ((_, values),) = open_reader(str(tmp_path / "rows.parquet")).read(Span(1, 1, 1)).rows
    assert (values["prompt"], values["response"]) == ("hi", "ho")


def test_numbers_that_are_no_json_come_out_as_null(tmp_path: Path) -> None:
    texts = ['{"text": "a", "loss": NaN, "all": [1.5, -Infinity]}', '{"text": "b", "loss": 1e999}', '{"text": "c"}']
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(texts))
    part = open_reader(str(path)).read(Span(1, 3, 3))
    written = part.scored([{"line": line, "verdicts": []} for line in (1, 2, 3)], "f").decode().splitlines()

    def refused(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    found = [json.loads(line, parse_constant=refused) for line in written]
    assert [row.get("loss", "none") for row in found] == [None, None, "none"]
    assert found[0]["all"] == [1.5, None]
    assert as_json({"when": Path("x"), "loss": float("nan")}) == '{"when": "x", "loss": null}'


def test_parts_keep_every_column_and_its_type(tmp_path: Path) -> None:
    columns = {"id": pa.array([7, 8], pa.int16()), "when": pa.array([0, None], pa.timestamp("ns")), "none": [None] * 2}
    part = open_reader(str(parquet(tmp_path / "rows.parquet", 2, **columns))).read(Span(1, 2, 2))
    line, values = part.rows[1]
    assert (line, values["text"], [*values]) == (
        2,
        "row 1",
        ["text", "id"],
    )  # what is null is not there: keys tell shapes
    assert part.original(1) == {"text": "row 1", "id": 8}
    (tmp_path / "scored.parquet").write_bytes(
        part.scored([{"line": 1, "verdicts": []}, {"line": 2, "verdicts": []}], "f")
    )
    scored = pq.read_table(tmp_path / "scored.parquet")
    assert scored.schema.names == ["text", "id", "when", "none", *ADDED]
    assert scored.schema.field("id").type == pa.int16()
    assert scored.schema.field("when").type == pa.timestamp("ns")
    assert Shard(12, "a/rows.parquet", Span(1, 2, 2)).part == "part-000012.parquet"
    assert Shard(12, "a/rows.jsonl.gz", Span(1, 2, 2)).part == "part-000012.jsonl"
