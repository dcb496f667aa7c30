"""The parts of the guards benchmark, whose rows stand together in guards.json.

Every part writes through ``write_part``: its own rows are replaced and those of the others stay.  Each row names its
part, and ``notes.parts`` keeps each part's commit, machine, seconds and notes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safeside.errors import InputError
from tidy import result_of, write_json

PARTS = ("methods", "stream", "presets", "needle", "intercept", "patch", "port", "training")
FILE = "guards.json"


def write_part(folder: Path, result: Mapping[str, object]) -> Path:
    """Put the rows and facts of the part that ``result["benchmark"]`` names into guards.json; returns its path.

    A guards.json there that is not one is an InputError.
    """
    name = result["benchmark"]
    assert name in PARTS, f"{name} is no part of {FILE}"
    path = folder / FILE
    known = read_parts(path) if path.is_file() else {}
    known[str(name)] = json.loads(json.dumps(result))
    parts = {part: known[part] for part in PARTS if part in known}
    rows = [{"part": part, **row} for part, values in parts.items() for row in values["rows"]]
    facts = {part: {key: value for key, value in values.items() if key != "rows"} for part, values in parts.items()}
    seconds = sum(float(values["seconds"]) for values in parts.values())
    return write_json(path, result_of("guards", seconds, rows, {"parts": facts}))


def read_parts(path: Path) -> dict[str, dict]:  # type: ignore[type-arg]
    """The result of each part in a guards.json, as its bench gave it; a file that is none is an InputError."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        parts = {part: {**facts, "rows": []} for part, facts in result["notes"]["parts"].items()}
        for row in result["rows"]:
            parts[row["part"]]["rows"].append({column: value for column, value in row.items() if column != "part"})
        is_whole = set(parts) <= set(PARTS) and all(part["seconds"] >= 0 for part in parts.values())
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise InputError(f"{path} is not a result of the guards benchmark: {error!r}. Move it away.") from error
    if not is_whole:
        raise InputError(f"{path} holds parts other than {', '.join(PARTS)}. Move it away.")
    return parts
