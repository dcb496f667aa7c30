"""How often a threshold keeps its promised false-positive rate on other rows of the same traffic.

    python benchmarks/resplits.py --data ../shared/data

Harmless prompts of a set are scored once by ``builtin:harm``.  Then they are split at random, many times: a threshold
is fitted on one part and counted on the other.  ``plain`` flags at most the promised share of the rows that it was
fitted on, ``bound`` is the one that promises it of rows to come with 95% confidence.  ``kept_share`` is the share of
splits whose other part is flagged at most at the promised rate; that part is finite too, so even a threshold that is
right for the traffic as a whole now and then shows more there.  Writes the part ``resplits`` of guards.json.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from parts import write_part
from presets import harmless
from safeside.artifact import load_adapter
from safeside.base.model import load_base
from safeside.guards.calibrate import threshold_at, threshold_with_bound
from safeside.guards.score import score_conversations
from safeside.provenance import config_hash
from safeside.tasks.leakage import text_of
from safeside.terminal import note
from tidy import RESULTS, Row, figure_row, result_of

GUARD, BASE = "builtin:harm", "builtin"
SETS = ("benign_prompts/alpaca_train.jsonl.gz", "toxic_chat/train.jsonl.gz")
RATES = (0.05, 0.01)
FITS: dict[str, Callable[[NDArray[np.float64], float], float]] = {"plain": threshold_at, "bound": threshold_with_bound}


def rows_of(name: str, scores: NDArray[np.float64], n_splits: int) -> Iterator[Row]:
    """Figures of one set: for each rate and fit the share of splits that keep it, and the mean rate on other rows."""
    generator = np.random.default_rng(0)
    half = len(scores) // 2
    splits = [generator.permutation(scores) for _ in range(n_splits)]
    for rate in RATES:
        for fit, threshold_of in FITS.items():
            others = np.array([(some[half:] >= threshold_of(some[:half], rate)).mean() for some in splits])
            labels = {"base": BASE, "seed": 0, "suite": name, "fit": fit, "promised": rate, "fitted_rows": half}
            counts = {"n": n_splits, "config_hash": config_hash([labels, len(scores)])}
            kept = float((others <= rate).mean())
            note(f"{name}, {fit}, {rate:.0%}: kept in {kept:.1%} of {n_splits:,} splits, {others.mean():.2%} flagged")
            yield figure_row(labels, "kept_share", kept, **counts)
            spread = (float(np.quantile(others, 0.025)), float(np.quantile(others, 0.975)))
            yield figure_row(labels, "fpr", float(others.mean()), spread, **counts)


def main(arguments: Sequence[str] | None = None) -> Path:
    """Parse, score, split, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--rows", type=int, default=4000, help="of each set, at most")
    parser.add_argument("--splits", type=int, default=2000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the result file")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    started = time.perf_counter()
    base = load_base(BASE)
    guard = load_adapter(GUARD, base)
    rows: list[Row] = []
    for name in SETS:
        texts = {text_of(example): example.messages for example in harmless(options.data / name, options.rows)}
        found = score_conversations(base, [guard], list(texts.values()))  # each text once
        scores = np.array([row.by_guard[guard.name][0] for row in found])
        rows += rows_of(name.split("/")[0], scores[np.isfinite(scores)], options.splits)
    spread = "fpr: 2.5% and 97.5% of the splits; kept_share: none, for all splits are of the same rows"
    notes = {"guard": GUARD, "confidence": 0.95, "intervals": spread}
    path = write_part(options.output, result_of("resplits", time.perf_counter() - started, rows, notes))
    note(f"wrote {path}")
    return path


if __name__ == "__main__":
    main()
