"""A patched folder keeps what was before it, and gives it back bit for bit."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kills_for_tests import KilledError, kill_at
from safeside import Adapter, Base, Message, load_adapter, save_adapter
from safeside.artifact import WEIGHTS_FILE, read_checksum
from safeside.errors import FormatError, InputError, SafesideError
from safeside.guards.versions import BEFORE, count_versions, output_of, roll_back, save_patched, stored_dtype
from safeside.staging import writing
from safeside.tasks.learnt import are_learnt, load_learnt, save_learnt
from safeside.types import Example


def sums(folder: Path) -> dict[str, str]:
    """sha256 of every file under ``folder``, by its path there."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def changed(guard: Adapter, by: float) -> Adapter:
    with torch.no_grad():
        guard.head.linear.bias.add_(by)
    return guard


@pytest.fixture
def folder(tiny_base: Base, random_guard: Callable[..., Adapter], tmp_path: Path) -> Path:
    return save_adapter(random_guard(tiny_base), tmp_path / "harm", tiny_base, dtype=torch.bfloat16)


def test_two_patches_are_rolled_back_one_after_the_other(tiny_base: Base, folder: Path) -> None:
    states = [sums(folder)]
    for by in (1.0, 2.0):
        save_patched(changed(load_adapter(folder, tiny_base), by), folder, folder, tiny_base, {"by": str(by)})
        states.append(sums(folder))
    assert len({state[WEIGHTS_FILE] for state in states}) == 3
    assert count_versions(folder) == 2
    for state in states[1::-1]:
        assert roll_back(folder, folder) == folder
        assert sums(folder) == state
    assert count_versions(folder) == 0
    load_adapter(folder, tiny_base)


def test_of_two_patches_at_once_the_later_one_is_refused(tiny_base: Base, folder: Path) -> None:
    """Else the first one's work would be lost, and ``before/`` would say that it is in the newest version."""
    loaded = read_checksum(folder)
    first, second = (changed(load_adapter(folder, tiny_base), by) for by in (1.0, 2.0))
    save_patched(first, folder, folder, tiny_base, {}, loaded=loaded)
    now = sums(folder)
    with pytest.raises(InputError, match="has changed since this run began"):
        save_patched(second, folder, folder, tiny_base, {}, loaded=loaded)
    assert sums(folder) == now
    save_patched(second, folder, folder, tiny_base, {}, loaded=read_checksum(folder))
    assert count_versions(folder) == 2


def test_the_rows_of_a_patch_join_the_record_and_leave_it(tiny_base: Base, folder: Path) -> None:
    rows = [Example((Message("user", text),), (1.0,)) for text in ("a", "b")]
    save_learnt(folder, rows[:1])
    save_patched(changed(load_adapter(folder, tiny_base), 1.0), folder, folder, tiny_base, {}, learnt=rows[1:])
    assert are_learnt(rows, load_learnt(folder)) == [True, True]
    roll_back(folder, folder)
    assert are_learnt(rows, load_learnt(folder)) == [True, False]


def test_the_patched_weights_keep_the_stored_dtype(tiny_base: Base, folder: Path) -> None:
    assert stored_dtype(folder) == torch.bfloat16
    save_patched(changed(load_adapter(folder, tiny_base), 1.0), folder, folder, tiny_base, {})
    assert {tensor.dtype for tensor in load_file(folder / WEIGHTS_FILE).values()} == {torch.bfloat16}


def test_another_folder_leaves_the_first_as_it_was(tiny_base: Base, folder: Path, tmp_path: Path) -> None:
    before, new, back = sums(folder), tmp_path / "new", tmp_path / "back"
    save_patched(changed(load_adapter(folder, tiny_base), 1.0), folder, new, tiny_base, {})
    patched = sums(new)
    roll_back(new, back)
    assert sums(folder) == before == sums(back)
    assert sums(new) == patched


def test_a_patch_to_another_folder_waits_for_who_writes_to_its_source(
    tiny_base: Base, folder: Path, tmp_path: Path
) -> None:
    """It copies the source's files: of one that is being replaced it would get old weights with a new configuration."""
    guard = changed(load_adapter(folder, tiny_base), 1.0)
    with ThreadPoolExecutor(1) as pool:
        with writing(folder):
            job = pool.submit(save_patched, guard, folder, tmp_path / "new", tiny_base, {})
            with pytest.raises(TimeoutError):
                job.result(timeout=0.5)
            assert not (tmp_path / "new" / WEIGHTS_FILE).exists()
        job.result(timeout=60)
    assert sums(tmp_path / "new" / BEFORE) == sums(folder)


def test_other_files_in_the_folder_stay(tiny_base: Base, folder: Path) -> None:
    (folder / "notes.txt").write_text("mine")
    save_patched(changed(load_adapter(folder, tiny_base), 1.0), folder, folder, tiny_base, {})
    roll_back(folder, folder)
    assert (folder / "notes.txt").read_text() == "mine"


