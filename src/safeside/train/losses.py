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
) -> Float[Tensor, ""]:
    """Binary cross-entropy over K labels; with ``soft`` targets in [0, 1] the weighted sum of both (DSA).

    A NaN label or soft target is unknown and counts for nothing: each mean is over what is known.
    ``positive_weight`` multiplies the loss of harmful rows, label by label.  A ``temperature`` above 1 divides the
    logits of both sides of the soft part and multiplies it by its square (Hinton et al. 2015, section 2).
    """
    hard = _known_mean(logits.float(), labels.float(), positive_weight)
    if soft is None or soft_weight == 0.0:
        return hard
    cooled, target = logits.float(), soft.float()
    if temperature != 1.0:
        cooled, target = cooled / temperature, torch.sigmoid(torch.logit(target, _LEAST) / temperature)
    return (1 - soft_weight) * hard + soft_weight * temperature**2 * _known_mean(cooled, target, None)


def _known_mean(logits: Tensor, targets: Tensor, positive_weight: Tensor | None) -> Tensor:
    """Mean cross-entropy over the targets that are not NaN; 0 where none is known."""
    known = ~targets.isnan()
    losses = F.binary_cross_entropy_with_logits(
        logits, targets.nan_to_num(), pos_weight=positive_weight, reduction="none"
    )[known]
    return losses.mean() if len(losses) else logits.sum() * 0.0


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
