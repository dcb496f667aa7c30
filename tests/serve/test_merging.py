"""The strictest of several policies: a lattice, and nothing in it loosens."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from policies_for_tests import LABELS, SCORES, policies, verdicts
from safeside.serve.effective import EffectivePolicy
from safeside.serve.merging import strictest
from safeside.serve.rules import SEVERITY, Policy, PolicyMode

MODE = st.sampled_from([None, "enforce", "shadow"])
BY_LABEL = st.fixed_dictionaries(dict.fromkeys(LABELS, SCORES))


def effective(policy: Policy) -> EffectivePolicy:
    return EffectivePolicy("test", "0", strictest([policy]))


@settings(max_examples=25)
@given(st.lists(policies(), min_size=1, max_size=3), MODE, st.randoms())
def test_neither_order_nor_repetition_matters(found: list[Policy], mode: PolicyMode | None, random: object) -> None:
    mixed = [*found, found[0]]
    random.shuffle(mixed)
    assert strictest(mixed, mode) == strictest(found, mode)


@settings(max_examples=25)
@given(policies(), policies(), policies())
def test_merging_in_steps_is_merging_at_once(first: Policy, second: Policy, third: Policy) -> None:
    assert strictest([strictest([first, second]), third]) == strictest([first, second, third])
    assert strictest([first, strictest([second, third])]) == strictest([first, second, third])


@settings(max_examples=25)
@given(policies(), policies())
def test_more_policies_ask_for_no_less(first: Policy, second: Policy) -> None:
    one, both = effective(first).policy, strictest([first, second])
    assert set(one.prompt) <= set(both.prompt)
    assert set(one.answer) <= set(both.answer)
    assert set(one.genes) <= set(both.genes)
    assert both.floor >= one.floor
    assert both.highest_asked <= (2.0 if both.ceiling is None else both.ceiling)
    if one.hold_back is not None:
        assert both.hold_back >= one.hold_back
    if one.audit_text is False:
        assert both.audit_text is False  # a text that one policy keeps out of the log stays out
    order = [None, "annotate", "steer", "block"]
    assert order.index(both.on_error) >= order.index(one.on_error)


@settings(max_examples=25)
@given(st.lists(policies(steers=False), min_size=1, max_size=3), BY_LABEL, st.sampled_from(["prompt", "answer"]))
def test_the_decision_is_the_most_severe_of_each_policy_alone(
    found: list[Policy], scores: dict[str, float], stage: str
) -> None:
    """The slow twin: ask every policy by itself."""
    judged = verdicts(scores, stage)

    def severity(policy: Policy, key: str) -> int:
        holds = effective(policy)
        decision = holds.decide_prompt(judged) if stage == "prompt" else holds.decide_answer(judged)
        return SEVERITY[getattr(decision, key)]

    for key in ("action", "intended"):
        assert severity(strictest(found), key) == max(severity(policy, key) for policy in found)


@settings(max_examples=25)
@given(policies(steers=False), BY_LABEL)
def test_in_shadow_nothing_acts_and_the_intention_is_that_of_enforcement(
    policy: Policy, scores: dict[str, float]
) -> None:
    shadow, enforced = (EffectivePolicy("", "", strictest([policy], mode)) for mode in ("shadow", "enforce"))
    judged = verdicts(scores)
    assert shadow.is_shadow
    assert shadow.decide_prompt(judged).action == "allow"
    assert shadow.decide_prompt(judged).intended == enforced.decide_prompt(judged).action


def test_a_floor_that_does_not_act_is_none() -> None:
    policy = Policy(floor=0.5, mode="shadow")
    assert strictest([policy]).floor == 0.0
    assert strictest([policy], "enforce").floor == 0.5


def test_a_ceiling_never_lies_below_what_another_policy_asks_for() -> None:
    assert strictest([Policy(ceiling=0.5), Policy(floor=1.0)]).ceiling == 1.0
    assert strictest([Policy(), Policy(floor=1.0)]).ceiling is None


def test_nothing_merged_is_a_policy_without_opinion() -> None:
    assert strictest([]) == Policy()
