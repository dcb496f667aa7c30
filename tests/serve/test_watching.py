"""What rules that do not end an answer say of it: all that they would have done, and not only at its last token."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policies_for_tests import policies
from safeside import Adapter, Base
from safeside.adapters.config import Calibration, ModeCalibration, Promise
from safeside.serve.effective import EffectivePolicy
from safeside.serve.merging import strictest
from safeside.serve.row import Ended
from safeside.serve.rules import Policy
from safeside.serve.watching import AnswerWatch
from serving_for_tests import Script, effective

RULE = {"guard": "harm", "threshold": 0.5}
MIDWAY = [(0.1, 0.1), (0.63, 0.2), (0.55, 0.1), (0.04, 0.04)]
STEER = {"guard": "harm", "action": "steer", "low": 0.5, "high": 0.9}


@pytest.fixture(scope="module")
def guard(session_base: Base, random_guard: Callable[..., Adapter]) -> Adapter:
    """Flags whole answers at 0.4 and 0.6, and with 'strict' two tokens in a row of one at 0.3 and 0.35."""
    guard = random_guard(session_base, labels=("hate", "theft"))
    guard.set_calibration(Calibration(scale=(1.0, 1.0), bias=(0.0, 0.0), threshold=(0.4, 0.6)))
    strict = {"strict": Promise(threshold=(0.3, 0.35), false_positive_rate=0.05)}
    guard.set_mode("stream", ModeCalibration(n_harmless=320, presets=strict, n_consecutive=2))
    return guard


def ended(base: Base, policy: EffectivePolicy, scores: list[tuple[float, ...]]) -> Ended:
    return Script(base, policy, len(scores)).run(*scores).ended


@pytest.mark.parametrize(
    "rule", [{**RULE, "action": "block"}, {**RULE, "action": "replace", "text": "No."}, {**RULE, "action": "annotate"}]
)
def test_in_shadow_the_middle_of_an_answer_counts(session_base: Base, guard: Adapter, rule: dict[str, object]) -> None:
    acted = ended(session_base, effective([guard], answer=[rule]), MIDWAY)
    found = ended(session_base, effective([guard], answer=[{**rule, "mode": "shadow"}]), MIDWAY)
    assert acted.decision.action == rule["action"]
    assert (found.finish, found.decision.action, found.decision.intended) == ("length", "allow", rule["action"])
    assert found.decision.reason.startswith("harm: hate 0.630 >= 0.500")
    assert [(each.flagged, each.score) for each in found.verdicts] == [(True, 0.63), (False, 0.04)]


def test_an_annotation_marks_what_was_flagged_midway(session_base: Base, guard: Adapter) -> None:
    found = ended(session_base, effective([guard], answer=[{**RULE, "action": "annotate"}]), MIDWAY)
    assert (found.finish, found.decision.action, found.decision.intended) == ("length", "annotate", "annotate")
    assert found.decision.by_guard == {"harm": "annotate"}
    assert found.decision.reason == "harm: hate 0.630 >= 0.500 at token 2"
    hate, theft = found.verdicts
    assert (hate.flagged, hate.score, hate.threshold, hate.mode) == (True, 0.63, 0.5, "stream")
    assert hate.reason.endswith("at token 2")
    assert (theft.flagged, theft.score, theft.mode) == (False, 0.04, "answer")


def test_each_label_is_marked_where_it_is_riskiest(session_base: Base, guard: Adapter) -> None:
    scores = [(0.6, 0.1), (0.8, 0.7), (0.7, 0.9), (0.0, 0.0)]
    found = ended(session_base, effective([guard], answer=[{**RULE, "action": "allow"}]), scores)
    assert found.decision.action == "allow"
    assert [(each.flagged, each.score) for each in found.verdicts] == [(True, 0.8), (True, 0.9)]


def test_a_label_that_a_rule_leaves_out_is_not_marked(session_base: Base, guard: Adapter) -> None:
    rule = {**RULE, "action": "annotate", "labels": ["theft"]}
    found = ended(session_base, effective([guard], answer=[rule]), MIDWAY)
    assert (found.decision.action, [each.flagged for each in found.verdicts]) == ("allow", [False, False])


@pytest.mark.parametrize(("n_risky", "action"), [(1, "allow"), (2, "annotate")])
def test_a_rule_waits_for_as_many_tokens_as_its_promise(
    session_base: Base, guard: Adapter, n_risky: int, action: str
) -> None:
    rule = {"guard": "harm", "preset": "strict", "action": "annotate"}
    found = ended(session_base, effective([guard], answer=[rule]), [(0.35, 0.0)] * n_risky + [(0.0, 0.0)])
    assert found.decision.action == action


def test_a_mark_decides_nothing_else(session_base: Base, guard: Adapter) -> None:
    """One token is enough to annotate and too little to block, and it is not the whole answer's score either."""
    rules = [{**RULE, "action": "block", "n_consecutive": 3}, {**RULE, "action": "annotate"}]
    found = ended(session_base, effective([guard], answer=rules), MIDWAY)
    assert (found.finish, found.decision.action, found.decision.intended) == ("length", "annotate", "annotate")


@pytest.mark.parametrize(("mode", "action"), [("enforce", "steer"), ("shadow", "allow")])
def test_steering_midway_is_told(session_base: Base, guard: Adapter, mode: str, action: str) -> None:
    found = ended(session_base, effective([guard], answer=[{**STEER, "mode": mode}]), MIDWAY)
    assert (found.decision.action, found.decision.intended) == (action, "steer")
    low = ended(session_base, effective([guard], answer=[{**STEER, "mode": mode}]), [(0.5, 0.5), (0.1, 0.1)])
    assert (low.decision.action, low.decision.intended) == ("allow", "allow")


@pytest.mark.parametrize("floor", [0.0, 0.2])
def test_a_step_steers_by_each_labels_own_line(session_base: Base, guard: Adapter, floor: float) -> None:
    rule = {"guard": "harm", "action": "steer", "preset": "strict", "mode": "shadow", "floor": floor}
    found = ended(session_base, effective([guard], answer=[rule]), [(0.29, 0.34), (0.0, 0.0)])
    assert found.decision.intended == ("steer" if floor else "allow")
    assert (
        ended(session_base, effective([guard], answer=[rule]), [(0.0, 0.36), (0.0, 0.0)]).decision.intended == "steer"
    )


def test_a_strength_that_was_asked_for_is_nobodys_steering(guard: Adapter) -> None:
    watch = AnswerWatch(effective([guard], strength=0.0, answer=[STEER]))
    watch.add({"harm": (0.9, 0.9)}, {})
    assert watch.met == {}


SCORES = st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0, math.nan, math.inf])


@given(policies(), st.lists(st.tuples(SCORES, SCORES), min_size=1, max_size=6))
@settings(max_examples=150, deadline=None)
def test_shadow_tells_what_enforcing_does(
    session_base: Base, guard: Adapter, policy: Policy, scores: list[tuple[float, ...]]
) -> None:
    policy = policy.model_copy(update={"floor": 0.0, "genes": ()})
    enforced, shadow = (
        EffectivePolicy("test", "0", strictest([policy], mode), {"harm": guard}, ("refuse",))
        for mode in ("enforce", "shadow")
    )
    acted, watched = (ended(session_base, each, scores).decision for each in (enforced, shadow))
    assert watched.action == "allow"
    assert watched.intended == acted.action == acted.intended
