"""Rapid patching: a guard learns a new family of unsafe texts from a few dozen examples and keeps its other scores.

Every step sees some of the examples, with their labels, and some replayed rows, with the guard's own old logits as the
target.  The base is not touched.  The thresholds in force, those of each reading mode, are kept, or raised to where no
more harmless ones of the rows measured elsewhere are flagged than before; they are never lowered.
"""

from __future__ import annotations

import math
import random
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score
from torch import Tensor

from safeside.adapters.adapter import Adapter, GuardHead
from safeside.adapters.config import AdapterConfig, Calibration
from safeside.base.model import Base
from safeside.errors import InputError
from safeside.guards.calibrate import threshold_at
from safeside.guards.carry import ScoredTwice, carry_thresholds, in_force
from safeside.tasks.leakage import normalise, text_of
from safeside.train.loop import Progress
from safeside.train.patch_lesson import Lesson, Parts, PatchSettings, Pool, make_pool
from safeside.types import Example, Mode

_HELD_OUT = 0.25  # of the examples, when no rows to measure on are given


@dataclass(frozen=True, slots=True)
class PatchRows:
    """What a patch learns from and is measured on."""

    examples: Sequence[Example]
    """The new family, labelled."""
    replay: Sequence[Example]
    """Rows like those that the guard learnt from, labelled; harmless ones among them."""
    held_out: Sequence[Example] | None = None
    """More of the family, only measured; None takes a quarter of the examples away for it."""
    elsewhere: Sequence[Example] | None = None
    """Rows like ``replay`` that the guard did not learn from, by which its other scores are measured and its thresholds
    kept; None takes half of ``replay`` away for it, and figures on rows that the guard knows flatter it."""


@dataclass(frozen=True, slots=True)
class PatchReport:
    """What a patch did.  Shares are in [0, 1], NaN where there is no such row."""

    parts: Parts
    """The rows that were used, by what they were for."""
    n_unused: int
    """Further rows to replay or measure elsewhere, beyond the settings' limit."""
    n_repeated: int
    """Rows to measure or replay whose text is an example's too, and further copies of rows that are measured or
    replayed: left out."""
    n_windowed: int
    """Rows longer than the base's context, read in windows."""
    seconds: float
    """Wall-clock seconds, the base's pass included."""
    detected: tuple[float, float]
    """Share of the harmful held-out rows that are flagged, before and after."""
    passed: tuple[float, float]
    """Share of the harmless held-out rows that are not, before and after."""
    flagged_elsewhere: tuple[float, float]
    """Share of the labels 0 of the rows elsewhere that are flagged, before and after; the threshold is kept by them."""
    auroc_elsewhere: tuple[float, float]
    """Mean AUROC over labels elsewhere, before and after."""
    threshold: tuple[tuple[float, ...], tuple[float, ...]]
    """The guard's own thresholds before and after."""
    held: Mapping[Mode, tuple[tuple[float, ...], tuple[float, ...]]]
    """Thresholds before and after of the reading modes that have others than the guard's own."""
    dropped: tuple[Mode, ...] = ()
    """Reading modes whose promises, presets and probabilities were of the old scores, and are gone."""

    @property
    def elsewhere_change(self) -> float:
        """AUROC after less AUROC before, elsewhere."""
        return self.auroc_elsewhere[1] - self.auroc_elsewhere[0]


@dataclass(frozen=True, slots=True)
class _State:
    """A guard's scores (n, K) on all rows of a pool, and the thresholds (n, K) that judge them, at one time."""

    scores: NDArray[np.float64]
    thresholds: NDArray[np.float64]


