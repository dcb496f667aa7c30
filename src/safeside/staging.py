"""Files that are put into a folder together: a kill in between leaves the old ones or the new ones, never a mixture.

They are written into a folder of their own first.  One rename of it to ``.new`` is the step from which on they are what
the folder holds; then they are copied to their places one by one.  Whoever uses the folder after a kill goes on with
that first.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from safeside.errors import FormatError

_NEW = ".new"


def empty_stage(stage: Path) -> Path:
    """The folder ``stage``, made anew to prepare files in: what a killed run left there goes."""
    if stage.exists():
        shutil.rmtree(stage)
    stage.mkdir(parents=True)
    return stage


def put_in_place(new: Path, folder: Path, names: Sequence[str]) -> None:
    """Give ``folder`` the files in ``new``, a folder on the same disk, which goes; other files of ``names`` go too."""
    finish_replacing(folder, names)
    new.rename(folder / _NEW)
    finish_replacing(folder, names)


def finish_replacing(folder: Path, names: Sequence[str]) -> None:
    """Go on with what ``put_in_place`` was doing in ``folder`` when it was killed; nothing to do is the rule.

    Several processes may do so at once.  A folder that cannot be written is a FormatError.
    """
    new = folder / _NEW
    if not new.is_dir():
        return
    try:
        found = {file.name for file in new.iterdir()}
        if not new.is_dir():  # another process was done meanwhile, and the listing may lack what it had deleted
            return
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
