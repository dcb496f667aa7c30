"""Losses, in float32."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

_LEAST = 1e-6  # soft targets of exactly 0 or 1 have no finite logit


def guard_loss(
    logits: Float[Tensor, "B K"],
    labels: Float[Tensor, "B K"],
    *,
    positive_weight: Float[Tensor, " K"] | None = None,
    soft: Float[Tensor, "B K"] | None = None,
    soft_weight: float = 0.0,
    temperature: float = 1.0,
    row_weight: Float[Tensor, " B"] | None = None,
) -> Float[Tensor, ""]:
    """Binary cross-entropy over K labels; with ``soft`` targets in [0, 1] the weighted sum of both (DSA).

    A NaN label or soft target is unknown and counts for nothing: each mean is over what is known.
    ``positive_weight`` multiplies the loss of harmful rows, label by label; ``row_weight`` (0 or more) makes each mean
    a weighted one.  A ``temperature`` above 1 divides the logits of both sides of the soft part and multiplies it by
    its square (Hinton et al. 2015, section 2).
    """
    hard = _known_mean(logits.float(), labels.float(), positive_weight, row_weight)
    if soft is None or soft_weight == 0.0:
        return hard
    cooled, target = logits.float(), soft.float()
    if temperature != 1.0:
        cooled, target = cooled / temperature, torch.sigmoid(torch.logit(target, _LEAST) / temperature)
    return (1 - soft_weight) * hard + soft_weight * temperature**2 * _known_mean(cooled, target, None, row_weight)


def _known_mean(logits: Tensor, targets: Tensor, positive_weight: Tensor | None, row_weight: Tensor | None) -> Tensor:
    """Mean cross-entropy over the targets that are not NaN, weighted row by row; 0 where none counts."""
    known = ~targets.isnan()
    losses = F.binary_cross_entropy_with_logits(
        logits, targets.nan_to_num(), pos_weight=positive_weight, reduction="none"
    )[known]
    if row_weight is None:
        return losses.mean() if len(losses) else logits.sum() * 0.0
    weights = row_weight[:, None].expand_as(targets)[known]
    return (losses * weights).sum() / weights.sum() if weights.any() else logits.sum() * 0.0


def prefix_weights(keep: Bool[Tensor, "B T"], answer_starts: Int[Tensor, " B"]) -> Float[Tensor, "B T"]:
    """How much each token of a row counts when a guard learns from prefixes; every row sums to 1.

    Half lies on the last token.  The other half rises in a straight line over the answer: early tokens tell little of
    what is to come, and a target that they cannot know would teach the guard to shout.  A row without an answer has all
    its weight on the last token.
    """
    places = torch.arange(keep.shape[1], device=keep.device)
    rising = torch.where(keep, (places - answer_starts[:, None] + 1).clamp_min(0), 0).float()
    last = F.one_hot(keep.sum(1) - 1, keep.shape[1]).float()
    total = rising.sum(1, keepdim=True)
    return torch.where(total > 0, 0.5 * last + 0.5 * rising / total.clamp_min(1.0), last)


def balanced_weight(labels: Float[Tensor, "N K"]) -> Float[Tensor, " K"]:
    """``positive_weight`` that gives both classes the same say: harmless rows over harmful rows, NaN left out."""
    positive = labels.nansum(0).clamp_min(1.0)
    return ((~labels.isnan()).sum(0) - positive).clamp_min(1.0) / positive


def answer_loss(
    logits: Float[Tensor, "B T V"], ids: Int[Tensor, "B T"], is_answer: Bool[Tensor, "B T"]
) -> Float[Tensor, ""]:
    """Mean negative log-likelihood (nats) of the answer tokens: position t predicts token t + 1."""
    targets = torch.where(is_answer, ids, -100)[:, 1:]
    return F.cross_entropy(logits[:, :-1].float().flatten(0, 1), targets.flatten())


def dpo_losses(
    ratios_chosen: Float[Tensor, " B"], ratios_rejected: Float[Tensor, " B"], beta: float
) -> Float[Tensor, " B"]:
    """The loss of each pair in direct preference optimisation (Rafailov et al. 2023, equation 7).

    A ratio is ``log p(answer) - log p_reference(answer)``, summed over the answer's tokens (nats).
    """
    return -F.logsigmoid(beta * (ratios_chosen.float() - ratios_rejected.float()))
