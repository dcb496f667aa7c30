"""The mix of base and aligners, and the policies that set its strength.

Heads are linear, so mixing final states is mixing logits: ``h = h_base + sum_i s_i * delta_i`` gives
``z = (1 - s) z_base + s z_side`` for one aligner.  Sums run in float32 and are cast once; a token whose strengths are
all 0 keeps the base's state by selection, so it stays the base bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from safeside.adapters.adapter import Adapter
from safeside.errors import InputError, NotFiniteError
from safeside.types import MAX_STRENGTH


@runtime_checkable
class Policy(Protocol):
    """How strong an aligner is, and what decides it."""

    @property
    def guard(self) -> str | None:
        """Name of the guard whose scores it reads; None: of no guard."""
        ...

    @property
    def latched(self) -> bool:
        """True: decided once, by the score at the prompt's end.  False: again at every token."""
        ...

    @property
    def ceiling(self) -> float:
        """The highest strength that it gives."""
        ...

    def strength(self, score: Float[Tensor, ...]) -> Float[Tensor, ...]:
        """Strength for scores in [0, 1]; a score that is not finite gets the ceiling (guards fail closed)."""
        ...


@dataclass(frozen=True, slots=True)
class Fixed:
    """The same strength at every token: one value, or one for each row of the request."""

    values: tuple[float, ...]
    """Strengths in [0, 2]."""
    guard: None = None
    """No guard is asked."""
    latched: bool = False
    """Nothing to decide."""

    def __post_init__(self) -> None:
        if not self.values:
            raise InputError("A fixed strength needs at least one value; got none.")
        for value in self.values:
            check_strength(value)

    @property
    def ceiling(self) -> float:
        """The highest of the values."""
        return max(self.values)

    def strength(self, score: Float[Tensor, ...]) -> Float[Tensor, ...]:
        """The values as a (rows, 1) column, whatever the score."""
        return torch.tensor(self.values, dtype=torch.float32, device=score.device)[:, None]


@dataclass(frozen=True, slots=True)
class Step:
    """``low`` below the guard's ``threshold`` and ``high`` from it on (the targeted alignment of DSA)."""

    guard: str
    """Name of the guard; of several labels the highest score counts."""
    threshold: float
    """Score in [0, 1]."""
    low: float = 0.0
    """Strength in [0, 2] below the threshold."""
    high: float = 1.0
    """Strength in [0, 2] from the threshold on, and for a score that is not a number."""
    latched: bool = True
    """Decided once, at the prompt's end; False: again at every token."""

    def __post_init__(self) -> None:
        check_score(self.threshold)
        check_order(self.low, self.high)

    @property
    def ceiling(self) -> float:
        """``high``."""
        return self.high

    def strength(self, score: Float[Tensor, ...]) -> Float[Tensor, ...]:
        """``high`` or ``low`` for each score, in its shape."""
        return torch.where((score < self.threshold) & score.isfinite(), self.low, self.high)


@dataclass(frozen=True, slots=True)
class Ramp:
    """``floor`` up to score ``low``, ``ceiling`` from score ``high``, linear between."""

    guard: str
    """Name of the guard; of several labels the highest score counts."""
    low: float
    """Score in [0, 1] at which the strength starts to rise."""
    high: float
    """Score in [0, 1] at which it is full."""
    floor: float = 0.0
    """Strength in [0, 2] up to score ``low``."""
    ceiling: float = 1.0
    """Strength in [0, 2] from score ``high`` on, and for a score that is not a number."""
    latched: bool = True
    """Decided once, at the prompt's end; False: again at every token."""

    def __post_init__(self) -> None:
        check_score(self.low)
        check_score(self.high)
        if self.low >= self.high:
            raise InputError(f"A ramp must rise: low {self.low} must be below high {self.high}.")
        check_order(self.floor, self.ceiling)

    def strength(self, score: Float[Tensor, ...]) -> Float[Tensor, ...]:
        """A strength for each score, in its shape."""
        share = ((score - self.low) / (self.high - self.low)).clamp(0.0, 1.0)
        value = (self.floor + share * (self.ceiling - self.floor)).clamp(self.floor, self.ceiling)
        return torch.where((score < self.high) & score.isfinite(), value, self.ceiling)


def fixed(strength: float | int | Sequence[float] | Tensor) -> Fixed:
    """The same strength in [0, 2] at every token; a sequence gives one value for each row of the request.

    0 is the base bit for bit, 1 the aligner; values between mix and values above 1 extrapolate.  Anything outside the
    range is an InputError.
    """
    return Fixed(_numbers(strength))


def _numbers(strength: object) -> tuple[float, ...]:
    """One number, or several, as floats; anything else is an InputError."""
    given: object = strength.flatten().tolist() if isinstance(strength, Tensor) else strength
    values: list[Any] = list(given) if isinstance(given, Iterable) else [given]
    if not all(isinstance(value, Real) for value in values):
        raise InputError(f"A fixed strength is a number, or one number for each row; got {given!r}.")
    return tuple(float(value) for value in values)


def step(
    guard: Adapter | str,
    threshold: float | None = None,
    low: float = 0.0,
    high: float = 1.0,
    *,
    latched: bool = True,
) -> Step:
    """Strength ``high`` where the guard's score reaches ``threshold``, else ``low``.

    This is DSA's targeted alignment.  Without ``threshold`` it is the guard's for prompts, at the preset chosen, and of
    several labels the lowest: what flags is aligned.

    ``latched`` decides once, by the score at the prompt's end; otherwise every token decides for itself.  A score that
    is not a number gets ``high``.  Thresholds outside [0, 1], strengths outside [0, 2] and ``low`` above ``high`` are
    an InputError.
    """
    if threshold is None:
        threshold = threshold_of(guard)
    return Step(name_of(guard), threshold, low, high, latched)


