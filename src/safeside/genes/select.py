"""Selection: the layers whose updates move harmful inputs most and harmless ones least (SafeGene's second stage).

A layer's shift is ``|h with - h without| / |h without|`` at the end of the prompt, where the answer begins, with the
update of that layer alone: so a late layer is not credited with what earlier ones did.  Our reconstruction.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from safeside.base.model import Base
from safeside.base.updates import LiveUpdates
from safeside.errors import InputError
from safeside.genes.checks import check_fits, check_model, check_plain
from safeside.genes.gene import Gene
from safeside.genes.recipe import SelectSection
from safeside.genes.rows import Batch, Given, Texts, encode_texts

_ROWS = 32  # of one pass


@dataclass(frozen=True, slots=True)
class Shift:
    """How far a layer's update moves what the layer gives, relative to its length."""

    harmful: float
    """Mean over harmful prompts."""
    benign: float
    """Mean over harmless prompts."""

    @property
    def contrast(self) -> float:
        """What layers are ranked by."""
        return self.harmful - self.benign


def select_layers(
    base: Base,
    gene: Gene,
    harmful: Sequence[Given],
    benign: Sequence[Given],
    settings: SelectSection | None = None,
) -> Gene:
    """The gene with the layers that the settings keep (its recipe's unless given), chosen on ``base``.

    Shifts are measured, and kept in its results, however layers are chosen; more layers than it has are an InputError.
    """
    settings = settings or gene.config.recipe.select
    n_layers = len(gene.config.layers)
    if settings.method != "all" and settings.keep > n_layers:
        raise InputError(f"{gene.name} has {n_layers} layers; got keep = {settings.keep}. Keep fewer.")
    shifts = layer_shifts(base, gene, harmful[: settings.n_prompts], benign[: settings.n_prompts])
    if settings.method == "all":
        chosen = list(gene.config.layers)
    elif settings.method == "random":
        chosen = random.Random(gene.config.recipe.seed).sample(gene.config.layers, settings.keep)
    else:
        chosen = sorted(shifts, key=lambda layer: -shifts[layer].contrast)[: settings.keep]
    results: dict[str, int | float | str] = {"selected_by": settings.method}
    for layer, shift in shifts.items():
        results |= {f"shift_harmful_{layer}": shift.harmful, f"shift_benign_{layer}": shift.benign}
    return gene.kept(chosen).with_results(results)


def layer_shifts(base: Base, gene: Gene, harmful: Sequence[Given], benign: Sequence[Given]) -> dict[int, Shift]:
    """The shift of each of the gene's layers on the prompts of both kinds (answers are not read)."""
    check_model(base)
    check_plain(base)
    check_fits(gene, base)
    kinds = [
        encode_texts(base, rows, name, answered=False)
        for rows, name in ((harmful, "harmful prompts"), (benign, "harmless prompts"))
    ]
    harmful_shifts, benign_shifts = (_mean_shifts(base, gene, texts) for texts in kinds)
    return {layer: Shift(harmful_shifts[layer], benign_shifts[layer]) for layer in gene.config.layers}


@torch.no_grad()
def _mean_shifts(base: Base, gene: Gene, texts: Texts) -> dict[int, float]:
    totals = dict.fromkeys(gene.config.layers, 0.0)
    for batch in texts.batches(base, _ROWS, only_prompts=True):
        without = last_states(base, batch, gene.config.layers)
        for layer in gene.config.layers:
            alone = {name: update.to(base.device) for name, update in gene.kept([layer]).updates.items()}
            with LiveUpdates(base.model, alone, dict.fromkeys(alone, 1.0)):
                moved = last_states(base, batch, [layer])[layer] - without[layer]
            totals[layer] += float((moved.norm(dim=-1) / without[layer].norm(dim=-1)).sum())
    return {layer: total / len(texts) for layer, total in totals.items()}


def last_states(base: Base, batch: Batch, layers: Sequence[int]) -> dict[int, Tensor]:
    """(B, D) in float32, what each layer gives at the last token of each text."""
    found: dict[int, Tensor] = {}
    row, last = torch.arange(len(batch.ids), device=batch.ids.device), batch.keep.sum(1) - 1

    def keep(layer: int, output: object) -> None:
        state = output[0] if isinstance(output, tuple) else output
        assert isinstance(state, Tensor)
        found[layer] = state[row, last].float()

    handles = [
        base.blocks[layer - 1].register_forward_hook(lambda module, inputs, output, layer=layer: keep(layer, output))
        for layer in layers
    ]
    try:
        batch.final_states(base)
    finally:
        for handle in handles:
            handle.remove()
    return found
