"""What genes are compared with: repairs of a task model by arithmetic on its weights, and SaLoRA's guarded fine-tuning.

Weights and updates are matrices (n_out, n_in) in float32 by the layer's name.  The safety vector of a layer is ``V =
W_aligned - W_unaligned``; a task's update is ``W_task - W_aligned``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from safeside.base.model import Base
from safeside.base.updates import LiveUpdates, LowRank, add_to_weight, linear_layer
from safeside.errors import InputError
from safeside.genes.checks import check_model, check_plain
from safeside.genes.optimise import Report, Steps, draws, optimise, silent
from safeside.genes.rows import Given, Texts, answer_loss, encode_texts
from safeside.lora import linear_layers

Matrices = Mapping[str, Tensor]

_ROWS = 16  # of one pass


def weights_of(base: Base) -> dict[str, Float[Tensor, "n_out n_in"]]:
    """The weights of every linear layer in the blocks."""
    found = {}
    for name in linear_layers(base):
        layer = linear_layer(base.model, name)
        weight = layer.get_parameter("weight").detach().float()
        found[name] = weight.T.clone() if isinstance(layer, Conv1D) else weight.clone()
    return found


def difference(first: Matrices, second: Matrices) -> dict[str, Tensor]:
    """``first - second``, layer by layer; other layers, or other shapes, are an InputError."""
    wrong = sorted(set(first) ^ set(second)) or [name for name in first if first[name].shape != second[name].shape]
    if wrong:
        raise InputError(f"The two models differ in layer {wrong[0]}; expected one architecture.")
    return {name: first[name] - second[name] for name in first}


def with_added(base: Base, matrices: Matrices) -> Base:
    """A copy of ``base`` in memory with matrices added to its weights; the base stays as it is."""
    copy = replace(base, model=deepcopy(base.model))
    for name, matrix in matrices.items():
        add_to_weight(linear_layer(copy.model, name), matrix)
    return copy


def thinned(matrices: Matrices, density: float, seed: int) -> dict[str, Tensor]:
    """Each entry kept with probability ``density`` and divided by it, else 0: DARE (Yu et al. 2023, section 3.2)."""
    if not 0 < density <= 1:
        raise InputError(f"density is a share above 0 and at most 1; got {density}.")
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.where(torch.rand(matrix.shape, generator=generator) < density, matrix / density, 0.0)
        for name, matrix in sorted(matrices.items())
    }


def resta(task: Matrices, safety: Matrices, strength: float, density: float = 1.0, seed: int = 0) -> dict[str, Tensor]:
    """What to add to a task model: ``strength`` times the safety vectors, and the task's updates thinned.

    RESTA (Bhardwaj et al. 2024, section 3); at density 1 it is task arithmetic.
    """
    thin = thinned(task, density, seed)
    return {name: thin[name] - task[name] + strength * safety[name] for name in task}


def projection(safety: Float[Tensor, "n_out n_in"]) -> Float[Tensor, "n_out n_out"]:
    """``C = V V^T / |V|`` (Frobenius); all zero for a layer that alignment did not touch."""
    norm = safety.norm()
    return safety @ safety.T / norm if norm else torch.zeros(len(safety), len(safety))


def alignment(task: Tensor, safety: Tensor) -> float:
    """Cosine between a task's update and its projection: how much it stays in what alignment moved."""
    if not task.norm() or not safety.norm():
        return 1.0  # nothing that could stray, or nothing to stray from
    projected = projection(safety) @ task
    length = float(projected.norm())
    return float((projected * task).sum()) / (length * float(task.norm())) if length else 0.0


def safe_lora(task: Matrices, safety: Matrices, threshold: float = 0.5) -> dict[str, Tensor]:
    """What to add to a task model: updates at or under the threshold are replaced by their projection.

    SafeLoRA (Hsu et al. 2024, section 3).
    """
    return {
        name: projection(safety[name]) @ matrix - matrix
        for name, matrix in task.items()
        if alignment(matrix, safety[name]) <= threshold
    }


def safe_merge(
    task: Matrices, safety: Matrices, safety_update: Matrices, threshold: float = 0.35, share: float = 0.8
) -> dict[str, Tensor]:
    """What to add to a task model: updates under the threshold are mixed with those of a safety fine-tune.

    ``share`` of the task's and the rest of ``safety_update`` (SafeMERGE, Djuhera et al. 2025, section 3).
    """
    return {
        name: share * matrix + (1 - share) * safety_update[name] - matrix
        for name, matrix in task.items()
        if alignment(matrix, safety[name]) < threshold
    }


