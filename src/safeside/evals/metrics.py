"""Figures of guards, with 95% bootstrap intervals."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from safeside.errors import InputError
from safeside.guards.probability import expected_calibration_error

Array = NDArray[np.float64]

N_RESAMPLES = 1000


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure with its interval (2.5% and 97.5% quantiles over resampled rows)."""

    value: float
    low: float
    high: float


def auroc(labels: Array, scores: Array) -> float:
    """Probability that a harmful row scores above a harmless one, ties counted half.  Both kinds must be there."""
    harmful, harmless = _counts(labels, scores)
    below = harmless.cumsum() - harmless
    return float((harmful * (below + harmless / 2)).sum() / (harmful.sum() * harmless.sum()))


def auprc(labels: Array, scores: Array) -> float:
    """Average precision of the harmful class.  Both kinds must be there."""
    harmful, harmless = (counts[::-1] for counts in _counts(labels, scores))
    hits = harmful.cumsum()
    precision = hits / (hits + harmless.cumsum())
    return float((harmful * precision).sum() / hits[-1])


def _counts(labels: Array, scores: Array) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Harmful and harmless rows at each distinct score, rising.  A thousand resamples need it quick."""
    values, places = np.unique(scores, return_inverse=True)
    harmful = np.bincount(places[labels == 1], minlength=len(values))
    return harmful, np.bincount(places, minlength=len(values)) - harmful


def rates(labels: Array, flagged: NDArray[np.bool_]) -> tuple[float, float, float]:
    """f1, true-positive rate and false-positive rate; 0 where there is nothing to divide by."""
    harmful = labels == 1
    hits = float((flagged & harmful).sum())
    false_alarms = float((flagged & ~harmful).sum())
    misses = float((~flagged & harmful).sum())
    f1 = 2 * hits / max(2 * hits + false_alarms + misses, 1.0)
    return f1, hits / max(float(harmful.sum()), 1.0), false_alarms / max(float((~harmful).sum()), 1.0)


def guard_figures(
    labels: Array,
    scores: Array,
    threshold: float | Array,
    *,
    probabilities: Array | None = None,
    groups: Sequence[str] | None = None,
    seed: int = 0,
) -> dict[str, Figure]:
    """auroc, auprc, ece, and f1, tpr, fpr at ``threshold`` (one, or one for each row), from (n,) labels and scores.

    ``ece`` is the expected calibration error of ``probabilities``, the scores unless given.  Rows of one class only are
    an InputError, and so is a score that is not a number: those count as unscored and must be taken out by the caller,
    who reports them.
    """
    if len(set(labels.tolist())) < 2:
        raise InputError("Figures need both harmful and harmless rows; got one kind only. Add rows of the other.")
    if not np.isfinite(scores).all():
        raise InputError("Scores hold NaN or infinity; take unscored rows out and count them.")
    flagged = (scores >= threshold).astype(np.float64)
    of_flags: Mapping[str, Callable[[Array, Array], float]] = {
        "f1": lambda some, flags: rates(some, flags == 1)[0],
        "tpr": lambda some, flags: rates(some, flags == 1)[1],
        "fpr": lambda some, flags: rates(some, flags == 1)[2],
    }
    return {  # one seed: all figures come from the same draws
        **bootstrap({"auroc": auroc, "auprc": auprc}, labels, scores, groups=groups, seed=seed),
        **bootstrap(of_flags, labels, flagged, groups=groups, seed=seed),
        **bootstrap(
            {"ece": expected_calibration_error},
            labels,
            scores if probabilities is None else probabilities,
            groups=groups,
            seed=seed,
        ),
    }


def bootstrap(
    functions: Mapping[str, Callable[[Array, Array], float]],
    labels: Array,
    scores: Array,
    *,
    groups: Sequence[str] | None = None,
    n_resamples: int = N_RESAMPLES,
    seed: int = 0,
) -> dict[str, Figure]:
    """Each function of (labels, scores) with its interval; rows are resampled within each class, so both remain.

    Rows that are variants of one another belong to one of ``groups`` (a name for each row) and are drawn together, all
    or none: taken one by one they would make the interval too narrow.
    """
    draws: dict[str, list[float]] = {name: [] for name in functions}
    for rows in _resamples(labels, groups, n_resamples, seed):
        for name, function in functions.items():
            draws[name].append(function(labels[rows], scores[rows]))
    return {name: _figure(function(labels, scores), draws[name]) for name, function in functions.items()}


def paired_difference(
    function: Callable[[Array, Array], float],
    labels: Array,
    first: Array,
    second: Array,
    *,
    groups: Sequence[str] | None = None,
    n_resamples: int = N_RESAMPLES,
    seed: int = 0,
) -> Figure:
    """How much higher ``function`` of (labels, scores) is for ``first`` than for ``second``, on the same rows.

    Scores are (S, n), one line for each training seed, or (n,); the figure is of the means over seeds, and every
    resample draws rows (or ``groups``) and seeds anew.
    """
    first, second = np.atleast_2d(first), np.atleast_2d(second)

    def difference(rows: NDArray[np.int64], seeds: Sequence[NDArray[np.int64]]) -> float:
        means = [
            np.mean([function(labels[rows], scores[index, rows]) for index in chosen])
            for scores, chosen in zip((first, second), seeds, strict=True)
        ]
        return float(means[0] - means[1])

    generator = np.random.default_rng([seed, 1])  # not the stream that draws rows
    sizes = (len(first), len(second))
    draws = [
        difference(rows, [generator.integers(size, size=size) for size in sizes])
        for rows in _resamples(labels, groups, n_resamples, seed)
    ]
    return _figure(difference(np.arange(len(labels)), [np.arange(size) for size in sizes]), draws)


def _resamples(labels: Array, groups: Sequence[str] | None, n_resamples: int, seed: int) -> Iterator[NDArray[np.int64]]:
    """Row indices of each resample: as many rows of each class as there are, or as many groups of the same classes.

    A group whose rows are of several classes is drawn whole, among those of these classes.
    """
    generator = np.random.default_rng(seed)
    classes = [np.flatnonzero(labels == value) for value in np.unique(labels)]
    if groups is None:
        for _ in range(n_resamples):
            yield np.concatenate([generator.choice(members, len(members)) for members in classes])
        return
    codes = np.unique(np.asarray(groups), return_inverse=True)[1]
    members_of = np.split(np.argsort(codes, kind="stable"), np.cumsum(np.bincount(codes))[:-1])
    strata: dict[tuple[float, ...], list[NDArray[np.int64]]] = {}
    for members in members_of:
        strata.setdefault(tuple(np.unique(labels[members]).tolist()), []).append(members)
    pools = [strata[found] for found in sorted(strata)]
    for _ in range(n_resamples):
        yield np.concatenate([pool[index] for pool in pools for index in generator.integers(len(pool), size=len(pool))])


def _figure(value: float, draws: Sequence[float]) -> Figure:
    return Figure(value, *(float(end) for end in np.quantile(draws, [0.025, 0.975])))
