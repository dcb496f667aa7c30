"""Files and folders here or behind any URL that fsspec opens, and writing there so that a kill leaves no half file."""

from __future__ import annotations

import contextlib
import json
import uuid
from collections.abc import Iterable, Iterator

from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from safeside.errors import InputError, SafesideError

TEMPORARY = "_unfinished"
"""Inside a folder, what may be taken away at any time between two runs."""


@contextlib.contextmanager
def explained(place: str, doing: str) -> Iterator[None]:
    """Whatever goes wrong at a place becomes one InputError: each file system has errors of its own."""
    try:
        yield
    except SafesideError:
        raise
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise InputError(
            f"{place} cannot be {doing}: {reason}. Expected a path, or a URL of a file system that fsspec knows and "
            "that may be used from here. Check the place."
        ) from error


def opened(place: str) -> tuple[AbstractFileSystem, str]:
    """The file system of a path or URL, and the path inside it."""
    with explained(place, "opened"):
        files, path = url_to_fs(place)
        return files, path.rstrip("/") or path


def address(files: AbstractFileSystem, path: str) -> str:
    """How a file is named from anywhere: the path itself on this machine, else its URL."""
    return path if isinstance(files, LocalFileSystem) else str(files.unstrip_protocol(path))


class Folder:
    """A folder whose files are there as a whole or not at all."""

    def __init__(self, place: str) -> None:
        self.place = place
        self.files, self.path = opened(place)

    @property
    def address(self) -> str:
        """How it is named from anywhere."""
        return address(self.files, self.path)

    def names(self, folder: str = "") -> list[str]:
        """Names of what lies in it, or in one of its folders; none if it is not there."""
        path = self._inside(folder) if folder else self.path
        with explained(path, "listed"):
            self.files.invalidate_cache()
            if self.files.isfile(path):
                raise InputError(f"{self.place} is a file; expected a folder, new or of the same run. Choose another.")
            found = self.files.ls(path, detail=False) if self.files.isdir(path) else []
        names = sorted(str(name).rstrip("/").rpartition("/")[2] for name in found)
        return [name for name in names if name != TEMPORARY]

    def write(self, name: str, content: Iterable[bytes]) -> None:
        """Write one file: under a name of its own first, then in place of any that was there."""
        temporary, final = self._inside(f"{TEMPORARY}/{uuid.uuid4().hex}"), self._inside(name)
        with explained(final, "written"):
            for path in (temporary, final):
                self.files.makedirs(path.rpartition("/")[0], exist_ok=True)
            with self.files.open(temporary, "wb") as handle:
                for piece in content:
                    handle.write(piece)
            self.files.mv(temporary, final)

    def read(self, name: str) -> bytes:
        """The content of one file."""
        path = self._inside(name)
        with explained(path, "read"), self.files.open(path, "rb") as handle:
            return bytes(handle.read())

    def has(self, name: str) -> bool:
        """Whether a file is there."""
        path = self._inside(name)
        with explained(path, "read"):
            return bool(self.files.exists(path))

    def read_json(self, name: str) -> dict[str, object]:
        """The JSON object in one file; anything else is an InputError."""
        try:
            return dict(json.loads(self.read(name)))
        except (ValueError, TypeError) as error:
            raise InputError(f"{self._inside(name)} is damaged: {error}. Choose another folder.") from error

    def remove(self, name: str) -> None:
        """Take away a file, or a folder with all in it; one that is not there is none."""
        if self.has(name):
            path = self._inside(name)
            with explained(path, "removed"):
                self.files.rm(path, recursive=True)

    def clear_temporary(self) -> None:
        """Take away what killed writers left."""
        self.remove(TEMPORARY)

    def _inside(self, name: str) -> str:
        return f"{self.path}/{name}"
