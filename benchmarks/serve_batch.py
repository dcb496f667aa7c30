"""Many rows through ``safeside guard``, killed half-way.

Of the rows, ``injected`` counts kills, ``lost`` rows that are missing or doubled in the output, ``leaked`` those with
another score than the row has alone.
"""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from safeside.artifact import load_adapter
from safeside.base.model import load_base
from safeside.guards.score import judge
from safeside.types import Message
from serve_process import SAFESIDE
from tidy import Row, figure_row

_SAMPLE = 50  # rows that are scored alone as well


def batch_rows(n_rows: int) -> tuple[list[Row], dict[str, object]]:
    """The rows ``fault, metric`` of a run that is killed and goes on, and what is noted of its speed."""
    with TemporaryDirectory() as name:
        data, output = Path(name) / "rows.jsonl", Path(name) / "lines.jsonl"
        prompts = [f"Tell me about number {row}, {'please ' * (row % 17)}in plain words." for row in range(n_rows)]
        data.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts), encoding="utf-8")
        command = [*SAFESIDE, "guard", "builtin:harm", str(data), "--output", str(output)]
        started = time.perf_counter()
        with subprocess.Popen(command, stderr=subprocess.DEVNULL) as first:
            while first.poll() is None and _n_lines(output) < n_rows // 2:
                time.sleep(0.2)
            first.kill()
        n_before = _n_lines(output)
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
        seconds = time.perf_counter() - started
        lines = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    found = {int(line["line"]): float(line["verdicts"][0]["score"]) for line in lines}
    n_lost = len(lines) - len(found) + len(set(range(1, n_rows + 1)) ^ set(found))
    counts = {"injected": int(first.returncode != 0), "lost": n_lost, "leaked": _n_other(prompts, found)}
    labels = {"fault": f"guard_{n_rows}_rows_killed"}
    rows = [figure_row(labels, metric, count, n=n_rows) for metric, count in counts.items()]
    return rows, {"rows": n_rows, "kept_at_the_kill": n_before, "seconds": seconds, "rows_per_s": n_rows / seconds}


def _n_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def _n_other(prompts: list[str], found: dict[int, float]) -> int:
    """Rows of a sample whose score is not the one that they have alone."""
    base = load_base("builtin")
    guard = load_adapter("builtin:harm", base)
    chosen = np.random.default_rng(0).permutation(len(prompts))[:_SAMPLE]
    alone = {int(row) + 1: judge(base, [guard], [[Message("user", prompts[row])]])[0][0].score for row in chosen}
    return sum(abs(found.get(line, float("nan")) - score) > 1e-4 for line, score in alone.items())
