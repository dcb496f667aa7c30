"""Porting an adapter to another base without labels: by maps between the bases' states, by distillation, or both.

A guard is ported by linear maps (``safeside.train.port_map``), by learning the old guard's scores and read-out on
unlabelled text (``safeside.train.port_distill``), or by the second from where the first ends.  An aligner is ported by
learning its mixed next-token distribution, for which both bases must share their tokenizer.  A ported guard is
calibrated anew on text that it did not learn from: its scores get the old ones' mean and spread, and in each reading
mode it flags no larger share of it.  What a port is said to be worth is measured on further text, which served nothing
else.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from safeside.adapters.adapter import Adapter
from safeside.adapters.config import Calibration
from safeside.artifact import create_adapter
from safeside.attach import attach
from safeside.base.model import Base
from safeside.errors import MismatchError, UnsupportedError
from safeside.guards.calibrate import scores_of, threshold_at
from safeside.guards.carry import ScoredTwice, carry_thresholds, in_force
from safeside.guards.score import place_of
from safeside.train.loop import Progress
from safeside.train.port_distill import chunks, distill_aligner, distill_guard, guard_outputs, mean_divergence
from safeside.train.port_map import Maps, check_mappable, ported_config
from safeside.train.port_text import Method, PortSettings, PortText, Readers, Side, read_text, require_enough
from safeside.train.taps import FINAL, TapStore
from safeside.types import Example, Message, Mode

_LEAST_SPREAD = 1e-3  # of a new guard's logits
_N_ANSWERS = 25  # written in one batch
_LEAST_CORRELATION = 0.5  # under which a guard's scores say little of the old one's

Array = NDArray[np.float64]
_Figures = tuple[float, tuple[float, ...], tuple[float, float]]  # agreement, correlations, flagged


@dataclass(frozen=True, slots=True)
class Port:
    """A ported adapter and how it went."""

    adapter: Adapter
    """On the new base, a guard's thresholds set."""
    n_rows: int
    """Rows of text behind it, the held-out two fifths included."""
    n_left_out: int
    """Rows that hold no text, that either base refuses or cannot read whole, that are not traced to characters where
    maps are wanted, and of an aligner's those that got no answer."""
    n_measured: int
    """Rows behind the figures below: no weight, scale or threshold comes from them."""
    n_pairs: int
    """Positions that the maps were fitted on; 0 without maps."""
    seconds: float
    """Wall-clock seconds, the passes of both bases included."""
    agreement: float
    """Guards: mean of the ``correlations``.  Aligners: KL(old || new) in nats a token."""
    correlations: tuple[float, ...]
    """Of a guard's new and old logits, by label; NaN where either are all the same.  None of an aligner."""
    flagged: tuple[float, float]
    """Share of the labels of all rows that the old guard flags, and the new one; NaN for aligners."""

    @property
    def warning(self) -> str | None:
        """Why a guard is not to be relied on; None of an aligner, and where each label's scores follow the old ones."""
        named = zip(self.correlations, self.adapter.config.labels, strict=False)
        low = [(value, label) for value, label in named if not value >= _LEAST_CORRELATION]
        if not low:
            return None
        found = ", ".join(f"{'undefined' if math.isnan(value) else f'{value:.3f}'} ({label})" for value, label in low)
        return (
            f"Do not rely on this port: over {self.n_measured} held-out rows the correlation of its scores with the "
            f"old guard's is {found}; expected at least {_LEAST_CORRELATION}. Port with more text of the kind that the "
            "guard judges, or train a guard on the new base."
        )


