"""Which of several policies counts: the strictest, part by part.

``strictest`` is the join of a lattice: neither the order of the policies nor naming one twice changes what it gives,
and adding a policy never loosens anything.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

from safeside.serve.rules import FlagRule, OnError, Policy, PolicyMode, Rule, SteerRule

_ON_ERROR: tuple[OnError, ...] = ("annotate", "steer", "block")
Value = TypeVar("Value", int, float, str, bool)


def strictest(policies: Sequence[Policy], mode: PolicyMode | None = None) -> Policy:
    """One policy that asks for everything that any of ``policies`` asks for.

    ``mode`` is that of every rule; unless given each keeps its own.
    """
    settled = [_settled(policy, mode) for policy in policies]
    given = [policy.on_error for policy in settled if policy.on_error is not None]
    keeps_text = _given(policy.audit_text for policy in settled)
    return Policy(
        prompt=_union(policy.prompt for policy in settled),
        answer=_union(policy.answer for policy in settled),
        floor=max((policy.floor for policy in settled), default=0.0),
        ceiling=_ceiling(settled),
        on_error=max(given, key=_ON_ERROR.index, default=None),
        hold_back=max(_given(policy.hold_back for policy in settled), default=None),
        audit_text=all(keeps_text) if keeps_text else None,
        genes=tuple(sorted({gene for policy in settled for gene in policy.genes})),
    )


def _ceiling(policies: Sequence[Policy]) -> float | None:
    """The highest ceiling that is given, and nothing that is asked for lies above it."""
    given = _given(policy.ceiling for policy in policies)
    return max(*given, *(policy.highest_asked for policy in policies)) if given else None


def _settled(policy: Policy, mode: PolicyMode | None) -> Policy:
    """The policy with its mode, or another, written into every rule; a floor that does not act is none."""
    acts = (mode or policy.mode) == "enforce"
    return policy.model_copy(
        update={
            "prompt": tuple(_with_mode(rule, policy.mode, mode) for rule in policy.prompt),
            "answer": tuple(_with_mode(rule, policy.mode, mode) for rule in policy.answer),
            "floor": policy.floor if acts else 0.0,
        }
    )


def _with_mode(rule: Rule, own: PolicyMode, asked: PolicyMode | None) -> Rule:
    return rule.model_copy(update={"mode": asked or rule.mode or own})


def _union(groups: Iterable[Sequence[Rule]]) -> tuple[Rule, ...]:
    """Every rule once, in an order that depends on the rules alone."""
    rules: set[FlagRule | SteerRule] = {rule for group in groups for rule in group}
    return tuple(sorted(rules, key=lambda rule: rule.model_dump_json()))


def _given(values: Iterable[Value | None]) -> list[Value]:
    return [value for value in values if value is not None]
