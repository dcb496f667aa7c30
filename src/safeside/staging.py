"""Files that are put into a folder together: a kill in between leaves the old ones or the new ones, never a mixture.

They are written into a folder of their own first.  One rename of it to ``.new`` is the step from which on they are what
the folder holds; then they are copied to their places one by one.  Whoever uses the folder after a kill goes on with
that first.  A ``.new`` that is not whole, by the list of its files, is nobody's work and changes nothing.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from safeside.errors import FormatError

_NEW = ".new"
_SIZES = "sizes.json"  # in it: by name, the bytes of each file


@contextmanager
def writing(*folders: Path) -> Iterator[None]:
    """Have ``folders`` to oneself: whoever else is to write there waits.  The locks go with the process."""
    handles = []
    try:
        for folder in sorted({folder.resolve() for folder in folders}):  # all take them in one order
            handles.append(os.open(folder, os.O_RDONLY))
            fcntl.flock(handles[-1], fcntl.LOCK_EX)
        yield
    finally:
        for handle in handles:
            os.close(handle)


def empty_stage(stage: Path) -> Path:
    """The folder ``stage``, made anew to prepare files in: what a killed run left there goes."""
    if stage.exists():
        shutil.rmtree(stage)
    stage.mkdir(parents=True)
    return stage


def put_in_place(new: Path, folder: Path, names: Sequence[str]) -> None:
    """Give ``folder`` the files in ``new``, a folder on the same disk, which goes; other files of ``names`` go too.

    For who holds ``writing(folder)``.
    """
    finish_replacing(folder, names)
    if (folder / _NEW).is_dir():  # not whole
        shutil.rmtree(folder / _NEW)
    seal(new)
    new.rename(folder / _NEW)
    finish_replacing(folder, names)


def seal(new: Path) -> None:
    """Put the list of its files into a folder that is whole."""
    (new / _SIZES).write_text(json.dumps({file.name: file.stat().st_size for file in new.iterdir()}), encoding="utf-8")


def _sealed(new: Path) -> set[str] | None:
    """The names of the files in ``new``; None where it has no list, or other files than its list says."""
    try:
        sizes = json.loads((new / _SIZES).read_text(encoding="utf-8"))
        return set(sizes) if all((new / name).stat().st_size == size for name, size in sizes.items()) else None
    except (OSError, ValueError, AttributeError):
        return None


def finish_replacing(folder: Path, names: Sequence[str]) -> None:
    """Go on with what ``put_in_place`` was doing in ``folder`` when it was killed; nothing to do is the rule.

    Several processes may do so at once.  A folder that cannot be written is a FormatError.
    """
    new = folder / _NEW
    found = _sealed(new)
    if found is None:
        return
    try:
        with TemporaryDirectory(prefix=f"{_NEW}-", dir=folder) as own:
            for name in names:
                if name in found:
                    Path(shutil.copyfile(new / name, Path(own) / name)).replace(folder / name)
                else:
                    (folder / name).unlink(missing_ok=True)
            new.rename(Path(own) / _NEW)
    except OSError as error:
        if new.is_dir():  # else another process was done first
            raise FormatError(
                f"{folder}: the files in {new} belong in their places and cannot be put there: {error}. Make the "
                "folder writable, with room for them; the next use goes on."
            ) from error
