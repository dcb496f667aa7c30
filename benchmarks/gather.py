"""Result files of the guards benchmark's parts, and guards.json, which holds the rows of all of them.

    python benchmarks/gather.py            make guards.json anew from the parts that are there

Every part writes a file of its own through ``write_part``, which refreshes guards.json too: running one part alone
replaces its rows and leaves those of the others.  Each row names its part, and each part keeps its own facts.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from safeside.errors import InputError
from safeside.terminal import note
from tidy import RESULTS, Row, result_of, write_json

PARTS = ("methods", "stream", "presets", "needle", "intercept", "patch", "port")


@dataclass(frozen=True, slots=True)
class Part:
    """One part's result: its rows, and all else that is known of the run."""

    rows: list[Row]
    facts: dict[str, object]


def write_part(folder: Path, result: Mapping[str, object]) -> Path:
    """Write the file of the part that ``result["benchmark"]`` names and refresh guards.json; returns the former."""
    assert result["benchmark"] in PARTS, f"{result['benchmark']} is no part of guards.json"
    path = write_json(folder / f"{result['benchmark']}.json", result)
    gather(folder)
    return path


def gather(folder: Path) -> Path:
    """Write guards.json from the parts in ``folder``; without any, and with a broken one, that is an InputError."""
    parts = {name: _read(folder / f"{name}.json", name) for name in PARTS if (folder / f"{name}.json").is_file()}
    if not parts:
        raise InputError(
            f"{folder} holds none of {', '.join(PARTS)} (.json). Run make bench-guards, or one part of it."
        )
    rows = [{"part": name, **row} for name, part in parts.items() for row in part.rows]
    seconds = sum(float(str(part.facts["seconds"])) for part in parts.values())
    notes = {"parts": {name: part.facts for name, part in parts.items()}}
    return write_json(folder / "guards.json", result_of("guards", seconds, rows, notes))


def _read(path: Path, name: str) -> Part:
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        facts = {fact: value for fact, value in result.items() if fact != "rows"}
        is_part = (
            facts["benchmark"] == name and facts["seconds"] >= 0 and all("metric" in row for row in result["rows"])
        )
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise InputError(f"{path} is not a result file: {error!r}. Delete it, or run that part again.") from error
    if not is_part:
        raise InputError(f"{path} is not the result of the part {name!r}. Delete it, or run that part again.")
    return Part(result["rows"], facts)


def main(arguments: Sequence[str] | None = None) -> Path:
    """Parse and gather."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result files")
    path = gather(parser.parse_args(arguments).results)
    note(f"wrote {path}")
    return path


if __name__ == "__main__":
    main()
