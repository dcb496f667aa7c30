"""The guards benchmark: every method on four tasks and two bases, three seeds, and who wins.

    python benchmarks/guards.py --data ../shared/data           all of it, hours on two cores; a killed run goes on
    python benchmarks/guards.py --data ../shared/data --quick   a few rows of each task, into a temporary folder

Every method of one task and base learns from the same rows; validation rows choose schedules, epochs, regularisation,
questions and thresholds; test rows are scored once by each schedule.  Writes the part ``methods`` of guards.json with
the cells that are there.
"""

from __future__ import annotations

import argparse
import functools
import json
import shutil
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from guard_cells import (
    FITTED,
    METHODS,
    TAUGHT,
    Cell,
    better_of,
    build_store,
    epochs_of,
    key_of,
    reads_states,
    run_cell,
    schedules_of,
)
from guard_figures import Found, rows_of, source_alone, wins_of
from guard_rows import SPLITS, Setup, installed, prepare, sources_of
from guard_shared import SHARED, SHARED_TASKS
from parts import write_part
from safeside.errors import InputError
from safeside.provenance import config_hash
from safeside.tasks.task import TASKS
from safeside.terminal import note
from tidy import RESULTS, Row, result_of, write_json
from workers import Workers

Array = NDArray[np.float64]

CELLS = RESULTS / "guard_cells"  # kept with the results: hours of work, and the rows behind every interval
SCRATCH = Path(__file__).parent / ".cells" / "guards"
TASK_NAMES = ("hate", "prompt_harm", "response_harm", "grounding")
BASES = ("builtin", "minilm")
SEEDS = (0, 1, 2)
ONE_SEED = ("prompted", "probe", "tfidf", "length")  # nothing in them is drawn
# Seconds of a cell of the benchmark's rows on one core to itself: for the first estimate only.
STATED = {
    "plr": 10,
    "rtb": 45,
    "lst_distilled": 75,
    "lora_full": 150,
    "probe": 20,
    "tfidf": 5,
    "length": 1,
    "prompted": 30,
}


@dataclass(frozen=True, slots=True)
class Plan:
    """What to run, and where results go."""

    setup: Setup
    tasks: tuple[str, ...]
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    cells: Path
    output: Path
    finished_only: bool = False

    def cells_of(self, task: str, base: str) -> list[Cell]:
        """Those of every method and seed, by each of their schedules."""
        cells = [
            Cell(task, base, method, seed)
            for method, seed in product(self.methods, self.seeds)
            if not (method in ONE_SEED and seed != self.seeds[0]) and not (method == "prompted" and base == "minilm")
        ]
        return [part for cell in cells for part in schedules_of(self.setup, cell)]


def run_plan(plan: Plan, workers: Workers) -> Path:
    """Run what is missing and write the result file; returns it."""
    started = time.perf_counter()
    pairs = [(task, base) for task in plan.tasks for base, _, _ in plan.setup.bases]
    tasks = SHARED_TASKS if SHARED in plan.methods else plan.tasks
    hashes = {task: _data_hash(plan.setup.data, task) for task in tasks}
    paths = {
        cell: plan.cells / f"{key_of(plan.setup, cell, _data_of(cell, hashes))}.json"
        for pair in pairs
        for cell in plan.cells_of(*pair)
    }
    missing = [cell for cell, path in paths.items() if not path.is_file()]
    if plan.finished_only:
        paths = {cell: path for cell, path in paths.items() if path.is_file()}
        missing = []
    stated = sum(STATED.get(cell.method, 60) for cell in missing) / workers.n_workers
    note(f"{len(paths)} cells, {len(paths) - len(missing)} cached; about {stated / 60:.0f} min for the others")
    for task, base in pairs:
        _fill(plan, workers, [cell for cell in missing if (cell.task, cell.base) == (task, base)], paths)
    shutil.rmtree(plan.setup.scratch / "taps" / "shared", ignore_errors=True)
    tried = {cell: json.loads(path.read_text(encoding="utf-8")) for cell, path in paths.items()}
    values = chosen_of(plan.setup, tried)
    if n_left_out := len(_without_schedules(tried)) - len(values):
        note(f"{n_left_out} cells are left out, for not every schedule of them was run: see left_out in the notes")
    rows: list[Row] = []
    for pair in pairs:
        rows += _figures(plan, pair, {cell: found for cell, found in values.items() if (cell.task, cell.base) == pair})
    wanted = [cell for pair in pairs for cell in plan.cells_of(*pair)]
    notes = {**_notes(tried, values), "not_run": _not_run(wanted, tried)}
    return write_part(plan.output, result_of("methods", time.perf_counter() - started, rows, notes))