@dataclass(frozen=True, slots=True)
class SaloraSettings:
    """SaLoRA's dimensions."""

    rank: int = 8
    """Of each update."""
    safety_rank: int = 16
    """Directions of a layer's output on harmful prompts that are left alone."""
    n_steps: int = 60
    """Of the optimiser."""
    batch_size: int = 16
    """Rows of a step."""
    learning_rate: float = 2e-3
    """Peak of AdamW's rate."""
    seed: int = 0
    """Of the order of rows."""


def train_salora(
    base: Base,
    safety: Sequence[Given],
    task: Sequence[Given],
    settings: SaloraSettings | None = None,
    *,
    report: Report = silent,
) -> dict[str, Tensor]:
    """The update of a fine-tune of ``base`` on ``task`` that leaves what it does on ``safety`` prompts alone.

    SaLoRA (Li et al. 2025, section 4): ``W + C (B A - B_0 A_0)`` with ``C = I - V V^T`` fixed, V the main directions of
    the layer's outputs on safety samples, and A and B starting from the layer's singular vectors, B within the main
    directions of its outputs on the task.  The base stays as it is.
    """
    settings = settings or SaloraSettings()
    check_model(base)
    check_plain(base)
    rows = encode_texts(base, task, "task rows", answered=True)
    guarded = main_directions(base, encode_texts(base, safety, "safety prompts", answered=False), settings.safety_rank)
    useful = main_directions(base, rows.first(128), settings.rank)
    starts = {name: _start(weight, useful[name], settings.rank) for name, weight in weights_of(base).items()}
    learnt = {
        name: (nn.Parameter(start.down.clone()), nn.Parameter(start.up.clone())) for name, start in starts.items()
    }
    order = draws(len(rows), settings.batch_size, settings.seed)

    def updates() -> dict[str, LowRank]:
        return {name: _guarded(learnt[name], starts[name], guarded[name]) for name in learnt}

    def loss_of(step: int) -> Tensor:
        live = updates()
        with LiveUpdates(base.model, live, dict.fromkeys(live, 1.0)):
            return answer_loss(base, rows.batch(base, next(order)))

    parameters = [parameter for pair in learnt.values() for parameter in pair]
    optimise(parameters, loss_of, Steps(settings.n_steps, settings.learning_rate, report))
    with torch.no_grad():
        return {name: update.matrix for name, update in updates().items()}


def _start(weight: Tensor, useful: Tensor, rank: int) -> LowRank:
    """``A_0 = sqrt(S) R^T`` and ``B_0 = V_t V_t^T L sqrt(S)`` from the layer's singular value decomposition."""
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    root = values[:rank].sqrt()
    return LowRank(root[:, None] * right[:rank], useful @ (useful.T @ (left[:, :rank] * root)))


def _guarded(learnt: tuple[Tensor, Tensor], start: LowRank, guarded: Tensor) -> LowRank:
    """``C (B A - B_0 A_0)`` as one update of twice the rank."""
    up = torch.cat([learnt[1], -start.up], 1)
    return LowRank(torch.cat([learnt[0], start.down]), up - guarded @ (guarded.T @ up))


@torch.no_grad()
def main_directions(base: Base, texts: Texts, rank: int) -> dict[str, Float[Tensor, "n_out r"]]:
    """The ``rank`` main directions of what each linear layer gives, over all tokens of ``texts``: orthonormal columns.

    They are the right singular vectors of the outputs, found from their second moments.
    """
    names = linear_layers(base)
    moments: dict[str, Tensor] = {}
    keep = torch.zeros(0)

    def add(name: str, output: Tensor) -> None:
        given = output[keep].float()
        moments[name] = moments.get(name, torch.zeros(())) + given.T @ given

    handles = [
        linear_layer(base.model, name).register_forward_hook(
            lambda module, inputs, output, name=name: add(name, output)
        )
        for name in names
    ]
    try:
        for batch in texts.batches(base, _ROWS):
            keep = batch.keep
            batch.final_states(base)
    finally:
        for handle in handles:
            handle.remove()
    return {name: torch.linalg.eigh(moment)[1][:, -rank:] for name, moment in moments.items()}
