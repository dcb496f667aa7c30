"""Calibration of a guard: probabilities, and thresholds at a stated or a promised false-positive rate.

A promised rate is distribution-free: it asks only that the harmless rows come as the harmless texts to judge will come
(independent draws of one distribution), and it is bought with rows.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import torch

from safeside.adapters.adapter import Adapter
from safeside.adapters.config import CONFIDENCE, PRESET_RATES, Calibration, ModeCalibration, Promise, rows_needed
from safeside.errors import InputError, NotFiniteError
from safeside.guards.probability import Array, fit_map, platt
from safeside.types import Mode, Preset

_ROUNDING = 2e-6  # float32 sums in another order: a few of its last digits


def fit_calibration(logits: Array, labels: Array, false_positive_rate: float = 0.05) -> Calibration:
    """Platt scaling and threshold for each label, from (n, K) raw logits and 0/1 labels of validation rows.

    A label that a row does not know is NaN: that row counts for the other labels only.

    The scale is kept positive, so that scores rise with risk and no ranking changes.  A label with one class only is an
    InputError, and a logit that is not finite a NotFiniteError.
    """
    if not np.isfinite(logits).all():
        raise NotFiniteError("A guard gave logits that are not finite on validation rows; lower the learning rate.")
    scales, biases, thresholds = [], [], []
    for column, known in zip(logits.T, labels.T, strict=True):
        logit, label = column[~np.isnan(known)], known[~np.isnan(known)]
        if len(set(label.tolist())) < 2:
            raise InputError("Calibration needs both harmful and harmless validation rows; got one kind. Add rows.")
        scale, bias = platt(logit, label)
        scores = _scores(logit, scale, bias)
        scales.append(scale)
        biases.append(bias)
        thresholds.append(threshold_at(scores[label == 0], false_positive_rate))
    return Calibration(
        scale=tuple(scales),
        bias=tuple(biases),
        threshold=tuple(thresholds),
        false_positive_rate=false_positive_rate,
    )


def _scores(logit: Array, scale: float, bias: float) -> Array:
    """Scores as a guard's head computes them: in float32."""
    scaled = torch.tensor(scale, dtype=torch.float32) * torch.from_numpy(logit).float()
    return np.asarray(torch.sigmoid(scaled + torch.tensor(bias, dtype=torch.float32)).double())


def threshold_at(harmless_scores: Array, false_positive_rate: float) -> float:
    """The lowest threshold that flags at most this share of the harmless rows (flagged means score >= threshold).

    The share of k of n rows is the float ``k / n``, so a rate that was counted on as many rows allows what was counted.
    The threshold stands a hair above the highest score that passes, for the same text in another batch differs in its
    last digits.  When too many rows score 1 there is none, and that is an InputError; so is no row at all.  A score
    that is not a number is a NotFiniteError.
    """
    if not len(harmless_scores):
        raise InputError("A threshold needs harmless rows; got none. Add rows with label 0.")
    shares = np.arange(1, len(harmless_scores) + 1) / len(harmless_scores)
    n_within = int(np.searchsorted(shares, false_positive_rate, side="right"))
    return _above(harmless_scores, n_within, false_positive_rate)


def threshold_with_bound(benign_scores: Array, false_positive_rate: float, confidence: float = CONFIDENCE) -> float:
    """The lowest threshold that promises a false-positive rate on texts to come (flagged means score >= threshold).

    With probability ``confidence`` over the draw of the (n,) benign scores, at most ``false_positive_rate`` of all
    benign texts drawn like them are flagged: the threshold stands above the (k+1)-th highest score, for the largest k
    whose Clopper-Pearson upper bound, k of n, is at most that rate.  Ties can only make it safer.  Too few rows for any
    threshold are an InputError that says how many it takes; so are too many rows that score 1, and too many that score
    -inf: answers that are too short for a stop rule.  A score that is not a number is a NotFiniteError.
    """
    n_rows, needed = len(benign_scores), rows_needed(false_positive_rate, confidence)
    if n_rows < needed:
        raise InputError(
            f"{n_rows:,} harmless rows cannot promise a false-positive rate of {false_positive_rate:.3%} with "
            f"{confidence:.0%} confidence; it takes {needed:,}. Add rows, or ask for a higher rate."
        )
    return _above(benign_scores, n_allowed(n_rows, false_positive_rate, confidence), false_positive_rate)


