"""The core benchmark: AUROC of guards on a frozen base against a standalone transformer of equal cost.

    python benchmarks/core.py --data ../shared/data           all of it, hours on two cores; a killed run goes on
    python benchmarks/core.py --data ../shared/data --quick   a few rows of each task, into a temporary folder

Every method gets the same rows, loop and recipe; the learning rate of each is chosen on validation rows of one task
from the same grid.  Test rows are scored once for each trained guard, with the weights of the best validation.
Writes core.json and geometry.json.
"""

from __future__ import annotations

import argparse
import functools
import json
import shutil
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cells import METHODS, SPLITS, Cell, Setup, build_store, key_of, prepare, run_cell
from core_data import TASKS, file_hashes
from geometry import geometry_rows
from safeside.base.model import load_base
from safeside.provenance import config_hash
from safeside.terminal import note
from tidy import RESULTS, Row, figure_row, result_of, write_json
from workers import Workers

CELLS = Path(__file__).parent / ".cells"
SEEDS = (0, 1, 2)
GRID = (3e-4, 1e-3, 3e-3)  # learning rates
# Seconds of an lst cell of 2,000 training rows on one core to itself: for the first estimate only.
STATED_SECONDS = {"toxigen": 80.0, "pku_saferlhf_guard": 280.0, "beavertails": 290.0, "toxic_chat": 170.0}
FIXED_SECONDS = 2.0  # of any cell: reading rows, scoring
METHOD_COST = {"plr": 0.15, "rtb": 0.7, "lst": 1.0, "standalone": 0.9}  # beside lst


@dataclass(frozen=True, slots=True)
class Plan:
    """What to run, and where results go."""

    setup: Setup
    tasks: tuple[str, ...]
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    grid: tuple[float, ...]
    output: Path


class Board:
    """Cached cells, the files that they depend on, and a line for every finished one with the time left."""

    def __init__(self, plan: Plan, workers: Workers) -> None:
        self.plan, self.workers = plan, workers
        self.hashes = {task: file_hashes(plan.setup.data, task) for task in plan.tasks}
        self.n_run = 0
        self.started = time.perf_counter()
        self.stated_done, self.stated_left = 0.0, 0.0
        self.store_seconds: dict[str, float] = {}

    def key(self, cell: Cell) -> str:
        return key_of(self.plan.setup, cell, self.hashes[cell.task])

    def path(self, cell: Cell) -> Path:
        return self.plan.setup.cells / f"{self.key(cell)}.json"

    def missing(self, cells: Sequence[Cell]) -> list[Cell]:
        return [cell for cell in cells if not self.path(cell).is_file()]

    def read(self, cell: Cell) -> dict[str, object]:
        return dict(json.loads(self.path(cell).read_text(encoding="utf-8")))

    def stated_seconds(self, cells: Iterable[Cell]) -> float:
        setup = self.plan.setup
        size = setup.limit / 2000 * setup.epochs / 10
        seconds = (FIXED_SECONDS + size * STATED_SECONDS[cell.task] * METHOD_COST[cell.method] for cell in cells)
        return sum(seconds) / self.workers.n_workers

    def announce(self, cells: Sequence[Cell]) -> None:
        """Say what there is to do before any of it."""
        missing = set(self.missing(cells))
        cached = [cell for cell in cells if cell not in missing]
        measured = sum(float(self.read(cell)["seconds"]) for cell in cached) / self.workers.n_workers
        pace = measured / self.stated_seconds(cached) if cached else 1.0
        self.stated_left = self.stated_seconds(missing)
        note(
            f"{len(cells)} cells, {len(cached)} cached, {len(missing)} to do: about "
            f"{_duration(self.stated_left * pace)} ({'as measured' if cached else 'stated'}) with "
            f"{self.workers.n_workers} workers of {self.workers.n_threads} threads"
        )

    def fill(self, cells: Sequence[Cell]) -> None:
        """Run the cells of one task that are not cached."""
        todo = self.missing(cells)
        if not todo:
            return
        task, setup = todo[0].task, self.plan.setup
        splits = SPLITS if any(cell.final for cell in todo) else SPLITS[:2]
        if any(cell.method != "standalone" for cell in todo):
            for split, seconds in self.workers.run(functools.partial(build_store, setup, task), splits):
                self.store_seconds[f"{task} {split}"] = round(seconds, 1)
                note(f"{task}: states of the {split} rows stored in {seconds:.0f} s")
        for cell, values in self.workers.run(functools.partial(_run, setup), [(cell, self.key(cell)) for cell in todo]):
            self._finish(cell[0], values)

    def _finish(self, cell: Cell, values: dict[str, object]) -> None:
        self.n_run += 1
        done = self.stated_seconds([cell])
        self.stated_done, self.stated_left = self.stated_done + done, max(0.0, self.stated_left - done)
        left = self.stated_left * (time.perf_counter() - self.started) / self.stated_done
        note(f"{cell.title}: validation {values['validation']:.4f}, {values['seconds']:.0f} s; {_duration(left)} left")


