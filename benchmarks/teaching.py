"""What a guard costs to train with everything that comes before, beside a LoRA guard on the whole base.

    python benchmarks/teaching.py --data ../shared/data

One after the other in one process, by the recipes of the guards benchmark (short schedule, seed 0): ``states`` puts the
base's states of training and validation rows on disk, which all guards of a task read; ``importance`` is the pass for
pruned starts; ``teacher`` trains the two LoRAs, each on half of the rows, whose scores all distilled guards of a task
learn from; ``lst``, ``lst_distilled`` and ``lora_full`` are the training alone.  Writes the part ``teaching`` of
guards.json.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from guard_cells import Cell, build_store, importance_of, recipe_of, trained_of
from guard_rows import Setup, installed, prepare
from guards import BASES, CELLS
from parts import write_part
from safeside.provenance import config_hash
from safeside.terminal import note
from safeside.train.teacher import out_of_fold
from tidy import RESULTS, Row, figure_row, result_of

TRAINED = ("lst", "lst_distilled", "lora_full")
NOTES = {
    "seconds": "of one run each, without an interval",
    "teacher": "kept scores of an earlier run are what lst_distilled learns from; this one is timed and dropped",
}


def seconds_of(setup: Setup, task: str, base: str) -> Iterator[tuple[str, float]]:
    """What was done, and how long it took."""
    data = prepare(setup, task, base)
    cell = Cell(task, base, "lst_distilled", 0, setup.schedules(task)[0])
    yield "states", sum(build_store(setup, (cell, split)) for split in ("train", "validation"))
    started = time.perf_counter()
    importance_of(setup, task, base)
    yield "importance", time.perf_counter() - started
    started = time.perf_counter()
    out_of_fold(data.base, recipe_of(setup, cell), data.train, data.splits["validation"].rows)
    yield "teacher", time.perf_counter() - started
    for method in TRAINED:
        yield method, float(str(trained_of(setup, replace(cell, method=method)).facts["train_seconds"]))


def main(arguments: Sequence[str] | None = None) -> Path:
    """Parse, train, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--bases", nargs="+", default=list(BASES), help="builtin, minilm, a folder or a hub name")
    parser.add_argument("--tasks", nargs="+", default=["hate", "prompt_harm"])
    parser.add_argument("--limit", type=int, default=1500, help="training rows, as in guards.py")
    parser.add_argument("--evaluation-limit", type=int, default=1000, help="validation rows, and test rows")
    parser.add_argument("--epochs", type=int, default=5, help="at most")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--teachers", type=Path, default=CELLS.parent / "guard_teachers", help="kept scores")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the result file")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    started = time.perf_counter()
    rows: list[Row] = []
    for name, base in installed(options.bases).items():
        place = (Path(name).name, name, config_hash(base.fingerprint.model_dump()))
        for task in options.tasks:
            with tempfile.TemporaryDirectory() as folder:
                most = (options.limit, options.evaluation_limit, options.epochs)
                setup = Setup(options.data, (place,), Path(folder), *most, teachers=options.teachers)
                rows += _rows(setup, task, place[0])
            path = write_part(options.output, result_of("teaching", time.perf_counter() - started, rows, NOTES))
    note(f"wrote {path}")
    return path


def _rows(setup: Setup, task: str, base: str) -> Iterator[Row]:
    for method, seconds in seconds_of(setup, task, base):
        labels = {"task": task, "base": base, "method": method, "seed": 0}
        note(f"{task} {base}, {method}: {seconds:.0f} s")
        n_rows = len(prepare(setup, task, base).train.ids)
        yield figure_row(labels, "seconds", round(seconds, 1), n=n_rows, config_hash=config_hash([labels, n_rows]))


if __name__ == "__main__":
    main()
