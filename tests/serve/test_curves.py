"""Steer rules as strength policies: those that meet are nowhere below any of them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from policies_for_tests import GUARD, LABELS, SCORES, STRENGTHS, steer_rules
from safeside import Adapter, Base, fixed
from safeside.adapters.config import Calibration, ModeCalibration, Promise
from safeside.errors import ConfigError
from safeside.mixing import Ramp, Step
from safeside.policies import ByCategory, Timed
from safeside.serve.curves import strength_policy
from safeside.serve.rules import SteerRule

STAGES = st.sampled_from(["prompt", "answer"])


@pytest.fixture(scope="module")
def guards(session_base: Base, random_guard: Callable[..., Adapter]) -> dict[str, Adapter]:
    guard = random_guard(session_base, name=GUARD, labels=LABELS)
    guard.set_calibration(Calibration(scale=(1.0, 1.0), bias=(0.0, 0.0), threshold=(0.4, 0.6)))
    strict = {"strict": Promise(threshold=(0.1, 0.2), false_positive_rate=0.05)}
    guard.set_mode("prompt", ModeCalibration(n_harmless=320, presets=strict))
    return {GUARD: guard}


def rule(**fields: object) -> SteerRule:
    return SteerRule.model_validate({"guard": GUARD, "action": "steer", **fields})


def at(policy: object, scores: tuple[float, ...]) -> float:
    """The strength at a guard's scores by label."""
    curve = policy.policy if isinstance(policy, Timed) else policy
    row = torch.tensor(scores)
    return float(curve.strength(row if isinstance(curve, ByCategory) else row.amax()))


def alone(each: SteerRule, scores: tuple[float, ...]) -> float:
    """The slow twin: one rule by its definition, with lines as the float32 that scores are."""
    wanted = each.labels or LABELS
    score = max(score for label, score in zip(LABELS, scores, strict=True) if label in wanted)
    score, low, high = (float(np.float32(value)) for value in (score, each.low, each.high))
    if score >= high:
        return each.ceiling
    if score <= low:
        return each.floor
    return each.floor + (score - low) / (high - low) * (each.ceiling - each.floor)


@settings(max_examples=40)
@given(st.lists(st.tuples(STAGES, steer_rules()), min_size=1, max_size=3), STRENGTHS, st.tuples(SCORES, SCORES))
def test_rules_that_meet_are_nowhere_below_any_of_them(
    guards: dict[str, Adapter], rules: list[tuple[str, SteerRule]], floor: float, scores: tuple[float, float]
) -> None:
    policy = strength_policy(rules, guards, floor)
    wanted = max(max(alone(each, scores), floor) for _, each in rules)
    assert at(policy, scores) >= wanted - 1e-6
    if len(rules) == 1 and rules[0][1].ceiling >= floor == 0.0:
        assert at(policy, scores) == pytest.approx(wanted, abs=1e-5)
    assert policy.ceiling <= max(floor, *(each.ceiling for _, each in rules), 0.0)
    assert at(policy, (float("nan"), 0.0)) == policy.ceiling  # fails closed


def test_one_rule_is_a_plain_ramp_or_step() -> None:
    assert strength_policy([("prompt", rule(low=0.2, high=0.8))], {}, 0.0) == Ramp(GUARD, 0.2, 0.8)
    assert strength_policy([("prompt", rule(low=0.5, high=0.5, floor=0.1))], {}, 0.0) == Step(GUARD, 0.5, 0.1)
    assert strength_policy([("prompt", rule(low=0.2, high=0.8))], {}, 0.3) == Ramp(GUARD, 0.2, 0.8, 0.3)
    assert strength_policy([], {}, 0.25) == fixed(0.25)


def test_rules_on_the_answer_are_read_again_at_every_token() -> None:
    answer = strength_policy([("answer", rule(low=0.2, high=0.8))], {}, 0.0)
    assert (answer.reads, answer.latched) == ("answer", False)
    both = strength_policy([(stage, rule(low=0.2, high=0.8)) for stage in ("prompt", "answer")], {}, 0.0)
    assert (both.reads, both.latched) == ("both", False)


def test_a_step_stands_at_the_guards_threshold_or_that_of_a_preset(guards: dict[str, Adapter]) -> None:
    own = strength_policy([("prompt", rule())], guards, 0.0)
    assert (at(own, (0.39, 0.59)), at(own, (0.41, 0.0)), at(own, (0.0, 0.61))) == (0.0, 1.0, 1.0)
    strict = strength_policy([("prompt", rule(preset="strict", labels=["theft"]))], guards, 0.0)
    assert (at(strict, (1.0, 0.19)), at(strict, (0.0, 0.21))) == (0.0, 1.0)


def test_two_guards_cannot_set_one_aligner() -> None:
    rules = [("prompt", rule(guard=name, low=0.1, high=0.2)) for name in ("hate", "harm")]
    with pytest.raises(ConfigError, match="Steer rules of harm and hate meet on one aligner"):
        strength_policy(rules, {}, 0.0)


def test_a_guard_that_is_not_loaded_is_told() -> None:
    with pytest.raises(ConfigError, match="guard 'harm', which is not loaded; loaded are none"):
        strength_policy([("prompt", rule())], {}, 0.0)
    with pytest.raises(ConfigError, match="not loaded"):
        strength_policy([("prompt", rule(low=0.1, high=0.2, labels=["hate"]))], {}, 0.0)
