"""Further policies: a smooth gate, one gate for each category, several gates, and when a policy looks and acts.

The plain ones, ``fixed``, ``step`` and ``ramp``, are in ``safeside.mixing``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from safeside.adapters.adapter import Adapter
from safeside.errors import InputError
from safeside.mixing import Fixed, Policy, as_policy, check_order, check_score, name_of, step, threshold_of

Reads = Literal["prompt", "answer", "both"]


@dataclass(frozen=True, slots=True)
class Sigmoid:
    """From ``floor`` to ``ceiling`` along a logistic curve of the score."""

    guard: str
    """Name of the guard; of several labels the highest score counts."""
    middle: float
    """Score in [0, 1] at which the strength is half-way."""
    width: float
    """Scores over which it goes from 12% to 88% of the way: 0.2 reaches from ``middle`` - 0.1 to ``middle`` + 0.1."""
    floor: float = 0.0
    """Strength in [0, 2] far below the middle."""
    ceiling: float = 1.0
    """Strength in [0, 2] far above it, and for a score that is not a number."""
    latched: bool = True
    """Decided once, at the prompt's end; False: again at every token."""

    def __post_init__(self) -> None:
        check_score(self.middle)
        if not 0.0 < self.width < math.inf:
            raise InputError(f"A sigmoid's width must be a number above 0, such as 0.2; got {self.width}.")
        check_order(self.floor, self.ceiling)

    def strength(self, score: Float[Tensor, ...]) -> Float[Tensor, ...]:
        """A strength for each score, in its shape."""
        share = torch.sigmoid(4.0 * (score - self.middle) / self.width)
        value = (self.floor + share * (self.ceiling - self.floor)).clamp(self.floor, self.ceiling)
        return torch.where(score.isfinite(), value, self.ceiling)


@dataclass(frozen=True, slots=True)
class ByCategory:
    """A policy for each label of one guard; where several ask for strength, the highest counts."""

    guard: str
    """Name of the guard."""
    parts: tuple[tuple[int, str, Policy], ...]
    """Column of the guard's scores, its label, and the policy that reads it."""
    n_labels: int
    """Columns of the guard."""
    latched: bool = True
    """Decided once, at the prompt's end; False: again at every token."""

    @property
    def ceiling(self) -> float:
        """The highest of the parts'."""
        return max(policy.ceiling for _, _, policy in self.parts)

    def strength(self, score: Float[Tensor, "*B K"]) -> Float[Tensor, "*B"]:
        """A strength for each row of the guard's K scores; the ceiling where any of them is not a number."""
        if score.shape[-1] != self.n_labels:
            raise InputError(
                f"The policy by categories of guard {self.guard!r} is for {self.n_labels} labels; got "
                f"{score.shape[-1]}. Make it from the guard that is attached."
            )
        strongest = self.by_part(score).amax(-1)
        return torch.where(score.isfinite().all(-1), strongest, self.ceiling)

    def by_part(self, score: Float[Tensor, "*B K"]) -> Float[Tensor, "*B P"]:
        """The strength that each part asks for."""
        return torch.stack([policy.strength(score[..., column]) for column, _, policy in self.parts], -1)


