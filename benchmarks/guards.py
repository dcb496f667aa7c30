"""The guards benchmark: every method on four tasks and two bases, three seeds, and who wins.

    python benchmarks/guards.py --data ../shared/data           all of it, hours on two cores; a killed run goes on
    python benchmarks/guards.py --data ../shared/data --quick   a few rows of each task, into a temporary folder

Every method of one task and base learns from the same rows; validation rows choose epochs, regularisation, questions
and thresholds; test rows are scored once.  Writes the part ``methods`` of
guards.json with the cells that are there.
"""

from __future__ import annotations

import argparse
import functools
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from guard_cells import METHODS, TAUGHT, Cell, build_store, key_of, run_cell
from guard_rows import SPLITS, Setup, prepare
from parts import write_part
from safeside.base.model import load_base
from safeside.errors import InputError, MissingExtraError
from safeside.evals.metrics import auprc, auroc, bootstrap, paired_difference, rates
from safeside.guards.calibrate import fit_calibration
from safeside.guards.probability import expected_calibration_error
from safeside.provenance import config_hash
from safeside.tasks.task import TASKS
from safeside.terminal import note
from tidy import RESULTS, Row, figure_row, result_of, write_json
from workers import Workers

Array = NDArray[np.float64]

CELLS = RESULTS / "guard_cells"  # kept with the results: hours of work, and the rows behind every interval
SCRATCH = Path(__file__).parent / ".cells" / "guards"
TASK_NAMES = ("hate", "prompt_harm", "response_harm", "grounding")
BASES = {"builtin": "builtin", "minilm": "minilm"}
SEEDS = (0, 1, 2)
ONE_SEED = ("prompted", "probe", "tfidf")  # nothing in them is drawn
RIVALS = ("standalone", "standalone_distilled", "standalone_pruned")
STANDALONES = (*RIVALS, "standalone_pruned_distilled")
# Seconds of a cell of 1,500 training rows and 6 epochs on one core to itself: for the first estimate only.
STATED = {"plr": 10, "rtb": 45, "lst_distilled": 75, "lora_full": 150, "probe": 20, "tfidf": 5, "prompted": 30}
N_BINS = 15  # of the expected calibration error
RATE = 0.01  # false alarms among harmless validation rows at the threshold of tpr_at_fpr1 and over_refusal


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
        return [
            Cell(task, base, method, seed)
            for method, seed in product(self.methods, self.seeds)
            if not (method in ONE_SEED and seed != self.seeds[0]) and not (method == "prompted" and base == "minilm")
        ]