def _run(setup: Setup, job: tuple[Cell, str]) -> dict[str, object]:
    """Run one cell and write its file at once: a run that is killed later does not lose it."""
    cell, key = job
    values = run_cell(setup, cell, key)
    write_json(setup.cells / f"{key}.json", values)
    return values


def tuning_cells(plan: Plan) -> list[Cell]:
    """One training run for each method and learning rate, on the first task."""
    return [Cell(plan.tasks[0], method, 0, rate, final=False) for method in plan.methods for rate in plan.grid]


def final_cells(plan: Plan, task: str, rates: dict[str, float]) -> list[Cell]:
    return [Cell(task, method, seed, rates[method]) for method in plan.methods for seed in plan.seeds]


def best_rates(plan: Plan, board: Board) -> dict[str, float]:
    """The learning rate of each method with the highest validation AUROC, the lower one when equal."""
    best: dict[str, tuple[float, float]] = {}
    for cell in tuning_cells(plan):
        found = (float(board.read(cell)["validation"]), -cell.learning_rate)
        best[cell.method] = max(best.get(cell.method, (-1.0, 0.0)), found)
    return {method: -negative for method, (_, negative) in best.items()}


def run_plan(plan: Plan, workers: Workers) -> Path:
    """Run what is missing and write the two result files; returns the first."""
    started = time.perf_counter()
    plan.setup.cells.mkdir(parents=True, exist_ok=True)
    (plan.setup.cells / ".gitignore").write_text("*\n", encoding="utf-8")
    board = Board(plan, workers)
    guess = dict.fromkeys(plan.methods, plan.grid[0])
    tuning = tuning_cells(plan)
    if not board.missing(tuning):
        guess = best_rates(plan, board)
    board.announce([*tuning, *(cell for task in plan.tasks for cell in final_cells(plan, task, guess))])
    board.fill(tuning)
    rates = best_rates(plan, board)
    finals = []
    for task in plan.tasks:
        cells = final_cells(plan, task, rates)
        board.fill(cells)
        finals += cells
        shutil.rmtree(plan.setup.cells / "taps" / task, ignore_errors=True)  # gigabytes
    geometry_started = time.perf_counter()
    geometry = geometry_rows()
    geometry_seconds = time.perf_counter() - geometry_started
    write_json(plan.output / "geometry.json", result_of("geometry", geometry_seconds, geometry, {}))
    rows = [row for cell in finals for row in rows_of(plan.setup, board.read(cell))]
    rows += [{"task": "geometry", **row, "seed": 0} for row in geometry]
    seconds = time.perf_counter() - started
    notes = notes_of(plan, board, rates, finals)
    return write_json(plan.output / "core.json", result_of("core", seconds, rows, notes))


def rows_of(setup: Setup, values: dict[str, object]) -> list[Row]:
    """The three figures of a final cell."""
    labels = {"task": values["task"], "base": Path(setup.base).name, "method": values["method"]}
    labels["seed"] = values["seed"]
    cost = {"flops_share": values["flops_share"], "config_hash": values["key"]}
    value, low, high = values["auroc"]
    counts = values["counts"]
    trained = {"n": counts["train_rows"], "n_unscored": counts["train_rows_too_long"] + counts["train_bad_rows"]}
    tested = {"n": values["n"], "n_unscored": values["n_unscored"]}
    return [
        figure_row(labels, "auroc", value, (low, high), **tested, **cost),
        figure_row(labels, "train_seconds", round(values["train_seconds"], 2), **trained, **cost),
        figure_row(labels, "trainable_params", values["trainable_params"], **cost),
    ]