def port_adapter(
    old: tuple[Base, Adapter],
    base: Base,
    text: Sequence[Example],
    settings: PortSettings | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    report: Callable[[Progress], None] = lambda progress: None,
) -> Port:
    """An adapter for ``base`` that does what the old one does on its own base.  ``text`` needs no labels.

    It is in float32, rounded to ``dtype``, as it is to be stored, before it is calibrated and measured.

    An aligner needs ``method="distill"`` and bases of one tokenizer and chat template, else it is a MismatchError; to
    prompts without an answer the old base writes one, with the aligner.  A kind that no map carries, and one that the
    new base cannot have, are an UnsupportedError before any text is read.  Too few usable rows are an InputError.
    """
    settings = settings or PortSettings()
    started = time.perf_counter()
    old_base, teacher = old
    is_guard = teacher.config.role == "guard"
    _check_method(teacher, settings)
    if not is_guard:
        _check_alignable(old, base)
    student = create_adapter(base, ported_config(teacher.config, base, settings.size), settings.seed)
    rows = _aligner_text(old, base, text, settings) if not is_guard else read_text(old_base, base, text, settings)
    require_enough(rows.n_rows, len(text))
    with tempfile.TemporaryDirectory() as folder:
        old_side = _side(old_base, teacher.float(), rows.old.ids, folder)
        new_side = _side(base, student, rows.new.ids, folder)
        _learn(old_side, new_side, rows, settings, report)
        student.to(dtype).float().eval().requires_grad_(False)
        if is_guard:
            calibrate_like(student, teacher, *_twice(old_side, new_side, rows, rows.choosing))
        measure = _guard_figures if is_guard else _aligner_figures
        agreement, correlations, flagged = measure(old_side, new_side, rows)
    return Port(
        adapter=student,
        n_rows=rows.n_rows,
        n_left_out=len(text) - rows.n_rows,
        n_measured=len(rows.measured),
        n_pairs=sum(map(len, rows.pairs[: rows.n_learnt])),
        seconds=time.perf_counter() - started,
        agreement=agreement,
        correlations=correlations,
        flagged=flagged,
    )


def _check_method(teacher: Adapter, settings: PortSettings) -> None:
    """Raise where maps are wanted and cannot carry the adapter, or not at the wanted size."""
    if settings.method == "distill":
        return
    check_mappable(teacher)
    if settings.size is not None:
        raise UnsupportedError(
            "Maps carry the old blocks as they are, so their width is the old one; a size is for --method distill."
        )


def best_method(adapter: Adapter) -> Method:
    """``both`` where maps can carry the adapter, else ``distill``."""
    try:
        check_mappable(adapter)
    except UnsupportedError:
        return "distill"
    return "both"


def _check_alignable(old: tuple[Base, Adapter], base: Base) -> None:
    """Raise unless ``base`` gives distributions over the old base's tokens."""
    old_base, aligner = old
    if base.is_encoder:
        raise UnsupportedError(f"{base.name} is an encoder: it has no next-token distribution, so guards only.")
    if old_base.fingerprint.tokenizer != base.fingerprint.tokenizer:
        raise MismatchError(
            f"{aligner.name!r} gives distributions over the tokens of {old_base.name} (tokenizer "
            f"{old_base.fingerprint.tokenizer}), but {base.name} has another tokenizer ({base.fingerprint.tokenizer}). "
            "An aligner is ported between bases of one tokenizer only; train one on the new base instead."
        )


def _aligner_text(old: tuple[Base, Adapter], base: Base, text: Sequence[Example], settings: PortSettings) -> PortText:
    """Rows with answers, in the same tokens for both bases; too few that can have one are an InputError."""
    old_base, aligner = old
    readers = Readers(old_base, base)
    usable = [row for row in text if _is_answered(row) or readers.encode(row.messages, settings.max_new_tokens)]
    require_enough(len(usable), len(text))
    rows = read_text(old_base, base, answered(old_base, aligner, usable, settings.max_new_tokens), settings)
    if rows.old.ids != rows.new.ids:
        raise MismatchError(
            f"{old_base.name} and {base.name} share a tokenizer but not a chat template: the same conversation becomes "
            "other tokens. Give both the same template."
        )
    return rows


def _is_answered(row: Example) -> bool:
    return row.messages[-1].role == "assistant"


def answered(base: Base, aligner: Adapter, text: Sequence[Example], max_new_tokens: int) -> list[Example]:
    """The conversations that end in an answer, after those that did not got one: the aligned base's own, greedy.

    ``base`` has room for each of them and ``max_new_tokens``.  A prompt that is answered with nothing is left out: no
    token of it could be learnt.
    """
    done = [row for row in text if _is_answered(row)]
    asked = [row for row in text if not _is_answered(row)]
    with attach(base, [aligner]):
        for start in range(0, len(asked), _N_ANSWERS):
            some = asked[start : start + _N_ANSWERS]
            answers = base.chat_batch([row.messages for row in some], max_new_tokens=max_new_tokens)
            done += [
                replace(row, messages=(*row.messages, Message("assistant", answer.text)))
                for row, answer in zip(some, answers, strict=True)
                if answer.text
            ]
    return done


