"""Stop rules against loops over plain lists."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from safeside import Adapter, Base
from safeside.adapters.config import ModeCalibration, Promise
from safeside.errors import InputError
from safeside.stopping import Standing, StopRule, as_rules, kept_rule, run_scores, standing_of

SCORES = st.lists(st.sampled_from([0.0, 0.1, 0.4, 0.5, 0.6, 0.9, 1.0, math.nan]), max_size=12)


def stop_by_hand(scores: list[float], threshold: float, n: int) -> int | None:
    """Walk along the answer and count risky tokens in a row."""
    count = 0
    for token, score in enumerate(scores):
        if math.isnan(score):
            return token
        count = count + 1 if score >= threshold else 0
        if count >= n:
            return token
    return None


def run_by_hand(scores: list[float], n: int) -> list[float]:
    result = []
    for token in range(len(scores)):
        window = scores[max(0, token - n + 1) : token + 1]
        known = [math.inf if math.isnan(score) else score for score in window]
        result.append(math.inf if math.isnan(scores[token]) else min(known) if len(window) == n else -math.inf)
    return result


@given(SCORES, st.sampled_from([0.0, 0.3, 0.5, 1.0]), st.integers(1, 5))
def test_a_rule_stops_where_its_twin_does(scores: list[float], threshold: float, n: int) -> None:
    rule, values = StopRule(threshold, n), torch.tensor(scores, dtype=torch.float64)
    expected = stop_by_hand(scores, threshold, n)
    assert rule.first_stop(values) == expected
    assert run_scores(values, n).tolist() == run_by_hand(scores, n)
    highest = max(run_by_hand(scores, n), default=-math.inf)
    assert (highest >= threshold) == (expected is not None)  # what a threshold is fitted on


@given(SCORES, st.sampled_from([0.3, 0.5]), st.integers(1, 5))
def test_what_is_clear_is_never_taken_back(scores: list[float], threshold: float, n: int) -> None:
    """Token by token: what was clear stays so, holds no risky end, and at most n scored tokens are held back."""
    rule, before = {"harm": StopRule(threshold, n)}, 0
    for length in range(1, len(scores) + 1):
        values = torch.tensor(scores[: length - 1], dtype=torch.float64)  # the newest is not scored yet
        standing = standing_of(rule, {"harm": values}, length)
        assert standing.n_clear >= before
        before = standing.n_clear
        if standing.stop is not None:
            assert standing.stop.token == stop_by_hand(scores, threshold, n) == length - 2
            assert standing.stop.n_kept == before
            kept, run = scores[:before], scores[before : length - 1]
            assert not kept or kept[-1] < threshold
            assert all(math.isnan(score) or score >= threshold for score in run)
            return
        assert length - before <= n


def test_the_first_of_several_guards_stops() -> None:
    rules = {"slow": StopRule(0.5, 3), "quick": StopRule(0.8, 1)}
    scores = {"slow": torch.tensor([0.1, 0.6, 0.6, 0.6]), "quick": torch.tensor([0.0, 0.0, 0.9, 0.9])}
    standing = standing_of(rules, scores, 5)
    assert standing.stop is not None
    assert (standing.stop.guard, standing.stop.token) == ("quick", 2)
    assert standing.stop.score == pytest.approx(0.9)
    assert standing.n_clear == standing.stop.n_kept == 1  # the slow guard had not cleared the second token


def test_without_rules_everything_is_clear() -> None:
    assert standing_of({}, {}, 7) == Standing(7)


def test_a_score_that_is_not_a_number_is_told() -> None:
    standing = standing_of({"harm": StopRule(0.5, 2)}, {"harm": torch.tensor([0.1, math.nan])}, 3)
    assert standing.stop is not None
    assert math.isnan(standing.stop.score)


@pytest.mark.parametrize("threshold", [-0.1, 1.1, math.nan])
def test_thresholds_outside_scores_are_refused(threshold: float) -> None:
    with pytest.raises(InputError, match=r"must lie in \[0, 1\]; got"):
        StopRule(threshold)
    with pytest.raises(InputError, match="1 token in a row or more; got n_consecutive=0"):
        StopRule(0.5, 0)


def test_rules_find_their_guards(session_base: Base, random_guard: Callable[..., Adapter]) -> None:
    rule = StopRule(0.5)
    harm, other = random_guard(session_base, name="harm"), random_guard(session_base, name="other")
    assert as_rules(None, []) == {}
    assert as_rules(rule, [harm]) == {"harm": rule}
    assert as_rules({"other": rule}, [harm, other]) == {"other": rule}
    for guards in ([], [harm, other]):
        with pytest.raises(InputError, match=rf"for {len(guards)} guards .* expected one guard\. Pass stop="):
            as_rules(rule, guards)
    with pytest.raises(InputError, match="No guard called c to stop by; attached are harm, other"):
        as_rules({"c": rule}, [harm, other])
    for wrong in (0.5, {"harm": 0.5}, "harm", False):
        with pytest.raises(InputError, match="expected a StopRule, or a mapping"):
            as_rules(wrong, [harm])


def test_true_asks_for_the_rules_that_artifacts_keep(session_base: Base, random_guard: Callable[..., Adapter]) -> None:
    harm, other = random_guard(session_base, name="harm"), random_guard(session_base, name="other")
    with pytest.raises(InputError, match=r"No guard attached keeps a stop rule \('harm' at preset none\)\. Make one"):
        as_rules(True, [harm])
    own, strict = (Promise(threshold=(value,), false_positive_rate=0.05) for value in (0.9, 0.8))
    harm.set_mode("stream", ModeCalibration(n_harmless=60, promise=own, presets={"strict": strict}, n_consecutive=3))
    assert as_rules(True, [harm, other]) == {"harm": StopRule(0.9, 3)}
    assert as_rules(True, [harm.with_preset("strict")]) == {"harm": StopRule(0.8, 3)}
    harm.set_mode("stream", ModeCalibration(n_harmless=60, presets={"strict": strict}, n_consecutive=3))
    assert kept_rule(harm) is None
    with pytest.raises(InputError, match="choose a preset that it has"):
        as_rules(True, [harm])
    harm.set_mode("stream", ModeCalibration(n_harmless=60, promise=own))
    assert kept_rule(harm) is None  # kept by an older version, which knew no number of tokens
