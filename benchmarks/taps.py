"""How much faster ten adapters train when the base's states are stored once: live against stored, in one run.

    python benchmarks/taps.py

Adapter by adapter, each is trained once on live and once on stored states, in turns that change places, so a machine
that slows down slows both.  The stored side pays for storing.  Rows are the packaged demo set.  Writes taps.json.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from safeside.adapters.sizing import flops_share
from safeside.artifact import create_adapter
from safeside.base.model import Base, load_base
from safeside.errors import SafesideError
from safeside.provenance import config_hash
from safeside.terminal import note
from safeside.train.loop import Loop, Progress
from safeside.train.objectives import guard_objective
from safeside.train.recipe import Recipe
from safeside.train.rows import Rows
from safeside.train.splits import encode_rows, read_files
from safeside.train.taps import LiveTaps, Source, StoredTaps, TapStore
from tidy import RESULTS, Row, figure_row, result_of, write_json

_LOSS_TOLERANCE = 1e-3  # both sides must do the same work: mean loss of an epoch, float32 on other batch shapes


@dataclass(slots=True)
class Times:
    """Seconds of each adapter's training on either side, and of storing the states once."""

    live: list[float] = field(default_factory=list)
    stored: list[float] = field(default_factory=list)
    storing: float = 0.0
    largest_difference: float = 0.0

    def speed_up(self, rows: Sequence[int] | np.ndarray) -> float:
        """How many times faster the stored side was, over some of the adapters; storing is paid once."""
        live, stored = np.array(self.live)[rows], np.array(self.stored)[rows]
        return float(live.sum() / (stored.sum() + self.storing))


def measure(base: Base, n_adapters: int, n_rows: int, folder: Path) -> tuple[Times, Recipe, Rows]:
    """Train every adapter twice and take the time."""
    recipe = demo_recipe(base, n_rows)
    rows = encode_rows(base, read_files(recipe.data.train, Path(), ("harm",))[0], n_rows)
    times = Times()
    _train(base, recipe, rows, 0, lambda adapter: LiveTaps(base, adapter), n_steps=1)  # warm caches, outside the times
    started = time.perf_counter()
    store = TapStore.build(base, rows.ids, recipe.adapter_config(base).layers, folder)
    times.storing = time.perf_counter() - started
    for seed in range(n_adapters):
        sides: list[tuple[list[float], Callable[..., Source]]] = [
            (times.live, lambda adapter: LiveTaps(base, adapter)),
            (times.stored, lambda adapter: StoredTaps(store, adapter)),
        ]
        losses = []
        for seconds, source in sides if seed % 2 == 0 else reversed(sides):
            started = time.perf_counter()
            losses.append(_train(base, recipe, rows, seed, source))
            seconds.append(time.perf_counter() - started)
        times.largest_difference = max(times.largest_difference, abs(losses[0] - losses[1]))
        note(f"adapter {seed + 1} of {n_adapters}: live {times.live[-1]:.1f} s, stored {times.stored[-1]:.1f} s")
    return times, recipe, rows


def demo_recipe(base: Base, n_rows: int) -> Recipe:
    """One epoch of a small LST guard on the packaged rows."""
    values: dict[str, object] = {"name": "taps", "output": "none", "base": {"name": Path(base.name).name}}
    values["data"] = {"train": ("demo:train.jsonl.gz",), "validation": ("demo:train.jsonl.gz",), "limit": n_rows}
    values["adapter"] = {"kind": "lst", "reduction": 4}
    values["training"] = {"epochs": 1, "checkpoint_seconds": 1e9}
    return Recipe.model_validate(values)


def _train(
    base: Base, recipe: Recipe, rows: Rows, seed: int, source_of: Callable[..., Source], n_steps: int | None = None
) -> float:
    """Train a fresh adapter for an epoch (or on the rows of some steps only); returns its mean loss."""
    adapter = create_adapter(base, recipe.adapter_config(base), seed)
    losses: list[float] = []

    def report(progress: Progress) -> None:
        if progress.loss == progress.loss:
            losses.append(progress.loss)

    lengths = rows.lengths[: n_steps * recipe.training.batch_size] if n_steps else rows.lengths
    objective = guard_objective(base, source_of(adapter), rows, recipe)
    Loop(adapter, lengths, objective, lambda: 0.0, recipe.training, seed=seed, report=report).run()
    return sum(losses) / len(losses)


def rows_of(base: Base, times: Times, recipe: Recipe) -> list[Row]:
    """Total seconds of both sides, and the speed-up with its interval over adapters."""
    generator = np.random.default_rng(0)
    n_adapters = len(times.live)
    draws = [times.speed_up(generator.integers(0, n_adapters, n_adapters)) for _ in range(1000)]
    share = flops_share(base, create_adapter(base, recipe.adapter_config(base)))
    costs = {"n": n_adapters, "flops_share": share, "config_hash": config_hash(recipe.model_dump())}
    labels = {"task": "demo", "base": Path(base.name).name, "seed": 0}
    low, high = (float(value) for value in np.quantile(draws, [0.025, 0.975]))
    stored = {**labels, "method": "stored"}
    return [
        figure_row({**labels, "method": "live"}, "train_seconds", round(sum(times.live), 2), **costs),
        figure_row(stored, "train_seconds", round(sum(times.stored) + times.storing, 2), **costs),
        figure_row(stored, "speed_up", times.speed_up(range(n_adapters)), (low, high), **costs),
    ]


def main(arguments: Sequence[str] | None = None) -> Path:
    """Parse, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--base", default="builtin", help="as for load_base")
    parser.add_argument("--adapters", type=int, default=10)
    parser.add_argument("--rows", type=int, default=400)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the result file")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    started = time.perf_counter()
    base = load_base(options.base)
    with tempfile.TemporaryDirectory() as folder:
        times, recipe, rows = measure(base, options.adapters, options.rows, Path(folder))
    if times.largest_difference > _LOSS_TOLERANCE:
        raise SafesideError(
            f"Live and stored training differ: mean losses {times.largest_difference:.2e} apart, expected at most "
            f"{_LOSS_TOLERANCE}. The times are of different work; look for what changed in safeside.train.taps."
        )
    notes = {
        "rows": len(rows.ids),
        "storing_seconds": round(times.storing, 2),
        "live_seconds": [round(value, 2) for value in times.live],
        "stored_seconds": [round(value, 2) for value in times.stored],
        "largest_difference_of_mean_loss": times.largest_difference,
        "interval": "speed_up: 95% bootstrap over adapters",
    }
    result = result_of("taps", time.perf_counter() - started, rows_of(base, times, recipe), notes)
    path = write_json(options.output / "taps.json", result)
    note(f"wrote {path}")
    return path


if __name__ == "__main__":
    main()
