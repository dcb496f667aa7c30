"""From scores to probabilities: Platt scaling or isotonic regression, and how far off they are."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold

from safeside.adapters.config import ProbabilityMap, log_odds
from safeside.errors import InputError

Array = NDArray[np.float64]
Method = Literal["platt", "isotonic"]

LEAST_ROWS = 30  # of each kind: with fewer, two parameters are mostly noise
LEAST_ROWS_ISOTONIC = 1000  # of both kinds together: with fewer, its steps follow single rows
_N_FOLDS = 5
_LEAST_SLOPE = 1e-3  # of the standardised logit


def fit_map(scores: Array, labels: Array, uncalibrated: Array | None = None) -> ProbabilityMap | None:
    """The map from (n,) scores in [0, 1] to probabilities, given 0/1 labels; None below 30 rows of either kind.

    ``uncalibrated`` (n,) are what ``error_before`` is of where the scores were fitted to these very rows already.

    From 1,000 rows on isotonic regression takes the place of Platt scaling if its Brier score is lower.  That score and
    ``error_after`` come from five folds: each row's probability from a fit on the others.
    """
    n_harmful = int(labels.sum())
    if min(n_harmful, len(labels) - n_harmful) < LEAST_ROWS:
        return None
    methods: tuple[Method, ...] = ("platt", "isotonic") if len(labels) >= LEAST_ROWS_ISOTONIC else ("platt",)
    held_out = {method: _held_out(method, scores, labels) for method in methods}
    best = min(methods, key=lambda method: float(np.mean((held_out[method] - labels) ** 2)))
    errors = {
        "error_before": expected_calibration_error(labels, scores if uncalibrated is None else uncalibrated),
        "error_after": expected_calibration_error(labels, held_out[best]),
    }
    return _fit(best, scores, labels).model_copy(update=errors)


def _held_out(method: Method, scores: Array, labels: Array) -> Array:
    """Each row's probability by a fit on the other folds."""
    result = np.empty_like(scores)
    for fitted, left_out in StratifiedKFold(_N_FOLDS, shuffle=True, random_state=0).split(scores, labels):
        result[left_out] = _fit(method, scores[fitted], labels[fitted]).probabilities(scores[left_out])
    return result


def _fit(method: Method, scores: Array, labels: Array) -> ProbabilityMap:
    """The map on all rows given, its errors not measured yet."""
    n_harmful = int(labels.sum())
    counts = {"n_harmless": len(labels) - n_harmful, "n_harmful": n_harmful, "error_before": 0.0, "error_after": 0.0}
    if method == "platt":
        slope, height = platt(log_odds(scores), labels)
        return ProbabilityMap(method=method, slope=slope, height=height, **counts)
    margin = 1 / (len(labels) + 2)  # no row count proves a probability of 0 or 1
    model = IsotonicRegression(y_min=margin, y_max=1 - margin).fit(scores, labels)
    knots, levels = tuple(model.X_thresholds_.tolist()), tuple(model.y_thresholds_.tolist())
    return ProbabilityMap(method=method, knots=knots, levels=levels, **counts)


def platt(logit: Array, label: Array) -> tuple[float, float]:
    """Slope (positive) and height of a logistic regression on one logit."""
    mean, spread = float(logit.mean()), max(float(logit.std()), 1e-6)
    model = LogisticRegression(C=1e4, max_iter=1000).fit(((logit - mean) / spread)[:, None], label)
    slope, height = float(model.coef_[0, 0]), float(model.intercept_[0])
    if slope < _LEAST_SLOPE:  # a guard that ranks upside down: scores near the share of harmful rows
        slope, height = _LEAST_SLOPE, float(np.log(label.mean() / (1 - label.mean())))
    return slope / spread, height - slope * mean / spread


def expected_calibration_error(labels: Array, probabilities: Array, n_bins: int = 15) -> float:
    """Mean distance between what is predicted and what happens: |mean probability - share of harmful rows| by bin.

    ``n_bins`` bins of equal width on [0, 1], weighted by their rows (Guo et al. 2017, arXiv 1706.04599, section 2).
    No row at all, and probabilities outside [0, 1], are an InputError.
    """
    if not len(labels) or not ((probabilities >= 0) & (probabilities <= 1)).all():
        raise InputError("A calibration error needs rows with probabilities in [0, 1]; take unscored rows out.")
    bins = np.minimum((probabilities * n_bins).astype(int), n_bins - 1)
    gaps = np.bincount(bins, weights=probabilities - labels, minlength=n_bins)
    return float(np.abs(gaps).sum() / len(labels))
