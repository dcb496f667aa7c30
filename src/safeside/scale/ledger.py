"""The output folder of a bulk run: which shards there are, which are done, and that all of it is one run.

``_manifest.json`` is written before the first row is scored: the run's settings, its input files as they were, and
every shard.  A shard is done when its ``part-NNNNNN`` is there, and its bad rows are in ``_bad`` before that.  Shards
are cut once, so whatever was killed, each row is in exactly one part.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

from safeside.errors import InputError
from safeside.scale.places import TEMPORARY, Folder, address, explained, opened
from safeside.scale.reading import Shard, Span, find_files, open_reader

MANIFEST, QUARANTINE = "_manifest.json", "_quarantine.jsonl"
_BAD, _PART = "_bad", "part-"
_ATTEMPTS = 3  # at one shard, in one run of the command


@dataclass(frozen=True, slots=True)
class Ledger:
    """An output folder and the shards of its run."""

    folder: Folder
    """The output."""
    shards: tuple[Shard, ...]
    """All shards, done or not."""

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
        self.folder.clear_temporary()
        return n_bad


def begin_shard(folder: Folder, shard: Shard) -> None:
    """Note that a shard is begun; one that is begun too often in a run, and so kills its workers, is an InputError."""
    name = f"{TEMPORARY}/begun-{shard.number:06d}"
    n_begun = len(folder.read(name)) if folder.has(name) else 0
    if n_begun == _ATTEMPTS:
        last = shard.span.first + shard.span.n_lines - 1
        raise InputError(
            f"{n_begun} workers died while they scored lines {shard.span.first} to {last} of {shard.file}. If memory "
            "ran out, lower --workers, or --shard-rows in a new output folder; else look at these rows."
        )
    folder.write(name, [b"." * (n_begun + 1)])


def keep_shard(folder: Folder, shard: Shard, scored: bytes, bad: Sequence[Mapping[str, object]]) -> None:
    """Write a shard's bad rows and then its part, which makes it done."""
    name = f"{_BAD}/{shard.number:06d}.jsonl"
    if bad:
        folder.write(name, (json.dumps(row, default=str).encode() + b"\n" for row in bad))
    else:
        folder.remove(name)  # of an attempt that was killed between the two
    folder.write(shard.part, [scored])


def open_ledger(source: str, output: str, settings: Mapping[str, object], shard_rows: int) -> Ledger:
    """The ledger of a new run, or of the run that ``output`` holds if it has the same settings and input.

    Another run's folder, or one with other files, is an InputError; a run that has not kept anything yet is no run.
    """
    folder = Folder(output)
    names = folder.names()
    wanted = {**settings, "input": address(source), "shard_rows": shard_rows}
    if MANIFEST in names:  # a folder of ours
        folder.clear_temporary()
    if MANIFEST in names and any(name.startswith(_PART) for name in names):
        found = folder.read_json(MANIFEST)
        _check_same(output, found, wanted)
        return Ledger(folder, tuple(_shards_in(output, found)))
    if names and MANIFEST not in names:
        raise InputError(f"{output} holds {names[0]!r} and no bulk run; expected a new folder. Choose another.")
    folder.remove(_BAD)
    files = find_files(source)
    shards = tuple(_cut(files, shard_rows))
    if not shards:
        raise InputError(f"{source} holds no row. Check the path.")
    manifest = {"settings": wanted, "files": _states(files), "shards": [asdict(shard) for shard in shards]}
    folder.write(MANIFEST, [json.dumps(manifest).encode()])
    return Ledger(folder, shards)


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
    before, states = found.get("settings"), found.get("files")
    if not isinstance(before, dict) or not isinstance(states, dict):
        raise InputError(f"{output}/{MANIFEST} is damaged. Choose another folder.")
    for name, value in json.loads(json.dumps(wanted)).items():
        if before.get(name) != value:
            raise InputError(
                f"{output} holds a run with {name} {before.get(name)!r}; this one has {value!r}. Give the same, or "
                "choose another folder."
            )
    changed = [file for file, state in _states(list(states)).items() if state != states[file]]
    if changed:
        raise InputError(f"{changed[0]} was changed since the run in {output} began. Choose another folder.")


def _shards_in(output: str, found: Mapping[str, object]) -> Iterator[Shard]:
    try:
        for values in list(found["shards"]):  # type: ignore[call-overload]
            yield Shard(values["number"], values["file"], Span(**values["span"]))
    except (KeyError, TypeError) as error:
        raise InputError(f"{output}/{MANIFEST} is damaged: {error!r}. Choose another folder.") from error