def _side(base: Base, adapter: Adapter, ids: Sequence[tuple[int, ...]], folder: str) -> Side:
    layers = (*adapter.config.layers, *([FINAL] if adapter.config.role == "align" else []))
    return Side(base, adapter, ids, TapStore.build(base, ids, layers, Path(folder)))


def _learn(old: Side, new: Side, rows: PortText, settings: PortSettings, report: Callable[[Progress], None]) -> None:
    """Give the new adapter its weights, by maps, by distillation, or by both."""
    if settings.method != "distill":
        Maps(old, new, rows.pairs[: rows.n_learnt], settings.ridge).fold()
    if settings.method != "map":
        distill = distill_guard if old.adapter.config.role == "guard" else distill_aligner
        distill(old, new, rows, settings, report)


def _aligner_figures(old: Side, new: Side, rows: PortText) -> _Figures:
    return mean_divergence(old, new, rows, rows.measured), (), (math.nan, math.nan)


def _guard_figures(old: Side, new: Side, rows: PortText) -> _Figures:
    old_logits, new_logits, modes = _twice(old, new, rows, rows.measured)
    found = label_correlations(old_logits, new_logits)
    flagged = flagged_share(old.adapter, old_logits, modes), flagged_share(new.adapter, new_logits, modes)
    return float(np.mean(found)), found, flagged


@torch.no_grad()
def _twice(old: Side, new: Side, rows: PortText, some: range) -> tuple[Array, Array, list[Mode]]:
    """Raw logits (n, K) of some rows by the old guard and by the new one, and how each row is read."""
    logits = [torch.cat([guard_outputs(side, part)[0] for part in chunks(some)]) for side in (old, new)]
    modes = [place_of(rows.old.examples[row].messages) for row in some]
    return logits[0].double().numpy(), logits[1].double().numpy(), modes


def calibrate_like(new: Adapter, old: Adapter, old_logits: Array, new_logits: Array, modes: Sequence[Mode]) -> None:
    """Calibrate ``new`` to score as ``old`` on the same (n, K) rows.

    Scaled logits get the old ones' mean and spread.  Where a threshold in force flags some of the rows that it judges,
    the new one is set so that as many are flagged at most; where it flags all, or neither flags any, it stays.
    """
    before = _calibration_of(old)
    wanted = np.array(before.scale) * old_logits + np.array(before.bias)
    scale = wanted.std(0).clip(_LEAST_SPREAD) / new_logits.std(0).clip(_LEAST_SPREAD)
    bias = wanted.mean(0) - scale * new_logits.mean(0)
    after = before.model_copy(update={"scale": tuple(scale.tolist()), "bias": tuple(bias.tolist())})
    rows = ScoredTwice(scores_of(before, old_logits), scores_of(after, new_logits), modes)
    carry_thresholds(new, old, after, rows, _matched)


def flagged_share(guard: Adapter, logits: Array, modes: Sequence[Mode]) -> float:
    """Share of the labels of all rows, of raw logits (n, K), that a guard flags."""
    return float((scores_of(_calibration_of(guard), logits) >= in_force(guard, modes)).mean())


def _calibration_of(guard: Adapter) -> Calibration:
    """How the guard's logits become scores, calibrated or not."""
    thresholds = guard.thresholds
    plain = Calibration(scale=(1.0,) * len(thresholds), bias=(0.0,) * len(thresholds), threshold=thresholds)
    return guard.config.calibration or plain


def _matched(threshold: float, before: Array, after: Array) -> float:
    """The lowest threshold that flags no larger share of the rows than before; where that was none or all, no lower."""
    rate = float((before >= threshold).mean())
    if rate == 1 or (rate == 0 and not (after >= threshold).any()):
        return threshold
    return threshold_at(after, rate)


def label_correlations(old: Array, new: Array) -> tuple[float, ...]:
    """Pearson correlations of logits (n, K), by label; NaN where either are all the same."""
    values = []
    for before, after in zip(old.T, new.T, strict=True):
        is_defined = np.ptp(before) > 0 and np.ptp(after) > 0
        values.append(float(np.corrcoef(before, after)[0, 1]) if is_defined else math.nan)
    return tuple(values)
