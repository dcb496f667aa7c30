"""Frozen records that travel through the package, and the legend of tensor shapes.

Shapes: ``B`` batch, ``T`` new tokens, ``S`` cached plus new tokens, ``D`` width of the base, ``d`` width of the side
network, ``V`` vocabulary, ``K`` labels, ``L`` layers.  Masks are bool and ``True`` means keep.  A score is in [0, 1]
and higher is riskier, everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

Role = Literal["system", "user", "assistant"]
Mode = Literal["prompt", "answer", "stream", "windowed"]
"""How a guard read a text: to the end of a user's message, to the end of an answer, token by token while an answer is
written, or in several windows."""
Preset = Literal["strict", "balanced", "permissive"]
"""Thresholds with a promised false-positive rate under each label: 5%, 1% and 0.1%."""
Combine = Literal["max", "min"]
"""Which of the scores of a long text's windows counts."""
FinishReason = Literal["stop", "length", "guard", "blocked"]
MAX_STRENGTH = 2.0
"""The highest strength of an aligner: beyond 1 the mix extrapolates, and farther than this texts fall apart."""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: Role
    """Who speaks: system, user or assistant."""
    content: str
    """What is said.  It is always encoded as plain text: it can spell a control token, but never become one."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one guard says of one text.  A guard that could not score fails closed: ``flagged`` with the reason."""

    task: str
    """Name of the guard."""
    score: float
    """Risk in [0, 1], higher is riskier; NaN when the guard could not score."""
    threshold: float
    """The score in [0, 1] from which on the label flags."""
    label: str
    """The label that decided: of several the one farthest over, or nearest to, its threshold."""
    flagged: bool
    """Whether the score reaches the threshold, or could not be computed."""
    mode: Mode = "prompt"
    """How the text was read; thresholds and probabilities belong to a mode."""
    probability: float = math.nan
    """Calibrated probability of harm in this mode; the score itself where the mode has no calibration of its own."""
    reason: str = ""
    """What to know about the score, ``"; "`` between notes; empty when there is nothing."""


@dataclass(frozen=True, slots=True)
class Stop:
    """Where a guard ended an answer while it was written (see ``safeside.stopping``)."""

    guard: str
    """Name of the guard."""
    token: int
    """Index, from 0, of the answer's token at which its rule was met."""
    n_kept: int
    """Tokens of the answer before those that met the rule: the ones of ``Completion.text``."""
    score: float
    """The lowest score of the tokens that met the rule; NaN when one could not be scored."""
    threshold: float = math.nan
    """The rule's."""


@dataclass(frozen=True, slots=True)
class StrengthTrace:
    """What set the strength of one aligner, token by token of an answer."""

    aligner: str
    """Name of the aligner."""
    strengths: tuple[float, ...]
    """The strength in [0, 2] behind each token."""
    guard: str | None = None
    """Name of the guard whose scores were read, of several with `` + `` between; None where no guard was asked."""
    scores: tuple[float, ...] = ()
    """The guard's score in [0, 1] that counted for each token, before any hysteresis; NaN when it could not score."""
    labels: tuple[str, ...] = ()
    """The guard's label that this score belongs to; of several guards ``guard/label``."""

    def first(self, n_tokens: int) -> StrengthTrace:
        """The trace of the first tokens."""
        return replace(
            self, strengths=self.strengths[:n_tokens], scores=self.scores[:n_tokens], labels=self.labels[:n_tokens]
        )


@dataclass(frozen=True, slots=True)
class Completion:
    """One answer, and what guards and aligners did to it."""

    text: str
    """The answer without special tokens and outer white space; what a guard stopped or blocked is not in it."""
    verdicts: tuple[Verdict, ...]
    """Every guard on the prompt, then every guard on the answer."""
    strength: Mapping[str, tuple[float, ...]]
    """By aligner, the strength in [0, 2] behind each token of the answer."""
    n_prompt_tokens: int
    """Tokens of the rendered conversation, template included."""
    n_new_tokens: int
    """Tokens of ``text``, the stop token not counted."""
    finish_reason: FinishReason
    """``stop``: the model ended its answer; ``length``: ``max_new_tokens`` did; ``guard``: a guard did, see ``stop``;
    ``blocked``: the intercepting guard flagged the prompt, and there is no answer."""
    stop: Stop | None = None
    """Which guard ended the answer, and where; None when none did."""
    traces: tuple[StrengthTrace, ...] = ()
    """Of every aligner: which guard set its strength, by which score, at each token of the answer."""


@dataclass(frozen=True, slots=True)
class Example:
    """One row to train or measure on: a conversation and its labels."""

    messages: tuple[Message, ...]
    """The conversation; it ends with the message that is judged or learnt."""
    labels: tuple[float, ...] = ()
    """K values, 0 or 1, in the order of the guard's labels, NaN where unknown; empty for an aligner's rows."""
    soft: tuple[float, ...] | None = None
    """K scores in [0, 1] of a bigger guard, for distillation."""
    line: int = 0
    """Line number in its file, from 1; 0 when it comes from none."""
    rejected: Message | None = None
    """Of a preference: the worse answer, in place of the last message."""


@dataclass(frozen=True, slots=True)
class Result:
    """One figure of one benchmark, with its 95% interval and what was left out."""

    benchmark: str
    """Name of the suite or benchmark."""
    metric: str
    """What was measured, such as ``refusal_rate_harmful``."""
    value: float
    """The figure."""
    low: float
    """Lower end of its 95% interval."""
    high: float
    """Upper end of its 95% interval."""
    n: int
    """Rows behind the figure."""
    n_unscored: int = 0
    """Rows that could not be scored; they are not in ``n``."""
    provenance: Mapping[str, str] = field(default_factory=dict)
    """The setting that the figure belongs to, such as ``strength``."""
