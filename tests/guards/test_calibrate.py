"""Calibration: thresholds keep their promise, and no ranking changes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from fractions import Fraction
from itertools import islice, takewhile

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from safeside import Adapter, Base
from safeside.adapters.config import PRESET_RATES, rows_needed
from safeside.errors import InputError, NotFiniteError
from safeside.guards.calibrate import (
    JudgedRows,
    calibrate_guard,
    counted_once,
    fit_calibration,
    fit_mode,
    n_allowed,
    scores_of,
    threshold_at,
    threshold_with_bound,
)
from safeside.guards.probability import expected_calibration_error

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


def test_a_rate_that_was_counted_allows_as_many_rows() -> None:
    """15 of 22 rows are 15, though the product of 22 and the float 15 / 22 is just below."""
    assert int(22 * (15 / 22)) == 14
    for n in range(2, 90):
        scores = np.arange(n) / n
        flagged = [int((scores >= threshold_at(scores, counted / n)).sum()) for counted in range(1, n)]
        assert flagged == list(range(1, n))


@given(
    rows=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), min_size=2, max_size=120),
    threshold=st.integers(0, 40),
)
@example(rows=[(index, index) for index in range(22)], threshold=7)
def test_a_threshold_flags_as_many_as_another_did(rows: list[tuple[int, int]], threshold: int) -> None:
    """As a patch and a port choose it for scores before and after; the twin counts rows and tries every score."""
    before, after = np.array(rows).T / 41
    n_before = int((before >= threshold / 41).sum())
    assume(n_before < len(rows))
    lowest = min(score for score in after.tolist() if (after > score).sum() <= n_before)
    found = threshold_at(after, float((before >= threshold / 41).mean()))
    assert found == pytest.approx(lowest, abs=3e-6)
    assert (after >= found).sum() <= n_before


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


# ---- promised rates --------------------------------------------------------------------------------------------------


def chances(n: int, rate: Fraction) -> Iterator[Fraction]:
    """P(Binomial(n, rate) <= k) for k = 0, 1, ..., in whole numbers."""
    total, hit, whole = 0, rate.numerator, rate.denominator
    for k in range(n):
        total += math.comb(n, k) * hit**k * (whole - hit) ** (n - k)
        yield Fraction(total, whole**n)


@pytest.mark.parametrize(("rate", "needed"), [(0.05, 59), (0.01, 299), (0.001, 2995)])
def test_the_rows_of_a_promise_are_those_of_the_papers(rate: float, needed: int) -> None:
    assert rows_needed(rate) == needed
    assert (1 - rate) ** needed <= 0.05 < (1 - rate) ** (needed - 1)
    scores = np.random.default_rng(0).random(needed) * 0.9
    assert threshold_with_bound(scores, rate) > scores.max()  # so few rows promise only what none of them breaks
    with pytest.raises(InputError, match=f"{needed - 1:,} harmless rows cannot promise .* it takes {needed:,}"):
        threshold_with_bound(scores[1:], rate)


@pytest.mark.parametrize("rate", [0.0, 1.0, -0.1, math.nan])
def test_a_rate_lies_between_0_and_1(rate: float) -> None:
    with pytest.raises(InputError, match="lie between 0 and 1"):
        threshold_with_bound(np.zeros(100), rate)


@pytest.mark.parametrize("rate", [5e-324, 1e-300, 1e-17, 2e-9])
def test_a_rate_that_no_file_can_promise_is_refused(rate: float) -> None:
    with pytest.raises(InputError, match=f"rate of {rate} cannot be promised: .* more than 1,000,000,000 .* Ask for "):
        rows_needed(rate)
    assert rows_needed(1e-8) == 299573226


@settings(max_examples=60)
@given(
    n=st.integers(1, 150),
    rate=st.fractions(Fraction(1, 40), Fraction(3, 5), max_denominator=40),
    confidence=st.sampled_from([0.8, 0.9, 0.95]),
)
def test_the_allowed_count_is_the_largest_that_keeps_the_promise(n: int, rate: Fraction, confidence: float) -> None:
    """Against the binomial distribution in exact fractions."""
    risk = 1 - Fraction(confidence)
    n_kept = len(list(takewhile(lambda chance: chance <= risk, chances(n, rate))))
    assert (n >= rows_needed(float(rate), confidence)) == (n_kept > 0)
    if n_kept:
        assert n_allowed(n, float(rate), confidence) == n_kept - 1


def slow_threshold(scores: np.ndarray, rate: float) -> float:
    """Of all thresholds just above a row's score, the lowest whose count of flagged rows keeps the promise."""
    is_kept = [chance <= 1 - Fraction(0.95) for chance in chances(len(scores), Fraction(rate))]
    return min(candidate for candidate in scores.tolist() if is_kept[int((scores > candidate).sum())])