def ramp(
    guard: Adapter | str,
    low: float | None = None,
    high: float | None = None,
    floor: float = 0.0,
    ceiling: float = 1.0,
    *,
    latched: bool = True,
) -> Ramp:
    """Strength that rises from ``floor`` at score ``low`` to ``ceiling`` at score ``high``, in a straight line.

    Without ``high`` it is the guard's own calibrated threshold, and of several labels the lowest: what flags is aligned
    in full.  Without ``low`` it is half of ``high``.

    ``latched`` decides once, by the score at the prompt's end; otherwise every token decides for itself.  A score that
    is not a number gets ``ceiling``.  Scores outside [0, 1], strengths outside [0, 2] and a ramp that falls are an
    InputError.
    """
    if high is None:
        high = threshold_of(guard)
    return Ramp(name_of(guard), high / 2 if low is None else low, high, floor, ceiling, latched)


def as_policies(strength: object, aligners: Sequence[str]) -> dict[str, Policy]:
    """One policy for each aligner.

    ``strength`` is a number, one number for each row, a policy, or a mapping from aligner to any of these (aligners
    left out get 0).  Unknown aligners are an InputError.
    """
    if isinstance(strength, Mapping):
        unknown = sorted(set(strength) - set(aligners))
        if unknown:
            raise InputError(f"No aligner called {', '.join(unknown)}; attached are {', '.join(aligners) or 'none'}.")
        return {name: as_policy(strength.get(name, 0.0)) for name in aligners}
    policy = as_policy(strength)
    return dict.fromkeys(aligners, policy)


def as_policy(strength: object) -> Policy:
    """A policy as it is, and a number or one number for each row as ``fixed``; anything else is an InputError."""
    if isinstance(strength, Policy):
        return strength
    if isinstance(strength, (int, float, Tensor, list, tuple)) and not isinstance(strength, bool):
        return fixed(strength)
    raise InputError(
        f"A strength cannot be {strength!r}; expected a number, one number a row, or a policy such as ramp()."
    )


def threshold_of(guard: Adapter | str) -> float:
    """The lowest of a guard's thresholds for prompts, at its preset, so that what flags is aligned."""
    if isinstance(guard, str):
        raise InputError(
            f"The guard is given by its name {guard!r} only, which tells no threshold; pass one, or the guard."
        )
    if not guard.thresholds:
        raise InputError(f"{guard.name!r} is no guard: it has no scores to ask for. Pass a guard, or its name.")
    return min(guard.thresholds_in("prompt"))


def name_of(guard: Adapter | str) -> str:
    """What policies call a guard."""
    return guard if isinstance(guard, str) else guard.name


def check_strength(value: float) -> None:
    """Raise an InputError unless ``value`` is a strength."""
    if not 0.0 <= value <= MAX_STRENGTH:  # also refuses NaN
        raise InputError(f"A strength must lie in [0, {MAX_STRENGTH:g}]; got {value}.")


def check_score(value: float) -> None:
    """Raise an InputError unless ``value`` is a score."""
    if not 0.0 <= value <= 1.0:
        raise InputError(f"A score threshold must lie in [0, 1]; got {value}.")


def check_order(low: float, high: float) -> None:
    """Raise an InputError unless both are strengths that do not fall."""
    check_strength(low)
    check_strength(high)
    if low > high:
        raise InputError(f"A policy must not weaken as risk grows: {low} is above {high}.")


def mix(
    base_state: Float[Tensor, "B T D"],
    deltas: Sequence[Float[Tensor, "B T D"]],
    strengths: Sequence[Float[Tensor, "B T"]],
) -> Float[Tensor, "B T D"]:
    """The mixed final state (B, T, D): ``base_state + sum_i strengths_i * deltas_i``, in float32 and cast once.

    Heads are linear, so mixing final states mixes logits.  Tokens whose strengths are all 0 are the base's, bit for
    bit, whatever the deltas hold.  A delta that is not finite where its strength is not 0 is a NotFiniteError.
    """
    parts = [weighted(delta, strength) for delta, strength in zip(deltas, strengths, strict=True)]
    if not all(part.isfinite().all() for part in parts):
        raise NotFiniteError("An aligner returned NaN or infinity; the answer cannot be trusted. Detach it.")
    return moved(base_state, parts, strengths)


def weighted(delta: Float[Tensor, "*B D"], strength: Float[Tensor, "*B"]) -> Float[Tensor, "*B D"]:
    """``strength * delta`` in float32; 0 where the strength is 0, whatever the delta holds."""
    return torch.where((strength != 0)[..., None], strength[..., None] * delta.float(), 0.0)


def moved(
    base_state: Float[Tensor, "*B D"], parts: Sequence[Float[Tensor, "*B D"]], strengths: Sequence[Float[Tensor, "*B"]]
) -> Float[Tensor, "*B D"]:
    """The base's state with the ``weighted`` parts added, in float32 and cast once; itself where all strengths are 0.

    It looks at no value, so it can be captured in a graph of kernels; whether the parts are finite is the caller's.
    """
    total = sum(parts, base_state.float())
    active = torch.zeros(base_state.shape[:-1], dtype=torch.bool, device=base_state.device)
    for strength in strengths:
        active = active | (strength != 0)
    return torch.where(active[..., None], total.to(base_state.dtype), base_state)
