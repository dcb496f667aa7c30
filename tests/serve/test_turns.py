"""Earlier turns of the user: which are judged, by which rules, and what is told of the one that ends a request."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from safeside import Adapter, Base, Message
from safeside.guards.score import Scores, judge, score_conversations
from safeside.serve.turns import earlier_turns, refusal_by_turns, verdicts_on
from serving_for_tests import effective

Make = Callable[..., Adapter]
TALK = [
    Message("system", "Be kind."), Message("user", "one"), Message("assistant", "a"), Message("user", " \u200b"),
    Message("user", "two"), Message("assistant", "b"), Message("user", "three"),
]  # fmt: skip


def test_the_users_messages_but_the_last_that_hold_text_are_earlier_turns() -> None:
    assert earlier_turns(TALK) == [(TALK[1],), (TALK[4],)]
    assert earlier_turns(TALK[:2]) == []
    assert earlier_turns(TALK[:6]) == [(TALK[1],), (TALK[4],)]  # an answer ends it


@pytest.mark.parametrize("action", ["block", "replace", "annotate", "allow"])
def test_the_first_turn_that_a_rule_would_end_is_told(tiny_base: Base, random_guard: Make, action: str) -> None:
    guard = random_guard(tiny_base)
    turns = [(Message("user", f"the cat sat {index * 7919}"),) for index in range(4)]
    found = score_conversations(tiny_base, [guard], turns)
    scores = [row.by_guard[guard.name][0] for row in found]
    line = sum(sorted(scores)[1:3]) / 2
    rule = {"guard": guard.name, "action": action, "threshold": line}
    policy = effective([guard], turns="each", prompt=[{**rule, **({"text": "No."} if action == "replace" else {})}])
    refusal = refusal_by_turns(policy, {guard.name: guard}, found)
    if action in ("annotate", "allow"):
        assert refusal is None
        return
    assert refusal is not None
    verdicts, decision = refusal
    first = next(number for number, score in enumerate(scores, 1) if score >= line)
    assert (decision.action, decision.text) == (action, "No." if action == "replace" else "")
    assert decision.reason.endswith(f">= {line:.3f} (an earlier turn, {first} of 4)")
    assert [verdict.score for verdict in verdicts] == [scores[first - 1]]
    assert [verdict.reason for verdict in verdicts] == [f"an earlier turn, {first} of 4"]
    quiet = effective([guard], turns="each", prompt=[{**rule, "action": "block", "threshold": 1.0}])
    assert refusal_by_turns(quiet, {guard.name: guard}, found) is None


@pytest.mark.parametrize(("on_error", "ends"), [("block", True), ("annotate", False), (None, True)])
def test_a_turn_that_cannot_be_scored_is_met_by_on_error(
    tiny_base: Base, random_guard: Make, on_error: str | None, ends: bool
) -> None:
    guard = random_guard(tiny_base)
    rule = {"guard": guard.name, "action": "block", "threshold": 1.0}
    policy = effective([guard], turns="each", on_error=on_error, prompt=[rule])
    refusal = refusal_by_turns(policy, {guard.name: guard}, [Scores({guard.name: (math.nan,)})])
    assert (refusal is not None) == ends
    if refusal is not None:
        assert "could not score" in refusal[1].reason


def test_guards_are_asked_where_a_rule_on_prompts_acts(tiny_base: Base, random_guard: Make) -> None:
    guard = random_guard(tiny_base)
    rule = {"guard": guard.name, "action": "block"}
    shadow = {**rule, "mode": "shadow"}
    for fields, guards in (
        ({"turns": "each", "prompt": [rule]}, (guard.name,)),
        ({"turns": "each", "prompt": [rule, shadow]}, (guard.name,)),
        ({"turns": "each", "prompt": [shadow]}, ()),
        ({"turns": "each", "prompt": [rule], "mode": "shadow"}, ()),
        ({"turns": "each", "answer": [rule]}, ()),
        ({"turns": "last", "prompt": [rule]}, ()),
        ({"prompt": [rule]}, ()),
    ):
        assert effective([guard], **fields).turn_guards == guards


def test_verdicts_are_those_of_judging_the_text(tiny_base: Base, random_guard: Make) -> None:
    guard = random_guard(tiny_base)
    talk = [Message("user", "the cat")]
    (scores,) = score_conversations(tiny_base, [guard], [talk])
    (found,) = verdicts_on(effective([guard]), {guard.name: guard}, scores)
    ((verdict,),) = judge(tiny_base, [guard], [talk])
    assert (found.score, found.threshold, found.flagged) == (verdict.score, verdict.threshold, verdict.flagged)