@settings(max_examples=40)
@given(
    scores=arrays.arrays(np.float64, st.integers(20, 90), elements=st.floats(0, 0.75, width=32) | st.just(0.5)),
    rate=st.sampled_from([0.05, 0.1, 0.25, 0.5]),
)
def test_a_threshold_with_bound_is_that_of_the_slow_twin(scores: np.ndarray, rate: float) -> None:
    assume(len(scores) >= rows_needed(rate))
    threshold = threshold_with_bound(scores, rate)
    assert threshold == pytest.approx(slow_threshold(scores, rate), abs=3e-6)
    assert (scores >= threshold).sum() <= n_allowed(len(scores), rate)
    assert threshold >= threshold_at(scores, rate)  # a promise is never laxer than what was counted
    more_sure = threshold_with_bound(scores, rate, 0.8)
    assert more_sure <= threshold


@pytest.mark.parametrize(("n", "rate"), [(59, 0.05), (200, 0.05), (299, 0.01), (1500, 0.01)])
@pytest.mark.parametrize("n_values", [None, 50])
def test_the_promise_is_kept_in_19_of_20_draws(n: int, rate: float, n_values: int | None) -> None:
    """Uniform scores, so that the true rate of a threshold is known; with ``n_values`` they are rounded into ties.

    The share of broken promises is that of the binomial (ties: at most), within four standard errors of 2,000 draws.
    """
    generator, n_draws, broken = np.random.default_rng(n), 2000, 0
    for _ in range(n_draws):
        scores = generator.random(n) * 0.99
        if n_values is not None:
            scores = np.floor(scores * n_values) / n_values
        threshold = threshold_with_bound(scores, rate)
        if n_values is None:
            true_rate = 1 - threshold / 0.99
        else:
            values = np.arange(n_values) / n_values
            weights = np.diff(np.append(np.minimum(values, 0.99), 0.99)) / 0.99
            true_rate = weights[values >= threshold].sum()
        broken += true_rate > rate
    expected = float(next(islice(chances(n, Fraction(rate)), n_allowed(n, rate), None)))
    assert expected <= 0.05
    margin = 4 * math.sqrt(expected * (1 - expected) / n_draws)
    assert broken / n_draws <= expected + margin
    if n_values is None:
        assert broken / n_draws >= expected - margin - 0.005  # the hair above the row's score makes it safer


def test_rows_that_score_one_cannot_promise() -> None:
    scores = np.append(np.zeros(100), np.ones(5))
    with pytest.raises(InputError, match="have score 1"):
        threshold_with_bound(scores, 0.05)


def test_what_is_no_score_has_no_threshold() -> None:
    broken = np.append(np.linspace(0, 0.5, 290), [np.nan] * 10)
    for threshold in (threshold_at, threshold_with_bound):
        with pytest.raises(NotFiniteError, match="is not a number"):
            threshold(broken, 0.05)
    with pytest.raises(InputError, match="needs harmless rows; got none"):
        threshold_at(np.zeros(0), 0.05)


# ---- modes -----------------------------------------------------------------------------------------------------------


