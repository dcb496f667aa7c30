"""Extraction: what an aligned model has and its degraded copy lost, as low-rank updates of the copy.

Our reconstruction of SafeGene's first stage: over the updates ``BA`` it minimises ``KL(aligned || degraded + BA)`` on
harmful prompts, plus ``KL(degraded || degraded + BA)`` on harmless ones, so that the gene carries safety only.  Both
are means over the tokens of answers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from safeside.base.model import Base
from safeside.base.token_scores import token_divergences
from safeside.base.updates import LiveUpdates, LowRank, linear_layer, widths_of
from safeside.genes.checks import check_pair, family_of
from safeside.genes.gene import AttachmentPoint, Gene, GeneConfig
from safeside.genes.optimise import Report, Steps, draws, optimise, silent
from safeside.genes.recipe import GeneRecipe
from safeside.genes.rows import Batch, Given, Texts, check_rows, encode_texts, named, with_answers
from safeside.lora import linear_layers


@dataclass(frozen=True, slots=True)
class Pair:
    """Two models of one family."""

    aligned: Base
    """Safe."""
    degraded: Base
    """Its mildly degraded copy."""


def extract_gene(
    pair: Pair,
    harmful: Sequence[Given],
    benign: Sequence[Given],
    recipe: GeneRecipe,
    report: Report = silent,
) -> Gene:
    """A gene of all layers with coefficients 1; both models stay as they are.

    Prompts without an answer get one: harmful ones the aligned model's, harmless ones the degraded model's.  Those that
    are answered with nothing are left out and counted in the gene's results.
    """
    check_pair(pair.aligned, pair.degraded)
    base, longest, started = pair.degraded, recipe.extract.max_new_tokens, time.perf_counter()
    asked, plainly = named(harmful, "harmful prompts"), named(benign, "harmless prompts")
    check_rows(pair.aligned, asked, "harmful prompts", longest)
    check_rows(base, plainly, "harmless prompts", longest)
    texts = encode_texts(base, with_answers(pair.aligned, asked, longest), "harmful prompts", answered=True)
    plain = encode_texts(base, with_answers(base, plainly, longest), "harmless prompts", answered=True)
    gene, loss = learn_gene(
        base, (texts, plain), lambda updates, batch: divergence(pair.aligned, base, updates, batch), recipe, report
    )
    results: dict[str, int | float | str] = {
        "extract_loss": loss,
        "extract_seconds": time.perf_counter() - started,
        "n_harmful": len(texts),
        "n_benign": len(plain),
        "n_without_answer": len(harmful) + len(benign) - len(texts) - len(plain),
    }
    return gene.with_results(results)


def learn_gene(
    base: Base,
    texts: tuple[Texts, Texts],
    loss_of: Callable[[Mapping[str, LowRank], Batch], Tensor],
    recipe: GeneRecipe,
    report: Report = silent,
) -> tuple[Gene, float]:
    """A gene of ``base`` with coefficients 1, and its last loss: that of ``loss_of`` (updates, batch) on harmful texts.

    On harmless texts, the second of ``texts``, the divergence from the base as it is counts with the recipe's weight.
    """
    settings, (harmful, benign) = recipe.extract, texts
    points = attachment_points(base, settings.targets, settings.rank)
    updates = trainable_updates(points, base.device, recipe.seed)
    order = draws(len(harmful), settings.batch_size, recipe.seed)
    plain_order = draws(len(benign), settings.batch_size, recipe.seed + 1)

    def loss_at(step: int) -> Tensor:
        lost = loss_of(updates, harmful.batch(base, next(order)))
        if not settings.benign_weight:
            return lost
        return lost + settings.benign_weight * divergence(base, base, updates, benign.batch(base, next(plain_order)))

    steps = Steps(settings.steps, settings.learning_rate, report, "[extract] learning_rate")
    loss = optimise(parameters_of(updates), loss_at, steps)
    learnt = {name: LowRank(update.down.detach(), update.up.detach()) for name, update in updates.items()}
    return _new_gene(base, points, recipe, learnt), loss


def _new_gene(
    base: Base, points: tuple[AttachmentPoint, ...], recipe: GeneRecipe, updates: Mapping[str, LowRank]
) -> Gene:
    """A gene of all layers that have a point, with coefficients 1."""
    layers = tuple(sorted({point.layer for point in points}))
    config = GeneConfig(
        name=recipe.name,
        layers=layers,
        coefficients=(1.0,) * len(layers),
        modules=points,
        family=family_of(base),
        conflicts=recipe.conflicts,
        recipe=recipe,
    )
    return Gene(config, updates)


def attachment_points(base: Base, targets: tuple[str, ...], rank: int) -> tuple[AttachmentPoint, ...]:
    """The linear layers whose names end in ``targets`` (all in the blocks without), each with at most ``rank``."""
    layer_of = {module: number for number, block in enumerate(base.blocks, 1) for module in block.modules()}
    points = []
    for name in linear_layers(base, targets):
        module = linear_layer(base.model, name)
        n_in, n_out = widths_of(module)
        most = min(rank, n_in, n_out)
        points.append(AttachmentPoint(name=name, layer=layer_of[module], rank=most, n_in=n_in, n_out=n_out))
    return tuple(points)


def trainable_updates(points: Sequence[AttachmentPoint], device: torch.device, seed: int) -> dict[str, LowRank]:
    """Fresh updates that are learnt: ``down`` random, ``up`` zero, so that they start as nothing (LoRA's start)."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for point in points:
        down = (torch.rand(point.rank, point.n_in, generator=generator) * 2 - 1) / point.n_in**0.5
        up = torch.zeros(point.n_out, point.rank)
        found[point.name] = LowRank(nn.Parameter(down.to(device)), nn.Parameter(up.to(device)))
    return found


def parameters_of(updates: Mapping[str, LowRank]) -> list[nn.Parameter]:
    """What is learnt of trainable updates."""
    tensors = [tensor for update in updates.values() for tensor in (update.down, update.up)]
    return [tensor for tensor in tensors if isinstance(tensor, nn.Parameter)]


def divergence(teacher: Base, base: Base, updates: Mapping[str, LowRank], batch: Batch) -> Float[Tensor, ""]:
    """Mean ``KL(teacher || base + updates)`` (nats) over the tokens of the batch's answers."""
    row, place = batch.answer_places
    with torch.no_grad():
        wanted = batch.final_states(teacher)[row, place]
    with LiveUpdates(base.model, updates, dict.fromkeys(updates, 1.0)):
        found = batch.final_states(base)[row, place]
    return token_divergences(base, wanted, found, teacher=teacher).mean()
