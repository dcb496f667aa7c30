"""The output folder: files are whole or absent, and one folder holds one run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from safeside.errors import InputError
from safeside.scale import ledger as ledgers
from safeside.scale.ledger import MANIFEST, QUARANTINE, WRITER, Ledger, begin_shard, keep_shard, open_ledger
from safeside.scale.places import TEMPORARY, Folder
from safeside.scale.reading import Shard

SETTINGS = {"guards": [["harm", "0123"], ["hate", "4567"]], "preset": None}


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
    assert [begin_shard(ledger.folder, ledger.shards[1]) for _ in range(3)] == [1, 2, 3]
    begin_shard(ledger.folder, ledger.shards[0])
    with pytest.raises(InputError, match=r"3 workers died while they scored lines 11 to 20 of .*rows\.jsonl"):
        begin_shard(ledger.folder, ledger.shards[1])
    begin_shard(opened(rows, tmp_path / "out").folder, ledger.shards[1])  # of another run of the command


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"preset": "strict"}, "a run with preset None; this one has 'strict'"),
        ({"guards": [["hate", "4567"], ["harm", "0123"]]}, "a run with guards"),  # in another order
    ],
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


@pytest.mark.parametrize("what", ["added", "taken away"])
def test_files_that_came_or_went_are_refused(rows: Path, tmp_path: Path, what: str) -> None:
    """A pattern that finds other files than were planned: rows would be left out without a word."""
    shutil.copy(rows, tmp_path / "rows2.jsonl")
    source, out = f"{tmp_path}/rows*.jsonl", str(tmp_path / "out")
    ledger = open_ledger(source, out, SETTINGS, 10)
    keep_shard(ledger.folder, ledger.shards[0], b"{}\n", [])
    if what == "added":
        shutil.copy(rows, tmp_path / "rows1.jsonl")
    else:
        (tmp_path / "rows2.jsonl").unlink()
    with pytest.raises(InputError, match=rf"rows\d\.jsonl was {what} since"):
        open_ledger(source, out, SETTINGS, 10)


def test_an_output_among_the_input_is_no_input(rows: Path, tmp_path: Path) -> None:
    ledger = opened(tmp_path, tmp_path / "out")
    keep_shard(ledger.folder, ledger.shards[0], b"{}\n", [])
    assert opened(tmp_path, tmp_path / "out").shards == ledger.shards


def test_a_run_whose_folder_was_taken_writes_nothing_more(rows: Path, tmp_path: Path) -> None:
    """Two commands begin in one folder before either has kept anything, or a worker outlives its command."""
    first = opened(rows, tmp_path / "out")
    second = opened(rows, tmp_path / "out", preset="strict")
    with pytest.raises(InputError, match=r"Another command has begun in .*out"):
        keep_shard(first.folder, first.shards[0], b"{}\n", [{"line": 1}])
    assert (second.done(), second.folder.names("_bad")) == (set(), [])
    keep_shard(second.folder, second.shards[0], b"{}\n", [])
    again = opened(rows, tmp_path / "out", preset="strict")
    assert again.shards == second.shards
    assert again.done() == {0}


def test_a_part_is_not_moved_to_its_place_once_the_folder_was_taken(
    rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other run begins while the part is written under its first name."""
    first = opened(rows, tmp_path / "out")
    begins, n_asked = Folder.begins, []

    def asked(folder: Folder, name: str, head: bytes) -> bool:
        n_asked.append(name)
        if len(n_asked) == 2:
            opened(rows, tmp_path / "out", preset="strict")
        return begins(folder, name, head)

    monkeypatch.setattr(Folder, "begins", asked)
    with pytest.raises(InputError, match="Another command has begun"):
        keep_shard(first.folder, first.shards[0], b"{}\n", [])
    assert first.done() == set()


def test_of_two_commands_that_go_on_with_one_run_the_first_stops(rows: Path, tmp_path: Path) -> None:
    """The second takes away what it found unfinished, so what the first one is writing may not come to its place."""
    live = opened(rows, tmp_path / "out")
    keep_shard(live.folder, live.shards[0], b"{}\n", [])
    (tmp_path / "out" / TEMPORARY / "killed").write_text("half")
    begin_shard(live.folder, live.shards[1])
    other = opened(rows, tmp_path / "out")
    with pytest.raises(
        InputError, match=r"Another command has begun in .*out\. This one has stopped: let the other end"
    ):
        keep_shard(live.folder, live.shards[1], b"live\n", [])
    for shard in other.shards[1:]:
        begin_shard(other.folder, shard)
        keep_shard(other.folder, shard, b"other\n", [])
    assert other.finish() == 0
    assert (tmp_path / "out" / live.shards[1].part).read_text() == "other\n"
    assert not (tmp_path / "out" / TEMPORARY).exists()


def test_rows_that_another_run_keeps_during_the_planning_are_not_taken_over(
    rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = opened(rows, tmp_path / "out")

    def cut(files: list[str], shard_rows: int) -> list[Shard]:
        keep_shard(first.folder, first.shards[0], b"{}\n", [])
        return list(first.shards)

    monkeypatch.setattr(ledgers, "_cut", cut)
    with pytest.raises(InputError, match=r"Another run kept rows in .*out while this one was planned"):
        opened(rows, tmp_path / "out", preset="strict")
    assert opened(rows, tmp_path / "out").done() == {0}


def test_a_plan_is_not_written_over_that_of_a_command_that_began_later(
    rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one begins between this one's name in the folder and its plan."""
    names, others = Folder.names, list[Ledger]()

    def interrupted(folder: Folder, *where: str) -> list[str]:
        found = names(folder, *where)
        if folder.has(WRITER) and not others:
            monkeypatch.setattr(Folder, "names", names)
            others.append(opened(rows, tmp_path / "out", preset="strict"))
        return found

    monkeypatch.setattr(Folder, "names", interrupted)
    with pytest.raises(InputError, match="Another command has begun in"):
        opened(rows, tmp_path / "out")
    assert json.loads((tmp_path / "out" / MANIFEST).read_text())["settings"]["preset"] == "strict"


def test_a_command_that_was_killed_before_its_plan_leaves_a_folder_that_another_may_have(
    rows: Path, tmp_path: Path
) -> None:
    Folder(str(tmp_path / "out")).write(WRITER, [b"killed"])
    assert opened(rows, tmp_path / "out").done() == set()


def test_files_are_replaced_where_nothing_moves_onto_a_name_that_is_taken(
    rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bad rows are gathered again each time a command ends."""
    moved = MemoryFileSystem.mv

    def strict(files: MemoryFileSystem, source: str, target: str, **options: object) -> None:
        if files.exists(target):
            raise FileExistsError(target)
        moved(files, source, target, **options)

    monkeypatch.setattr(MemoryFileSystem, "mv", strict)
    for _ in range(2):
        found = open_ledger(str(rows), "memory://strict", SETTINGS, 10)
        keep_shard(found.folder, found.shards[0], b"{}\n", [{"line": 3}])
        assert found.finish() == 1
    assert found.folder.read(QUARANTINE) == b'{"line": 3}\n'


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
