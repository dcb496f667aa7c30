"""What training minimises and what it maximises on validation rows, of guards; for aligners see ``alignment``."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score
from torch import Tensor

from safeside.base.model import Base
from safeside.errors import ConfigError
from safeside.train.alignment import AlignmentLoss, answer_starts
from safeside.train.losses import balanced_weight, guard_loss, prefix_weights
from safeside.train.recipe import Recipe
from safeside.train.rows import Rows
from safeside.train.taps import Batch, Source, make_batch


@dataclass(frozen=True, slots=True)
class Objective:
    """What a Loop needs to know of a role."""

    loss_of: Callable[[Sequence[int]], Tensor]
    """The loss of some training rows."""
    metric_of: Callable[[], float]
    """A figure to maximise on validation rows."""
    metric: str
    """Its name."""
    weights: Sequence[float] | None
    """How much of the mean each row is, where a loss is a mean over more than rows."""
    lengths: Sequence[int]
    """Tokens of each row."""


def objective_of(base: Base, sources: Sequence[Source], splits: Sequence[Rows], recipe: Recipe) -> Objective:
    """The objective of the recipe's role; ``sources`` and ``splits`` are those of training and validation."""
    (source, validation_source), (train, validation) = sources, splits
    if recipe.adapter.role == "guard":
        known = (~train.labels.isnan()).sum(1)
        return Objective(
            guard_objective(base, source, train, recipe),
            guard_metric(base, validation_source, validation),
            "auroc",
            None if bool((known == train.labels.shape[1]).all()) else known.double().tolist(),
            train.lengths,
        )
    learnt = AlignmentLoss(base, source, train, recipe.training)
    held_out = AlignmentLoss(base, validation_source, validation, recipe.training)
    return Objective(learnt, held_out.metric, held_out.name, learnt.weights, learnt.lengths)


def _last(values: Tensor, batch: Batch) -> Tensor:
    """The entry at each row's last kept token: (B, T, K) to (B, K)."""
    return values[torch.arange(len(batch.rows), device=values.device), batch.keep.sum(1) - 1]


def guard_objective(base: Base, source: Source, rows: Rows, recipe: Recipe) -> Callable[[Sequence[int]], Tensor]:
    """The loss of some rows: logits at the last token, or at all of the answer, against what is known."""
    training = recipe.training
    if training.targets == "prefixes" and base.is_encoder:
        raise ConfigError(
            f"targets = 'prefixes' needs a base that reads forwards, and {base.name} is an encoder; 'end'."
        )
    weight = balanced_weight(rows.labels).to(base.device) if training.class_weights == "balanced" else None
    if training.soft_weight and rows.soft is None:
        raise ConfigError("soft_weight is set but not every training row has 'soft' scores. Add them, or set it to 0.")

    def loss_of(some: Sequence[int]) -> Tensor:
        batch = make_batch(base, rows.ids, some)
        output = source(batch).output
        assert output.logits is not None
        chosen = torch.tensor(batch.rows)
        soft = rows.soft[chosen].to(base.device) if rows.soft is not None and training.soft_weight else None
        labels = rows.labels[chosen].to(base.device)
        logits, token_weight = _last(output.logits, batch), None
        if training.targets == "prefixes":
            weights = prefix_weights(batch.keep, answer_starts(rows, batch))
            of_row, place = weights.nonzero(as_tuple=True)
            logits, token_weight = output.logits[of_row, place], weights[of_row, place]
            labels, soft = labels[of_row], soft[of_row] if soft is not None else None
        return guard_loss(
            logits,
            labels,
            positive_weight=weight,
            soft=soft,
            soft_weight=training.soft_weight,
            temperature=training.temperature,
            row_weight=token_weight,
        )

    return loss_of


@torch.no_grad()
def guard_logits(base: Base, source: Source, rows: Rows, batch_size: int = 64) -> NDArray[np.float64]:
    """Raw logits (n, K) at every row's last token, in the order of ``rows``."""
    order = sorted(range(len(rows.ids)), key=lambda row: len(rows.ids[row]))
    result = np.zeros(tuple(rows.labels.shape))
    for start in range(0, len(order), batch_size):
        batch = make_batch(base, rows.ids, order[start : start + batch_size])
        output = source(batch).output
        assert output.logits is not None
        result[list(batch.rows)] = _last(output.logits, batch).double().cpu().numpy()
    return result


def guard_metric(base: Base, source: Source, rows: Rows) -> Callable[[], float]:
    """Mean over labels of the AUROC on the ``rows`` that know the label; NaN where a logit is not finite."""
    rows.require_both_kinds("Validation")
    labels = rows.labels.double().numpy()
    known = ~np.isnan(labels)

    def metric_of() -> float:
        logits = guard_logits(base, source, rows)
        if not np.isfinite(logits).all():
            return math.nan
        columns = zip(labels.T, logits.T, known.T, strict=True)
        return float(np.mean([roc_auc_score(label[some], logit[some]) for label, logit, some in columns]))

    return metric_of