def _not_run(wanted: Iterable[Cell], tried: Iterable[Cell]) -> list[str]:
    """Task, base and method of what has no cell at all."""
    known = {(cell.task, cell.base, cell.method) for cell in tried}
    places = dict.fromkeys((cell.task, cell.base, cell.method) for cell in wanted)
    return [" ".join(place) for place in places if place not in known]


def _notes(tried: Mapping[Cell, Found], values: Mapping[Cell, Found]) -> dict[str, object]:
    """What a reader of the figures must know."""
    return {
        "peak_bytes": "of a worker that held other cells before; side by side the part training measures it; not "
        "measured of what is fitted and not trained (probe, tfidf, length, prompted)",
        "over_refusal": "of safe prompts and benign instructions, for tasks of prompts: they are no answers or claims",
        "train_seconds": "under whatever else ran then, on stored states, of the schedule that was chosen; of "
        "distilled guards without their teacher",
        "schedules": _schedules(values),
        "left_out": [cell.title for cell in _without_schedules(tried) if cell not in values],
        "intervals": "95% bootstrap over prompts and documents, each with all its test rows; of over_refusal Wilson's; "
        "elsewhere low and high are the value",
        "rows": {f"{cell.task} {cell.base}": found["counts"] for cell, found in values.items()},
        "cell_commits": sorted({str(found["commit"]) for found in tried.values()}),
        "cell_seconds": round(sum(float(found["seconds"]) for found in tried.values()), 1),  # type: ignore[arg-type]
    }


def chosen_of(setup: Setup, tried: Mapping[Cell, Found]) -> dict[Cell, Found]:
    """Each cell by the schedule that is better on validation rows; those that not all were run of are left out."""
    chosen = {}
    for cell in _without_schedules(tried):
        schedules = schedules_of(setup, cell)
        if all(one in tried for one in schedules):
            chosen[cell] = better_of([{**tried[one], "schedule": epochs_of(setup, one)} for one in schedules])
    return chosen


def _without_schedules(tried: Iterable[Cell]) -> list[Cell]:
    return list(dict.fromkeys(replace(cell, epochs=0) for cell in tried))


def _schedules(values: Mapping[Cell, Found]) -> dict[str, dict[int, dict[str, object]]]:
    """By task, base and method, and by seed: the most epochs of the schedule that counts, and how many were run."""
    result: dict[str, dict[int, dict[str, object]]] = {}
    for cell, found in values.items():
        if cell.method not in FITTED:
            told = {"most": found["schedule"], "run": found["epochs"]}
            result.setdefault(f"{cell.task} {cell.base} {cell.method}", {})[cell.seed] = told
    return result


def _figures(plan: Plan, place: tuple[str, str], values: dict[Cell, Found]) -> list[Row]:
    """All rows of one task and base; the sources of test rows are read anew, for cells do not hold them."""
    if not values:
        return []
    sources = sources_of(plan.setup, *place)
    labels = next(iter(values.values()))["labels"]["test"]  # type: ignore[index]
    assert labels == sources.labels, f"the cells of {place} are of other test rows: move them away"
    rows = [row for cell, found in values.items() for row in rows_of(cell, found, sources)]
    return [*rows, *source_alone(place, sources, labels), *wins_of(place, values, sources, plan.seeds)]


def _data_of(cell: Cell, hashes: dict[str, str]) -> str:
    """What a cell's data are known by: those of its task, or of all tasks for the network that they share."""
    return config_hash(sorted(hashes.items())) if cell.method == SHARED else hashes[cell.task]


def _data_hash(root: Path, task: str) -> str:
    """Hash of the sizes of a task's files: cells of other data are not used again."""
    places = [
        part.place
        for source in TASKS.get(task).sources
        for part in (source.train, source.validation, source.test)
        if part is not None
    ]
    missing = [place for place in places if not (root / place).is_file()]
    if missing:
        raise InputError(
            f"{root} has no {missing[0]}; expected the data sets of SOURCES.md. Name their folder with --data."
        )
    return config_hash([(place, (root / place).stat().st_size) for place in sorted(set(places))])