def mode_rows(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    logits, labels = logits_and_labels(2.0, n, seed)
    return 1 / (1 + np.exp(-3 * logits)), labels


def test_a_mode_holds_the_presets_that_its_rows_can_promise() -> None:
    """About 0.6 of the rows are harmless."""
    found = {n: fit_mode(*mode_rows(n)) for n in (50, 200, 1000, 8000)}
    assert [list(fit.presets) for fit in found.values()] == [
        [],
        ["strict"],
        ["strict", "balanced"],
        ["strict", "balanced", "permissive"],
    ]
    for n, fit in found.items():
        scores, labels = mode_rows(n)
        assert fit.n_harmless == int((labels == 0).sum())
        assert fit.promise is None
        for preset, promise in fit.presets.items():
            assert promise.false_positive_rate == PRESET_RATES[preset]
            assert promise.threshold == (threshold_with_bound(scores[labels == 0], PRESET_RATES[preset]),)
        thresholds = [promise.threshold[0] for promise in fit.presets.values()]
        assert thresholds == sorted(thresholds)
    assert found[50].maps == ()
    assert found[200].maps[0].method == "platt"
    assert found[8000].maps[0].error_after < found[8000].maps[0].error_before


def test_a_rate_of_its_own_is_kept_or_refused() -> None:
    scores, labels = mode_rows(200)
    assert fit_mode(scores, labels, false_positive_rate=0.1).promise.threshold == (
        threshold_with_bound(scores[labels == 0], 0.1),
    )
    with pytest.raises(InputError, match="it takes 299"):
        fit_mode(scores, labels, false_positive_rate=0.01)


def test_benign_rows_replace_the_harmless_ones() -> None:
    scores, labels = mode_rows(200)
    benign = np.random.default_rng(5).random((70, 1)) / 2
    fit = fit_mode(scores, labels, benign=benign)
    assert fit.n_harmless == 70
    assert fit.presets["strict"].threshold == (threshold_with_bound(benign[:, 0], 0.05),)
    assert fit.maps == fit_mode(scores, labels).maps
    assert fit_mode(np.zeros((0, 1)), np.zeros((0, 1)), benign=benign).maps == ()


def test_a_row_without_a_score_counts_as_flagged() -> None:
    benign = np.random.default_rng(5).random((100, 1)) / 2
    sound = fit_mode(np.zeros((0, 1)), np.zeros((0, 1)), benign=benign)
    benign[np.argsort(benign[:, 0])[50]] = math.nan
    broken = fit_mode(np.zeros((0, 1)), np.zeros((0, 1)), benign=benign)
    assert broken.presets["strict"].threshold[0] > sound.presets["strict"].threshold[0]


def test_of_several_labels_the_fewest_rows_count() -> None:
    first, second = mode_rows(300, 1), mode_rows(300, 2)
    second[1][:250] = 1
    fit = fit_mode(np.hstack([first[0], second[0]]), np.hstack([first[1], second[1]]))
    assert fit.n_harmless == int((second[1] == 0).sum()) < 59
    assert fit.presets == {}
    assert fit.maps == ()  # one label has too few harmless rows


def test_training_calibrates_every_mode_by_its_own_rows(tiny_base: Base, random_guard: Callable[..., Adapter]) -> None:
    logits, labels = logits_and_labels(2.0, 600)
    modes = tuple("answer" if index % 3 == 0 else "prompt" for index in range(600))
    guard = random_guard(tiny_base)
    calibrate_guard(guard, 0.1, JudgedRows(logits, labels, modes))
    assert guard.config.calibration == fit_calibration(logits, labels, 0.1)
    scores = scores_of(guard.config.calibration, logits)
    assert torch.equal(torch.from_numpy(scores), head_scores(tiny_base, random_guard, guard.config.calibration, logits))
    for mode, start in (("prompt", None), ("answer", 0)):
        own = np.array([found == mode for found in modes])
        assert own.sum() == (200 if start == 0 else 400)
        plain = torch.from_numpy(logits[own]).float().sigmoid().double().numpy()
        assert guard.config.modes[mode] == fit_mode(scores[own], labels[own], uncalibrated=plain)
    assert list(guard.config.modes) == ["answer", "prompt"]


def test_the_error_before_is_that_of_the_raw_logits(tiny_base: Base, random_guard: Callable[..., Adapter]) -> None:
    """Not of scores that were fitted to the same rows, which would look calibrated before."""
    logits, labels = logits_and_labels(2.0, 600)
    logits = 9 * logits + 20
    guard = random_guard(tiny_base)
    calibrate_guard(guard, 0.1, JudgedRows(logits, labels, ("prompt",) * 600))
    (fit,) = guard.config.modes["prompt"].maps
    assert fit.error_before == pytest.approx(expected_calibration_error(labels[:, 0], 1 / (1 + np.exp(-logits[:, 0]))))
    assert fit.error_after < 0.1 < fit.error_before
    scores = scores_of(guard.config.calibration, logits)
    assert expected_calibration_error(labels[:, 0], scores[:, 0]) < 0.1
    fitted = fit_mode(scores, labels)
    assert guard.config.modes["prompt"].presets == fitted.presets
    assert (fit.slope, fit.height, fit.error_after) == (
        fitted.maps[0].slope, fitted.maps[0].height, fitted.maps[0].error_after,
    )  # fmt: skip


def test_training_takes_benign_rows_where_it_has_them(tiny_base: Base, random_guard: Callable[..., Adapter]) -> None:
    logits, labels = logits_and_labels(2.0, 400)
    rows = JudgedRows(logits, labels, ("prompt",) * 200 + ("answer",) * 200)
    clean = np.random.default_rng(3).normal(size=(90, 1))
    benign = JudgedRows(clean, np.zeros((90, 1)), ("prompt",) * 60 + ("windowed",) * 30)
    guard = random_guard(tiny_base)
    calibrate_guard(guard, 0.1, rows, benign)
    calibration, modes = guard.config.calibration, guard.config.modes
    assert [modes[mode].n_harmless for mode in ("prompt", "windowed")] == [60, 30]
    assert modes["answer"].n_harmless == int((labels[200:] == 0).sum())
    assert modes["prompt"].presets["strict"].threshold == (
        threshold_with_bound(scores_of(calibration, clean[:60])[:, 0], 0.05),
    )
    assert modes["windowed"].presets == {}
    assert modes["windowed"].maps == ()


def test_copies_among_the_rows_of_training_buy_no_promise(
    tiny_base: Base, random_guard: Callable[..., Adapter]
) -> None:
    """58 harmless texts promise no 5%, however often each comes; a 59th does.  So it is for benign rows."""
    logits, labels = logits_and_labels(2.0, 400)
    n_harmless = int((labels == 0).sum())
    for n_distinct in (58, 59):
        texts = np.array([f"harmful {row}" for row in range(400)], dtype=object)
        texts[labels[:, 0] == 0] = [f"harmless {row % n_distinct}" for row in range(n_harmless)]
        guard = random_guard(tiny_base)
        calibrate_guard(guard, 0.1, JudgedRows(logits, labels, ("prompt",) * 400, tuple(texts)))
        fit = guard.config.modes["prompt"]
        assert (fit.n_harmless, list(fit.presets)) == (n_distinct, ["strict"] if n_distinct == 59 else [])
        clean = logits[labels[:, 0] == 0]
        benign = JudgedRows(clean, np.zeros((len(clean), 1)), ("prompt",) * len(clean), tuple(texts[labels[:, 0] == 0]))
        calibrate_guard(guard, 0.1, JudgedRows(logits, labels, ("prompt",) * 400), benign)
        assert guard.config.modes["prompt"].presets == fit.presets
        assert guard.config.modes["prompt"].n_harmless == n_distinct


def test_rows_that_were_learnt_from_buy_no_promise(tiny_base: Base, random_guard: Callable[..., Adapter]) -> None:
    """They still say how scores become probabilities; 58 others promise no 5%, a 59th does."""
    logits, labels = logits_and_labels(2.0, 400)
    harmless = np.flatnonzero(labels[:, 0] == 0)
    texts = tuple(f"text {row}" for row in range(400))
    for n_unseen in (58, 59):
        learnt = frozenset(texts[row] for row in harmless[n_unseen:])
        guard = random_guard(tiny_base)
        calibrate_guard(guard, 0.1, JudgedRows(logits, labels, ("prompt",) * 400, texts, learnt))
        fit = guard.config.modes["prompt"]
        assert (fit.n_harmless, list(fit.presets)) == (n_unseen, ["strict"] if n_unseen == 59 else [])
        calibrate_guard(whole := random_guard(tiny_base), 0.1, JudgedRows(logits, labels, ("prompt",) * 400, texts))
        assert whole.config.modes["prompt"].maps == fit.maps
        assert whole.config.calibration == guard.config.calibration


def test_of_copies_the_highest_scores_count() -> None:
    scores = np.array([[0.1, 0.9], [0.5, 0.2], [math.nan, 0.3], [0.2, 0.4]])
    found = counted_once(scores, ["a", "b", "a", "b"])
    assert np.array_equal(found, [[0.5, 0.4], [math.nan, 0.9]], equal_nan=True)
    assert counted_once(scores, []).shape == (4, 2), "without texts no row is a copy"
    assert counted_once(np.zeros((0, 2)), []).shape == (0, 2)


def test_rows_that_do_not_know_a_label_count_for_the_others_only() -> None:
    first, second = mode_rows(300, 1), mode_rows(300, 2)
    scores, labels = np.hstack([first[0], second[0]]), np.hstack([first[1], second[1]])
    labels[:100, 0], labels[100:, 1] = math.nan, math.nan
    calibration = fit_calibration(np.log(scores / (1 - scores)), labels)
    alone = [
        fit_calibration(np.log(one / (1 - one)), known)
        for one, known in ((scores[100:, :1], labels[100:, :1]), (scores[:100, 1:], labels[:100, 1:]))
    ]
    assert calibration.threshold == (alone[0].threshold[0], alone[1].threshold[0])
    fit = fit_mode(scores, labels)
    assert fit.n_harmless == int((labels[:100, 1] == 0).sum())
    assert [one.n_harmless + one.n_harmful for one in fit.maps] == [200, 100]
