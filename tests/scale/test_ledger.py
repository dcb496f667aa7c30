"""The output folder: files are whole or absent, and one folder holds one run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from safeside.errors import InputError
from safeside.scale.ledger import MANIFEST, QUARANTINE, Ledger, begin_shard, keep_shard, open_ledger
from safeside.scale.places import TEMPORARY, Folder

SETTINGS = {"guards": {"harm": "0123"}, "preset": None}


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"row {index}"}) for index in range(25)))
    return path


def opened(rows: Path, output: Path, **changes: object) -> Ledger:
    return open_ledger(str(rows), str(output), {**SETTINGS, **changes}, 10)


@pytest.mark.parametrize("place", ["memory://whole", "{folder}/deep/down"])
def test_a_file_is_there_as_a_whole_or_not_at_all(tmp_path: Path, place: str) -> None:
    def breaking() -> Iterator[bytes]:
        yield b"half"
        raise OSError("the disk is full")

    folder = Folder(place.format(folder=tmp_path))
    assert folder.names() == []
    folder.write("a/b.txt", [b"old"])
    with pytest.raises(InputError, match=r"b\.txt cannot be written: the disk is full"):
        folder.write("a/b.txt", breaking())
    assert folder.read("a/b.txt") == b"old"
    folder.write("a/b.txt", [b"n", b"ew"])
    assert folder.read("a/b.txt") == b"new"
    assert folder.names("a") == ["b.txt"]
    folder.clear_temporary()
    folder.remove("none")
    assert folder.names() == ["a"]


def test_a_run_is_planned_once_and_then_found_again(rows: Path, tmp_path: Path) -> None:
    first = opened(rows, tmp_path / "out")
    assert [(shard.span.first, shard.span.n_rows) for shard in first.shards] == [(1, 10), (11, 10), (21, 5)]
    keep_shard(first.folder, first.shards[1], b"{}\n", [{"line": 12, "problem": "odd"}])
    again = opened(rows, tmp_path / "out")
    assert again.shards == first.shards
    assert again.done() == {1}
    assert again.finish() == 1
    assert json.loads((tmp_path / "out" / QUARANTINE).read_text()) == {"line": 12, "problem": "odd"}


def test_bad_rows_of_an_attempt_that_was_killed_are_forgotten(rows: Path, tmp_path: Path) -> None:
    """Killed between quarantine and part, and scored anew without bad rows."""
    ledger = opened(rows, tmp_path / "out")
    keep_shard(ledger.folder, ledger.shards[0], b"{}\n", [{"line": 1}])
    keep_shard(ledger.folder, ledger.shards[0], b"{}\n", [])
    assert ledger.finish() == 0
    assert QUARANTINE not in ledger.folder.names()


def test_rows_that_kill_every_worker_end_the_run(rows: Path, tmp_path: Path) -> None:
    ledger = opened(rows, tmp_path / "out")
    for _ in range(3):
        begin_shard(ledger.folder, ledger.shards[1])
    begin_shard(ledger.folder, ledger.shards[0])
    with pytest.raises(InputError, match=r"3 workers died while they scored lines 11 to 20 of .*rows\.jsonl"):
        begin_shard(ledger.folder, ledger.shards[1])
    begin_shard(opened(rows, tmp_path / "out").folder, ledger.shards[1])  # of another run of the command


@pytest.mark.parametrize(
    ("changes", "problem"),
    [({"preset": "strict"}, "a run with preset None; this one has 'strict'"), ({"guards": {}}, "a run with guards")],
)
def test_another_run_is_refused(rows: Path, tmp_path: Path, changes: dict[str, object], problem: str) -> None:
    opened(rows, tmp_path / "out", preset="balanced")  # it kept nothing
    ledger = opened(rows, tmp_path / "out")
    keep_shard(ledger.folder, ledger.shards[0], b"{}\n", [])
    with pytest.raises(InputError, match=problem):
        opened(rows, tmp_path / "out", **changes)
    with pytest.raises(InputError, match="a run with shard_rows 10; this one has 5"):
        open_ledger(str(rows), str(tmp_path / "out"), SETTINGS, 5)


def test_input_that_was_changed_is_refused(rows: Path, tmp_path: Path) -> None:
    ledger = opened(rows, tmp_path / "out")
    keep_shard(ledger.folder, ledger.shards[0], b"{}\n", [])
    with rows.open("a") as handle:
        handle.write("\n{}")
    with pytest.raises(InputError, match=r"rows.jsonl was changed since"):
        opened(rows, tmp_path / "out")


def test_a_folder_of_something_else_is_refused(rows: Path, tmp_path: Path) -> None:
    (tmp_path / TEMPORARY).mkdir()
    with pytest.raises(InputError, match=r"holds 'rows\.jsonl' and no bulk run"):
        opened(rows, tmp_path)
    assert (tmp_path / TEMPORARY).is_dir()  # it may be somebody else's
    with pytest.raises(InputError, match="is a file; expected a folder"):
        opened(rows, rows)
    out = tmp_path / "out"
    ledger = opened(rows, out)
    keep_shard(ledger.folder, ledger.shards[0], b"{}\n", [])
    for damaged in ("[", "[]", "{}", json.dumps({**json.loads((out / MANIFEST).read_text()), "shards": [{}]})):
        (out / MANIFEST).write_text(damaged)
        with pytest.raises(InputError, match="is damaged"):
            opened(rows, out)


def test_input_without_a_row_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("\n \n")
    with pytest.raises(InputError, match="holds no row"):
        opened(tmp_path / "rows.jsonl", tmp_path / "out")
