"""Result files: one JSON object with the run's facts and tidy rows, one figure a row."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from safeside.provenance import git_commit, machine

RESULTS = Path(__file__).parent / "results"

Row = dict[str, object]
N_RESAMPLES = 2000


def figure_row(
    labels: Mapping[str, object],
    metric: str,
    value: float,
    interval: tuple[float, float] | None = None,
    **counts: object,
) -> Row:
    """One figure.  ``labels`` are the columns that say what was measured.

    Without an ``interval`` ``low`` and ``high`` are the value itself: a count, or a single measurement.  ``counts``
    are ``n``, ``n_unscored``, ``flops_share`` and ``config_hash``.
    """
    low, high = interval or (value, value)
    figure = {"metric": metric, "value": value, "low": low, "high": high}
    return {**labels, **figure, "n": 1, "n_unscored": 0, "flops_share": 0.0, "config_hash": "", **counts}


def ratio_figure(seconds: Sequence[float], base: Sequence[float], seed: int = 0) -> tuple[float, tuple[float, float]]:
    """Median over rounds of the ratio to the base, and its 95% bootstrap interval over rounds."""
    ratios = np.asarray(seconds) / np.asarray(base)
    draws = np.random.default_rng(seed).integers(0, len(ratios), (N_RESAMPLES, len(ratios)))
    low, high = np.quantile(np.median(ratios[draws], axis=1), [0.025, 0.975])
    return float(np.median(ratios)), (float(low), float(high))


def result_of(benchmark: str, seconds: float, rows: Sequence[Row], notes: Mapping[str, object]) -> dict[str, object]:
    """The content of a result file.  ``seconds`` are of this run, which may have found much of the work done."""
    return {
        "benchmark": benchmark,
        "commit": git_commit(),
        "seconds": round(seconds, 1),
        "machine": machine(),
        "rows": list(rows),
        "notes": dict(notes),
    }


def write_json(path: Path, values: object, indent: int | None = 1) -> Path:
    """Write ``values`` so that a kill leaves the old file or the new one, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".new")
    temporary.write_text(json.dumps(values, indent=indent) + "\n", encoding="utf-8")
    temporary.replace(path)
    return path
