"""What a policy file may say: rules for guards, and what they do when a guard flags."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from safeside.types import MAX_STRENGTH, Preset

Action = Literal["allow", "annotate", "steer", "replace", "block"]
"""What is done with a text, the mildest first.  ``annotate``: the answer is sent with the verdict marked."""
PolicyMode = Literal["enforce", "shadow"]
"""``shadow`` scores and tells what it would have done, and does nothing."""
OnError = Literal["annotate", "steer", "block"]
"""What is done when a guard cannot score.  There is no ``allow``: it is never passed over."""
DEFAULT_ON_ERROR: OnError = "block"
DEFAULT_HOLD_BACK = 8
"""Tokens."""
Stage = Literal["prompt", "answer"]

SEVERITY: dict[Action, int] = {"allow": 0, "annotate": 1, "steer": 2, "replace": 3, "block": 4}
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]
Label = Annotated[str, StringConstraints(min_length=1, max_length=64)]
Score = Annotated[float, Field(ge=0.0, le=1.0, allow_inf_nan=False)]
Strength = Annotated[float, Field(ge=0.0, le=MAX_STRENGTH, allow_inf_nan=False)]


class _Rule(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    guard: Name
    """Name of the guard that is asked."""
    labels: tuple[Label, ...] = ()
    """The guard's labels that count; all of them unless given."""
    mode: PolicyMode | None = None
    """Whether this rule acts; as the policy says unless given."""


class FlagRule(_Rule):
    """Does one thing with a text that a guard flags."""

    action: Literal["allow", "annotate", "replace", "block"]
    """What is done; ``allow`` only records."""
    preset: Preset | None = None
    """Thresholds by the false-positive rate that the guard promises for each of its labels."""
    threshold: Score | None = None
    """Score in [0, 1] from which on a text is flagged.  With neither, the guard's own thresholds hold."""
    n_consecutive: Annotated[int, Field(ge=1, le=64)] | None = None
    """Of an answer that is being written: risky tokens in a row that end it, or that a rule which ends none marks.

    Unless given, as many as the guard's promise for streams counts on; 1 with a ``threshold``, or without a promise.
    """
    text: Annotated[str, StringConstraints(min_length=1, max_length=4000)] | None = None
    """What is sent in place of the answer; for ``replace``."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.preset is not None and self.threshold is not None:
            raise ValueError("a rule has a preset or a threshold, not both")
        if (self.action == "replace") != (self.text is not None):
            raise ValueError("'replace' needs a text to send instead, and only 'replace' has one")
        return self


class SteerRule(_Rule):
    """Sets an aligner's strength by a guard's score: a ramp from ``low`` to ``high``, or a step at the threshold."""

    action: Literal["steer"]
    """Always ``steer``."""
    aligner: Name | None = None
    """The aligner that is set; every one unless given."""
    preset: Preset | None = None
    """For a step: the false-positive rate whose thresholds count; the guard's own unless given."""
    low: Score | None = None
    """Score up to which the strength is ``floor``; without it and ``high`` a step at the guard's threshold."""
    high: Score | None = None
    """Score from which it is ``ceiling``, linear between; equal to ``low`` for a step."""
    floor: Strength = 0.0
    """Strength in [0, 2] of what the guard finds harmless."""
    ceiling: Strength = 1.0
    """Strength in [0, 2] of what it flags, and where it cannot score."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.low is None) != (self.high is None):
            raise ValueError("a ramp needs both low and high; a step at the guard's threshold neither")
        if self.low is not None and self.high is not None and self.low > self.high:
            raise ValueError(f"low {self.low} must not be above high {self.high}")
        if self.low is not None and self.preset is not None:
            raise ValueError("a steer rule has low and high or a preset, not both")
        if self.floor > self.ceiling:
            raise ValueError(f"floor {self.floor} must not be above ceiling {self.ceiling}")
        return self


Rule = Annotated[FlagRule | SteerRule, Field(discriminator="action")]


class Policy(BaseModel):
    """One named policy.  What is left out has no opinion, and other policies that hold at the same time decide."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    description: str = ""
    """For people."""
    prompt: tuple[Rule, ...] = ()
    """Rules on the prompt."""
    answer: tuple[Rule, ...] = ()
    """Rules on the answer, also while it is written."""
    floor: Strength = 0.0
    """The least strength of every aligner."""
    ceiling: Strength | None = None
    """The highest strength that a request may ask for; 2 unless given."""
    mode: PolicyMode = "enforce"
    """Whether the rules act that do not say so themselves."""
    on_error: OnError | None = None
    """What is done when a guard cannot score; ``block`` unless given."""
    hold_back: Annotated[int, Field(ge=0, le=4096)] | None = None
    """Tokens of a stream that are held back until they are judged; 0 sends at once.  8 unless given."""
    audit_text: bool | None = None
    """Whether the audit log keeps texts, and not only their keyed hash; no unless given."""
    genes: tuple[Name, ...] = ()
    """Genes that have to be loaded."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        for rule in self.answer:
            if isinstance(rule, FlagRule) and rule.labels and rule.action in ("replace", "block"):
                raise ValueError("an answer is ended by its guard's highest label; leave labels out of answer rules")
        top = MAX_STRENGTH if self.ceiling is None else self.ceiling
        if self.highest_asked > top:
            raise ValueError(f"ceiling {top:g} is below a floor or a steer rule's ceiling of {self.highest_asked:g}")
        return self

    @property
    def highest_asked(self) -> float:
        """The highest strength that its floor or a steer rule asks for."""
        rules = (*self.prompt, *self.answer)
        return max([self.floor, *(rule.ceiling for rule in rules if isinstance(rule, SteerRule))])
