"""Is what a training run takes what the memory model says?  The model's bytes beside those that a process held.

    python benchmarks/memory.py          an ``lst`` guard beside a 0.5B geometry in bfloat16, at three batch sizes

Each batch is trained on for two steps, from live states, in a process of its own.  ``held_bytes`` are the most that it
held over what its libraries took before the base was there; ``predicted_bytes`` are what ``safeside.train.estimate``
says.  The goal is that the two are within 10%.  Writes memory.json.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch

from overhead_variants import tapped_config, twin_of
from safeside.adapters.adapter import Adapter
from safeside.provenance import config_hash
from safeside.terminal import note
from safeside.train.estimate import Memory, adapter_memory
from safeside.train.memory import PeakMemory, anonymous_bytes
from safeside.train.recipe import Recipe
from tidy import Row, figure_row, result_of, write_json
from training import Bench, Settings, add_arguments
from workers import numbers_alone

BATCHES = (2, 8, 32)
GOAL = 0.1  # of what was held
METHOD = "lst"


def predicted(bench: Bench) -> Memory:
    """What the memory model says of this batch."""
    settings, base = bench.settings, twin_of(bench.base)
    recipe = Recipe.model_validate(
        {
            "name": "memory",
            "output": "memory",
            "base": {"name": settings.geometry, "device": "cpu", "dtype": "bfloat16"},
            "adapter": {"kind": METHOD, "role": "guard", "labels": ["harm"]},
            "data": {"train": ["train"], "validation": ["validation"], "max_tokens": settings.n_tokens},
            "training": {"batch_size": settings.n_rows, "precision": "bfloat16"},
        }
    )
    return adapter_memory(base, Adapter(tapped_config(base, None)), recipe)


def print_held(job: dict[str, object]) -> None:
    """Most bytes over the libraries' own that two steps held, then those of each part of the model."""
    values = job["settings"]
    assert isinstance(values, dict)
    libraries = anonymous_bytes()
    with tempfile.TemporaryDirectory() as folder, PeakMemory(torch.device("cpu")) as memory:
        bench = Bench.open(Settings(**values), Path(folder))
        student = bench.student(METHOD)
        for _ in range(2):  # from the second on the optimiser's state is there
            student.step(bench.batch, bench.labels, bench.settings.dtype)
    print(memory.n_bytes - libraries, *asdict(predicted(bench)).values())


def held_alone(settings: Settings) -> list[int]:
    """What ``print_held`` prints in a process of its own."""
    return numbers_alone(Path(__file__), {"settings": asdict(settings)})


def rows_of(settings: Settings, numbers: Sequence[int]) -> list[Row]:
    """Both figures of one batch, each part of the model, and the ratio."""
    held, *parts = numbers
    memory = Memory(*parts)
    labels = {"geometry": settings.geometry, "method": METHOD, "batch": settings.n_rows, "tokens": settings.n_tokens}
    cost: dict[str, object] = {"config_hash": config_hash([labels, asdict(settings)])}
    figures = {"held_bytes": held, "predicted_bytes": memory.total, "predicted_to_held": memory.total / held}
    figures |= {f"{name}_bytes": n_bytes for name, n_bytes in asdict(memory).items()}
    return [figure_row(labels, metric, value, **cost) for metric, value in figures.items()]


def main(arguments: Sequence[str] | None = None) -> Path:
    """Parse, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_arguments(parser)
    parser.add_argument("--batches", type=int, nargs="+", default=list(BATCHES), help="rows of each")
    options = parser.parse_args(arguments)
    if options.peak:
        print_held(options.peak)
        sys.exit()
    started, rows = time.perf_counter(), list[Row]()
    settings = Settings(options.geometry, n_tokens=options.tokens, threads=options.threads)
    for n_rows in options.batches:
        own = replace(settings, n_rows=n_rows)
        found = rows_of(own, held_alone(own))
        rows += found
        note(f"batch {n_rows}: " + ", ".join(f"{row['metric']} {row['value']:,.4g}" for row in found))
    ratios = [float(str(row["value"])) for row in rows if row["metric"] == "predicted_to_held"]
    notes = {
        "goal": f"predicted_to_held within {GOAL:.0%} of 1",
        "met": all(abs(ratio - 1) <= GOAL for ratio in ratios),
        "held": "anonymous memory of a process of its own, less what it held before the base was there",
    }
    path = write_json(options.output / "memory.json", result_of("memory", time.perf_counter() - started, rows, notes))
    note(f"wrote {path}")
    return path


if __name__ == "__main__":
    main()
