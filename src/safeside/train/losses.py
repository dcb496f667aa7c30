"""Losses, in float32."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F


def guard_loss(
    logits: Float[Tensor, "B K"],
    labels: Float[Tensor, "B K"],
    *,
    positive_weight: Float[Tensor, " K"] | None = None,
    soft: Float[Tensor, "B K"] | None = None,
    soft_weight: float = 0.0,
) -> Float[Tensor, ""]:
    """Binary cross-entropy over K labels; with ``soft`` targets in [0, 1] the weighted sum of both (DSA).

    ``positive_weight`` multiplies the loss of harmful rows, label by label.
    """
    hard = F.binary_cross_entropy_with_logits(logits.float(), labels.float(), pos_weight=positive_weight)
    if soft is None or soft_weight == 0.0:
        return hard
    return (1 - soft_weight) * hard + soft_weight * F.binary_cross_entropy_with_logits(logits.float(), soft.float())


def balanced_weight(labels: Float[Tensor, "N K"]) -> Float[Tensor, " K"]:
    """``positive_weight`` that gives both classes the same say: harmless rows over harmful rows."""
    positive = labels.sum(0).clamp_min(1.0)
    return (labels.shape[0] - positive).clamp_min(1.0) / positive


def answer_loss(
    logits: Float[Tensor, "B T V"], ids: Int[Tensor, "B T"], is_answer: Bool[Tensor, "B T"]
) -> Float[Tensor, ""]:
    """Mean negative log-likelihood (nats) of the answer tokens: position t predicts token t + 1."""
    targets = torch.where(is_answer, ids, -100)[:, 1:]
    return F.cross_entropy(logits[:, :-1].float().flatten(0, 1), targets.flatten())
