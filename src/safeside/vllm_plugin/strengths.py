"""How strong the aligner is for one request: what ``extra_args`` may say, and the rule behind it as six numbers.

A number in [0, 2], or a policy: ``{"policy": "ramp", "guard": "harm", "low": 0.2, "high": 0.8}``, with the parameters
of ``safeside.step`` and ``safeside.ramp``.  ``reads`` says which score counts: the prompt's, decided once (``prompt``);
the newest token's (``answer``); the riskier of both (``both``); or the highest since the prompt's end (``maximum``).
Over HTTP a policy is one string of JSON, because ``vllm_xargs`` takes no objects.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from safeside.errors import InputError, problems_of
from safeside.mixing import Fixed, Ramp, Step, fixed, ramp, step

KEY = "safeside_strength"
"""The key of ``extra_args`` (``vllm_xargs`` over HTTP)."""
READS = ("always", "prompt", "answer", "both", "maximum")
_TOO_STRONG = 1e9  # in place of an int that no float can hold
NO_NUMBER = 2.0
"""In place of a score that is not a number, or is not known: above every threshold, so that guards fail closed."""


class AskedPolicy(BaseModel):
    """A policy as a request spells it; unknown fields are an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    policy: Literal["step", "ramp"]
    guard: str | None = None
    reads: Literal["prompt", "answer", "both", "maximum"] = "prompt"
    threshold: float | None = None
    low: float | None = None
    high: float | None = None
    floor: float | None = None
    ceiling: float | None = None

    def built(self, guard: str, threshold: float) -> Step | Ramp:
        """The policy of ``guard``; what is not said is as in ``step`` and ``ramp``."""
        ignored = ("floor", "ceiling") if self.policy == "step" else ("threshold",)
        values = {name: value for name, value in self.model_dump(exclude_none=True).items() if name in _CURVE}
        if wrong := [name for name in ignored if name in values]:
            raise InputError(f"A {self.policy} has no {', '.join(wrong)}. Leave it out.")
        if self.policy == "step":
            return step(guard, **{"threshold": threshold, **values})
        return ramp(guard, **{"high": threshold, **values})


_CURVE = ("threshold", "low", "high", "floor", "ceiling")


class Setting(NamedTuple):
    """A rule as numbers: ``floor`` up to score ``low``, ``ceiling`` from ``high`` on, a straight line between."""

    low: float
    high: float
    floor: float
    ceiling: float
    guard: int = 0
    """Index of the guard."""
    reads: int = 0
    """Index in READS."""


def parse_strength(value: object, thresholds: Mapping[str, float]) -> Setting:
    """The rule that ``value`` asks for; ``thresholds`` are those of the engine's guards, in order.

    Numbers out of range, unknown guards and fields, and what is no strength at all are an InputError.
    """
    if isinstance(value, str):
        value = spelled(value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return setting_of(fixed(min(value, _TOO_STRONG)), 0, "always")
    if not isinstance(value, Mapping):
        raise InputError(f"{KEY} is a number in [0, 2] or a policy of a guard; got {value!r}.")
    try:
        asked = AskedPolicy.model_validate(dict(value))
    except ValidationError as error:
        raise InputError(f"{KEY} is no policy: {problems_of(error)}") from error
    guard = asked.guard if asked.guard is not None or len(thresholds) != 1 else next(iter(thresholds))
    if guard is None or guard not in thresholds:
        raise InputError(
            f"{KEY} asks guard {guard!r}; the engine's guards are {', '.join(thresholds) or 'none'}. Name one of them."
        )
    return setting_of(asked.built(guard, thresholds[guard]), list(thresholds).index(guard), asked.reads)


def spelled(text: str) -> object:
    """A number or policy from its JSON; anything else is an InputError."""
    try:
        value: object = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{KEY} is neither a number nor JSON: {text[:100]!r}.") from error
    return value


def setting_of(policy: Fixed | Step | Ramp, guard: int, reads: str) -> Setting:
    """The numbers of a library's policy."""
    place = READS.index(reads)
    if isinstance(policy, Fixed):
        return Setting(0.0, 0.0, policy.values[0], policy.values[0], guard, place)
    if isinstance(policy, Step):
        return Setting(policy.threshold, policy.threshold, policy.low, policy.high, guard, place)
    return Setting(policy.low, policy.high, policy.floor, policy.ceiling, guard, place)


def curve(settings: Float[Tensor, "*B 6"], score: Float[Tensor, "*B"]) -> Float[Tensor, "*B"]:
    """The strength for each score by its own rule; the ceiling for NO_NUMBER."""
    low, high, floor, ceiling = settings[..., :4].unbind(-1)
    share = ((score - low) / (high - low).clamp_min(1e-12)).clamp(0.0, 1.0)
    value = torch.minimum(floor + share * (ceiling - floor), ceiling)
    return torch.where(score >= high, ceiling, torch.where(score < low, floor, value))
