"""Calibration of how a guard judges texts longer than the base's context: by one score of their windows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from safeside.adapters.adapter import Adapter
from safeside.base.model import Base
from safeside.guards.calibrate import counted_once, fit_mode
from safeside.guards.score import score_conversations
from safeside.tasks.leakage import text_of
from safeside.terminal import note
from safeside.types import Example

__all__ = ["calibrate_windows"]


def calibrate_windows(base: Base, guard: Adapter, rows: Sequence[Example], benign: Sequence[Example] = ()) -> None:
    """Keep the calibration of mode ``windowed`` in ``guard``, by labelled ``rows`` beyond the base's context.

    The promises rest on the ``benign`` rows if there are any, which are beyond it too.  Without a row nothing is kept,
    and a preset that so few cannot promise is left out.  A row that cannot be cut has score 1, for it is flagged.  The
    calibration error "before" is that of the guard's scores, which were fitted to rows that fit the context.
    """
    if not rows and not benign:
        return
    note(f"{len(rows) + len(benign):,} rows are longer than the base's context: read in windows, for their calibration")
    found = score_conversations(base, [guard], [row.messages for row in (*rows, *benign)])
    scores = np.array([row.by_guard[guard.name] for row in found], dtype=np.float64)
    labels = np.array([row.labels for row in rows], dtype=np.float64).reshape(-1, scores.shape[1])
    own, clean = np.where(np.isnan(scores), 1.0, scores)[: len(rows)], scores[len(rows) :]
    once = counted_once(clean, [text_of(row) for row in benign]) if benign else None
    guard.set_mode("windowed", fit_mode(own, labels, texts=[text_of(row) for row in rows], benign=once))
