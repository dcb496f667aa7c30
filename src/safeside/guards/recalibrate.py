"""What ``safeside calibrate`` does: thresholds that keep a promised rate on a user's own traffic."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from safeside.adapters.adapter import Adapter
from safeside.adapters.config import CONFIDENCE, ModeCalibration, rows_needed
from safeside.artifact import base_of, copy_adapter, find_adapter, load_adapter
from safeside.base.model import Base
from safeside.errors import InputError
from safeside.guards.calibrate import fit_mode
from safeside.guards.probability import Array
from safeside.guards.score import score_conversations
from safeside.tasks.rows import BadRow, load_kind
from safeside.terminal import note
from safeside.types import Example, Mode


@dataclass(frozen=True, slots=True)
class Traffic:
    """Rows to calibrate on, and what they shall promise."""

    benign: Path
    """Harmless rows, drawn as the texts to come are."""
    harmful: Path | None = None
    """Harmful rows, in the share that is to be expected: for probabilities only, thresholds do without."""
    false_positive_rate: float = 0.01
    """The rate to promise, in (0, 1)."""
    mode: Mode | None = None
    """The reading mode to calibrate; None: every one that the harmless rows are read in."""

    def __post_init__(self) -> None:
        rows_needed(self.false_positive_rate)  # an InputError outside (0, 1), before anything is scored


@dataclass(frozen=True, slots=True)
class Recalibration:
    """A re-calibrated adapter on disk, and what was left out."""

    folder: Path
    """Where it was written."""
    modes: Mapping[Mode, ModeCalibration]
    """The modes that were calibrated."""
    bad: tuple[BadRow, ...]
    """Rows that could not be read."""
    n_unscored: int
    """Rows that could not be scored; they count as flagged."""
    n_other_modes: int
    """Rows that are read in another mode than those calibrated."""


@dataclass(frozen=True, slots=True)
class _Scored:
    """Scores (n, K), labels (n, K) and modes (n) of all rows."""

    scores: Array
    labels: Array
    modes: tuple[Mode, ...]


def calibrate_command(
    name: str, base_name: str | None, traffic: Traffic, output: Path | None
) -> tuple[list[dict[str, object]], dict[str, object]]:
    """One row for each mode and threshold, and what else there is to say of the run."""
    base = base_of(name, base_name)
    is_in_place = output is not None and output.exists()
    done = recalibrate(name, base, traffic, output)
    for row in done.bad:
        note(f"line {row.line} was left out: {row.problem}")
    if done.n_unscored:
        note(f"{done.n_unscored} rows could not be scored; they count as flagged")
    if done.n_other_modes:
        note(f"{done.n_other_modes} rows were left out: they are read in other modes than {', '.join(done.modes)}")
    if is_in_place:
        note(f"{done.folder} was changed in place")
    rows: list[dict[str, object]] = [
        {
            "mode": mode,
            "preset": preset,
            "false_positive_rate": promise.false_positive_rate,
            "threshold": list(promise.threshold),
            "n_harmless": fit.n_harmless,
        }
        for mode, fit in done.modes.items()
        for preset, promise in (("default", fit.promise), *fit.presets.items())
        if promise is not None
    ]
    return rows, {
        "adapter": str(done.folder),
        "in_place": is_in_place,
        "confidence": CONFIDENCE,
        "calibration_error": {
            mode: [{"method": one.method, "before": one.error_before, "after": one.error_after} for one in fit.maps]
            for mode, fit in done.modes.items()
        },
        "n_skipped": len(done.bad),
        "n_unscored": done.n_unscored,
        "n_other_modes": done.n_other_modes,
    }


def recalibrate(name_or_path: str, base: Base, traffic: Traffic, output: Path | None = None) -> Recalibration:
    """Fit an adapter's thresholds on ``traffic`` and write it, weights untouched, to the folder ``output``.

    Without ``output`` that is ``NAME-calibrated``.  A folder that exists is an InputError, unless it is the adapter's
    own: then it is changed in place.  Too few harmless rows for the rate are an InputError that says how many it takes.
    """
    source = find_adapter(name_or_path)
    guard = load_adapter(name_or_path, base)
    if guard.config.role != "guard":
        raise InputError(f"{guard.name!r} is an aligner and flags nothing; only guards are calibrated.")
    folder = output or Path(f"{guard.name}-calibrated")
    if folder.exists() and folder.resolve() != source.resolve():
        raise InputError(f"{folder} exists already. Choose another --output, or the adapter's own folder to change it.")
    examples, bad = _examples(traffic, guard.config.labels)
    scored = _score(base, guard, examples)
    modes = _modes(scored, traffic)
    fits = {mode: _fit(scored, mode, traffic, guard.config.modes.get(mode)) for mode in modes}
    for mode, fit in fits.items():
        guard.set_mode(mode, fit)
    facts = {f"calibrated for {mode}": _fact(fit, traffic) for mode, fit in fits.items()}
    copy_adapter(source, folder, guard.config, facts)
    return Recalibration(
        folder=folder,
        modes=fits,
        bad=tuple(bad),
        n_unscored=int(np.isnan(scored.scores).any(1).sum()),
        n_other_modes=sum(mode not in fits for mode in scored.modes),
    )


def _examples(traffic: Traffic, labels: tuple[str, ...]) -> tuple[list[Example], list[BadRow]]:
    examples, bad = load_kind(traffic.benign, labels, is_harmful=False)
    if traffic.harmful is not None:
        harmful, broken = load_kind(traffic.harmful, labels, is_harmful=True)
        examples, bad = [*examples, *harmful], [*bad, *broken]
    return examples, bad


def _score(base: Base, guard: Adapter, examples: Sequence[Example]) -> _Scored:
    found = score_conversations(base, [guard], [example.messages for example in examples])
    return _Scored(
        np.array([row.by_guard[guard.name] for row in found], dtype=np.float64),
        np.array([example.labels for example in examples], dtype=np.float64),
        tuple(row.mode_for(guard) for row in found),
    )


def _modes(scored: _Scored, traffic: Traffic) -> list[Mode]:
    """The modes to calibrate: the one that is asked for, or those of the harmless rows."""
    counts = Counter(mode for mode, labels in zip(scored.modes, scored.labels, strict=True) if not labels.any())
    if traffic.mode is None:
        return sorted(counts)
    if traffic.mode not in counts:
        found = ", ".join(f"{count:,} for {mode!r}" for mode, count in counts.items())
        raise InputError(
            f"{traffic.benign} holds no row that is read in mode {traffic.mode!r}; found {found}. Prompts end with a "
            "user's message, answers with an assistant's; windowed texts are longer than the base's context."
        )
    return [traffic.mode]


def _fit(scored: _Scored, mode: Mode, traffic: Traffic, before: ModeCalibration | None) -> ModeCalibration:
    """The calibration of one mode; without harmful rows its old map from score to probability stays."""
    own = np.array([found == mode for found in scored.modes])
    benign = scored.scores[own & ~scored.labels.any(1)]
    try:
        fit = fit_mode(
            scored.scores[own], scored.labels[own], benign=benign, false_positive_rate=traffic.false_positive_rate
        )
    except InputError as error:
        raise InputError(f"Mode {mode!r}: {error}") from error
    kept = before.maps if before is not None and not fit.maps else fit.maps
    return fit.model_copy(update={"maps": kept})


def _fact(fit: ModeCalibration, traffic: Traffic) -> str:
    """What card and provenance say of one mode."""
    harmful = f", probabilities from {traffic.harmful.name} too" if traffic.harmful is not None and fit.maps else ""
    return (
        f"{fit.n_harmless:,} harmless rows of {traffic.benign.name}{harmful}: at most "
        f"{traffic.false_positive_rate:.3%} flagged, with {CONFIDENCE:.0%} confidence; "
        f"{datetime.now(UTC).date().isoformat()}"
    )
