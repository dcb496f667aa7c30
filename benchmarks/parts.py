"""Benchmarks that are measured in parts, whose rows stand together in one file: guards.json, overhead.json, serve.json,
bulk.json.

Every part writes through ``write_part``: its own rows are replaced and those of the others stay.  Each row names its
part, and ``notes.parts`` keeps each part's commit, machine, seconds and notes.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safeside.errors import InputError
from tidy import result_of, write_json


@dataclass(frozen=True, slots=True)
class Whole:
    """A benchmark in parts."""

    name: str
    """What its file and its results are called."""
    parts: tuple[str, ...]
    """In the order in which their rows stand in the file."""

    @property
    def file(self) -> str:
        """Its name."""
        return f"{self.name}.json"


GUARDS = Whole(
    "guards",
    ("methods", "stream", "presets", "needle", "intercept", "patch", "port", "training", "teaching", "resplits"),
)
OVERHEAD = Whole("overhead", ("time", "peaks"))
SERVE = Whole("serve", ("load", "faults", "batch", "soak"))
BULK = Whole("bulk", ("hf", "hf_many", "vllm", "vllm_many"))
FILE = GUARDS.file


def write_part(folder: Path, result: Mapping[str, object], whole: Whole = GUARDS) -> Path:
    """Put the rows and facts of the part that ``result["benchmark"]`` names into the file; returns its path.

    A file of that name there that is not one is an InputError.  Benches that end together wait for each other.
    """
    name = result["benchmark"]
    assert name in whole.parts, f"{name} is no part of {whole.file}"
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        return _with_part(folder / whole.file, str(name), result, whole)
    finally:
        os.close(handle)


def _with_part(path: Path, name: str, result: Mapping[str, object], whole: Whole) -> Path:
    known = read_parts(path, whole) if path.is_file() else {}
    known[name] = json.loads(json.dumps(result))
    parts = {part: known[part] for part in whole.parts if part in known}
    rows = [{"part": part, **row} for part, values in parts.items() for row in values["rows"]]
    facts = {part: {key: value for key, value in values.items() if key != "rows"} for part, values in parts.items()}
    seconds = sum(float(values["seconds"]) for values in parts.values())
    return write_json(path, result_of(whole.name, seconds, rows, {"parts": facts}))


def read_parts(path: Path, whole: Whole = GUARDS) -> dict[str, dict]:  # type: ignore[type-arg]
    """The result of each part in a file, as its bench gave it; a file that is none is an InputError."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        parts = {part: {**facts, "rows": []} for part, facts in result["notes"]["parts"].items()}
        for row in result["rows"]:
            parts[row["part"]]["rows"].append({column: value for column, value in row.items() if column != "part"})
        is_whole = set(parts) <= set(whole.parts) and all(part["seconds"] >= 0 for part in parts.values())
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise InputError(f"{path} is not a result of the {whole.name} benchmark: {error!r}. Move it away.") from error
    if not is_whole:
        raise InputError(f"{path} holds parts other than {', '.join(whole.parts)}. Move it away.")
    return parts