def test_what_a_killed_run_left_is_cleared_away(tiny_base: Base, folder: Path) -> None:
    before = sums(folder)
    (folder / ".patch" / BEFORE).mkdir(parents=True)
    save_patched(changed(load_adapter(folder, tiny_base), 1.0), folder, folder, tiny_base, {})
    assert sums(roll_back(folder, folder)) == before


def rolled_back(folder: Path) -> list[str]:
    """The weights' sums of all versions, newest first, as one rollback after the other gives them."""
    found = []
    while True:
        try:
            found.append(weights_of(roll_back(folder, folder)))
        except InputError:
            return found


def weights_of(folder: Path) -> str:
    return sums(folder)[WEIGHTS_FILE]


@pytest.mark.parametrize("step", range(28))
def test_a_patch_killed_at_any_step_loses_no_version(
    tiny_base: Base, folder: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """And the folder loads as what it was before the patch, or as what it is after."""
    versions = [weights_of(folder)]
    for by in (1.0, 2.0):
        save_patched(changed(load_adapter(folder, tiny_base), by), folder, folder, tiny_base, {})
        versions.insert(0, weights_of(folder))
    guard = changed(load_adapter(folder, tiny_base), 3.0)
    with monkeypatch.context() as patched:
        kill_at(patched, step)
        with pytest.raises(KilledError):
            save_patched(guard, folder, folder, tiny_base, {})
    load_adapter(folder, tiny_base)
    patched_weights = weights_of(save_adapter(guard, folder / "apart", dtype=torch.bfloat16))
    found = [weights_of(folder), *rolled_back(folder)]
    assert found in (versions, [versions[0], *versions], [patched_weights, *versions])


@pytest.mark.parametrize("step", range(27))
def test_a_rollback_killed_at_any_step_loses_no_older_version(
    tiny_base: Base, folder: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    versions = [weights_of(folder)]
    for by in (1.0, 2.0, 3.0):
        save_patched(changed(load_adapter(folder, tiny_base), by), folder, folder, tiny_base, {})
        versions.insert(0, weights_of(folder))
    with monkeypatch.context() as patched:
        kill_at(patched, step)
        with pytest.raises(KilledError):
            roll_back(folder, folder)
    load_adapter(folder, tiny_base)
    assert weights_of(folder) in versions[:2]
    found = rolled_back(folder)
    assert found in (versions[1:], versions[2:])


def test_an_unpatched_folder_cannot_be_rolled_back(folder: Path) -> None:
    before = sums(folder)
    with pytest.raises(InputError, match="keeps no earlier version"):
        roll_back(folder, folder)
    assert sums(folder) == before
    with pytest.raises(InputError, match="There is no folder"):
        roll_back(folder / "missing", folder)


def test_a_damaged_earlier_version_is_not_put_back(tiny_base: Base, folder: Path) -> None:
    save_patched(changed(load_adapter(folder, tiny_base), 1.0), folder, folder, tiny_base, {})
    weights = folder / BEFORE / WEIGHTS_FILE
    content = bytearray(weights.read_bytes())
    content[-2] ^= 1  # the low byte of a bfloat16: another number, and still one
    weights.write_bytes(content)
    before = sums(folder)
    with pytest.raises(FormatError, match="checksum"):
        roll_back(folder, folder)
    assert sums(folder) == before


def test_outputs_never_overwrite_another_folder(folder: Path, tmp_path: Path) -> None:
    assert output_of(str(folder), folder, None) == folder
    assert output_of(str(folder), folder, tmp_path / "new") == tmp_path / "new"
    with pytest.raises(InputError, match="exists already"):
        output_of(str(folder), folder, tmp_path)
    with pytest.raises(InputError, match="give one for the result with --output"):
        output_of("builtin:harm", folder, None)


def test_what_is_refused_leaves_no_folder_for_its_result(tiny_base: Base, folder: Path, tmp_path: Path) -> None:
    """It would stand in the way of the next try."""
    new = tmp_path / "new"
    with pytest.raises(InputError, match="keeps no earlier version"):
        roll_back(folder, new)
    assert not new.exists()
    with pytest.raises(SafesideError, match="changed"):
        save_patched(changed(load_adapter(folder, tiny_base), 1.0), folder, new, tiny_base, {}, loaded="another")
    assert not new.exists()
    with pytest.raises(InputError, match="keeps no earlier version"):
        roll_back(folder, new / "deep" / "down")
    assert not new.exists()
    new.mkdir()  # one's own stays
    with pytest.raises(InputError, match="keeps no earlier version"):
        roll_back(folder, new)
    assert new.is_dir()
