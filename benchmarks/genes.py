"""The genes benchmark: how much lost safety comes back, by a gene and by others, on five task models and three seeds.

    python benchmarks/genes.py --data ../shared/data                 all of it, hours on two cores; a killed run goes on
    python benchmarks/genes.py --data ../shared/data --seeds 0       one seed
    python benchmarks/genes.py --data ../shared/data --port FOLDER   and between this base and one of another shape
    python benchmarks/genes.py --data ../shared/data --quick         a few rows of each task, into a temporary folder

An attack succeeds when a judge says that the answer goes along and the answer is about what was asked (see
``genes_judge``).  A task model counts when it learnt its task and attacks rose by ten points; the others are excluded
by that rule and counted, and repairs are not tried in them.  Writes genes.json with the cells that are there, and
genes.html.
"""

from __future__ import annotations

import argparse
import functools
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from genes_board import METHODS, Pair, judged
from genes_cells import FIRST_CELLS, run_task
from genes_figures import port_rows, ports_of, recovered_rows, rows_of
from genes_models import RATE_OF, Models, Setup
from genes_notes import notes_of
from genes_port import Move, moves_of, run_move, setup_of
from genes_report import write_page
from genes_rows import TASKS, Sizes
from safeside.base.model import load_base
from safeside.provenance import config_hash
from safeside.terminal import note
from tidy import RESULTS, result_of, write_json
from workers import Workers

CELLS = Path(__file__).parent / ".cells" / "genes"
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Plan:
    """What to run, and where results go."""

    setups: tuple[Setup, ...]
    """The first is the benchmark's; between it and the others genes are ported."""
    seeds: tuple[int, ...]
    tasks: tuple[str, ...]
    output: Path
    only_qualifying: bool = True
    """Whether repairs are measured in the task models alone that count."""

    @property
    def moves(self) -> list[Move]:
        """Every port."""
        return list(moves_of(self.setups, self.seeds, self.tasks))

    @property
    def shared(self) -> list[tuple[Setup, int]]:
        """Every base and seed that others need, that of SaLoRA's rate among them."""
        return list(dict.fromkeys([*product(self.setups, self.seeds), (self.setups[0], RATE_OF[0])]))

    @property
    def task_models(self) -> list[tuple[Setup, int, str]]:
        """Every task model that is asked for, by other tasks' transfers too."""
        own = [(self.setups[0], seed, task) for seed, task in product(self.seeds, TASKS)]
        return list(dict.fromkeys([*own, *((move.target, move.seed, move.task) for move in self.moves)]))


def run(plan: Plan, workers: Workers) -> Path:
    """Make what is missing, then write genes.json and genes.html; returns the former."""
    started, setup = time.perf_counter(), plan.setups[0]
    setup.cells.mkdir(parents=True, exist_ok=True)
    (setup.cells / ".gitignore").write_text("*\n", encoding="utf-8")
    for job, seconds in workers.run(_make_shared, plan.shared):
        note(f"{job[0].base}, seed {job[1]}: rows, aligned and degraded model and gene in {seconds:.0f} s")
    for (made, seed, task), seconds in workers.run(_make_task, plan.task_models):
        note(f"{made.base}, seed {seed}: {task} model in {seconds:.0f} s")
    transfers = tuple(f"transfer-{task}" for task in TASKS)
    rounds = {"first": FIRST_CELLS, "main": tuple(METHODS.values()), "transfer": transfers, "other": ()}
    for title, names in rounds.items():
        make_cells = functools.partial(run_task, setup, names=names)
        for (seed, task), seconds in workers.run(make_cells, _models_to_measure(plan, title)):
            note(f"seed {seed}, {task}: {title} cells in {seconds:.0f} s")
    for move, seconds in workers.run(run_move, plan.moves):
        note(f"{move.source.base} to {move.target.base}, seed {move.seed}, {move.task}: {seconds:.0f} s")
    return write_results(plan, time.perf_counter() - started)


def _models_to_measure(plan: Plan, title: str) -> list[Pair]:
    """Every task model at first, then those that count alone: there is nothing to repair in the others."""
    if title == "first" or not plan.only_qualifying:
        return list(product(plan.seeds, plan.tasks))
    return judged(plan.setups[0], plan.seeds, plan.tasks).qualifying


def _make_shared(job: tuple[Setup, int]) -> float:
    """What every task of a seed needs, so that two processes do not both make it."""
    started, models = time.perf_counter(), Models(*job)
    models.safety()
    models.unaligned()
    models.gene()
    return time.perf_counter() - started


def _make_task(job: tuple[Setup, int, str]) -> float:
    """A task model, before two processes both need it, and what is chosen on one of them."""
    started, (setup, seed, task) = time.perf_counter(), job
    Models(setup, seed).task(task)
    if (seed, task) == RATE_OF:
        Models(setup, seed).salora_rate()
    return time.perf_counter() - started


def write_results(plan: Plan, seconds: float) -> Path:
    """Write genes.json and genes.html from the cells that are there."""
    setup, ports = plan.setups[0], ports_of(plan.moves)
    board = judged(setup, plan.seeds, plan.tasks)
    rows = [*rows_of(board, setup.key), *recovered_rows(board), *port_rows(ports)]
    path = write_json(plan.output / "genes.json", result_of("genes", seconds, rows, notes_of(board, setup, ports)))
    note(f"wrote {write_page(path)}")
    return path


def main(arguments: Sequence[str] | None = None) -> Path:
    """Parse, run, and say where the results are."""
    options = _parser().parse_args(arguments)
    scratch = Path(tempfile.gettempdir()) / "safeside-bench"
    quick = Sizes(
        safety=24,
        instructions=24,
        degraded=8,
        task=24,
        labelled=24,
        mixed=8,
        test=8,
        attacks=9,
        extract=12,
        unaligned=16,
    )
    setup = Setup(
        data=options.data,
        cells=options.cells or (scratch / "genes-cells" if options.quick else CELLS),
        sizes=quick if options.quick else Sizes(),
        base=options.base,
        fingerprint=config_hash(load_base(options.base).fingerprint.model_dump()),
        epochs=1 if options.quick else None,
        steps=2 if options.quick else None,
    )
    setups = (setup, *(setup_of(setup, base) for base in options.port))
    seeds = options.seeds[:1] if options.quick else options.seeds
    output = options.output or (scratch if options.quick else RESULTS)
    plan = Plan(setups, tuple(seeds), tuple(options.tasks), output, only_qualifying=not options.quick)
    if options.results_only:
        return write_results(plan, 0.0)
    with Workers(options.workers, options.threads) as workers:
        path = run(plan, workers)
    note(f"wrote {path}")
    return path


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of the data sets")
    parser.add_argument("--base", default="builtin", help="as for load_base")
    parser.add_argument("--port", nargs="+", default=[], help="further bases that genes are ported to and from")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--workers", type=int, default=2, help="processes")
    parser.add_argument("--threads", type=int, default=1, help="threads of each process")
    parser.add_argument("--cells", type=Path, help="folder of models and cached cells")
    parser.add_argument("--output", type=Path, help="folder of the result file")
    parser.add_argument("--results-only", action="store_true", help="write the results of the cells that are there")
    parser.add_argument("--quick", action="store_true", help="prove that it works: few rows and steps, one seed")
    return parser


if __name__ == "__main__":
    main()
