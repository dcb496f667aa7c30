"""Figures against slow twins and scikit-learn, and intervals that cover."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from sklearn.metrics import average_precision_score, f1_score, roc_auc_score

from safeside.errors import InputError
from safeside.evals.metrics import (
    Figure,
    auprc,
    auroc,
    bootstrap,
    expected_calibration_error,
    guard_figures,
    paired_difference,
    rates,
)

SAME = 1e-12  # float64


def slow_auroc(labels: np.ndarray, scores: np.ndarray) -> float:
    harmful, harmless = scores[labels == 1], scores[labels == 0]
    won = [1.0 if one > other else 0.5 if one == other else 0.0 for one in harmful for other in harmless]
    return sum(won) / len(won)


def slow_auprc(labels: np.ndarray, scores: np.ndarray) -> float:
    """Precision at each distinct threshold, weighted by the recall that it adds."""
    total, before = 0.0, 0.0
    for threshold in sorted(set(scores.tolist()), reverse=True):
        flagged = scores >= threshold
        recall = (flagged & (labels == 1)).sum() / (labels == 1).sum()
        total += (recall - before) * (labels[flagged] == 1).mean()
        before = recall
    return total


@st.composite
def scored(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Labels of both kinds, and scores with ties."""
    n = draw(st.integers(2, 30))
    labels = draw(arrays.arrays(np.float64, n, elements=st.sampled_from([0.0, 1.0])))
    assume(len(set(labels.tolist())) == 2)
    coarse = st.sampled_from([0.0, 0.25, 0.5, 1.0])
    return labels, draw(arrays.arrays(np.float64, n, elements=coarse | st.floats(0, 1)))


@given(rows=scored())
def test_auroc_and_auprc_are_those_of_the_twins_and_of_sklearn(rows: tuple[np.ndarray, np.ndarray]) -> None:
    assert auroc(*rows) == pytest.approx(slow_auroc(*rows), abs=SAME)
    assert auroc(*rows) == pytest.approx(roc_auc_score(*rows), abs=SAME)
    assert auprc(*rows) == pytest.approx(slow_auprc(*rows), abs=SAME)
    assert auprc(*rows) == pytest.approx(average_precision_score(*rows), abs=SAME)


@given(rows=scored(), threshold=st.floats(0, 1))
def test_rates_are_counted(rows: tuple[np.ndarray, np.ndarray], threshold: float) -> None:
    labels, scores = rows
    flagged = scores >= threshold
    f1, hit_rate, false_rate = rates(labels, flagged)
    assert f1 == pytest.approx(f1_score(labels, flagged, zero_division=0.0), abs=SAME)
    assert hit_rate == pytest.approx(flagged[labels == 1].mean(), abs=SAME)
    assert false_rate == pytest.approx(flagged[labels == 0].mean(), abs=SAME)


def test_rates_of_nothing_are_zero() -> None:
    assert rates(np.array([0.0, 0.0]), np.array([True, False])) == (0.0, 0.0, 0.5)
    assert rates(np.array([1.0]), np.array([False])) == (0.0, 0.0, 0.0)


