"""Probabilities: monotone, honest about their error, and measured against a slow twin."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from safeside.errors import InputError
from safeside.guards import probability as module
from safeside.guards.probability import LEAST_ROWS, LEAST_ROWS_ISOTONIC, expected_calibration_error, fit_map

SAME = 1e-12  # float64


def slow_error(labels: np.ndarray, probabilities: np.ndarray, n_bins: int) -> float:
    total = 0.0
    for index in range(n_bins):
        rows = [
            (label, value)
            for label, value in zip(labels, probabilities, strict=True)
            if index <= value * n_bins < index + 1 or (index == n_bins - 1 and value == 1)
        ]
        if rows:
            confidence = sum(value for _, value in rows) / len(rows)
            frequency = sum(label for label, _ in rows) / len(rows)
            total += len(rows) / len(labels) * abs(confidence - frequency)
    return total


@given(
    rows=st.lists(
        st.tuples(st.sampled_from([0.0, 1.0]), st.floats(0, 1) | st.sampled_from([0.0, 0.5, 1.0])), min_size=1
    ),
    n_bins=st.integers(1, 20),
)
def test_the_calibration_error_is_that_of_the_twin(rows: list[tuple[float, float]], n_bins: int) -> None:
    labels, values = (np.array(column) for column in zip(*rows, strict=True))
    found = expected_calibration_error(labels, values, n_bins)
    assert found == pytest.approx(slow_error(labels, values, n_bins), abs=SAME)
    assert 0 <= found <= 1


def test_known_errors() -> None:
    assert expected_calibration_error(np.array([1.0, 0.0]), np.array([1.0, 0.0])) == 0
    assert expected_calibration_error(np.array([0.0, 0.0]), np.array([1.0, 1.0])) == 1
    assert expected_calibration_error(np.array([1.0, 0.0, 0.0, 0.0]), np.full(4, 0.75)) == pytest.approx(0.5)


@pytest.mark.parametrize("values", [[], [1.1], [np.nan], [-0.1]])
def test_what_is_no_probability_is_an_error(values: list[float]) -> None:
    with pytest.raises(InputError, match="probabilities in"):
        expected_calibration_error(np.zeros(len(values)), np.array(values))


def rows(n: int, curve: str = "logistic", seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Scores, and labels that are harmful with a known probability of the score."""
    generator = np.random.default_rng(seed)
    scores = generator.random(n)
    wanted = scores**3 if curve == "logistic" else np.select([scores < 0.4, scores < 0.6], [0.3, 0.35], 0.8)
    return scores, (generator.random(n) < wanted).astype(np.float64)


def test_few_rows_have_no_map() -> None:
    scores = np.linspace(0.1, 0.9, 4 * LEAST_ROWS)
    labels = np.zeros(4 * LEAST_ROWS)
    labels[: LEAST_ROWS - 1] = 1
    assert fit_map(scores, labels) is None
    assert fit_map(scores, 1 - labels) is None
    labels[LEAST_ROWS - 1] = 1
    assert fit_map(scores, labels).n_harmful == LEAST_ROWS


def test_isotonic_needs_many_rows_and_a_lower_brier_score() -> None:
    steps = {n: fit_map(*rows(n, "steps")) for n in (LEAST_ROWS_ISOTONIC - 1, 4000)}
    assert [fit.method for fit in steps.values()] == ["platt", "isotonic"]
    smooth = fit_map(*(values for values in rows(1200)))
    scores, labels = rows(1200)
    briers = {
        method: np.mean((module._held_out(method, scores, labels) - labels) ** 2) for method in ("platt", "isotonic")
    }
    assert smooth.method == min(briers, key=briers.get)


@pytest.mark.parametrize("curve", ["logistic", "steps"])
def test_probabilities_are_what_happens(curve: str) -> None:
    scores, labels = rows(6000, curve)
    fit = fit_map(scores, labels)
    assert fit.error_before == pytest.approx(expected_calibration_error(labels, scores))
    assert fit.error_after < 0.03 < fit.error_before
    fresh, fresh_labels = rows(6000, curve, seed=1)
    assert expected_calibration_error(fresh_labels, fit.probabilities(fresh)) < 0.04
    assert (fit.n_harmless, fit.n_harmful) == (int((labels == 0).sum()), int(labels.sum()))


def test_the_error_after_is_not_measured_on_the_rows_of_the_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    fit = module._fit

    def spy(method: module.Method, scores: np.ndarray, labels: np.ndarray) -> module.ProbabilityMap:
        seen.append(len(scores))
        return fit(method, scores, labels)

    monkeypatch.setattr(module, "_fit", spy)
    fit_map(*rows(500))
    assert seen == [400] * 5 + [500]


@settings(max_examples=30)
@given(
    scores=arrays.arrays(np.float64, 80, elements=st.floats(0, 1, width=32)),
    labels=arrays.arrays(np.bool_, 80),
    method=st.sampled_from(["platt", "isotonic"]),
)
def test_no_map_falls_or_leaves_the_unit_interval(
    scores: np.ndarray, labels: np.ndarray, method: module.Method
) -> None:
    labels[:2] = [True, False]
    fit = module._fit(method, scores, labels.astype(np.float64))
    values = fit.probabilities(np.linspace(0, 1, 201))
    assert ((values >= 0) & (values <= 1)).all()
    assert (np.diff(values) >= -SAME).all()
    assert np.isnan(fit.probabilities(np.array([np.nan]))).all()
    assert type(fit).model_validate_json(fit.model_dump_json()) == fit
