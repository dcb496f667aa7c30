"""Calibration of how a guard judges texts longer than the base's context: by one score of their windows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from safeside.adapters.adapter import Adapter
from safeside.base.model import Base
from safeside.guards.calibrate import counted_once, fit_mode
from safeside.guards.score import score_conversations
from safeside.tasks.leakage import text_of
from safeside.terminal import note, progress_bar
from safeside.types import Example

__all__ = ["calibrate_windows"]


def calibrate_windows(
    base: Base, guard: Adapter, rows: Sequence[Example], benign: Sequence[Example] = (), *, batch_size: int = 32
) -> None:
    """Keep the calibration of mode ``windowed`` in ``guard``, by labelled ``rows`` beyond the base's context.

    The promises rest on the ``benign`` rows if there are any, which are beyond it too.  A preset that so few cannot
    promise is left out, and where they are too few for anything nothing is kept.  A row that cannot be cut has score 1,
    for it is flagged.  The calibration error "before" is that of the guard's scores, which were fitted to rows that
    fit the context.  ``batch_size`` windows are read at once.
    """
    if not rows and not benign:
        return
    texts = [row.messages for row in (*rows, *benign)]
    note(f"{len(texts):,} rows are longer than the base's context: read in windows, for their calibration")
    with progress_bar("read long texts", len(texts)) as advance:
        found = score_conversations(base, [guard], texts, batch_size=batch_size, advance=advance)
    scores = np.array([row.by_guard[guard.name] for row in found], dtype=np.float64)
    labels = np.array([row.labels for row in rows], dtype=np.float64).reshape(-1, scores.shape[1])
    own, clean = scores[: len(rows)], np.where(np.isnan(scores), 1.0, scores)[len(rows) :]
    once = counted_once(clean, [text_of(row) for row in benign]) if benign else None
    fit = fit_mode(own, labels, texts=[text_of(row) for row in rows], benign=once)
    if fit.presets or fit.maps:
        guard.set_mode("windowed", fit)