def n_allowed(n_rows: int, false_positive_rate: float, confidence: float = CONFIDENCE) -> int:
    """How many of ``n_rows`` harmless rows may score above a threshold that promises the rate.

    The largest k with P(Binomial(n_rows, rate) <= k) <= 1 - confidence; ``n_rows`` must be at least ``rows_needed``.
    """
    counts = np.arange(1, n_rows + 1)
    steps = np.log((n_rows - counts + 1) / counts) + np.log(false_positive_rate) - np.log1p(-false_positive_rate)
    logarithms = n_rows * np.log1p(-false_positive_rate) + np.concatenate([[0.0], steps.cumsum()])
    within = np.searchsorted(np.exp(logarithms).cumsum(), 1 - confidence, side="right")
    return max(int(within) - 1, 0)


def _above(harmless_scores: Array, n_flagged: int, false_positive_rate: float) -> float:
    """The lowest threshold that flags at most ``n_flagged`` of the rows."""
    if np.isnan(harmless_scores).any():
        raise NotFiniteError("A harmless row's score is not a number, so there is no threshold. Count such rows as 1.")
    falling = np.sort(harmless_scores)[::-1]
    if falling[n_flagged] >= 1.0:
        raise InputError(
            f"More than {false_positive_rate:.2%} of the harmless rows have score 1; no threshold can let them pass. "
            "Train longer or with a lower learning rate, or allow a higher false-positive rate."
        )
    if falling[n_flagged] == -np.inf:
        n_short = int(np.isneginf(falling).sum())
        raise InputError(
            f"{n_short:,} of {len(falling):,} harmless answers have fewer tokens than the stop rule asks for in a row, "
            f"and a threshold for {false_positive_rate:.3%} would rest on them: it would stop every longer answer. Ask "
            "for fewer tokens in a row (--consecutive), or give longer answers."
        )
    return float(min(1.0, falling[n_flagged] + _ROUNDING))


def counted_once(harmless: Array, texts: Sequence[str]) -> Array:
    """Of (m, K) scores of harmless rows as many of the highest as their ``texts`` (m, normalised) are distinct.

    So a copy buys no promise, and yet the promise holds for texts that come as often as the rows do.
    """
    return np.sort(harmless, axis=0)[len(texts) - len(set(texts)) :]  # NaN is the highest of all