def patch_guard(
    base: Base,
    guard: Adapter,
    rows: PatchRows,
    settings: PatchSettings | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    report: Callable[[Progress], None] = lambda progress: None,
) -> PatchReport:
    """Teach ``guard`` the examples in place; it ends in float32, rounded to ``dtype``, as it is to be stored.

    An aligner, rows without text or that cannot be encoded, rows replayed or elsewhere without a harmless one, and
    examples and rows replayed that are all of one class are an InputError.
    """
    settings = settings or PatchSettings()
    started, old = time.perf_counter(), guard.with_preset(guard.config.preset)
    parts, n_unused, n_repeated = _parted(guard, rows, settings)
    with tempfile.TemporaryDirectory() as folder:
        pool = make_pool(base, guard, parts, Path(folder))
        lesson = Lesson(base, guard.float(), pool, settings)
        lesson.learn(report)
        guard.to(dtype).float().eval().requires_grad_(False)
        scores = _calibrated(guard, lesson.row_logits(range(len(pool.of_row))))
    before = _State(_calibrated(guard, lesson.targets), in_force(old, pool.modes))
    harmless = [row for row in pool.elsewhere if is_harmless(pool.labels[row].tolist())]
    rows_of = [pool.modes[row] for row in harmless]
    calibration = old.config.calibration or Calibration(
        scale=(1.0,) * len(old.thresholds), bias=(0.0,) * len(old.thresholds), threshold=old.thresholds
    )
    carry_thresholds(guard, old, calibration, ScoredTwice(before.scores[harmless], scores[harmless], rows_of), _raised)
    both = before, _State(scores, in_force(guard, pool.modes))
    return PatchReport(
        parts=parts,
        n_unused=n_unused,
        n_repeated=n_repeated,
        n_windowed=sum(len(some) > 1 for some in pool.of_row),
        seconds=time.perf_counter() - started,
        detected=_pair(both, lambda state: _flagged(state, pool, pool.held_out, 1)),
        passed=_pair(both, lambda state: 1 - _flagged(state, pool, pool.held_out, 0)),
        flagged_elsewhere=_pair(both, lambda state: _flagged(state, pool, pool.elsewhere, 0)),
        auroc_elsewhere=_pair(both, lambda state: _auroc(state, pool)),
        threshold=(old.thresholds, guard.thresholds),
        held={mode: (old.thresholds_in(mode), found.held) for mode, found in guard.config.modes.items()},
        dropped=tuple(old.config.modes),
    )


def require_guard(config: AdapterConfig) -> None:
    """An InputError unless the configuration is a guard's."""
    if config.role != "guard":
        raise InputError(f"{config.name!r} is an aligner; only guards are patched. Train it on more answers instead.")


