"""Files are put into a folder together, or not at all."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import sleep

import pytest

from kills_for_tests import KilledError, kill_at
from safeside.errors import FormatError
from safeside.staging import empty_stage, finish_replacing, put_in_place, seal, writing

NAMES = ("one", "two", "three")
OLD, NEW = {"one": "old", "three": "old", "mine": "kept"}, {"one": "new", "two": "new"}  # so "three" goes


def fill(folder: Path, contents: dict[str, str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        (folder / name).write_text(content)
    return folder


def contents_of(folder: Path) -> dict[str, str]:
    return {file.name: file.read_text() for file in folder.iterdir() if file.is_file()}


def test_files_take_the_place_of_others_and_the_rest_stays(tmp_path: Path) -> None:
    folder = fill(tmp_path / "folder", OLD)
    stage = fill(empty_stage(folder / "stage"), NEW)
    put_in_place(stage, folder, NAMES)
    assert contents_of(folder) == {**NEW, "mine": "kept"}
    assert [file for file in folder.iterdir() if file.is_dir()] == []


@pytest.mark.parametrize("step", range(8))
def test_a_kill_at_any_step_leaves_the_old_files_or_the_new_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    folder = fill(tmp_path / "folder", OLD)
    stage = fill(empty_stage(folder / "stage"), NEW)
    with monkeypatch.context() as patched:
        kill_at(patched, step)
        with pytest.raises(KilledError):
            put_in_place(stage, folder, NAMES)
    finish_replacing(folder, NAMES)
    assert contents_of(folder) == (OLD if step == 0 else {**NEW, "mine": "kept"})


@pytest.mark.parametrize("attempt", range(20))
def test_a_killed_run_is_finished_by_several_processes_at_once(tmp_path: Path, attempt: int) -> None:
    folder = fill(tmp_path / "folder", OLD)
    seal(fill(folder / ".new", NEW))
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(finish_replacing, [folder] * 8, [NAMES] * 8))
    assert contents_of(folder) == {**NEW, "mine": "kept"}


def test_what_a_killed_run_left_is_finished_before_newer_files_come(tmp_path: Path) -> None:
    folder = fill(tmp_path / "folder", OLD)
    seal(fill(folder / ".new", {"three": "never seen"}))
    put_in_place(fill(empty_stage(folder / "stage"), NEW), folder, NAMES)
    assert contents_of(folder) == {**NEW, "mine": "kept"}


def test_a_stage_is_empty(tmp_path: Path) -> None:
    stage = fill(tmp_path / "folder" / "stage", OLD)
    assert list(empty_stage(stage).iterdir()) == []


def test_files_that_cannot_be_put_in_place_are_an_error_and_wait(tmp_path: Path) -> None:
    folder = fill(tmp_path / "folder", {"one": "old"})
    (folder / "two").mkdir()
    stage = fill(empty_stage(folder / "stage"), NEW)
    with pytest.raises(
        FormatError, match=r"belong in their places and cannot be put there: .* Make the folder writable"
    ):
        put_in_place(stage, folder, NAMES)
    shutil.rmtree(folder / "two")
    finish_replacing(folder, NAMES)
    assert contents_of(folder) == NEW


@pytest.mark.parametrize("is_sealed", [False, True])
def test_a_folder_that_is_not_whole_changes_nothing(tmp_path: Path, is_sealed: bool) -> None:
    """As a copy that was broken off leaves one."""
    folder = fill(tmp_path / "folder", OLD)
    new = fill(folder / ".new", NEW if is_sealed else {})
    if is_sealed:
        seal(new)
        (new / "two").write_text("ne")
    finish_replacing(folder, NAMES)
    assert contents_of(folder) == OLD
    put_in_place(fill(empty_stage(folder / "stage"), NEW), folder, NAMES)
    assert contents_of(folder) == {**NEW, "mine": "kept"}


@pytest.mark.parametrize("is_two", [False, True])
def test_who_writes_to_a_folder_waits_for_who_does(tmp_path: Path, is_two: bool) -> None:
    """Whoever wants two folders, in whatever order they are named and by whatever path, waits for both."""
    order = []
    (tmp_path / "other").mkdir()
    more = [tmp_path / "other", tmp_path / "other" / ".." / "other"] if is_two else []

    def write(name: str) -> None:
        folders = [tmp_path, *more] if name in "ab" else [*more, tmp_path]
        with writing(*folders):
            order.append(name)
            sleep(0.02)
            order.append(name)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, "abcd"))
    assert order[::2] == order[1::2]
    assert sorted(order[::2]) == list("abcd")
