"""What holds for one request: verdicts at the rules' own lines, decisions, strengths, stop rules."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from policies_for_tests import GUARD, LABELS, verdict, verdicts
from safeside import Adapter, Base, Message, attach, fixed
from safeside.adapters.config import Calibration, ModeCalibration, Promise
from safeside.errors import ConfigError
from safeside.mixing import Ramp
from safeside.serve.effective import EffectivePolicy
from safeside.serve.merging import strictest
from safeside.serve.rules import Policy
from safeside.stopping import StopRule

NAN = math.nan


@pytest.fixture(scope="module")
def guard(session_base: Base, random_guard: Callable[..., Adapter]) -> Adapter:
    """Two labels with thresholds 0.4 and 0.6; strict ones of 0.1 and 0.2 for prompts, 0.3 for every token."""
    guard = random_guard(session_base, name=GUARD, labels=LABELS)
    guard.set_calibration(Calibration(scale=(1.0, 1.0), bias=(0.0, 0.0), threshold=(0.4, 0.6)))
    for mode, threshold in (("prompt", (0.1, 0.2)), ("stream", (0.3, 0.35))):
        strict = {"strict": Promise(threshold=threshold, false_positive_rate=0.05)}
        guard.set_mode(mode, ModeCalibration(n_harmless=320, presets=strict))
    return guard


def holding(guard: Adapter | None = None, strength: float | None = None, **fields: object) -> EffectivePolicy:
    policy = strictest([Policy.model_validate(fields)])
    return EffectivePolicy("test", "0", policy, {GUARD: guard} if guard else {}, ("refuse",), strength)


def flag(action: str, **fields: object) -> dict[str, object]:
    return {"guard": GUARD, "action": action, **fields}


STEER = flag("steer", low=0.2, high=0.8)


def test_a_policy_without_opinions_has_the_safe_defaults() -> None:
    nothing = holding()
    assert (nothing.guards, nothing.hold_back, nothing.on_error) == ((), 8, "block")
    assert (nothing.audit_text, nothing.policy.genes) == (False, ())
    assert nothing.decide_prompt([]).action == "allow"
    assert nothing.strengths() == {"refuse": fixed(0.0)}


@pytest.mark.parametrize("action", ["allow", "annotate", "block"])
def test_a_flag_does_its_action_from_its_threshold_on(action: str) -> None:
    rule = holding(prompt=[flag(action, threshold=0.7)])
    over, under = (rule.decide_prompt(verdicts({"hate": score})) for score in (0.7, 0.699))
    assert (over.action, over.intended, over.reason) == (
        (action, action, "harm: hate 0.700 >= 0.700") if action != "allow" else ("allow", "allow", "")
    )
    assert (under.action, under.guard) == ("allow", "")
    assert rule.decide_answer(verdicts({"hate": 0.9}, "answer")).action == "allow"  # it has no rule on answers


def test_replacing_brings_its_text() -> None:
    decision = holding(answer=[flag("replace", threshold=0.5, text="Sorry.")]).decide_answer(
        verdicts({"hate": 0.5}, "answer")
    )
    assert (decision.action, decision.text, decision.guard) == ("replace", "Sorry.", GUARD)


def test_labels_narrow_a_rule() -> None:
    rule = holding(prompt=[flag("block", threshold=0.5, labels=["theft"])])
    assert rule.decide_prompt(verdicts({"hate": 0.9, "theft": 0.1})).action == "allow"
    assert rule.decide_prompt(verdicts({"hate": 0.1, "theft": 0.9})).action == "block"


def test_presets_and_own_thresholds_are_those_of_the_reading_mode(guard: Adapter) -> None:
    strict, own = (holding(guard, prompt=[flag("block", **rule)]) for rule in ({"preset": "strict"}, {}))
    scores = verdicts({"hate": 0.05, "theft": 0.25})
    assert strict.decide_prompt(scores).reason == "harm: theft 0.250 >= 0.200"
    assert own.decide_prompt(scores).action == "allow"
    assert own.decide_prompt(verdicts({"hate": 0.41, "theft": 0.0})).action == "block"


def test_a_preset_without_its_guard_is_told() -> None:
    with pytest.raises(ConfigError, match="'harm', which is not loaded"):
        holding(prompt=[flag("block", preset="strict")]).decide_prompt(verdicts({"hate": 0.9}))


@pytest.mark.parametrize("on_error", ["annotate", "block"])
@pytest.mark.parametrize(
    ("found", "problem"),
    [
        ([], "it gave no verdict"),
        ([verdict("hate", 0.0)], "it gave no verdict"),  # of its other label
        ([verdict("hate", NAN), verdict("theft", 0.0)], "the score of hate is not a number"),
        ([verdict("hate", math.inf), verdict("theft", 0.0)], "the score of hate is not a number"),
        ([verdict("hate", NAN), verdict("hate", 0.0), verdict("theft", 0.0)], "the score of hate is not a number"),
    ],
)
def test_a_guard_that_cannot_score_is_never_passed_over(
    guard: Adapter, on_error: str, found: list, problem: str
) -> None:
    decision = holding(guard, prompt=[flag("annotate", threshold=0.99)], on_error=on_error).decide_prompt(found)
    assert (decision.action, decision.guard) == (on_error, GUARD)
    assert decision.reason == f"harm could not score: {problem}"


def test_steering_on_error_needs_a_steer_rule_of_that_guard() -> None:
    broken = verdicts({"hate": NAN})
    steers = holding(prompt=[STEER, flag("annotate", threshold=0.9)], on_error="steer").decide_prompt(broken)
    assert (steers.action, steers.strength) == ("steer", 1.0)
    assert holding(prompt=[flag("annotate", threshold=0.9)], on_error="steer").decide_prompt(broken).action == "block"


def test_a_rule_that_only_watches_does_nothing_even_when_its_guard_fails() -> None:
    watches = holding(prompt=[flag("block", threshold=0.5, mode="shadow")])
    for score in (0.9, NAN):
        decision = watches.decide_prompt(verdicts({"hate": score}))
        assert (decision.action, decision.intended) == ("allow", "block")
        assert decision.reason.startswith("harm")


@pytest.mark.parametrize(
    ("score", "strength", "action"), [(0.1, 0.0, "allow"), (0.5, 0.5, "steer"), (0.9, 1.0, "steer")]
)
def test_a_ramp_steers_by_the_score(score: float, strength: float, action: str) -> None:
    decision = holding(prompt=[STEER]).decide_prompt(verdicts({"hate": score, "theft": 0.0}))
    assert (decision.action, decision.strength) == (action, pytest.approx(strength))


def test_steering_by_category_asks_for_each_label(guard: Adapter) -> None:
    rules = [
        flag("steer", labels=[label], low=0.5, high=0.5, ceiling=top)
        for label, top in zip(LABELS, (0.5, 1.5), strict=True)
    ]
    policy = holding(guard, prompt=rules)
    strengths = [
        policy.decide_prompt(verdicts({"hate": hate, "theft": theft})).strength
        for hate, theft in ((0.1, 0.1), (0.9, 0.1), (0.9, 0.9))
    ]
    assert strengths == [0.0, 0.5, 1.5]


def test_strengths_are_policies_that_attach_takes(
    tiny_base: Base, random_guard: Callable[..., Adapter], random_aligner: Callable[..., Adapter]
) -> None:
    guard = random_guard(tiny_base)
    policy = holding(guard, prompt=[STEER], floor=0.1)
    assert policy.strengths() == {"refuse": Ramp(GUARD, 0.2, 0.8, 0.1)}
    with attach(tiny_base, guards=[guard], aligners=[random_aligner(tiny_base)], strength=policy.strengths()):
        completion = tiny_base.chat([Message("user", "the cat")], max_new_tokens=3)
    expected = policy.decide_prompt([completion.verdicts[0]]).strength
    assert completion.strength["refuse"] == pytest.approx((expected,) * len(completion.strength["refuse"]))


def test_an_exact_strength_is_what_was_asked_for() -> None:
    exact = holding(None, 0.0, prompt=[STEER], floor=0.5)
    assert exact.strengths() == {"refuse": fixed(0.0)}
    assert exact.decide_prompt(verdicts({"hate": 0.9})).strength == 0.0


def test_stop_rules_are_the_lowest_of_those_that_end_an_answer_and_act(guard: Adapter) -> None:
    answer = [
        flag("block", threshold=0.8, n_consecutive=3),
        flag("replace", preset="strict", n_consecutive=2, text="Stop."),
        flag("annotate", threshold=0.1),
        flag("block", threshold=0.05, mode="shadow"),
    ]
    assert holding(guard, answer=answer).stop_rules() == {GUARD: StopRule(0.3, 2)}
    assert holding(guard, answer=answer[2:]).stop_rules() == {}


def test_a_promise_for_streams_counts_on_its_own_run_of_tokens(guard: Adapter) -> None:
    strict = {"strict": Promise(threshold=(0.4, 0.4), false_positive_rate=0.05)}
    streaming = guard.with_preset("strict")
    streaming.set_mode("stream", ModeCalibration(n_harmless=320, presets=strict, n_consecutive=8))
    for rule, n_consecutive in (
        (flag("block", preset="strict"), 8),
        (flag("block", preset="strict", n_consecutive=2), 2),
        (flag("block", threshold=0.4), 1),
    ):
        assert holding(streaming, answer=[rule]).stop_rules()[GUARD].n_consecutive == n_consecutive
    assert holding(guard, answer=[flag("block", preset="strict")]).stop_rules()[GUARD].n_consecutive == 1


def test_a_stop_rule_is_no_laxer_than_the_line_of_whole_answers(guard: Adapter) -> None:
    strict = {"strict": Promise(threshold=(0.25, 0.5), false_positive_rate=0.05)}
    stricter = guard.with_preset("strict")
    stricter.set_mode("answer", ModeCalibration(n_harmless=320, presets=strict))
    policy = holding(stricter, answer=[flag("block", preset="strict", n_consecutive=2)])
    assert policy.stop_rules() == {GUARD: StopRule(0.25, 2)}


def test_verdicts_stand_at_the_lowest_line_of_the_rules_for_their_stage(guard: Adapter) -> None:
    policy = holding(
        guard,
        prompt=[flag("block", threshold=0.9), flag("annotate", preset="strict", labels=["theft"])],
        answer=[flag("block", threshold=0.7)],
    )
    prompt = policy.verdicts(GUARD, [0.85, 0.2], "prompt")
    assert [(each.label, each.threshold, each.flagged) for each in prompt] == [
        ("hate", 0.9, False),
        ("theft", 0.2, True),
    ]
    assert {each.threshold for each in policy.verdicts(GUARD, [0.1, 0.1], "answer")} == {0.7}
    assert [each.threshold for each in policy.verdicts(GUARD, [0.1, 0.1], "windowed")] == [0.7, 0.6]
    assert [each.threshold for each in holding(guard).verdicts(GUARD, [0.1, 0.1], "prompt")] == [0.4, 0.6]


def test_verdicts_without_a_number_flag_and_say_so(guard: Adapter) -> None:
    for each in holding(guard).verdicts(GUARD, [NAN, 0.0], "prompt"):
        assert each.flagged == (each.label == "hate")
        assert math.isnan(each.probability)
        assert "not a number" in each.reason


def test_verdicts_say_where_a_preset_has_no_thresholds_of_its_own(guard: Adapter) -> None:
    policy = holding(guard, prompt=[flag("block", preset="strict")], answer=[flag("block", preset="strict")])
    assert policy.verdicts(GUARD, [0.0, 0.0], "prompt")[0].reason == ""
    told = policy.verdicts(GUARD, [0.0, 0.0], "answer")[0].reason
    assert "no preset 'strict' for mode 'answer': the guard's own threshold is used" in told
