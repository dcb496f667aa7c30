"""From steer rules to the policies of ``safeside.mixing`` and ``safeside.policies`` that set an aligner's strength.

Rules that meet on one aligner become the mildest curve of their shape that is nowhere below any of them: the lowest
``low`` and ``high``, the highest ``floor`` and ``ceiling``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from safeside.adapters.adapter import Adapter
from safeside.errors import ConfigError
from safeside.mixing import Fixed, Ramp, Step
from safeside.mixing import Policy as StrengthPolicy
from safeside.policies import Reads, by_category, timed
from safeside.serve.rules import Stage, SteerRule
from safeside.types import Mode

_ALL = ""  # in place of a label: the highest score of all labels counts
StagedRule = tuple[Stage, SteerRule]


@dataclass(frozen=True, slots=True)
class Curve:
    """``floor`` up to score ``low``, ``ceiling`` from score ``high``, linear between."""

    low: float
    """Score in [0, 1]."""
    high: float
    """Score in [0, 1], not below ``low``."""
    floor: float
    """Strength in [0, 2]."""
    ceiling: float
    """Strength in [0, 2], not below ``floor``."""

    @property
    def starts_at(self) -> float:
        """The lowest score with a strength above 0."""
        if self.floor > 0:
            return 0.0
        return self.low if self.low == self.high else math.nextafter(self.low, 1.0)

    def joined(self, other: Curve) -> Curve:
        """The mildest curve that is nowhere below either of the two."""
        return Curve(
            min(self.low, other.low),
            min(self.high, other.high),
            max(self.floor, other.floor),
            max(self.ceiling, other.ceiling),
        )

    def policy(self, guard: str, latched: bool) -> Ramp | Step:
        """The curve as a strength policy of ``guard``."""
        if self.low < self.high:
            return Ramp(guard, self.low, self.high, self.floor, self.ceiling, latched)
        return Step(guard, self.low, self.floor, self.ceiling, latched)


def strength_policy(rules: Iterable[StagedRule], guards: Mapping[str, Adapter], floor: float) -> StrengthPolicy:
    """What sets the strength of one aligner under ``rules``, nowhere below ``floor``.

    Rules that read different guards are a ConfigError.
    """
    rules = tuple(rules)
    if not rules:
        return Fixed((floor,))
    guard = _one_guard(rule for _, rule in rules)
    stages = {stage for stage, _ in rules}
    latched = stages == {"prompt"}
    curves = {
        label: replace(curve, floor=max(curve.floor, floor), ceiling=max(curve.ceiling, floor))
        for label, curve in _curves(rules, guards).items()
    }
    policy: StrengthPolicy
    if set(curves) == {_ALL}:
        policy = curves[_ALL].policy(guard, latched)
    else:
        adapter = loaded(guard, guards)
        parts = {label: curve.policy(guard, latched) for label, curve in _by_label(curves, adapter).items()}
        policy = by_category(adapter, parts, latched=latched)
    reads: Reads = "both" if len(stages) == 2 else "answer"
    return policy if latched else timed(policy, reads=reads)


def _one_guard(rules: Iterable[SteerRule]) -> str:
    names = sorted({rule.guard for rule in rules})
    if len(names) > 1:
        raise ConfigError(
            f"Steer rules of {' and '.join(names)} meet on one aligner, which can follow only one guard. Let the "
            "policies that hold together steer by the same guard, or name different aligners."
        )
    return names[0]


def _curves(rules: Iterable[StagedRule], guards: Mapping[str, Adapter]) -> dict[str, Curve]:
    curves: dict[str, Curve] = {}
    for stage, rule in rules:
        for label, curve in _curves_of(rule, stage, guards).items():
            curves[label] = curves[label].joined(curve) if label in curves else curve
    return curves


def _curves_of(rule: SteerRule, stage: Stage, guards: Mapping[str, Adapter]) -> dict[str, Curve]:
    """By label the curve of one rule."""
    if rule.low is not None and rule.high is not None:
        curve = Curve(rule.low, rule.high, rule.floor, rule.ceiling)
        return dict.fromkeys(rule.labels or (_ALL,), curve)
    guard = loaded(rule.guard, guards)
    mode: Mode = "prompt" if stage == "prompt" else "stream"
    thresholds = dict(zip(guard.config.labels, guard.with_preset(rule.preset).thresholds_in(mode), strict=True))
    return {
        label: Curve(thresholds[label], thresholds[label], rule.floor, rule.ceiling)
        for label in rule.labels or guard.config.labels
    }


def steering_lines(rule: SteerRule, guards: Mapping[str, Adapter]) -> dict[str, float]:
    """By label the score from which on a token of an answer makes the rule steer; left out are those that never do."""
    curves = _curves_of(rule, "answer", guards)
    if _ALL in curves:
        curves = dict.fromkeys(loaded(rule.guard, guards).config.labels, curves[_ALL])
    return {label: curve.starts_at for label, curve in curves.items() if curve.ceiling > 0}


def _by_label(curves: Mapping[str, Curve], guard: Adapter) -> dict[str, Curve]:
    """The curves with the one for all labels put into each."""
    if _ALL not in curves:
        return dict(curves)
    everyone = curves[_ALL]
    return {label: curves[label].joined(everyone) if label in curves else everyone for label in guard.config.labels}


def loaded(name: str, guards: Mapping[str, Adapter]) -> Adapter:
    """The guard of this name; a policy that asks one that is not loaded is a ConfigError."""
    guard = guards.get(name)
    if guard is None:
        known = ", ".join(sorted(guards)) or "none"
        raise ConfigError(f"A rule asks guard {name!r}, which is not loaded; loaded are {known}. Load it first.")
    return guard
