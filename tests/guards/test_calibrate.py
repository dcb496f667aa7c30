"""Calibration: thresholds keep their promise, and no ranking changes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from safeside import Adapter, Base
from safeside.errors import InputError, NotFiniteError
from safeside.guards.calibrate import fit_calibration, threshold_at

LAST_DIGIT = (
    1.2e-7  # of float32: torch rounds the sigmoid of equal inputs differently inside and at the end of a vector
)
RATES = st.floats(0.001, 0.6)
FLOATS32 = st.floats(0, 1, width=32)


@given(scores=arrays.arrays(np.float64, st.integers(1, 60), elements=FLOATS32), rate=RATES)
def test_a_threshold_flags_at_most_the_asked_share(scores: np.ndarray, rate: float) -> None:
    try:
        threshold = threshold_at(scores, rate)
    except InputError:
        assert (scores == 1).mean() > rate
        return
    assert 0 <= threshold <= 1
    assert (scores >= threshold).mean() <= rate


@given(scores=arrays.arrays(np.float64, st.integers(1, 60), elements=FLOATS32), rate=RATES)
def test_a_threshold_is_the_lowest_that_does(scores: np.ndarray, rate: float) -> None:
    """Lower by more than rounding, it would flag too many."""
    assume((scores == 1).mean() <= rate)
    lower = threshold_at(scores, rate) - 3e-6
    assert (scores >= lower).mean() > rate


def test_the_margin_is_wider_than_rounding() -> None:
    scores = np.array([0.1, 0.5, 0.5, 0.9])
    threshold = threshold_at(scores, 0.25)
    assert threshold > 0.5 + 1e-6
    assert (scores >= threshold).sum() == 1
    assert threshold_at(scores, 0.01) == pytest.approx(0.9, abs=1e-5)


def test_rows_that_all_score_one_have_no_threshold() -> None:
    with pytest.raises(InputError, match=r"More than 5\.00% of the harmless rows have score 1"):
        threshold_at(np.ones(10), 0.05)


def logits_and_labels(shift: float, n: int = 400, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    labels = (generator.random(n) < 0.4).astype(np.float64)
    return (generator.normal(size=n) + shift * labels)[:, None], labels[:, None]


def head_scores(base: Base, make: Callable[..., Adapter], calibration: object, logits: np.ndarray) -> torch.Tensor:
    """Scores as a guard's own head makes them of raw logits."""
    head = make(base).head
    head.calibrate(calibration)
    return torch.sigmoid(head.scale * torch.from_numpy(logits).float() + head.bias).double()


@pytest.mark.parametrize("shift", [3.0, 0.3, 0.0, -2.0])
@pytest.mark.parametrize(("factor", "offset"), [(1.0, 0.0), (1e-3, 50.0), (300.0, -1000.0)])
def test_a_calibrated_guard_keeps_its_rate_and_its_ranking(
    tiny_base: Base, random_guard: Callable[..., Adapter], shift: float, factor: float, offset: float
) -> None:
    logits, labels = logits_and_labels(shift)
    logits = logits * factor + offset
    calibration = fit_calibration(logits, labels, 0.1)
    assert calibration.scale[0] > 0
    assert calibration.false_positive_rate == 0.1
    scores = head_scores(tiny_base, random_guard, calibration, logits)[:, 0]
    flagged = scores.numpy() >= calibration.threshold[0]
    harmless = labels[:, 0] == 0
    assert flagged[harmless].mean() <= 0.1
    order = np.argsort(logits[:, 0])
    assert (np.diff(scores.numpy()[order]) >= -LAST_DIGIT).all()


def test_scores_become_probabilities() -> None:
    logits, labels = logits_and_labels(2.0, n=4000)
    calibration = fit_calibration(logits * 7 + 3, labels)
    scores = 1 / (1 + np.exp(-(calibration.scale[0] * (logits * 7 + 3) + calibration.bias[0])))
    for low in np.arange(0.1, 0.9, 0.2):
        chosen = (scores >= low) & (scores < low + 0.2)
        assert scores[chosen].mean() == pytest.approx(labels[chosen].mean(), abs=0.06)


def test_a_guard_that_ranks_upside_down_stays_so() -> None:
    """Calibration may not hide it: the slope is kept positive and nearly flat, at the share of harmful rows."""
    logits, labels = logits_and_labels(-4.0)
    calibration = fit_calibration(logits, labels)
    scores = 1 / (1 + np.exp(-(calibration.scale[0] * logits + calibration.bias[0])))
    assert scores == pytest.approx(labels.mean(), abs=0.01)


def test_every_label_is_calibrated_for_itself() -> None:
    first, second = logits_and_labels(3.0, seed=1), logits_and_labels(1.0, seed=2)
    both = fit_calibration(np.hstack([first[0], second[0]]), np.hstack([first[1], second[1]]))
    alone = [fit_calibration(*first), fit_calibration(*second)]
    assert both.threshold == (alone[0].threshold[0], alone[1].threshold[0])
    assert both.scale == (alone[0].scale[0], alone[1].scale[0])


def test_separable_and_constant_logits_are_calibrated() -> None:
    labels = np.array([[0.0], [0.0], [0.0], [1.0], [1.0]])
    calibration = fit_calibration(np.array([[-9.0], [-8.0], [-8.5], [7.0], [8.0]]), labels)
    assert 0 < calibration.threshold[0] < 0.5
    flat = fit_calibration(np.full((5, 1), 3.0), labels)
    assert flat.scale[0] > 0


@settings(max_examples=30)
@given(
    logits=arrays.arrays(np.float64, (24, 2), elements=st.floats(-50, 50, width=32)),
    labels=arrays.arrays(np.bool_, (24, 2)),
    rate=RATES,
)
def test_any_logits_keep_the_rate(logits: np.ndarray, labels: np.ndarray, rate: float) -> None:
    assume(all(len(set(column)) == 2 for column in labels.T))
    calibration = fit_calibration(logits, labels.astype(np.float64), rate)
    for index in range(2):
        scaled = torch.tensor(calibration.scale[index]).float() * torch.from_numpy(logits[:, index]).float()
        scores = torch.sigmoid(scaled + torch.tensor(calibration.bias[index]).float()).double().numpy()
        assert (scores[~labels[:, index]] >= calibration.threshold[index]).mean() <= rate


@pytest.mark.parametrize("label", [0.0, 1.0])
def test_one_class_is_an_error(label: float) -> None:
    with pytest.raises(InputError, match="both harmful and harmless"):
        fit_calibration(np.zeros((5, 1)), np.full((5, 1), label))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_logit_that_is_not_finite_is_an_error(value: float) -> None:
    with pytest.raises(NotFiniteError, match="not finite"):
        fit_calibration(np.array([[0.0], [value]]), np.array([[0.0], [1.0]]))
