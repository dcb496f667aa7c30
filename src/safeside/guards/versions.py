"""Patched adapters and the way back: a folder keeps the version before its last patch in ``before/``, file by file.

``before/`` is an adapter folder itself, with a ``before/`` of its own after a second patch.  Rolling back copies its
files, so weights, thresholds and card are what they were bit for bit.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from safeside.adapters.adapter import Adapter
from safeside.artifact import (
    FILES,
    find_adapter,
    make_folder,
    read_adapter,
    require_new,
    require_unchanged,
    save_adapter,
)
from safeside.base.model import Base
from safeside.errors import InputError
from safeside.staging import empty_stage, finish_replacing, put_in_place, writing
from safeside.tasks.learnt import save_learnt
from safeside.types import Example

BEFORE = "before"
_STAGE = ".patch"
_FILES = "files"  # in the stage: what the folder is to hold
_OLDER, _UNDONE = "older", "undone"  # there too: the versions before a patch, and the one that a rollback put back


def count_versions(folder: Path) -> int:
    """How many earlier versions ``folder`` keeps: the patches that can be rolled back."""
    return 1 + count_versions(folder / BEFORE) if (folder / BEFORE).is_dir() else 0


def stored_dtype(folder: Path) -> torch.dtype:
    """What the weights in ``folder`` are stored in."""
    _, weights = read_adapter(folder)
    return next(iter(weights.values())).dtype


def output_of(adapter_name: str, source: Path, output: Path | None) -> Path:
    """Where a patched or rolled back adapter goes; an InputError where that would overwrite anything else."""
    if output is None:
        if source != Path(adapter_name):
            raise InputError(
                f"{adapter_name!r} is not a folder of yours; give one for the result with --output FOLDER."
            )
        return source
    if output.resolve() != source.resolve():
        require_new(output)
    return output


def save_patched(
    adapter: Adapter,
    source: Path,
    output: Path,
    base: Base,
    facts: Mapping[str, str],
    *,
    learnt: Sequence[Example] = (),
    loaded: str | None = None,
) -> Path:
    """Write the patched ``adapter`` to ``output`` in the dtype of ``source``, whose version is kept in ``before/``.

    ``learnt`` are the rows behind the patch, which join the record of the others.
    ``output`` may be ``source`` itself.  The old version is in ``before/`` before the new one holds, so a kill in
    between leaves a folder that loads as one of the two and loses no version.  ``loaded`` is as for
    ``require_unchanged``; where the source has changed nothing is written.
    """
    with _made(output), writing(source, output):
        for folder in {source, output}:
            _finish_killed(folder)
        require_unchanged(source, loaded)
        stage = empty_stage(output / _STAGE)
        save_adapter(adapter, stage / _FILES, base, facts, dtype=stored_dtype(source))
        save_learnt(stage / _FILES, learnt, before=source)
        _copy_version(source, stage / BEFORE)
        if (output / BEFORE).is_dir():
            (output / BEFORE).rename(stage / _OLDER)
        (stage / BEFORE).rename(output / BEFORE)
        put_in_place(stage / _FILES, output, FILES)
        shutil.rmtree(stage)
    return output


def roll_back(folder: Path, output: Path) -> Path:
    """Put the version before the last patch of ``folder`` into ``output`` (which may be ``folder``), bit for bit.

    A folder without an earlier version is an InputError, a damaged one a FormatError; then nothing is changed.
    """
    if not folder.is_dir():
        raise InputError(f"There is no folder {folder}; expected one that `safeside patch` wrote. Check the path.")
    with _made(output), writing(folder, output):
        return _roll_back(folder, output)


@contextmanager
def _made(output: Path) -> Iterator[None]:
    """``output`` is there, made if missing; folders that were made go again where nothing came into them."""
    made = [place for place in (output, *output.parents) if not place.exists()]
    make_folder(output)
    try:
        yield
    finally:
        for place in made:
            with suppress(OSError):  # something is in it
                place.rmdir()


def _roll_back(folder: Path, output: Path) -> Path:
    _finish_killed(folder)
    before = folder / BEFORE
    if not before.is_dir():
        raise InputError(
            f"{folder} keeps no earlier version; expected a folder that `safeside patch` wrote. It was never patched, "
            "was rolled back already, or came from the model hub, where only the newest version goes."
        )
    read_adapter(before)
    stage = empty_stage(output / _STAGE)
    _copy_files(before, stage / _FILES)
    if (before / BEFORE).is_dir():
        _copy_version(before / BEFORE, stage / BEFORE)
    put_in_place(stage / _FILES, output, FILES)
    if (output / BEFORE).is_dir():
        (output / BEFORE).rename(stage / _UNDONE)
    if (stage / BEFORE).is_dir():
        (stage / BEFORE).rename(output / BEFORE)
    shutil.rmtree(stage)
    return output


def rollback_command(adapter_name: str, output: Path | None) -> dict[str, object]:
    """What ``safeside patch ADAPTER --rollback`` does; returns what it says."""
    source = find_adapter(adapter_name)
    target = roll_back(source, output_of(adapter_name, source, output))
    return {"adapter": str(target), "versions_before": count_versions(target)}


def _finish_killed(folder: Path) -> None:
    """Give ``folder`` the files and earlier versions that a run was moving when it was killed."""
    finish_replacing(folder, FILES)
    stage = folder / _STAGE
    if (folder / BEFORE).is_dir():
        return
    if (stage / _OLDER).is_dir():  # a patch that had put nothing in their place yet
        (stage / _OLDER).rename(folder / BEFORE)
    elif (stage / _UNDONE).is_dir() and (stage / BEFORE).is_dir():  # a rollback, all but this step done
        (stage / BEFORE).rename(folder / BEFORE)


def _copy_version(source: Path, target: Path) -> None:
    """The files of an adapter folder and the versions that it keeps; nothing else that lies there."""
    _copy_files(source, target)
    if (source / BEFORE).is_dir():
        _copy_version(source / BEFORE, target / BEFORE)


def _copy_files(source: Path, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
