"""Rapid patching: a guard learns a new family of unsafe texts from a few dozen examples and keeps its other scores.

Every step sees some of the examples, with their labels, and some replayed rows, with the guard's own old logits as the
target.  The base is not touched.  The thresholds in force, those of each reading mode, are kept, or raised to where no
more harmless replay rows are flagged than before; they are never lowered.
"""

from __future__ import annotations

import math
import random
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
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
from safeside.guards.score import place_of
from safeside.guards.windows import Combine, windows
from safeside.train.loop import Loop, Progress
from safeside.train.losses import guard_loss
from safeside.train.recipe import TrainingSection
from safeside.train.taps import Source, StoredTaps, TapStore, make_batch
from safeside.types import Example, Mode

_ROUNDS = 4  # evaluations of the loop; the best one's weights are kept
_CHUNK = 64  # rows of one pass without gradients
_GROUP = 8  # windows of one batch
_LEAST_SPREAD = 1e-3  # of old logits, so that a constant guard divides by something
_HELD_OUT = 0.25  # of the examples, when no rows to measure on are given


@dataclass(frozen=True, slots=True)
class PatchSettings:
    """How to patch."""

    steps: int = 60
    """Optimiser steps in all."""
    learning_rate: float = 1e-3
    """Peak of AdamW's rate."""
    batch_size: int = 8
    """Examples of one step."""
    replay_size: int = 24
    """Replayed rows of one step."""
    replay_weight: float = 1.0
    """Weight of the squared change of replayed logits, in units of their old spread."""
    pull: float = 0.0
    """Weight of the squared distance to the old weights."""
    replay_limit: int = 600
    """Most replay rows: one half is replayed, the other measures and sets the threshold."""
    seed: int = 0
    """Of every draw."""


@dataclass(frozen=True, slots=True)
class PatchRows:
    """What a patch learns from and is measured on."""

    examples: Sequence[Example]
    """The new family, labelled."""
    replay: Sequence[Example]
    """Rows like those that the guard learnt from, labelled; harmless ones among them."""
    held_out: Sequence[Example] | None = None
    """More of the family, only measured; None takes a quarter of the examples away for it."""


@dataclass(frozen=True, slots=True)
class PatchReport:
    """What a patch did.  Shares are in [0, 1], NaN where there is no such row."""

    n_examples: int
    """Examples learnt from."""
    n_held_out: int
    """Examples measured on."""
    n_replay: int
    """Replay rows, both halves."""
    n_windowed: int
    """Rows longer than the base's context, read in windows."""
    seconds: float
    """Wall-clock seconds, the base's pass included."""
    detected: tuple[float, float]
    """Share of the harmful held-out rows that are flagged, before and after."""
    passed: tuple[float, float]
    """Share of the harmless held-out rows that are not, before and after."""
    flagged_elsewhere: tuple[float, float]
    """Share of the harmless replay rows (measuring half) that are flagged, before and after."""
    auroc_elsewhere: tuple[float, float]
    """Mean AUROC over labels on that half, before and after."""
    threshold: tuple[tuple[float, ...], tuple[float, ...]]
    """The guard's own thresholds before and after."""
    held: Mapping[Mode, tuple[tuple[float, ...], tuple[float, ...]]]
    """Thresholds before and after of the reading modes that have others than the guard's own."""
    dropped: tuple[Mode, ...] = ()
    """Reading modes whose promises, presets and probabilities were of the old scores, and are gone."""

    @property
    def elsewhere_change(self) -> float:
        """AUROC after less AUROC before, on replay rows that were not replayed."""
        return self.auroc_elsewhere[1] - self.auroc_elsewhere[0]


