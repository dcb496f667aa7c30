"""Random policies, and verdicts at chosen scores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hypothesis import strategies as st

from safeside.serve.rules import FlagRule, Policy, SteerRule
from safeside.types import Mode, Verdict

GUARD, LABELS = "harm", ("hate", "theft")
SCORES = st.floats(0.0, 1.0)
STRENGTHS = st.sampled_from([0.0, 0.25, 0.5, 1.0, 1.5, 2.0])
MODES = st.sampled_from([None, "enforce", "shadow"])
OWN_LABELS = st.sampled_from([(), ("hate",), LABELS])
ACTIONS = st.sampled_from(["allow", "annotate", "replace", "block"])


@dataclass(frozen=True)
class Wish:
    """What a request asks for."""

    policy: str | None = None
    strength: float | None = None
    mode: str | None = None


def verdict(label: str, score: float, mode: Mode = "prompt", guard: str = GUARD) -> Verdict:
    """A verdict whose own threshold nothing reaches: policies have lines of their own."""
    return Verdict(guard, score, 2.0, label, False, mode)


def verdicts(scores: Mapping[str, float], mode: Mode = "prompt") -> list[Verdict]:
    return [verdict(label, score, mode) for label, score in scores.items()]


@st.composite
def flag_rules(draw: st.DrawFn, labels: st.SearchStrategy[tuple[str, ...]] = OWN_LABELS) -> FlagRule:
    action = draw(ACTIONS)
    return FlagRule(
        guard=GUARD,
        labels=draw(labels),
        mode=draw(MODES),
        action=action,
        threshold=draw(SCORES),
        n_consecutive=draw(st.integers(1, 3)),
        text="No." if action == "replace" else None,
    )


@st.composite
def steer_rules(draw: st.DrawFn) -> SteerRule:
    low, high = sorted([draw(SCORES), draw(SCORES)])
    floor, ceiling = sorted([draw(STRENGTHS), draw(STRENGTHS)])
    return SteerRule(
        guard=GUARD,
        action="steer",
        labels=draw(OWN_LABELS),
        mode=draw(MODES),
        low=low,
        high=high,
        floor=floor,
        ceiling=ceiling,
    )


@st.composite
def policies(draw: st.DrawFn, steers: bool = True) -> Policy:
    """A policy of up to four rules; without ``steers`` nothing in it asks for strength."""
    prompt = draw(st.lists(flag_rules(), max_size=2))
    answer = draw(st.lists(flag_rules(st.just(())), max_size=2))
    return Policy(
        prompt=(*prompt, *(draw(st.lists(steer_rules(), max_size=1)) if steers else ())),
        answer=(*answer, *(draw(st.lists(steer_rules(), max_size=1)) if steers else ())),
        floor=draw(STRENGTHS) if steers else 0.0,
        ceiling=draw(st.sampled_from([None, 2.0])),
        mode=draw(st.sampled_from(["enforce", "shadow"])),
        on_error=draw(st.sampled_from([None, "annotate", "steer", "block"])),
        hold_back=draw(st.sampled_from([None, 0, 4, 16])),
        audit_text=draw(st.sampled_from([None, False, True])),
        genes=draw(st.sampled_from([(), ("safe",), ("safe", "kind")])),
    )
