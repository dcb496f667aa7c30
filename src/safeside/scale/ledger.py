"""The output folder of a bulk run: which shards there are, which are done, and that all of it is one run.

``_manifest.json`` is written before the first row is scored: the run's settings, its input files as they were, and
every shard.  A shard is done when its ``part-NNNNNN`` is there, and its bad rows are in ``_bad`` before that.  Shards
are cut once, so whatever was killed, each row is in exactly one part.  ``_writer`` names the command that began last in
the folder, and who writes a part looks there first: an earlier one stops.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import NamedTuple

from safeside.errors import InputError
from safeside.scale.places import TEMPORARY, Folder, address, explained, opened
from safeside.scale.reading import Shard, Span, as_json, find_files, open_reader

MANIFEST, QUARANTINE, WRITER = "_manifest.json", "_quarantine.jsonl", "_writer"
_BAD, _PART = "_bad", "part-"
_ATTEMPTS = 3  # at one shard, in one run of the command


class Claim(NamedTuple):
    """What a worker writes under."""

    output: str
    """The folder, named from anywhere."""
    writer: str
    """Id of the command that started the worker."""


@dataclass(frozen=True, slots=True)
class Ledger:
    """An output folder and the shards of its run."""

    folder: Folder
    """The output."""
    shards: tuple[Shard, ...]
    """All shards, done or not."""
    left: tuple[str, ...] = ()
    """What lay unfinished in the folder when it was opened."""

    @property
    def claim(self) -> Claim:
        """What workers of this command write under."""
        return Claim(address(self.folder.place), self.folder.writer)

    def done(self) -> set[int]:
        """Numbers of the shards that are done."""
        names = set(self.folder.names())
        return {shard.number for shard in self.shards if shard.part in names}

    def finish(self) -> int:
        """Count the bad rows of all shards, and gather them in one file if there are any."""
        names = self.folder.names(_BAD)
        n_bad = sum(self.folder.read(f"{_BAD}/{name}").count(b"\n") for name in names)
        if names:
            self.folder.write(QUARANTINE, (self.folder.read(f"{_BAD}/{name}") for name in names))
        self.folder.clear_temporary(self.left)
        return n_bad


def begin_shard(folder: Folder, shard: Shard) -> int:
    """Note that a shard is begun, and give the number of this attempt in this run of the command, from 1.

    A shard that is begun too often, and so kills its workers, is an InputError.
    """
    name = folder.unfinished(f"begun-{shard.number:06d}")
    n_begun = len(folder.read(name)) if folder.has(name) else 0
    if n_begun == _ATTEMPTS:
        raise InputError(
            f"{n_begun} workers died while they scored {shard.lines}. If memory ran out, lower --workers, or "
            "--shard-rows in a new output folder; else look at these rows."
        )
    folder.write(name, [b"." * (n_begun + 1)])
    return n_begun + 1


def keep_shard(folder: Folder, shard: Shard, scored: bytes, bad: Sequence[Mapping[str, object]]) -> None:
    """Write a shard's bad rows and then its part, which makes it done.

    Once another command has begun in the folder it is an InputError: rows of two runs would be mixed, and a command
    that goes on with this one takes away what is unfinished.
    """

    check = partial(_check_writer, folder)
    check()
    name = f"{_BAD}/{shard.number:06d}.jsonl"
    if bad:
        folder.write(name, (as_json(row).encode() + b"\n" for row in bad), check)
    else:
        folder.remove(name)  # of an attempt that was killed between the two
    folder.write(shard.part, [scored], check)


def _check_writer(folder: Folder) -> None:
    """Raise an InputError once another command has begun in the folder."""
    if not folder.begins(WRITER, folder.writer.encode()):
        raise InputError(
            f"Another command has begun in {folder.place}. This one has stopped: let the other end, or start this "
            "one again in an output folder of its own."
        )


def open_ledger(source: str, output: str, settings: Mapping[str, object], shard_rows: int) -> Ledger:
    """The ledger of a new run, or of the run that ``output`` holds if it has the same settings and input.

    Another run's folder, or one with other files, is an InputError; a run that has not kept anything yet is no run.
    """
    folder = Folder(output)
    names = folder.names()
    wanted = {**settings, "input": address(source), "shard_rows": shard_rows}
    if names and MANIFEST not in names and names != [WRITER]:
        raise InputError(f"{output} holds {names[0]!r} and no bulk run; expected a new folder. Choose another.")
    left = tuple(folder.names(TEMPORARY)) if names else ()
    if _has_part(names):
        found = folder.read_json(MANIFEST)
        _check_same(output, found, wanted)
        _check_files(output, found, _states(_inputs(source, output)))
        shards = tuple(_shards_in(output, found))
        folder.write(WRITER, [folder.writer.encode()])
        return Ledger(folder, shards, left)
    files = _inputs(source, output)
    shards = tuple(_cut(files, shard_rows))
    if not shards:
        raise InputError(f"{source} holds no row. Check the path.")
    planned = {"settings": wanted, "files": _states(files), "shards": [asdict(shard) for shard in shards]}
    folder.write(WRITER, [folder.writer.encode()])  # another command keeps nothing from here on
    if _has_part(folder.names()):
        raise InputError(f"Another run kept rows in {output} while this one was planned. Choose another folder.")
    _check_writer(folder)
    folder.remove(_BAD)  # of a run that this one takes the place of
    folder.write(MANIFEST, [json.dumps(planned).encode()], partial(_check_writer, folder))
    return Ledger(folder, shards, left)


def _has_part(names: Sequence[str]) -> bool:
    return any(name.startswith(_PART) for name in names)


def _inputs(source: str, output: str) -> list[str]:
    """The input files; the output may lie among them."""
    inside = f"{address(output)}/"
    return [file for file in find_files(source) if not file.startswith(inside)]


def _cut(files: Sequence[str], shard_rows: int) -> Iterator[Shard]:
    number = 0
    for file in files:
        for span in open_reader(file).spans(shard_rows):
            yield Shard(number, file, span)
            number += 1


def _states(files: Sequence[str]) -> dict[str, str]:
    """What tells by file whether it was changed: size, time and the like, as its file system keeps them."""
    found = {}
    for file in files:
        files_of, path = opened(file)
        with explained(file, "read"):
            found[file] = str(files_of.ukey(path))
    return found


def _check_same(output: str, found: Mapping[str, object], wanted: Mapping[str, object]) -> None:
    before = found.get("settings")
    if not all(isinstance(found.get(name), kind) for name, kind in (("settings", dict), ("files", dict))):
        raise InputError(f"{output}/{MANIFEST} is damaged. Choose another folder.")
    assert isinstance(before, dict)
    for name, value in json.loads(json.dumps(wanted)).items():
        if before.get(name) != value:
            raise InputError(
                f"{output} holds a run with {name} {before.get(name)!r}; this one has {value!r}. Give the same, or "
                "choose another folder."
            )


def _check_files(output: str, found: Mapping[str, object], states: Mapping[str, str]) -> None:
    """Raise an InputError unless the input has the files that were planned, all as they were."""
    before = found["files"]
    assert isinstance(before, dict)
    for file in sorted({*before, *states}):
        if before.get(file) != states.get(file):
            what = "added" if file not in before else "taken away" if file not in states else "changed"
            raise InputError(f"{file} was {what} since the run in {output} began. Choose another folder.")


def _shards_in(output: str, found: Mapping[str, object]) -> Iterator[Shard]:
    try:
        for values in list(found["shards"]):  # type: ignore[call-overload]
            yield Shard(values["number"], values["file"], Span(**values["span"]))
    except (KeyError, TypeError) as error:
        raise InputError(f"{output}/{MANIFEST} is damaged: {error!r}. Choose another folder.") from error