def fit_mode(
    scores: Array,
    labels: Array,
    *,
    texts: Sequence[str] = (),
    learnt: Set[str] = frozenset(),
    benign: Array | None = None,
    false_positive_rate: float | None = None,
    uncalibrated: Array | None = None,
) -> ModeCalibration:
    """What is known of a guard's scores in one reading mode, for ``Adapter.set_mode``.

    ``scores`` (n, K) in [0, 1] and ``labels`` (n, K) of 0 and 1 (NaN: not known) are of rows of that mode.  A score is
    what the mode's decision compares with the threshold: at a text's end for ``prompt`` and ``answer``, what the
    windows come to for ``windowed``, and for ``stream`` the number that stops an answer when it reaches the threshold,
    one for each whole answer (-inf: too short to be stopped).  NaN counts as 1, for such a text is flagged.

    Thresholds are promised for each label by itself (``Promise``).  They rest on the rows with label 0, of which each
    of their ``texts`` (n, normalised) counts once if these are given, and none that is in ``learnt``, or on ``benign``
    (m, K) if given.  Presets that so few rows cannot promise are left out.  With ``false_positive_rate`` the mode gets
    a threshold of its own, and too few rows for that are an InputError.

    Where the scores were fitted to these very rows, ``uncalibrated`` (n, K) are the rows' scores before that, which the
    calibration error "before" is of.
    """
    scores = np.where(np.isnan(scores), 1.0, scores)
    if benign is None:
        known = np.array(texts or range(len(scores)), dtype=object)  # by reference: texts may be long
        unseen = np.array([text not in learnt for text in texts] or [True] * len(scores), dtype=bool)
        harmless = [
            counted_once(column[(label == 0) & unseen], known[(label == 0) & unseen].tolist())
            for column, label in zip(scores.T, labels.T, strict=True)
        ]
    else:
        harmless = list(np.where(np.isnan(benign), 1.0, benign).T)
    presets: dict[Preset, Promise] = {}
    for preset, rate in PRESET_RATES.items():
        with suppress(InputError):
            presets[preset] = _promise(harmless, rate)
    before = scores if uncalibrated is None else uncalibrated
    maps = [
        fit_map(column[~np.isnan(label)], label[~np.isnan(label)], plain[~np.isnan(label)])
        for column, label, plain in zip(scores.clip(0.0).T, labels.T, before.clip(0.0).T, strict=True)
    ]
    return ModeCalibration(
        n_harmless=min(map(len, harmless)),
        promise=None if false_positive_rate is None else _promise(harmless, false_positive_rate),
        presets=presets,
        maps=tuple(fit for fit in maps if fit is not None) if None not in maps else (),
    )


def _promise(harmless: Sequence[Array], rate: float) -> Promise:
    return Promise(threshold=tuple(threshold_with_bound(scores, rate) for scores in harmless), false_positive_rate=rate)


@dataclass(frozen=True, slots=True)
class JudgedRows:
    """Raw logits of rows that a guard is calibrated on."""

    logits: Array
    """(n, K), finite."""
    labels: Array
    """(n, K), 0 or 1; NaN where a row does not know the label."""
    modes: tuple[Mode, ...]
    """How each row was read."""
    texts: tuple[str, ...] = ()
    """Each row's text, normalised: copies buy no promise.  Without them no row is taken for a copy."""
    learnt: frozenset[str] = frozenset()
    """Texts that the guard learnt from, should some be among these rows: no promise rests on them."""

    def of(self, mode: Mode) -> JudgedRows:
        """The rows of one mode."""
        own = np.array([found == mode for found in self.modes], dtype=bool)
        texts = tuple(text for text, is_own in zip(self.texts, own, strict=bool(self.texts)) if is_own)
        return JudgedRows(self.logits[own], self.labels[own], (mode,) * int(own.sum()), texts, self.learnt)


def calibrate_guard(
    guard: Adapter, false_positive_rate: float, rows: JudgedRows, benign: JudgedRows | None = None
) -> None:
    """Set the guard's calibration from all ``rows``, and that of each reading mode from the rows read so.

    The thresholds of the presets rest on the rows of ``benign`` in the modes that it holds, elsewhere on the harmless
    ones of ``rows``.  The calibration error "before" is that of the sigmoid of the raw logits.
    """
    calibration = fit_calibration(rows.logits, rows.labels, false_positive_rate)
    guard.set_calibration(calibration)
    for mode in sorted({*rows.modes, *(benign.modes if benign is not None else ())}):
        own, clean = rows.of(mode), benign.of(mode) if benign is not None and mode in benign.modes else None
        fit = fit_mode(
            scores_of(calibration, own.logits),
            own.labels,
            texts=own.texts,
            learnt=own.learnt,
            benign=counted_once(scores_of(calibration, clean.logits), clean.texts) if clean is not None else None,
            uncalibrated=_scores(own.logits, 1.0, 0.0),
        )
        guard.set_mode(mode, fit)


def scores_of(calibration: Calibration, logits: Array) -> Array:
    """Scores (n, K) of raw logits (n, K), as the guard's head makes them."""
    columns = zip(logits.T, calibration.scale, calibration.bias, strict=True)
    return np.stack([_scores(*column) for column in columns], -1)