def draw_rows(generator: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores of a guard whose true AUROC is 0.76 (normal, one standard deviation apart)."""
    labels = np.repeat([0.0, 1.0], n // 2)
    return labels, generator.normal(size=n) + labels


def test_bootstrap_intervals_cover_the_truth() -> None:
    """About 95 of 100 intervals hold the true figure; with 100 draws 88 is three standard errors below."""
    generator = np.random.default_rng(0)
    truth, covered, widths = 0.7602, 0, []
    for _ in range(100):
        figure = bootstrap({"auroc": auroc}, *draw_rows(generator, 100), n_resamples=200)["auroc"]
        covered += figure.low <= truth <= figure.high
        widths.append(figure.high - figure.low)
    assert 88 <= covered <= 100
    assert 0.1 < np.mean(widths) < 0.25


def test_bootstrap_is_the_quantiles_of_resampled_rows() -> None:
    """Each class is resampled for itself, so both are always there."""
    labels = np.array([1.0] + [0.0] * 20)
    scores = np.linspace(0, 1, 21)
    seen: list[tuple[int, int]] = []

    def count(some: np.ndarray, score: np.ndarray) -> float:
        seen.append((len(some), int(some.sum())))
        return float(score[some == 0].mean())

    figure = bootstrap({"count": count}, labels, scores, n_resamples=50)["count"]
    assert set(seen) == {(21, 1)}
    assert figure.low < figure.value < figure.high
    again = bootstrap({"count": count}, labels, scores, n_resamples=50)["count"]
    assert again == figure
    assert bootstrap({"count": count}, labels, scores, n_resamples=50, seed=1)["count"] != figure


def test_guard_figures_hold_everything_at_the_threshold() -> None:
    labels, scores = draw_rows(np.random.default_rng(1), 200)
    scores = 1 / (1 + np.exp(-scores))
    figures = guard_figures(labels, scores, 0.6)
    assert list(figures) == ["auroc", "auprc", "f1", "tpr", "fpr", "ece"]
    assert figures["auroc"].value == auroc(labels, scores)
    assert (figures["f1"].value, figures["tpr"].value, figures["fpr"].value) == rates(labels, scores >= 0.6)
    for figure in figures.values():
        assert 0 <= figure.low <= figure.value <= figure.high <= 1


def test_rows_may_have_thresholds_and_probabilities_of_their_own() -> None:
    labels, scores = draw_rows(np.random.default_rng(1), 200)
    scores = 1 / (1 + np.exp(-scores))
    thresholds = np.random.default_rng(2).random(200)
    figures = guard_figures(labels, scores, thresholds, probabilities=scores**2)
    plain = guard_figures(labels, scores, 0.6)
    assert (figures["f1"].value, figures["tpr"].value, figures["fpr"].value) == rates(labels, scores >= thresholds)
    assert figures["auroc"] == plain["auroc"]
    assert figures["ece"].value == expected_calibration_error(labels, scores**2) != plain["ece"].value
    assert guard_figures(labels, scores, np.full(200, 0.6)) == plain


def test_a_score_at_the_threshold_flags() -> None:
    figures = guard_figures(np.array([1.0, 0.0]), np.array([0.5, 0.4]), 0.5)
    assert (figures["tpr"].value, figures["fpr"].value) == (1.0, 0.0)


@pytest.mark.parametrize("label", [0.0, 1.0])
def test_one_class_is_an_error(label: float) -> None:
    with pytest.raises(InputError, match="both harmful and harmless rows"):
        guard_figures(np.full(4, label), np.linspace(0, 1, 4), 0.5)


@pytest.mark.parametrize("score", [np.nan, np.inf])
def test_a_score_that_is_not_a_number_is_an_error(score: float) -> None:
    with pytest.raises(InputError, match="take unscored rows out and count them"):
        guard_figures(np.array([0.0, 1.0]), np.array([0.3, score]), 0.5)


# ---- rows that are variants of one another, and two scorers on the same rows -----------------------------------------


def test_groups_are_drawn_together() -> None:
    """Every row three times tells no more than once: drawn as groups the interval stays, drawn as rows it shrinks."""
    labels, scores = draw_rows(np.random.default_rng(5), 60)
    once = bootstrap({"auroc": auroc}, labels, scores)["auroc"]
    thrice = np.repeat(labels, 3), np.repeat(scores, 3)
    names = [str(row // 3) for row in range(3 * len(labels))]
    grouped = bootstrap({"auroc": auroc}, *thrice, groups=names)["auroc"]
    apart = bootstrap({"auroc": auroc}, *thrice)["auroc"]
    assert grouped.value == pytest.approx(once.value)
    assert grouped.high - grouped.low == pytest.approx(once.high - once.low, rel=0.15)
    assert apart.high - apart.low < 0.75 * (once.high - once.low)


def test_a_group_of_its_own_for_every_row_is_no_group() -> None:
    labels, scores = draw_rows(np.random.default_rng(6), 80)
    names = [str(row) for row in range(len(labels))]
    found = bootstrap({"auroc": auroc}, labels, scores, groups=names)["auroc"]
    plain = bootstrap({"auroc": auroc}, labels, scores)["auroc"]
    assert (found.low, found.high) == pytest.approx((plain.low, plain.high), abs=0.02)


def test_a_group_is_drawn_whole_whatever_its_labels() -> None:
    """Each resample holds every row of a group as often as any other of it, and as many groups of each kind."""
    kinds = {"bad": [1.0, 1.0], "good": [0.0], "both": [0.0, 1.0, 0.0]}
    names = [f"{kind} {number}" for kind in kinds for number in range(5) for _ in kinds[kind]]
    labels = np.array([label for kind in kinds for _ in range(5) for label in kinds[kind]])
    drawn: list[np.ndarray] = []

    def noted(some: np.ndarray, rows: np.ndarray) -> float:
        drawn.append(rows.astype(int))
        return float(some.mean())

    found = bootstrap({"share": noted}, labels, np.arange(len(labels), dtype=float), groups=names, n_resamples=50)
    assert found["share"].low == found["share"].high == labels.mean()
    for rows in drawn:
        counts = np.bincount(rows, minlength=len(names))
        for name in set(names):
            assert len({count for count, own in zip(counts.tolist(), names, strict=True) if own == name}) == 1
        assert sum(counts[place] for place, name in enumerate(names) if name.startswith("both")) == 15
    assert len({tuple(rows) for rows in drawn}) > 40


def test_the_difference_of_a_scorer_and_itself_is_nothing() -> None:
    labels, scores = draw_rows(np.random.default_rng(7), 50)
    assert paired_difference(auroc, labels, scores, scores, n_resamples=50) == Figure(0.0, 0.0, 0.0)


def test_a_paired_difference_is_of_means_over_seeds() -> None:
    generator = np.random.default_rng(8)
    labels, _ = draw_rows(generator, 90)
    better = np.stack([labels + generator.normal(0, 0.5, len(labels)) for _ in range(3)])
    worse = np.stack([labels + generator.normal(0, 3.0, len(labels)) for _ in range(2)])
    found = paired_difference(auroc, labels, better, worse, n_resamples=200)
    means = [np.mean([auroc(labels, line) for line in lines]) for lines in (better, worse)]
    assert found.value == pytest.approx(means[0] - means[1])
    assert 0 < found.low < found.value < found.high
    turned = paired_difference(auroc, labels, worse, better, n_resamples=200)
    assert turned.value == pytest.approx(-found.value)
    assert turned.high < 0


def test_what_both_scorers_share_is_no_part_of_their_difference() -> None:
    """Nearly equal scorers on few rows: each interval is wide, that of the paired difference is narrow."""
    labels, scores = draw_rows(np.random.default_rng(9), 60)
    other = scores + np.random.default_rng(10).normal(0, 1e-3, len(scores))
    alone = bootstrap({"auroc": auroc}, labels, scores)["auroc"]
    pair = paired_difference(auroc, labels, scores, other, n_resamples=300)
    assert pair.high - pair.low < 0.2 * (alone.high - alone.low)
