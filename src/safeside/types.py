"""Frozen records that travel through the package, and the legend of tensor shapes.

Shapes: ``B`` batch, ``T`` new tokens, ``S`` cached plus new tokens, ``D`` width of the base, ``d`` width of the side
network, ``V`` vocabulary, ``K`` labels, ``L`` layers.  Masks are bool and ``True`` means keep.  A score is in [0, 1]
and higher is riskier, everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: Role
    content: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one guard says of one text.  A guard that could not score fails closed: ``flagged`` with the reason."""

    task: str
    score: float
    threshold: float
    label: str
    flagged: bool
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Completion:
    """One answer: its text, the guards' verdicts on prompt and answer, and the strength of every aligner by token."""

    text: str
    verdicts: tuple[Verdict, ...]
    strength: Mapping[str, tuple[float, ...]]
    n_prompt_tokens: int
    n_new_tokens: int
    finish_reason: Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Example:
    """One row to train or measure on: a conversation and its labels (K values in [0, 1])."""

    messages: tuple[Message, ...]
    labels: tuple[float, ...] = ()
    soft: tuple[float, ...] | None = None
    line: int = 0


@dataclass(frozen=True, slots=True)
class Result:
    """One figure of one benchmark, with its 95% interval and what was left out."""

    benchmark: str
    metric: str
    value: float
    low: float
    high: float
    n: int
    n_unscored: int = 0
    provenance: Mapping[str, str] = field(default_factory=dict)