@dataclass(frozen=True, slots=True)
class Timed:
    """When another policy looks, how it lets go, and how long it acts."""

    policy: Policy
    """Gives the strength."""
    reads: Reads
    """What the guard's score is of: the prompt, everything up to each token of the answer, or the riskier of both."""
    margin: float = 0.0
    """Hysteresis: the score that counts, label by label, follows the guard's up at once, and down only beyond this."""
    first_tokens: int | None = None
    """Tokens of the answer that it acts on; all of them unless given."""

    def __post_init__(self) -> None:
        if self.reads not in ("prompt", "answer", "both"):
            raise InputError(f"A policy reads 'prompt', 'answer' or 'both'; got {self.reads!r}.")
        if not 0.0 <= self.margin <= 1.0:
            raise InputError(f"A margin is a difference of scores in [0, 1]; got {self.margin}.")
        if self.margin and (self.reads == "prompt" or self.guard is None):
            raise InputError(
                "A margin does nothing where the score is read once, or no guard is asked. Set reads='answer' or "
                "'both' on a policy with a guard, or leave it out."
            )
        if self.first_tokens is not None and self.first_tokens < 1:
            raise InputError(f"first_tokens counts tokens and starts at 1; got {self.first_tokens}.")

    @property
    def guard(self) -> str | None:
        """That of the policy."""
        return self.policy.guard

    @property
    def latched(self) -> bool:
        """Whether it is decided once, at the prompt's end."""
        return self.guard is not None and self.reads == "prompt"

    @property
    def ceiling(self) -> float:
        """That of the policy."""
        return self.policy.ceiling

    @property
    def counts_from_prompt(self) -> bool:
        """Whether it has to know where the prompt ends."""
        return self.latched or self.first_tokens is not None or (self.guard is not None and self.reads == "both")

    def strength(self, score: Float[Tensor, ...]) -> Float[Tensor, ...]:
        """That of the policy; when it counts is decided in ``safeside.gates``."""
        return self.policy.strength(score)


@dataclass(frozen=True, slots=True)
class Strongest:
    """Several policies at once: at each token the strongest counts, so that a text has to get past all of them.

    A score that is not a number gets the ceiling of the part that asks its guard, and of no other.
    """

    parts: tuple[Policy, ...]
    """Policies of any guards; a single number among them is a floor."""

    def __post_init__(self) -> None:
        if len(self.parts) < 2 or not guards_of(self):
            raise InputError(
                f"The strongest of several policies needs two or more, one of them with a guard; got {self.parts}."
            )
        if any(isinstance(part, Strongest) for part in self.parts):
            raise InputError("One of these policies is the strongest of several already. Give all parts at once.")
        if any(len(row_values(part) or (0.0,)) != 1 for part in self.parts):
            raise InputError("A number among several policies is one for all rows; got one for each row.")

    @property
    def guard(self) -> str:
        """The first guard that is asked; ``guards_of`` names all."""
        return guards_of(self)[0]

    @property
    def latched(self) -> bool:
        """Whether all of it is decided once, at the prompt's end."""
        return all(part.latched for part in self.parts if part.guard is not None)

    @property
    def ceiling(self) -> float:
        """The highest of the parts'."""
        return max(part.ceiling for part in self.parts)

    def strength(self, score: Float[Tensor, ...]) -> Float[Tensor, ...]:
        """Of one score for all parts; in ``safeside.gates`` each part is asked with its own guard's."""
        return reduce(torch.maximum, [part.strength(score) for part in self.parts])


def sigmoid(
    guard: Adapter | str,
    middle: float | None = None,
    width: float = 0.2,
    floor: float = 0.0,
    ceiling: float = 1.0,
    *,
    latched: bool = True,
) -> Sigmoid:
    """Strength that rises from ``floor`` to ``ceiling`` along a logistic curve, half-way at score ``middle``.

    Without ``middle`` it is the guard's threshold for prompts, at the preset chosen.  ``latched`` as in ``step``.  A
    score that is not a number gets ``ceiling``.  What is out of range is an InputError.
    """
    return Sigmoid(name_of(guard), threshold_of(guard) if middle is None else middle, width, floor, ceiling, latched)


def by_category(guard: Adapter, strengths: Mapping[str, object], *, latched: bool = True) -> ByCategory:
    """A strength of its own for each label of ``guard``; labels left out call for none.

    A number is the strength from the label's own threshold for prompts on, at the preset chosen; else a policy of the
    same guard that is asked with the label's score alone.  The highest of what the labels call for counts, and a score
    that is not a number gets the highest there is.  Unknown labels and policies of other guards are an InputError.
    """
    labels, thresholds = guard.config.labels, guard.thresholds_in("prompt")
    unknown = sorted(set(strengths) - set(labels))
    if unknown or not strengths:
        raise InputError(
            f"Guard {guard.name!r} has no label {', '.join(unknown) or '(none was given)'}; expected some of "
            f"{', '.join(labels) or 'none, it is an aligner'}."
        )
    parts: list[tuple[int, str, Policy]] = []
    for label, wanted in strengths.items():
        column = labels.index(label)
        policy = as_policy(wanted)
        if isinstance(policy, Fixed):
            if len(policy.values) != 1:
                raise InputError(f"The strength of label {label!r} is one number, or a policy; got {wanted!r}.")
            policy = step(guard, thresholds[column], high=policy.values[0])
        if isinstance(policy, (ByCategory, Timed, Strongest)) or policy.guard != guard.name:
            raise InputError(
                f"The policy of label {label!r} must be a step, ramp or sigmoid of guard {guard.name!r}; got {policy}."
            )
        parts.append((column, label, policy))
    return ByCategory(guard.name, tuple(parts), len(labels), latched)


