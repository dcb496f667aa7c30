"""Files and folders here or behind URLs that fsspec opens, and writing there so that a kill leaves no half file."""

from __future__ import annotations

import contextlib
import json
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path

from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from safeside.errors import InputError, SafesideError

TEMPORARY = "_unfinished"
"""Inside a folder, what is being written and what killed writers left."""


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


def addresses(place: str, names: Sequence[str]) -> list[str]:
    """How files that were found at ``place`` are named from anywhere: by path on this machine, else like ``place``.

    Its hosts and chains (``hdfs://name:8020/rows``, ``zip://rows.jsonl::s3://bucket/all.zip``) stay, which fsspec's own
    way back to a URL drops.  Names that would not lead back to the same files are an InputError.
    """
    files, path = opened(place)
    if isinstance(files, LocalFileSystem):
        return list(names)
    links = place.split("::")
    if "://" not in links[-1]:  # a file here, which workers look for from another folder
        links[-1] = str(Path(links[-1]).absolute())
    for index, link in enumerate(links):
        around = links[:index], links[index + 1 :]
        found = ["::".join([*around[0], each, *around[1]]) for each in _renamed(link, path, names)]
        if found and _leads_to(found[0], files, names[0]):
            return found
    raise InputError(
        f"Files at {place} cannot be named so that a worker finds them again: fsspec drops a part of this URL. "
        "Expected a path, or a URL with the whole path in it; hosts and accounts can stand in fsspec's configuration."
    )


def address(place: str) -> str:
    """How ``place`` itself is named from anywhere."""
    return addresses(place, [opened(place)[1]])[0]


def _renamed(link: str, path: str, names: Sequence[str]) -> list[str]:
    """One link of a chain with each name in place of ``path``, its end; none where it is no URL."""
    if "://" not in link:
        return []
    stem = link if link.endswith("://") else link.rstrip("/")
    n_same = next(n for n in range(len(path), -1, -1) if stem.endswith(path[len(path) - n :]))
    return [stem[: len(stem) - n_same] + name[len(path) - n_same :] for name in names]


def _leads_to(place: str, files: AbstractFileSystem, path: str) -> bool:
    try:
        return bool(opened(place) == (files, path))
    except InputError:
        return False


class Folder:
    """A folder whose files are there as a whole or not at all.

    ``writer`` tells those who write there apart: each takes away its own unfinished files alone.
    """

    def __init__(self, place: str, writer: str | None = None) -> None:
        self.place = place
        self.writer = writer or uuid.uuid4().hex
        self.files, self.path = opened(place)

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

    def write(self, name: str, content: Iterable[bytes], check: Callable[[], None] = lambda: None) -> None:
        """Write one file: under a name of its own first, then, if ``check`` raises nothing, in place of any there.

        Elsewhere than on this machine a kill in between may leave none.
        """
        temporary, final = self._inside(self.unfinished(uuid.uuid4().hex)), self._inside(name)
        with explained(final, "written"):
            for path in (temporary, final):
                self.files.makedirs(path.rpartition("/")[0], exist_ok=True)
            with self.files.open(temporary, "wb") as handle:
                for piece in content:
                    handle.write(piece)
            check()
            if not isinstance(self.files, LocalFileSystem) and self.files.exists(final):
                self.files.rm(final)  # some file systems do not move onto a name that is taken
            self.files.mv(temporary, final)

    def unfinished(self, name: str) -> str:
        """The name of a file of this writer that ``clear_temporary`` takes away."""
        return f"{TEMPORARY}/{self.writer}-{name}"

    def read(self, name: str) -> bytes:
        """The content of one file."""
        path = self._inside(name)
        with explained(path, "read"), self.files.open(path, "rb") as handle:
            return bytes(handle.read())

    def begins(self, name: str, head: bytes) -> bool:
        """Whether one file begins with ``head``; no more of it is read."""
        path = self._inside(name)
        with explained(path, "read"):
            return bool(self.files.cat_file(path, start=0, end=len(head)) == head)

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

    def clear_temporary(self, left: Collection[str] = ()) -> None:
        """Take away this writer's unfinished files and those named ``left``: others may be at work here."""
        for name in self.names(TEMPORARY):
            if name.startswith(self.writer) or name in left:
                self.remove(f"{TEMPORARY}/{name}")
        with contextlib.suppress(OSError):  # others' files are in it, or it is none: stores of objects have no folders
            self.files.rmdir(self._inside(TEMPORARY))

    def _inside(self, name: str) -> str:
        return f"{self.path}/{name}"
