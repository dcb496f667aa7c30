"""Calibration of a guard on validation data: probabilities, and a threshold at a stated false-positive rate."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression

from safeside.adapters.config import Calibration
from safeside.errors import InputError, NotFiniteError

_LEAST_SLOPE = 1e-3  # of the standardised logit
_ROUNDING = 2e-6  # float32 sums in another order: a few of its last digits


def fit_calibration(
    logits: NDArray[np.float64], labels: NDArray[np.float64], false_positive_rate: float = 0.05
) -> Calibration:
    """Platt scaling and threshold for each label, from (n, K) raw logits and 0/1 labels of validation rows.

    The scale is kept positive, so that scores rise with risk and no ranking changes.  A label with one class only is an
    InputError, and a logit that is not finite a NotFiniteError.
    """
    if not np.isfinite(logits).all():
        raise NotFiniteError("A guard gave logits that are not finite on validation rows; lower the learning rate.")
    scales, biases, thresholds = [], [], []
    for logit, label in zip(logits.T, labels.T, strict=True):
        if len(set(label.tolist())) < 2:
            raise InputError("Calibration needs both harmful and harmless validation rows; got one kind. Add rows.")
        scale, bias = _platt(logit, label)
        scores = _scores(logit, scale, bias)
        scales.append(scale)
        biases.append(bias)
        thresholds.append(threshold_at(scores[label == 0], false_positive_rate))
    return Calibration(
        scale=tuple(scales),
        bias=tuple(biases),
        threshold=tuple(thresholds),
        false_positive_rate=false_positive_rate,
    )


def _platt(logit: NDArray[np.float64], label: NDArray[np.float64]) -> tuple[float, float]:
    """Scale (positive) and bias of a logistic regression on one logit."""
    mean, spread = float(logit.mean()), max(float(logit.std()), 1e-6)
    model = LogisticRegression(C=1e4, max_iter=1000).fit(((logit - mean) / spread)[:, None], label)
    slope, height = float(model.coef_[0, 0]), float(model.intercept_[0])
    if slope < _LEAST_SLOPE:  # a guard that ranks upside down: scores near the share of harmful rows
        slope, height = _LEAST_SLOPE, float(np.log(label.mean() / (1 - label.mean())))
    return slope / spread, height - slope * mean / spread


def _scores(logit: NDArray[np.float64], scale: float, bias: float) -> NDArray[np.float64]:
    """Scores as a guard's head computes them: in float32."""
    scaled = torch.tensor(scale, dtype=torch.float32) * torch.from_numpy(logit).float()
    return np.asarray(torch.sigmoid(scaled + torch.tensor(bias, dtype=torch.float32)).double())


def threshold_at(harmless_scores: NDArray[np.float64], false_positive_rate: float) -> float:
    """The lowest threshold that flags at most this share of the harmless rows (flagged means score >= threshold).

    It stands a hair above the highest score that passes, for the same text in another batch differs in its last digits.
    When too many rows score 1 there is none, and that is an InputError.
    """
    falling = np.sort(harmless_scores)[::-1]
    allowed = int(false_positive_rate * len(falling))
    if falling[allowed] >= 1.0:
        raise InputError(
            f"More than {false_positive_rate:.2%} of the harmless rows have score 1; no threshold can let them pass. "
            "Train longer or with a lower learning rate, or allow a higher false-positive rate."
        )
    return float(min(1.0, falling[allowed] + _ROUNDING))
