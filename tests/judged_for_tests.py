"""Made rows for the genes benchmark, and a board of it whose answers are given."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import genes_rows
from genes_board import Board

REFUSAL = "I'm sorry, but I can't help with that."


def board(
    *seeds: dict[str, list[int]],
    right: float = 1.0,
    task: str = "sst2",
    accuracies: dict[str, list[float]] | None = None,
) -> Board:
    """One task model for each seed: by cell, the outcome of each answer as 1 for a success, 0 for a refusal."""
    kinds = {1: "success", 0: "refused", 2: "off_topic", 3: "unscored"}
    cells, found = {}, {}
    for seed, hits in enumerate(seeds):
        own = {name: (accuracies or {}).get(name, [right] * 8) for name in hits}
        cells[seed, task] = {name: {"accuracy": own[name], "nll": [], "majority": 0.5} for name in hits}
        for name, some in hits.items():
            for judge in ("rules", "classifier"):
                found[seed, task, name, judge] = [kinds[hit] for hit in some]
    return Board(cells, found)


def write_gz(path: Path, rows: list[dict[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt") as handle:
        handle.write("\n".join(map(json.dumps, rows)))


def write_data(tmp_path: Path) -> Path:
    """Small files under the names of the real ones; every row has the fields of all."""
    for number, (name, path) in enumerate(genes_rows.SOURCES.items()):
        answer = REFUSAL if "safety" in name else f"the answer {name}"
        rows = [
            {
                "prompt": f"{name} {row}?", "response": answer, "text": f"{name} {row}", "label": row % 2,
                "first_human": f"{name} {row}?", "chosen": f"well {row}", "n_human_turns": 1 + (row == 3),
            }
            for row in range(160 + number)
        ]  # fmt: skip
        write_gz(tmp_path / "data" / path, rows)
    for path in genes_rows.ATTACKS:
        write_gz(tmp_path / "data" / path, [{"prompt": f"attack the {path[15:20]} castle {row}"} for row in range(6)])
    return tmp_path / "data"