def notes_of(plan: Plan, board: Board, rates: dict[str, float], finals: Sequence[Cell]) -> dict[str, object]:
    """What the rows do not say: rows left out, chosen learning rates, costs of the whole."""
    cells = {cell: board.read(cell) for cell in finals}
    return {
        "intervals": "auroc: 95% bootstrap over test rows; elsewhere low and high are the value",
        "train_seconds": "steps and validation, without storing the base's states (store_seconds)",
        "rows": {cell.task: values["counts"] for cell, values in cells.items()},
        "learning_rates": rates,
        "tuned_on": f"validation rows of {plan.tasks[0]}, seed 0",
        "tuning": {cell.title: round(float(board.read(cell)["validation"]), 4) for cell in tuning_cells(plan)},
        "validation_auroc": {cell.title: round(float(values["validation"]), 4) for cell, values in cells.items()},
        "epochs": {cell.title: values["epochs"] for cell, values in cells.items()},
        "matmuls": {cell.method: values["matmuls"] for cell, values in cells.items()},
        "store_seconds": board.store_seconds,
        "cell_seconds": round(sum(float(values["seconds"]) for values in cells.values()), 1),
        "cells_run_now": board.n_run,
        "processes": board.workers.n_workers,
        "cell_commits": sorted({str(values["commit"]) for values in cells.values()}),
        "cell_machines": sorted({str(values["machine"]) for values in cells.values()}),
        "toxigen": "test is the SafeNLP proxy of SOURCES.md, easier than the official test split",
    }


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"


def main(arguments: Sequence[str] | None = None) -> Path:
    """Parse, run, and say where the results are."""
    options = _parser().parse_args(arguments)
    if options.quick:
        options.limit, options.epochs, options.evaluation_limit = (
            min(options.limit, 128),
            1,
            options.evaluation_limit or 128,
        )
        options.seeds, options.learning_rates = options.seeds[:1], options.learning_rates[1:2]
    scratch = Path(tempfile.gettempdir()) / "safeside-bench"
    prepare.cache_clear()
    fingerprint = load_base(options.base).fingerprint
    setup = Setup(
        data=options.data,
        base=options.base,
        fingerprint=config_hash(fingerprint.model_dump()),
        cells=options.cells or (scratch / "cells" if options.quick else CELLS),
        limit=options.limit,
        evaluation_limit=options.evaluation_limit,
        epochs=options.epochs,
        device=options.device,
    )
    plan = Plan(
        setup=setup,
        tasks=tuple(options.tasks),
        methods=tuple(options.methods),
        seeds=tuple(options.seeds),
        grid=tuple(sorted(options.learning_rates)),
        output=options.output or (scratch if options.quick else RESULTS),
    )
    with Workers(options.workers, options.threads) as workers:
        path = run_plan(plan, workers)
    note(f"wrote {path}")
    return path


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of the data sets")
    parser.add_argument("--base", default="builtin", help="as for load_base")
    parser.add_argument("--limit", type=int, default=2000, help="training rows of a cell, 4000 at most")
    parser.add_argument(
        "--evaluation-limit", type=int, help="validation rows, and test rows, of a task; all unless given"
    )
    parser.add_argument("--epochs", type=int, default=10, help="at most; training stops 3 epochs after its best")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--learning-rates", type=float, nargs="+", default=list(GRID), help="grid of every method")
    parser.add_argument("--workers", type=int, default=2, help="processes")
    parser.add_argument("--threads", type=int, default=1, help="threads of each process")
    parser.add_argument("--device", default="cpu", help="cuda also works; cells do not tell devices apart")
    parser.add_argument("--cells", type=Path, help="folder of cached cells")
    parser.add_argument("--output", type=Path, help="folder of the result files")
    parser.add_argument("--quick", action="store_true", help="prove that it works: few rows, one epoch, one seed")
    return parser


if __name__ == "__main__":
    main()
