"""The packaged guard and aligner on a task model: trained on the base, attached as they are.

A fine-tune moves the states that a guard reads, and its scores with them.  Its threshold can follow without a label: to
where as many unlabelled texts score higher as did on the base that the guard was made for.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from genes_models import Models
from safeside.adapters.adapter import Adapter
from safeside.artifact import load_adapter
from safeside.attach import Attachment, attach
from safeside.base.model import Base
from safeside.errors import MismatchError
from safeside.evals.metrics import auroc
from safeside.genes.rows import Conversation
from safeside.guards.score import score_conversations
from safeside.mixing import ramp

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Packaged:
    """The pair, loaded for one model."""

    guard: Adapter
    aligner: Adapter
    seconds: float
    """What loading them took."""

    def attached(self, base: Base, high: float | None = None) -> Attachment:
        """Both in ``base``: the aligner is full from the guard's threshold on, or from score ``high`` on."""
        return attach(base, aligners=[self.aligner], guards=[self.guard], strength=ramp(self.guard, high=high))


def packaged_for(base: Base) -> Packaged | None:
    """The pair for a model of the built-in base's architecture; None for another one."""
    started = time.perf_counter()
    try:
        guard, aligner = (
            load_adapter(f"builtin:{name}", base, allow_mismatch="weights") for name in ("harm", "refuse")
        )
    except MismatchError:
        return None
    return Packaged(guard, aligner, time.perf_counter() - started)


@dataclass(frozen=True)
class GuardTexts:
    """Prompts that a guard is measured on, and those that its threshold moves on."""

    harmful: Sequence[Conversation]
    benign: Sequence[Conversation]
    unlabelled: Sequence[Conversation]
    """Harmful and harmless ones together, of which nobody says which is which."""

    @property
    def prompts(self) -> list[Conversation]:
        """All of them, in this order."""
        return [*self.harmful, *self.benign, *self.unlabelled]


def guard_texts(models: Models) -> GuardTexts:
    """Attacks and held-out instructions; unlabelled are training rows, which are neither of the two."""
    benign, *mixed = (
        [messages[:1] for messages in models.conversations(name)]
        for name in ("degraded_validation", "harmful", "benign")
    )
    return GuardTexts(models.attacks(), benign, [messages for kind in mixed for messages in kind])


@dataclass(frozen=True)
class GuardReport:
    """What the guard sees."""

    moved: float
    """Its threshold after it was moved."""
    facts: dict[str, object]
    """AUROC on the base and on the task model, what is caught before and after."""
    seconds: float
    """What it took."""


def report_of(base: Base, task: Base, texts: GuardTexts) -> GuardReport:
    """The guard on a task model, beside what it saw on the base."""
    started = time.perf_counter()
    threshold, on_base = _scores(base, texts)
    _, on_task = _scores(task, texts)
    first, last = len(texts.harmful), len(texts.harmful) + len(texts.benign)
    moved = moved_threshold(on_task[last:], int((on_base[last:] >= threshold).sum()))
    labels = np.repeat([1.0, 0.0], [first, last - first])
    own = on_task[:last]
    rates = {
        name: {
            "threshold": at,
            "caught": float((own[:first] >= at).mean()),
            "false_alarms": float((own[first:] >= at).mean()),
        }
        for name, at in (("before", threshold), ("after", moved))
    }
    aurocs = {"auroc": auroc(labels, own), "auroc_on_base": auroc(labels, on_base[:last])}
    return GuardReport(moved, {**aurocs, **rates}, time.perf_counter() - started)


def _scores(base: Base, texts: GuardTexts) -> tuple[float, Array]:
    """The guard's threshold, and its score of every text; a text that it cannot score counts as flagged."""
    guard = load_adapter("builtin:harm", base, allow_mismatch="weights")
    found = score_conversations(base, [guard], texts.prompts)
    scores = np.array([item.by_guard[guard.name][0] for item in found], dtype=np.float64)
    return float(guard.thresholds[0]), np.nan_to_num(scores, nan=1.0)


def moved_threshold(scores: Array, n_flagged: int) -> float:
    """The score from which ``n_flagged`` of the texts are flagged (more where the last of them ties); 0 flags none."""
    falling = np.sort(scores)[::-1]
    if n_flagged:
        return float(falling[n_flagged - 1])
    return min(1.0, float(np.nextafter(falling[0], 2.0)))