def _fill(plan: Plan, workers: Workers, todo: list[Cell], paths: dict[Cell, Path]) -> None:
    if not todo:
        return
    rows_of_split = prepare(plan.setup, todo[0].task, todo[0].base).rows
    needed = SPLITS if any(reads_states(cell.method) for cell in todo) else ()
    stored = [(todo[0], split) for split in needed if rows_of_split(split).ids]
    for (cell, split), seconds in workers.run(functools.partial(build_store, plan.setup), stored):
        note(f"{cell.task} {cell.base}: states of the {split} rows stored in {seconds:.0f} s")
    taught = [cell for cell in todo if cell.method in TAUGHT]
    waves = [[cell for cell in todo if cell not in taught[1:]], taught[1:]]  # the first one trains the teacher
    waves[0].sort(key=lambda cell: cell not in taught)
    for wave in waves:
        jobs = [(cell, paths[cell]) for cell in wave]
        for (cell, _), seconds in workers.run(functools.partial(_run, plan.setup), jobs):
            note(f"{cell.title}: {seconds:.0f} s")
    shutil.rmtree(plan.setup.scratch / "taps" / todo[0].task / todo[0].base, ignore_errors=True)  # gigabytes


def _run(setup: Setup, job: tuple[Cell, Path]) -> float:
    """Run one cell and write its file at once: a run that is killed later does not lose it."""
    cell, path = job
    values = run_cell(setup, cell, path.stem)
    write_json(path, values, indent=None)
    return float(values["seconds"])


def main(arguments: Sequence[str] | None = None) -> Path:
    """Parse, run, and say where the results are."""
    options = _parser().parse_args(arguments)
    scratch = Path(tempfile.gettempdir()) / "safeside-bench"
    if options.quick:
        options.limit, options.evaluation_limit, options.epochs, options.seeds = 64, 64, 1, options.seeds[:1]
    bases = [
        (Path(name).name, name, config_hash(base.fingerprint.model_dump()))
        for name, base in installed(options.bases).items()
    ]
    cells = options.cells or (scratch / "guard-cells" if options.quick else CELLS)
    setup = Setup(
        data=options.data,
        bases=tuple(bases),
        scratch=options.scratch or (scratch if options.quick else SCRATCH),
        limit=options.limit,
        evaluation_limit=options.evaluation_limit,
        epochs=options.epochs,
        teachers=cells.parent / "guard_teachers",
    )
    output = options.output or (scratch if options.quick else RESULTS)
    plan = Plan(
        setup, tuple(options.tasks), tuple(options.methods), tuple(options.seeds), cells, output, options.finished_only
    )
    with Workers(options.workers, options.threads) as workers:
        path = run_plan(plan, workers)
    note(f"wrote {path}")
    return path


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of the data sets")
    parser.add_argument("--bases", nargs="+", default=list(BASES), help="builtin, minilm, a folder or a hub name")
    parser.add_argument("--tasks", nargs="+", default=list(TASK_NAMES), choices=list(TASK_NAMES))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument(
        "--limit", type=int, default=1500, help="training rows of a cell; ROWS in guard_rows.py may allow fewer"
    )
    parser.add_argument(
        "--evaluation-limit", type=int, default=1000, help="validation rows, and test rows; ROWS may allow fewer"
    )
    parser.add_argument(
        "--epochs",
        type=int,
        default=12,
        help="at most, whatever SCHEDULES in guard_rows.py say",
    )
    parser.add_argument("--finished-only", action="store_true", help="run nothing: the figures of the cells there are")
    parser.add_argument("--workers", type=int, default=2, help="processes")
    parser.add_argument("--threads", type=int, default=1, help="threads of each process")
    parser.add_argument("--cells", type=Path, help="folder of finished cells; what teachers gave is kept beside it")
    parser.add_argument("--scratch", type=Path, help="folder of stored states")
    parser.add_argument("--output", type=Path, help="folder of the result file")
    parser.add_argument("--quick", action="store_true", help="prove that it works: few rows, one epoch, one seed")
    return parser


if __name__ == "__main__":
    main()
