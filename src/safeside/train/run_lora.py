"""Run a recipe of kind ``lora``: standard fine-tuning of the base, with the same loop, loss and data as our aligners.

The reference of DPO, and of the divergence on benign rows, is the base with the LoRA switched off.  With ``cache_taps``
its final states are computed once and stored, as for our aligners; else each batch costs a second pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from safeside.adapters.adapter import SideOutput
from safeside.artifact import make_folder
from safeside.base.model import Base
from safeside.errors import ConfigError
from safeside.lora import Lora, LoraShape, add_lora, save_lora
from safeside.train.loop import Outcome, Progress, processes_on
from safeside.train.objectives import objective_of
from safeside.train.recipe import LORA, Recipe
from safeside.train.rows import Rows
from safeside.train.run import DTYPES, base_for, clean_up, facts_of, identity_of, loop_for, splits_of, stores_of
from safeside.train.taps import FINAL, Batch, Forward, TapStore


@dataclass(slots=True)
class LoraRun:
    """A finished run.  The base is as it was; ``load_lora`` puts the LoRA back into it."""

    folder: Path
    """Where it was saved, as a peft folder."""
    outcome: Outcome
    """How training went."""
    train: Rows
    """Training rows, and which were left out."""
    validation: Rows
    """Validation rows, and which were left out."""
    validation_metric: str
    """What ``outcome.best_metric`` measures."""
    flops_share: float
    """What the updates cost beside the base: 0.01 is 1%."""
    benign: Rows | None = None
    """Harmless rows that it was held near the base on, and which were left out."""

    @property
    def splits(self) -> list[Rows]:
        """All rows that were read."""
        return [self.train, self.validation, *([self.benign] if self.benign is not None else [])]


class LoraSource:
    """A ``Source``: the updated base's final state, told as the plain base's and a delta to it.

    Only texts from ``first`` on need the plain base's state; for the others it is given as zero, and the delta is the
    whole state.  It is read from ``store``, or computed by a pass with the LoRA switched off.
    """

    def __init__(self, lora: Lora, first: int, store: TapStore | None) -> None:
        self.lora, self.first, self.store = lora, first, store

    def __call__(self, batch: Batch) -> Forward:
        needed = [place for place, row in enumerate(batch.rows) if row >= self.first]
        reference = self._reference(batch, needed) if needed else None
        final = self.lora.final_states(batch.ids, batch.keep)
        base_state = torch.zeros_like(final)
        if reference is not None:
            base_state[needed] = reference
        return Forward(SideOutput(final.float() - base_state.float(), None, None), base_state)

    @torch.no_grad()
    def _reference(self, batch: Batch, places: Sequence[int]) -> torch.Tensor:
        some = list(places)
        if self.store is not None:
            return self.store.read(batch)[FINAL][some]
        with self.lora.scaled(0.0):
            return self.lora.final_states(batch.ids[some], batch.keep[some])


def run_lora(
    recipe: Recipe,
    *,
    data_root: Path = Path(),
    output: Path | None = None,
    base: Base | None = None,
    resume: bool = False,
    report: Callable[[Progress], None] = lambda progress: None,
    advance: Callable[[int], None] = lambda count: None,
) -> LoraRun:
    """Train a LoRA by the recipe and save it to the output folder; arguments as those of ``run_recipe``.

    A recipe of another kind is a ConfigError.
    """
    if recipe.adapter.kind != LORA:
        raise ConfigError(f"run_lora is for kind 'lora'; {recipe.adapter.kind!r} is for run_recipe.")
    base = base or base_for(recipe)
    folder, shape = make_folder(output or Path(recipe.output)), lora_shape(recipe)
    splits = splits_of(base, recipe, data_root, (), folder)
    train, validation = splits[:2]
    processes = processes_on(base.device)
    described = [recipe.adapter.kind, shape.rank, shape.alpha, shape.depth]
    identity = identity_of(base, described, recipe, [train, validation])
    with processes.main_process_first():
        stores = _stores(base, recipe, splits[:2], folder, advance)
    with add_lora(base, shape, recipe.seed) as lora:
        pairs = zip(splits[:2], stores, strict=True)
        sources = [LoraSource(lora, _first_with_reference(recipe, rows), store) for rows, store in pairs]
        objective = objective_of(base, sources, (train, validation), recipe)
        outcome = loop_for(lora, objective, recipe, identity=identity, folder=folder, report=report).run(resume)
        if processes.is_main_process:
            facts = {**facts_of(recipe, outcome, splits, objective.metric), "flops_share": f"{lora.flops_share:.6f}"}
            save_lora(lora, folder, facts, dtype=DTYPES[recipe.stored_dtype])
            clean_up(folder, recipe.training.cache_taps is True)
        processes.wait_for_everyone()
        return LoraRun(folder, outcome, train, validation, objective.metric, lora.flops_share, *splits[2:])


def lora_shape(recipe: Recipe) -> LoraShape:
    """The dimensions that a recipe of kind ``lora`` asks for; updates are multiplied by 2."""
    rank = recipe.adapter.lora_rank or LoraShape().rank
    return LoraShape(rank, 2.0 * rank, depth=recipe.adapter.depth)


def _first_with_reference(recipe: Recipe, rows: Rows) -> int:
    """Index of the first text whose plain base state the loss reads: all of them, or the benign ones at the end."""
    return 0 if recipe.training.objective == "dpo" else len(rows.ids)


def _stores(
    base: Base, recipe: Recipe, splits: Sequence[Rows], folder: Path, advance: Callable[[int], None]
) -> Sequence[TapStore | None]:
    """Final states of the plain base, where the loss reads any and the recipe wants them stored."""
    is_read = recipe.training.objective == "dpo" or any(rows.benign is not None for rows in splits)
    if not recipe.training.cache_taps or not is_read:
        return [None] * len(splits)
    return stores_of(base, splits, (FINAL,), folder, advance)