def timed(
    strength: object, *, reads: Reads | None = None, margin: float = 0.0, first_tokens: int | None = None
) -> Timed:
    """A policy (or a number) that looks at other texts, lets go late, or acts on the first tokens only.

    ``reads`` is what the guard's score is of: the ``prompt``; the ``answer`` so far, with the prompt before it; or
    ``both``, the riskier of the two.  Unless given it is the policy's own: the prompt where it is latched.  ``margin``
    is a hysteresis for scores that are read again at every token: a gate that has opened closes only once the score has
    fallen by more than the margin below what opened it.  After ``first_tokens`` tokens of the answer the strength is 0.
    """
    policy = as_policy(strength)
    if isinstance(policy, (Timed, Strongest)):
        raise InputError("This policy is timed already, or the strongest of several. Give each part its times at once.")
    if reads is not None and policy.guard is None:
        raise InputError(f"reads={reads!r} does nothing for a strength that asks no guard. Leave it out.")
    return Timed(policy, reads or ("prompt" if policy.latched else "answer"), margin, first_tokens)


def strongest(*strengths: object) -> Strongest:
    """The strongest of several policies at each token: ``strongest(0.3, step(harm), timed(step(hate), reads="both"))``.

    A single number among them is a floor.  Fewer than two, none that asks a guard, and one that is the strongest of
    several already are an InputError.
    """
    return Strongest(tuple(as_policy(strength) for strength in strengths))


def parts_of(policy: Policy) -> tuple[Policy, ...]:
    """The policies that the strongest is taken of; of others the policy itself."""
    return policy.parts if isinstance(policy, Strongest) else (policy,)


def guards_of(policy: Policy) -> tuple[str, ...]:
    """Names of the guards that a policy asks, each once."""
    return tuple(dict.fromkeys(part.guard for part in parts_of(policy) if part.guard is not None))


def check_guards(policies: Mapping[str, Policy], attached: Sequence[str]) -> None:
    """Refuse policies (by aligner) that ask a guard which is not ``attached``."""
    for name, policy in policies.items():
        if missing := [guard for guard in guards_of(policy) if guard not in attached]:
            raise InputError(
                f"The strength of {name!r} asks guard {missing[0]!r}, which is not attached; attached guards: "
                f"{', '.join(attached) or 'none'}. Pass it in attach(guards=[...])."
            )


def follows_answer(policy: Policy) -> bool:
    """Whether ``policy`` asks a guard again at every token."""
    return policy.guard is not None and not policy.latched


def counts_from_prompt(policy: Policy) -> bool:
    """Whether ``policy`` has to know where the prompt ends."""
    if isinstance(policy, Strongest):
        return any(counts_from_prompt(part) for part in policy.parts)
    return policy.counts_from_prompt if isinstance(policy, Timed) else policy.latched


def row_values(policy: Policy) -> tuple[float, ...] | None:
    """The values of a fixed strength, one or one for each row; None where a guard decides."""
    plain = policy.policy if isinstance(policy, Timed) else policy
    return plain.values if isinstance(plain, Fixed) else None


def with_row_values(policy: Policy, values: tuple[float, ...]) -> Policy:
    """A fixed strength with other values."""
    if isinstance(policy, Timed):
        return replace(policy, policy=Fixed(values))
    return Fixed(values)