@dataclass(frozen=True, slots=True)
class _Pool:
    """All rows of a patch as windows, the base's states behind them, and which rows are which."""

    windows: list[tuple[int, ...]]
    of_row: list[list[int]]
    combine: Combine
    modes: list[Mode]
    labels: NDArray[np.float64]
    store: TapStore
    examples: range
    held_out: range
    replayed: range
    elsewhere: range


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

    An aligner, rows that cannot be encoded, replay rows without a harmless one, and examples and replay rows that are
    all of one class are an InputError.
    """
    settings = settings or PatchSettings()
    started, old = time.perf_counter(), guard.with_preset(guard.config.preset)
    with tempfile.TemporaryDirectory() as folder:
        pool = _pool(base, guard, _prepared(guard, rows, settings), Path(folder))
        lesson = _Lesson(base, guard.float(), pool, settings)
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
        n_examples=len(pool.examples),
        n_held_out=len(pool.held_out),
        n_replay=len(pool.replayed) + len(pool.elsewhere),
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


def _prepared(guard: Adapter, rows: PatchRows, settings: PatchSettings) -> PatchRows:
    """The rows with a held-out part, replay rows shuffled and not too many."""
    require_guard(guard.config)
    generator = random.Random(settings.seed)
    replay = list(rows.replay)
    generator.shuffle(replay)
    replay = replay[: settings.replay_limit]
    examples, held_out = list(rows.examples), rows.held_out
    if held_out is None:
        generator.shuffle(examples)
        examples, held_out = _split(examples)
    if not examples:
        raise InputError("There is no example to learn from; expected 16 to 64 labelled rows of the new family.")
    halves = replay[: len(replay) // 2], replay[len(replay) // 2 :]
    if not all(any(is_harmless(row.labels) for row in half) for half in halves):
        raise InputError(
            f"The {len(replay)} replay rows hold too few harmless ones (label 0) to keep the threshold by. Give rows "
            "like those that the guard learnt from with --replay."
        )
    kinds = {1.0 in row.labels for row in (*examples, *halves[0])}
    if len(kinds) < 2:
        raise InputError(
            "Examples and replay rows are all harmless; a guard learns from both kinds. Add harmful rows (label 1) to "
            "either file."
        )
    return PatchRows(examples, replay, held_out)


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


def _pool(base: Base, guard: Adapter, rows: PatchRows, folder: Path) -> _Pool:
    held_out, half = rows.held_out or (), len(rows.replay) // 2
    parts: list[Sequence[Example]] = [rows.examples, held_out, rows.replay[:half], rows.replay[half:]]
    ids: list[tuple[int, ...]] = []
    of_row = []
    for example in (example for part in parts for example in part):
        try:
            cut = windows(base, example.messages, combine=guard.config.windows)
        except InputError as error:
            raise InputError(f"The row in line {example.line} of its file cannot be read: {error}") from error
        encoded = [base.encode(part).ids for part in cut]
        of_row.append(list(range(len(ids), len(ids) + len(encoded))))
        ids += encoded
    ends = np.cumsum([0, *map(len, parts)]).tolist()
    spans = [range(start, end) for start, end in pairwise(ends)]
    labels = np.array([example.labels for part in parts for example in part], dtype=np.float64)
    modes: list[Mode] = [
        "windowed" if len(cut) > 1 else place_of(example.messages)
        for cut, example in zip(of_row, (example for part in parts for example in part), strict=True)
    ]
    store = TapStore.build(base, ids, guard.config.layers, folder)
    return _Pool(ids, of_row, guard.config.windows, modes, labels, store, *spans)


class _Lesson:
    """A guard, what it learns and what it must keep."""

    def __init__(self, base: Base, guard: Adapter, pool: _Pool, settings: PatchSettings) -> None:
        self.base, self.guard, self.pool, self.settings = base, guard, pool, settings
        self.source: Source = StoredTaps(pool.store, guard)
        self.labels = torch.from_numpy(pool.labels).float()
        self.targets = self.row_logits(range(len(pool.of_row)))
        self.spread = self.targets[list(pool.replayed)].std(0, correction=0).clamp_min(_LEAST_SPREAD)
        self.first = [parameter.detach().clone() for parameter in guard.parameters()]
        self.draws = random.Random(settings.seed)

    def learn(self, report: Callable[[Progress], None]) -> None:
        """Train the guard in place."""
        self.guard.requires_grad_(True)
        size = self.settings.batch_size
        training = TrainingSection(
            epochs=_ROUNDS,
            batch_size=size,
            learning_rate=self.settings.learning_rate,
            weight_decay=0.0,
            patience=_ROUNDS,
            checkpoint_seconds=1e9,
        )
        lengths = [1] * (max(1, self.settings.steps // _ROUNDS) * size)  # examples come round again and again
        Loop(self.guard, lengths, self._loss_of, self._fit, training, seed=self.settings.seed, report=report).run()

    @torch.no_grad()
    def row_logits(self, rows: Sequence[int]) -> Tensor:
        """(n, K), in the order of ``rows``."""
        order = sorted(range(len(rows)), key=lambda place: len(self.pool.windows[self.pool.of_row[rows[place]][0]]))
        result = torch.zeros(len(rows), self.labels.shape[1])
        for start in range(0, len(order), _CHUNK):
            places = order[start : start + _CHUNK]
            result[places] = self._logits_of([rows[place] for place in places])
        return result

    def _loss_of(self, turns: Sequence[int]) -> Tensor:
        some = [self.pool.examples[turn % len(self.pool.examples)] for turn in turns]
        again = self.draws.sample(self.pool.replayed, min(self.settings.replay_size, len(self.pool.replayed)))
        loss = self._objective(self._logits_of(some), some, self._logits_of(again), again)
        if not self.settings.pull:
            return loss
        moved = zip(self.guard.parameters(), self.first, strict=True)
        return loss + self.settings.pull * torch.stack([((now - then) ** 2).sum() for now, then in moved]).sum()

    def _fit(self) -> float:
        """Minus the loss on all examples and replayed rows: by this the best weights are chosen."""
        some, again = self.pool.examples, self.pool.replayed
        return -float(self._objective(self.row_logits(some), some, self.row_logits(again), again))

    def _objective(self, learnt: Tensor, some: Sequence[int], kept: Tensor, again: Sequence[int]) -> Tensor:
        """Cross-entropy of the examples, plus the squared change of replayed logits in units of their spread."""
        change = ((kept - self.targets[list(again)]) / self.spread).square().mean()
        return guard_loss(learnt, self.labels[list(some)]) + self.settings.replay_weight * change

    def _logits_of(self, rows: Sequence[int]) -> Tensor:
        """(n, K): of each row the logit of the window that counts, as when a guard judges long texts."""
        ends = self._ends([window for row in rows for window in self.pool.of_row[row]])
        best = torch.amax if self.pool.combine == "max" else torch.amin
        counts = [len(self.pool.of_row[row]) for row in rows]
        return torch.stack([best(part, 0) for part in ends.split(counts)])  # type: ignore[no-untyped-call]

    def _ends(self, some: Sequence[int]) -> Tensor:
        """Logits (n, K) at the last token of some windows, read in groups of like length: padding costs time."""
        order = sorted(range(len(some)), key=lambda place: len(self.pool.windows[some[place]]))
        parts = []
        for start in range(0, len(order), _GROUP):
            batch = make_batch(self.base, self.pool.windows, [some[place] for place in order[start : start + _GROUP]])
            output = self.source(batch).output
            assert output.logits is not None
            parts.append(output.logits[torch.arange(len(batch.rows)), batch.keep.sum(1) - 1].cpu())
        return torch.cat(parts)[torch.tensor(order).argsort()]


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


def _flagged(state: _State, pool: _Pool, rows: range, label: int) -> float:
    """Share of the labels with value ``label`` (0 or 1) in ``rows`` that are flagged; NaN if there is none."""
    chosen = pool.labels[list(rows)] == label
    flagged = state.scores[list(rows)] >= state.thresholds[list(rows)]
    return float(flagged[chosen].mean()) if chosen.any() else math.nan


def _auroc(state: _State, pool: _Pool) -> float:
    """Mean AUROC over the labels that have both classes; NaN if none has."""
    rows = list(pool.elsewhere)
    values = []
    for label, score in zip(pool.labels[rows].T, state.scores[rows].T, strict=True):
        known = ~np.isnan(label)
        if len(set(label[known].tolist())) == 2:
            values.append(roc_auc_score(label[known], score[known]))
    return float(np.mean(values)) if values else math.nan