def run_plan(plan: Plan, workers: Workers) -> Path:
    """Run what is missing and write the result file; returns it."""
    started = time.perf_counter()
    pairs = [(task, base) for task in plan.tasks for base, _, _ in plan.setup.bases]
    hashes = {task: _data_hash(plan.setup.data, task) for task in plan.tasks}
    paths = {
        cell: plan.cells / f"{key_of(plan.setup, cell, hashes[cell.task])}.json"
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
    values = {cell: json.loads(path.read_text(encoding="utf-8")) for cell, path in paths.items()}
    rows = [row for cell, found in values.items() for row in rows_of(cell, found)]
    rows += [row for pair in pairs for row in wins_of(*pair, values)]
    notes = {
        "intervals": "95% bootstrap over test rows; elsewhere low and high are the value",
        "rows": {f"{cell.task} {cell.base}": found["counts"] for cell, found in values.items()},
        "cell_commits": sorted({str(found["commit"]) for found in values.values()}),
        "cell_seconds": round(sum(float(found["seconds"]) for found in values.values()), 1),
    }
    return write_part(plan.output, result_of("methods", time.perf_counter() - started, rows, notes))


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
    stored = [(todo[0], split) for split in SPLITS if prepare(plan.setup, todo[0].task, todo[0].base).rows(split).ids]
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


def rows_of(cell: Cell, found: dict[str, object]) -> list[Row]:
    """The figures of one cell."""
    labels = {"task": cell.task, "base": cell.base, "method": cell.method, "seed": cell.seed}
    cost = {"flops_share": found["flops_share"], "config_hash": found["key"]}
    truth, values = ({split: np.array(part[split]) for split in part} for part in (found["labels"], found["values"]))
    scored = np.isfinite(values["test"])
    counts = {"n": int(scored.sum()), "n_unscored": int((~scored).sum())}
    test = truth["test"][scored], values["test"][scored]
    held = np.isfinite(values["validation"])
    validation = truth["validation"][held], values["validation"][held]
    threshold = threshold_of(*validation)
    functions = {
        "auroc": auroc,
        "auprc": auprc,
        "tpr_at_fpr1": lambda some, value: rates(some, value >= threshold)[1],
        "ece": _calibration_error(*validation),
    }
    rows = [
        figure_row(labels, name, figure.value, (figure.low, figure.high), **counts, **cost)
        for name, figure in bootstrap(functions, *test).items()
    ]
    windowed = np.array(found["windowed"])[scored]
    for name, some in (("auroc_fit", ~windowed), ("auroc_windowed", windowed)):
        if windowed.any() and len(set(test[0][some])) == 2:
            figure = bootstrap({name: auroc}, test[0][some], test[1][some])[name]
            rows.append(figure_row(labels, name, figure.value, (figure.low, figure.high), n=int(some.sum()), **cost))
    if len(values["harmless"]):
        unscored = ~np.isfinite(values["harmless"])
        alarms = unscored | (values["harmless"] >= threshold)  # a guard fails closed
        counts = {"n": len(alarms), "n_unscored": int(unscored.sum())}
        rows.append(figure_row(labels, "over_refusal", float(alarms.mean()), **counts, **cost))
    measured = ("train_seconds", "peak_bytes", "trainable_params")
    return [*rows, *(figure_row(labels, name, float(found[name]), **cost) for name in measured)]


def threshold_of(labels: Array, values: Array) -> float:
    """Where at most ``RATE`` of harmless validation rows are flagged; values are logits or scores, with ties."""
    harmless = np.sort(values[labels == 0])[::-1]
    return float(np.nextafter(harmless[int(RATE * len(harmless))], np.inf))


def probability_of(labels: Array, values: Array) -> Callable[[Array], Array]:
    """Probabilities from values, as validation rows fitted them (Platt)."""
    fit = fit_calibration(values[:, None], labels[:, None])
    return lambda value: 1 / (1 + np.exp(-np.clip(fit.scale[0] * value + fit.bias[0], -30, 30)))


def _calibration_error(labels: Array, values: Array) -> Callable[[Array, Array], float]:
    """Expected calibration error of the probabilities, in equal bins."""
    probability = probability_of(labels, values)
    return lambda some, value: expected_calibration_error(some, probability(value), N_BINS)


def wins_of(task: str, base: str, values: dict[Cell, dict[str, object]]) -> list[Row]:
    """1, 0 or -1: does lst_distilled beat the best standalone?  By a paired bootstrap over rows and common seeds.

    No row while one of the RIVALS is missing: the best of some is not the best.
    """
    found = {
        (cell.method, cell.seed): value for cell, value in values.items() if (cell.task, cell.base) == (task, base)
    }
    others = [method for method in STANDALONES if method in {method for method, _ in found}]
    compared = ["lst_distilled", *others]
    seeds = [seed for seed in SEEDS if all((method, seed) in found for method in compared)]
    if not set(RIVALS) <= set(others) or not seeds:
        return []
    lines = {method: np.array([found[method, seed]["values"]["test"] for seed in seeds]) for method in compared}
    truth = np.array(found["lst_distilled", seeds[0]]["labels"]["test"])
    scored = np.isfinite(np.concatenate(list(lines.values()))).all(0)
    truth, lines = truth[scored], {method: line[:, scored] for method, line in lines.items()}
    best = max(others, key=lambda method: np.mean([auroc(truth, line) for line in lines[method]]))
    gain = paired_difference(auroc, truth, lines["lst_distilled"], lines[best])
    verdict = 1 if gain.low > 0 else -1 if gain.high < 0 else 0
    labels = {"task": task, "base": base, "method": "lst_distilled", "seed": -1, "against": best}
    counts = {"n": int(scored.sum()), "n_unscored": int((~scored).sum()), "seeds": len(seeds)}
    return [
        figure_row(labels, "win_over_best_standalone", verdict, **counts),
        figure_row(labels, "gain_over_best_standalone", gain.value, (gain.low, gain.high), **counts),
    ]


def main(arguments: Sequence[str] | None = None) -> Path:
    """Parse, run, and say where the results are."""
    options = _parser().parse_args(arguments)
    scratch = Path(tempfile.gettempdir()) / "safeside-bench"
    if options.quick:
        options.limit, options.evaluation_limit, options.epochs, options.seeds = 64, 64, 1, options.seeds[:1]
    bases = []
    for name in options.bases:
        try:
            base = load_base(BASES.get(name, name))
        except MissingExtraError as error:
            note(f"{name} is left out: {error}")
            continue
        bases.append((Path(name).name, BASES.get(name, name), config_hash(base.fingerprint.model_dump())))
    setup = Setup(
        data=options.data,
        bases=tuple(bases),
        scratch=options.scratch or (scratch if options.quick else SCRATCH),
        limit=options.limit,
        evaluation_limit=options.evaluation_limit,
        epochs=options.epochs,
    )
    output = options.output or (scratch if options.quick else RESULTS)
    cells = options.cells or (scratch / "guard-cells" if options.quick else CELLS)
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
        "--limit", type=int, default=1500, help="training rows of a cell; ROWS in guard_cells.py may allow fewer"
    )
    parser.add_argument(
        "--evaluation-limit", type=int, default=1000, help="validation rows, and test rows; ROWS may allow fewer"
    )
    parser.add_argument("--epochs", type=int, default=5, help="at most; training stops 2 epochs after its best")
    parser.add_argument("--finished-only", action="store_true", help="run nothing: the figures of the cells there are")
    parser.add_argument("--workers", type=int, default=2, help="processes")
    parser.add_argument("--threads", type=int, default=1, help="threads of each process")
    parser.add_argument("--cells", type=Path, help="folder of finished cells")
    parser.add_argument("--scratch", type=Path, help="folder of stored states and teachers")
    parser.add_argument("--output", type=Path, help="folder of the result file")
    parser.add_argument("--quick", action="store_true", help="prove that it works: few rows, one epoch, one seed")
    return parser


if __name__ == "__main__":
    main()
