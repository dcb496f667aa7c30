"""What holds for one request, and what it decides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from safeside import mixing
from safeside.serve.rules import Action, OnError
from safeside.stopping import StopRule
from safeside.types import Mode, Verdict


@dataclass(frozen=True, slots=True)
class Decision:
    """What is done with one prompt or answer."""

    action: Action
    """What is done."""
    reason: str = ""
    """Which guard at which score, or why it could not score; none of the user's words."""
    strength: float = 0.0
    """The highest strength in [0, 2] that the steer rules ask for."""
    intended: Action = "allow"
    """What would be done if every rule acted: more than ``action`` only in shadow mode."""
    guard: str = ""
    """Name of the guard that decided; empty for ``allow``."""
    text: str = ""
    """What is sent instead; for ``replace``."""


@dataclass(frozen=True, slots=True)
class EffectivePolicy:
    """What holds for one request."""

    name: str
    """Names of the policies that hold, joined by ``+``."""
    version: str
    """The book's."""
    guards: tuple[str, ...]
    """Guards that have to judge: those of any rule, sorted."""
    is_shadow: bool
    """Whether no rule acts."""
    hold_back: int
    """Tokens of a stream that are held back; 0 sends at once."""
    on_error: OnError
    """What is done when a guard cannot score."""
    audit_text: bool
    """Whether the audit log keeps texts."""
    genes: tuple[str, ...]
    """Genes that have to be loaded."""

    def verdicts(self, guard: str, scores: Sequence[float], mode: Mode) -> tuple[Verdict, ...]:
        """One verdict for each label of a guard's scores, at the lowest threshold of the rules for this stage.

        ``scores`` are its K calibrated scores at one token; a guard that failed or timed out has NaN for each.
        """
        raise NotImplementedError

    def decide_prompt(self, verdicts: Sequence[Verdict]) -> Decision:
        """What is done with a prompt; a guard of a rule without a verdict counts as one that cannot score."""
        raise NotImplementedError

    def decide_answer(self, verdicts: Sequence[Verdict]) -> Decision:
        """The same for an answer, or for what is there of it."""
        raise NotImplementedError

    def strengths(self) -> dict[str, mixing.Policy]:
        """By aligner, what sets its strength; ready for ``attachment.request(strength=...)``."""
        raise NotImplementedError

    def stop_rules(self) -> dict[str, StopRule]:
        """By guard, when it ends an answer that is being written: of the rules that block or replace, and act."""
        raise NotImplementedError
