"""A gene of one base's family in the models of another's: how much of the lost safety comes back after the port.

Both bases go through the same setting: aligned, degraded and task models from the same recipes and rows.  The source's
gene is ported with the harmful and harmless prompts that it was extracted with, answers left out, then selected and
fitted on the target's task model as the target's own gene is, which stands beside it (``gene_own``).  So does a control
(``gene_refusals``): a gene of the target learnt in the same way from the refusals that the rows hold, without a source.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import permutations, product
from pathlib import Path

from genes_cells import MAIN_SHOTS, TaskBench, Values, measured, run_cells, run_task
from genes_models import Choice, Models, Setup
from safeside.base.model import Base, load_base
from safeside.genes.apply import apply_genes
from safeside.genes.artifact import load_gene, save_gene
from safeside.genes.fit import fit_gene
from safeside.genes.gene import Gene
from safeside.genes.port import learn_answers, port_gene
from safeside.genes.rows import Conversation
from safeside.genes.select import select_layers
from safeside.provenance import config_hash

PORT_TASKS = ("dolly", "ag_news")  # an open-ended task and one of classes
CONTROL = f"gene_refusals-{MAIN_SHOTS}"
_OWN = f"gene-{MAIN_SHOTS}"
_NEEDED = ("aligned", "finetuned", _OWN)


@dataclass(frozen=True)
class Move:
    """A port from the models of one setting to those of another, measured on one task model of one seed."""

    source: Setup
    target: Setup
    seed: int
    task: str

    @property
    def cell(self) -> str:
        """The name of its cell, among those of the target."""
        return f"ported-{self.source.key}"


def setup_of(setup: Setup, base: str) -> Setup:
    """The same setting from another base."""
    return replace(setup, base=base, fingerprint=config_hash(load_base(base).fingerprint.model_dump()))


def moves_of(setups: Sequence[Setup], seeds: Sequence[int], tasks: Sequence[str]) -> Iterator[Move]:
    """From every base to every other one."""
    chosen = [task for task in PORT_TASKS if task in tasks]
    for (source, target), seed, task in product(permutations(setups, 2), seeds, chosen):
        yield Move(source, target, seed, task)


def run_move(move: Move) -> float:
    """Make the cells of a move that are missing; returns the seconds that it took."""
    job = move.seed, move.task
    seconds = run_task(move.target, job, _NEEDED)
    cells = [
        (move.cell, lambda: _fitted(move, ported_gene(move))),
        (CONTROL, lambda: _fitted(move, refusing_gene(move))),
    ]
    return seconds + run_cells(move.target, job, cells)


def _fitted(move: Move, whole: Gene) -> Values:
    """A gene of the target's family, fitted on the target's task model and measured in it."""
    bench = TaskBench(Models(move.target, move.seed), move.task)
    gene = fit_gene(bench.base, whole, *bench.shots(MAIN_SHOTS))
    with apply_genes(bench.base, [gene]):
        values = measured(bench.base, bench)
    return {**values, "seconds": gene.config.results["port_seconds"], "source": move.source.base}


def ported_gene(move: Move) -> Gene:
    """The source's gene for the target's family, with the layers that are selected there; made once."""
    source = Models(move.source, move.seed)

    def port(target: Base, harmful: Sequence[Conversation], benign: Sequence[Conversation]) -> Gene:
        return port_gene(source.gene(Choice("all")), (load_base(source.degraded()), target), harmful, benign)

    return _learnt(move, f"gene-from-{move.source.key}", port)


def refusing_gene(move: Move) -> Gene:
    """A gene of the target learnt from the refusals that the same rows hold, selected in the same way; made once."""

    def learn(target: Base, harmful: Sequence[Conversation], benign: Sequence[Conversation]) -> Gene:
        recipe = Models(move.target, move.seed).gene(Choice("all")).config.recipe
        return learn_answers(target, harmful, benign, recipe)

    return _learnt(move, "gene-from-refusals", learn)


def _learnt(move: Move, title: str, learn: Callable[[Base, list[Conversation], list[Conversation]], Gene]) -> Gene:
    target = Models(move.target, move.seed)
    harmful, benign = target.conversations("harmful"), target.conversations("benign")

    def make(place: Path) -> None:
        base = load_base(target.degraded())
        whole = learn(base, harmful, benign)
        settings = whole.config.recipe.select
        kept = min(settings.keep, len(whole.config.layers))
        save_gene(select_layers(base, whole, harmful, benign, settings.model_copy(update={"keep": kept})), place)

    return load_gene(target.made(title, make))
