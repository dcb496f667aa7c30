"""Thresholds that a changed guard goes on with: those that judged before, reading mode by reading mode.

A patch or a port changes every score, so what was promised of the old ones no longer holds.  The thresholds in force
are carried over on rows that were scored before and after; what they promised is dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from safeside.adapters.adapter import Adapter
from safeside.adapters.config import Calibration, ModeCalibration
from safeside.guards.probability import Array
from safeside.types import Mode

Choose = Callable[[float, Array, Array], float]
"""The new threshold, from the old one and the scores of some rows before and after."""


@dataclass(frozen=True, slots=True)
class ScoredTwice:
    """Rows by the old guard and by the new one."""

    before: Array
    """Scores (n, K) in [0, 1]."""
    after: Array
    """Scores (n, K) in [0, 1] of the same rows."""
    modes: Sequence[Mode]
    """How each row is read."""

    def of(self, modes: Sequence[Mode]) -> NDArray[np.bool_]:
        """(n,) the rows read in one of ``modes``; all rows where none is."""
        own = np.array([mode in modes for mode in self.modes], dtype=bool)
        return own if own.any() else np.ones_like(own)


def in_force(guard: Adapter, modes: Sequence[Mode]) -> Array:
    """The thresholds (n, K) that judge rows read in these modes, at the guard's preset."""
    return np.array([guard.thresholds_in(mode) for mode in modes], dtype=np.float64).reshape(len(modes), -1)


def carry_thresholds(guard: Adapter, old: Adapter, calibration: Calibration, rows: ScoredTwice, choose: Choose) -> None:
    """Give ``guard`` the ``calibration`` with thresholds chosen anew: its own, and those of each mode that had others
    or a promise in force.

    A threshold is chosen on the rows that it judges, or on all of them where it judges none.  Promises, presets, maps
    to probabilities, stop rules and the rate of its own threshold are dropped: they were of other scores.
    """
    others = [
        mode
        for mode, found in old.config.modes.items()
        if mode != "stream" and (found.of_preset(old.config.preset) or old.thresholds_in(mode) != old.thresholds)
    ]

    def chosen(thresholds: Sequence[float], some: NDArray[np.bool_]) -> tuple[float, ...]:
        columns = zip(thresholds, rows.before[some].T, rows.after[some].T, strict=True)
        return tuple(choose(*column) for column in columns)

    own = rows.of([mode for mode in ("prompt", "answer", "windowed") if mode not in others])
    held = {mode: chosen(old.thresholds_in(mode), rows.of([mode])) for mode in others}
    carried = {"threshold": chosen(old.thresholds, own), "false_positive_rate": None}
    guard.set_calibration(calibration.model_copy(update=carried))
    for mode, thresholds in held.items():
        guard.set_mode(mode, ModeCalibration(n_harmless=0, held=thresholds))
