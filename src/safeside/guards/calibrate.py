"""Calibration of a guard on validation data: probabilities, and a threshold at a stated false-positive rate."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression

from safeside.adapters.config import Calibration
from safeside.errors import InputError


def fit_calibration(
    logits: NDArray[np.float64], labels: NDArray[np.float64], false_positive_rate: float = 0.05
) -> Calibration:
    """Platt scaling and threshold for each label, from (n, K) raw logits and 0/1 labels of validation rows.

    The scale is kept positive, so that scores rise with risk and no ranking changes.  A label with one class only is an
    InputError.
    """
    scales, biases, thresholds = [], [], []
    for logit, label in zip(logits.T, labels.T, strict=True):
        if len(set(label.tolist())) < 2:
            raise InputError("Calibration needs both harmful and harmless validation rows; got one kind. Add rows.")
        model = LogisticRegression(C=1e4).fit(logit[:, None], label)
        scale = max(float(model.coef_[0, 0]), 1e-3)
        bias = float(model.intercept_[0])
        scores = 1 / (1 + np.exp(-(scale * logit + bias)))
        scales.append(scale)
        biases.append(bias)
        thresholds.append(threshold_at(scores[label == 0], false_positive_rate))
    return Calibration(
        scale=tuple(scales),
        bias=tuple(biases),
        threshold=tuple(thresholds),
        false_positive_rate=false_positive_rate,
    )


def threshold_at(harmless_scores: NDArray[np.float64], false_positive_rate: float) -> float:
    """The lowest threshold that flags at most this share of the harmless rows (flagged means score >= threshold)."""
    falling = np.sort(harmless_scores)[::-1]
    allowed = int(false_positive_rate * len(falling))
    highest_passed = falling[allowed] if allowed < len(falling) else 0.0
    return float(min(1.0, np.nextafter(np.float32(highest_passed), np.float32(2.0))))
