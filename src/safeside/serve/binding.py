"""Whether a policy fits the adapters that are loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from safeside.adapters.adapter import Adapter
from safeside.errors import ConfigError, InputError
from safeside.registry import did_you_mean
from safeside.serve.rules import Policy, Rule, SteerRule


def check_binding(
    name: str, policy: Policy, guards: Mapping[str, Adapter], aligners: Sequence[str], genes: Sequence[str]
) -> None:
    """Raise a ConfigError where the policy called ``name`` asks for what is not loaded."""
    for stage, rules in (("prompt", policy.prompt), ("answer", policy.answer)):
        for number, rule in enumerate(rules, 1):
            if problem := _problem(rule, guards, aligners):
                raise ConfigError(f"Policy {name!r}, {stage} rule {number}: {problem}")
    if policy.floor and not aligners:
        raise ConfigError(f"Policy {name!r} has a floor of {policy.floor:g} but no aligner is loaded. Load one first.")
    for gene in policy.genes:
        if gene not in genes:
            raise ConfigError(
                f"Policy {name!r} needs gene {gene!r}, which is not loaded; loaded are {', '.join(genes) or 'none'}."
            )


def _problem(rule: Rule, guards: Mapping[str, Adapter], aligners: Sequence[str]) -> str:
    """What the rule asks for that is not there; empty when all is."""
    guard = guards.get(rule.guard)
    if guard is None:
        return did_you_mean("guard", rule.guard, list(guards))
    labels = list(guard.config.labels)
    for label in rule.labels:
        if label not in labels:
            return did_you_mean(f"label of guard {rule.guard}", label, labels)
    if isinstance(rule, SteerRule):
        if not aligners:
            return "it steers, but no aligner is loaded. Load one first."
        if rule.aligner is not None and rule.aligner not in aligners:
            return did_you_mean("aligner", rule.aligner, list(aligners))
    try:
        guard.with_preset(rule.preset)
    except InputError as error:
        return str(error)
    return ""