def _parted(guard: Adapter, rows: PatchRows, settings: PatchSettings) -> tuple[Parts, int, int]:
    """The rows by what they are for, how many were too many, and how many have a text that others have.

    Only the same text counts as one: prompts of a family often share all words but those that say what they are after.
    """
    require_guard(guard.config)
    generator = random.Random(settings.seed)
    examples, held_out = list(rows.examples), rows.held_out
    _refuse_contradictions([*examples, *(held_out or ())])
    if held_out is None:
        generator.shuffle(examples)
        examples, held_out = _split(examples)
    if not examples:
        raise InputError("There is no example to learn from; expected 16 to 64 labelled rows of the new family.")
    known = {text_of(example) for example in examples}
    given = [held_out, rows.replay, rows.elsewhere or ()]
    held_out = [row for row in held_out if text_of(row) not in known]
    known |= {text_of(row) for row in held_out}
    replay, elsewhere = (_fresh(some, known) for some in given[1:])
    n_repeated = sum(map(len, given)) - len(held_out) - len(replay) - len(elsewhere)
    generator.shuffle(replay)
    if rows.elsewhere is None:
        most = min(len(replay), 2 * settings.replay_limit)
        used = replay[: most // 2], replay[most // 2 : most]
    else:
        generator.shuffle(elsewhere)
        used = replay[: settings.replay_limit], elsewhere[: settings.replay_limit]
    n_unused = len(replay) + len(elsewhere) - sum(map(len, used))
    parts = Parts(examples, held_out, *used)
    _require_kinds(parts)
    return parts, n_unused, n_repeated


def _refuse_contradictions(family: Sequence[Example]) -> None:
    """An InputError where two rows of the family say the same and are labelled differently.

    Rows to replay may say otherwise: a patch can teach that a text was labelled wrongly, and they are left out.
    """
    known: dict[tuple[tuple[str, str], ...], Example] = {}
    for row in family:
        first = known.setdefault(tuple((message.role, normalise(message.content)) for message in row.messages), row)
        if any(abs(one - other) > 0 for one, other in zip(first.labels, row.labels, strict=True)):  # never of NaN
            raise InputError(
                f"The rows in lines {first.line} and {row.line} of their files have the same text, case and white "
                "space apart, and other labels; expected one label for each text. Take one away."
            )


def _fresh(rows: Sequence[Example], known: set[str]) -> list[Example]:
    """The rows whose text is not ``known``, each text once; they are known from then on."""
    fresh = []
    for row in rows:
        text = text_of(row)
        if text not in known:
            known.add(text)
            fresh.append(row)
    return fresh


def _require_kinds(parts: Parts) -> None:
    """An InputError unless thresholds can be kept and both kinds are learnt from."""
    for rows, name in ((parts.replayed, "replayed"), (parts.elsewhere, "measured elsewhere")):
        if not any(is_harmless(row.labels) for row in rows):
            raise InputError(
                f"The {len(rows)} rows that are {name} hold no harmless one (label 0) to keep the threshold by. Give "
                "rows like those that the guard learnt from with --replay."
            )
    if len({1.0 in row.labels for row in (*parts.examples, *parts.replayed)}) < 2:
        raise InputError(
            "Examples and replay rows are all harmless; a guard learns from both kinds. Add harmful rows (label 1) to "
            "either file."
        )


def is_harmless(labels: Sequence[float]) -> bool:
    """Whether every label is known to be 0."""
    return all(label == 0 for label in labels)


def _split(examples: Sequence[Example]) -> tuple[list[Example], list[Example]]:
    """Three quarters and one quarter, in each class; of a class of fewer than four nothing is taken away."""
    kept: list[Example] = []
    taken: list[Example] = []
    for harmful in (True, False):
        some = [row for row in examples if (1.0 in row.labels) == harmful]
        n_taken = int(len(some) * _HELD_OUT)
        taken += some[:n_taken]
        kept += some[n_taken:]
    return kept, taken


def _calibrated(guard: Adapter, logits: Tensor) -> NDArray[np.float64]:
    """Scores as the guard's head computes them: in float32."""
    assert isinstance(guard.head, GuardHead)
    scale, bias = guard.head.scale.cpu(), guard.head.bias.cpu()
    return np.asarray(torch.sigmoid(scale * logits + bias).double())


def _raised(threshold: float, before: NDArray[np.float64], after: NDArray[np.float64]) -> float:
    """The threshold, or where more of these harmless rows are flagged than before the lowest at which they are not."""
    allowed, flagged = float((before >= threshold).mean()), float((after >= threshold).mean())
    return threshold_at(after, allowed) if flagged > allowed else threshold


def _pair(states: tuple[_State, _State], figure: Callable[[_State], float]) -> tuple[float, float]:
    before, after = states
    return figure(before), figure(after)


def _flagged(state: _State, pool: Pool, rows: range, label: int) -> float:
    """Share of the labels with value ``label`` (0 or 1) in ``rows`` that are flagged; NaN if there is none."""
    chosen = pool.labels[list(rows)] == label
    flagged = state.scores[list(rows)] >= state.thresholds[list(rows)]
    return float(flagged[chosen].mean()) if chosen.any() else math.nan


def _auroc(state: _State, pool: Pool) -> float:
    """Mean AUROC over the labels that have both classes; NaN if none has."""
    rows = list(pool.elsewhere)
    values = []
    for label, score in zip(pool.labels[rows].T, state.scores[rows].T, strict=True):
        known = ~np.isnan(label)
        if len(set(label[known].tolist())) == 2:
            values.append(roc_auc_score(label[known], score[known]))
    return float(np.mean(values)) if values else math.nan
