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
from safeside.artifact import base_of, copy_adapter, find_adapter, load_adapter, read_checksum
from safeside.base.model import Base
from safeside.errors import InputError
from safeside.guards.calibrate import counted_once, fit_mode
from safeside.guards.probability import Array
from safeside.guards.score import place_of, score_conversations
from safeside.guards.stream import N_CONSECUTIVE, any_label, score_answers, stream_scores
from safeside.tasks.leakage import text_of
from safeside.tasks.learnt import learnt_notes, load_learnt, unseen_of
from safeside.tasks.rows import BadRow, load_kind
from safeside.terminal import note
from safeside.types import Example, Mode, Preset


@dataclass(frozen=True, slots=True)
class Traffic:
    """Rows to calibrate on, and what they shall promise."""

    benign: Path
    """Harmless rows, drawn as the texts to come are."""
    harmful: Path | None = None
    """Harmful rows, in the share that is to be expected: for probabilities only, thresholds do without."""
    false_positive_rate: float = 0.01
    """The rate to promise for each label, in (0, 1)."""
    mode: Mode | None = None
    """The reading mode to calibrate; None: every one that the harmless rows are read in, ``stream`` not among them."""
    n_consecutive: int | None = None
    """Of mode ``stream``: tokens of the rule; the guard's own, or 8, unless given."""

    def __post_init__(self) -> None:
        both_exist = self.harmful is not None and self.harmful.exists() and self.benign.exists()
        if self.harmful is not None and both_exist and self.benign.samefile(self.harmful):
            raise InputError(f"{self.benign} is given as --benign and as --harmful; expected two files.")
        rows_needed(self.false_positive_rate)  # an InputError outside (0, 1), before anything is scored
        if self.n_consecutive is not None and self.mode != "stream":
            raise InputError("Tokens in a row are those of a stop rule, for mode 'stream'. Add --mode stream.")
        if self.n_consecutive is not None and self.n_consecutive < 1:
            raise InputError(f"A stop rule needs 1 token in a row or more; got {self.n_consecutive}.")


@dataclass(frozen=True, slots=True)
class Recalibration:
    """A re-calibrated adapter on disk, and what was left out."""

    folder: Path
    """Where it was written."""
    modes: Mapping[Mode, ModeCalibration]
    """The modes that were calibrated."""
    flagged: Mapping[Mode, Mapping[str, float]]
    """By mode, and there for ``default`` and each preset, the share of its harmless rows, copies too, that is flagged
    under one label or more.  It was counted on these rows and is no promise."""
    bad: tuple[BadRow, ...]
    """Rows that could not be read."""
    n_unscored: int
    """Rows that could not be scored; they count as flagged."""
    n_other_modes: int
    """Rows that are read in another mode than those calibrated."""
    refused: Mapping[Mode, str]
    """Modes that are as they were, and why their rows promise nothing; only where no mode was asked for."""
    n_copies: int
    """Harmless rows whose text an earlier one has; they buy no promise, and count where they are flagged."""
    dropped_preset: Preset | None
    """The preset that the guard was saved with, where no mode has it any more; without it each mode's promise holds."""
    n_learnt: int | None
    """Rows left out because the guard learnt from them; None where its folder keeps no record of those."""
    kept_maps: frozenset[Mode]
    """The modes whose maps from score to probability are those of before, for none could be fitted on these rows."""


@dataclass(frozen=True, slots=True)
class _Scored:
    """Scores (n, K), labels (n, K), modes (n) and normalised texts (n) of all rows."""

    scores: Array
    labels: Array
    modes: tuple[Mode, ...]
    texts: tuple[str, ...]

    def of(self, mode: Mode) -> _Scored:
        """The rows of one mode."""
        own = [row for row, found in enumerate(self.modes) if found == mode]
        texts = tuple(self.texts[row] for row in own)
        return _Scored(self.scores[own], self.labels[own], (mode,) * len(own), texts)

    @property
    def benign(self) -> tuple[Array, int]:
        """Scores (m, K) of the harmless rows, and how many distinct texts they have."""
        return self.scores[~self.labels.any(1)], len(set(self.benign_texts))

    @property
    def benign_texts(self) -> list[str]:
        """Texts (m) of the harmless rows."""
        return [self.texts[row] for row in np.flatnonzero(~self.labels.any(1))]


def calibrate_command(
    name: str, base_name: str | None, traffic: Traffic, output: Path | None
) -> tuple[list[dict[str, object]], dict[str, object]]:
    """One row for each mode and threshold, and what else there is to say of the run."""
    base = base_of(name, base_name)
    is_in_place = output is not None and output.exists()
    done = recalibrate(name, base, traffic, output)
    _tell(name, done, is_in_place)
    rows: list[dict[str, object]] = [
        {
            "mode": mode,
            "preset": preset,
            "false_positive_rate": promise.false_positive_rate,
            "threshold": list(promise.threshold),
            "n_harmless": fit.n_harmless,
            **({"n_consecutive": fit.n_consecutive} if fit.n_consecutive is not None else {}),
            **({"flagged_under_any": done.flagged[mode][preset]} if fit.is_by_label else {}),
        }
        for mode, fit in done.modes.items()
        for preset, promise in fit.promises.items()
    ]
    return rows, {
        "adapter": str(done.folder),
        "in_place": is_in_place,
        "confidence": CONFIDENCE,
        "calibration_error": {
            mode: [
                {"method": one.method, "before": one.error_before, "after": one.error_after}
                for one in (() if mode in done.kept_maps else fit.maps)  # errors of other rows are not this run's
            ]
            for mode, fit in done.modes.items()
        },
        "n_skipped": len(done.bad),
        "n_unscored": done.n_unscored,
        "n_other_modes": done.n_other_modes,
        "refused": dict(done.refused),
        "n_copies": done.n_copies,
        "dropped_preset": done.dropped_preset,
        "n_learnt": done.n_learnt,
    }


def _tell(name: str, done: Recalibration, is_in_place: bool) -> None:
    """Say what was left out, and what cannot be known."""
    for row in done.bad:
        note(f"line {row.line} was left out: {row.problem}")
    if done.n_unscored:
        note(f"{done.n_unscored} rows could not be scored; they count as flagged")
    if done.n_other_modes:
        note(f"{done.n_other_modes} rows were left out: they are read in other modes than {', '.join(done.modes)}")
    for problem in done.refused.values():
        note(f"{problem} The mode is as it was")
    for mode, fit in done.modes.items():
        if fit.is_by_label:
            note(
                f"the promise is one for each label; under one or more, {done.flagged[mode]['default']:.1%} of the "
                f"harmless rows of mode {mode!r} are flagged"
            )
    if done.n_copies:
        note(f"{done.n_copies} harmless rows are copies of others; a promise takes distinct texts and counts each once")
    if done.dropped_preset:
        note(f"preset {done.dropped_preset!r} was dropped: no mode has it now, and each mode's own promise holds")
    for text in learnt_notes(name, done.n_learnt, "a promise rests on unseen rows"):
        note(text)
    if is_in_place:
        note(f"{done.folder} was changed in place")


def recalibrate(name_or_path: str, base: Base, traffic: Traffic, output: Path | None = None) -> Recalibration:
    """Fit an adapter's thresholds on ``traffic`` and write it, weights untouched, to the folder ``output``.

    Without ``output`` that is ``NAME-calibrated``.  A folder that exists is an InputError, unless it is the adapter's
    own: then it is changed in place.  Too few harmless rows for the rate are an InputError that says how many it takes,
    when no mode has enough or the mode was asked for; else the modes that have too few stay as they are.  A preset that
    the adapter was saved with is dropped where no mode has it any more.  An adapter that another run has changed
    meanwhile is an InputError, for its scores are others now.
    """
    source = find_adapter(name_or_path)
    loaded, guard = read_checksum(source), load_adapter(name_or_path, base)
    if guard.config.role != "guard":
        raise InputError(f"{guard.name!r} is an aligner and flags nothing; only guards are calibrated.")
    folder = output or Path(f"{guard.name}-calibrated")
    if folder.exists() and folder.resolve() != source.resolve():
        raise InputError(f"{folder} exists already. Choose another --output, or the adapter's own folder to change it.")
    examples, bad = _examples(traffic, guard.config.labels)
    examples, n_learnt = _unseen(examples, source, traffic)
    n_consecutive = _n_consecutive(guard, traffic)
    scored = _score(base, guard, examples, n_consecutive)
    fits, refused = _fits(scored, traffic, n_consecutive)
    fits, kept_maps = _with_old_maps(fits, guard.config.modes)
    for mode, fit in fits.items():
        guard.set_mode(mode, fit)
    dropped = _lost_preset(guard)
    if dropped is not None:
        guard = guard.with_preset(None)
    facts = {
        f"calibrated for {mode}": _fact(fit, traffic, dropped, scored.of(mode), mode in kept_maps)
        for mode, fit in fits.items()
    }
    copy_adapter(source, folder, guard.config, facts, loaded=loaded)
    benign, n_distinct = scored.benign
    return Recalibration(
        folder=folder,
        modes=fits,
        flagged={mode: _flagged(fit, scored.of(mode)) for mode, fit in fits.items()},
        bad=tuple(bad),
        n_unscored=int(np.isnan(scored.scores).any(1).sum()),
        n_other_modes=sum(mode not in fits for mode in scored.modes),
        refused=refused,
        n_copies=len(benign) - n_distinct,
        dropped_preset=dropped,
        n_learnt=n_learnt,
        kept_maps=kept_maps,
    )


def _lost_preset(guard: Adapter) -> Preset | None:
    """The guard's preset, where none of its modes has it."""
    chosen = guard.config.preset
    return None if any(chosen in found.presets for found in guard.config.modes.values()) else chosen


def _examples(traffic: Traffic, labels: tuple[str, ...]) -> tuple[list[Example], list[BadRow]]:
    examples, bad = load_kind(traffic.benign, labels, is_harmful=False)
    if traffic.harmful is not None:
        harmful, broken = load_kind(traffic.harmful, labels, is_harmful=True)
        _refuse_both(examples, harmful, traffic)
        examples, bad = [*examples, *harmful], [*bad, *broken]
    return examples, bad


def _refuse_both(benign: Sequence[Example], harmful: Sequence[Example], traffic: Traffic) -> None:
    """Raise an InputError where a text is given as harmless and as harmful."""
    line_of = {text_of(example): example.line for example in benign}
    both = [example for example in harmful if text_of(example) in line_of]
    if both:
        raise InputError(
            f"{len(both)} rows are given as harmless and as harmful: the first is line {line_of[text_of(both[0])]} of "
            f"{traffic.benign} and line {both[0].line} of {traffic.harmful}. Keep each text in one file."
        )


def _unseen(examples: Sequence[Example], source: Path, traffic: Traffic) -> tuple[list[Example], int | None]:
    """The rows that the guard in ``source`` did not learn from, and how many others there are (None: it cannot tell).

    No harmless row left is an InputError.
    """
    unseen, n_learnt = unseen_of(examples, load_learnt(source))
    if n_learnt is not None and all(any(row.labels) for row in unseen):
        raise InputError(
            f"The guard learnt from every row of {traffic.benign}, and a promise on rows that it knows is worth "
            "nothing. Give harmless rows that it has not seen."
        )
    return unseen, n_learnt


def _n_consecutive(guard: Adapter, traffic: Traffic) -> int | None:
    """Tokens of the stop rule to fit; None for the modes that have none."""
    if traffic.mode != "stream":
        return None
    before = guard.config.modes.get("stream")
    return traffic.n_consecutive or (before.n_consecutive if before is not None else None) or N_CONSECUTIVE


def _score(base: Base, guard: Adapter, examples: Sequence[Example], n_consecutive: int | None) -> _Scored:
    """What each row's mode compares with its threshold; with ``n_consecutive`` answers are read token by token."""
    labels = np.array([example.labels for example in examples], dtype=np.float64)
    texts = tuple(map(text_of, examples))
    if n_consecutive is None:
        found = score_conversations(base, [guard], [example.messages for example in examples])
        scores = np.array([row.by_guard[guard.name] for row in found], dtype=np.float64)
        return _Scored(scores, labels, tuple(row.mode_for(guard) for row in found), texts)
    answers = score_answers(base, guard, [example.messages for example in examples])
    modes: list[Mode] = [
        "stream" if answer.problem is None else "windowed" if place_of(example.messages) == "answer" else "prompt"
        for answer, example in zip(answers, examples, strict=True)
    ]
    scores = stream_scores(answers, n_consecutive, labels.shape[1])
    scores[np.isnan(scores)] = 1.0  # of rows in other modes
    return _Scored(scores, any_label(labels), tuple(modes), texts)


def _modes(scored: _Scored, traffic: Traffic) -> list[Mode]:
    """The modes to calibrate: the one that is asked for, or those of the harmless rows."""
    counts = Counter(mode for mode, labels in zip(scored.modes, scored.labels, strict=True) if not labels.any())
    if traffic.mode is None:
        return sorted(counts)
    if traffic.mode not in counts:
        found = ", ".join(f"{count:,} for {mode!r}" for mode, count in counts.items())
        raise InputError(
            f"{traffic.benign} holds no row that is read in mode {traffic.mode!r}; found {found}. Prompts end with a "
            "user's message, answers with an assistant's; windowed texts are longer than the base's context, and "
            "streams are answers that fit it."
        )
    return [traffic.mode]


def _fits(
    scored: _Scored, traffic: Traffic, n_consecutive: int | None
) -> tuple[dict[Mode, ModeCalibration], dict[Mode, str]]:
    """The calibration of every mode that can be promised, and why others cannot; at least one can."""
    fits, refused = dict[Mode, ModeCalibration](), dict[Mode, InputError]()
    for mode in _modes(scored, traffic):
        try:
            fits[mode] = _fit(scored.of(mode), traffic, n_consecutive)
        except InputError as error:
            refused[mode] = error
    if not fits:
        raise next(iter(refused.values()))
    return fits, {mode: str(error) for mode, error in refused.items()}


def _fit(scored: _Scored, traffic: Traffic, n_consecutive: int | None) -> ModeCalibration:
    """The calibration of one mode, by its rows; without harmful ones it has no map from score to probability."""
    benign, n_distinct = scored.benign
    once = counted_once(benign, scored.benign_texts)
    try:
        fit = fit_mode(scored.scores, scored.labels, benign=once, false_positive_rate=traffic.false_positive_rate)
    except InputError as error:
        rule = "" if n_consecutive is None else f", {n_consecutive} tokens in a row"
        how = ", each text counted once" if n_distinct < len(benign) else ""
        raise InputError(f"Mode {scored.modes[0]!r}{rule}{how}: {error}") from error
    return fit.model_copy(update={"n_consecutive": n_consecutive})


def _with_old_maps(
    fits: Mapping[Mode, ModeCalibration], before: Mapping[Mode, ModeCalibration]
) -> tuple[dict[Mode, ModeCalibration], frozenset[Mode]]:
    """The calibrations, with the old maps of modes that got none and whose scores are the same; and those modes."""
    kept = {
        mode: fit.model_copy(update={"maps": before[mode].maps})
        for mode, fit in fits.items()
        if not fit.maps and mode in before and before[mode].maps and before[mode].n_consecutive == fit.n_consecutive
    }
    return {**fits, **kept}, frozenset(kept)


def _flagged(fit: ModeCalibration, scored: _Scored) -> dict[str, float]:
    """By ``default`` and preset, the share of the harmless rows flagged under one label or more; NaN is flagged."""
    benign, _ = scored.benign
    return {name: float((~(benign < promise.threshold)).any(1).mean()) for name, promise in fit.promises.items()}


def _fact(fit: ModeCalibration, traffic: Traffic, dropped: Preset | None, scored: _Scored, has_old_maps: bool) -> str:
    """What card and provenance say of one mode and its rows."""
    benign, n_distinct = scored.benign
    copies = f" and {len(benign) - n_distinct:,} copies of them" if n_distinct < len(benign) else ""
    shares = ", ".join(f"{share:.1%} at {name}" for name, share in _flagged(fit, scored).items())
    by_label, counted = (
        (" under each label", f"under one or more {shares} (no promise); ") if fit.is_by_label else ("", "")
    )
    lost = f"preset {dropped!r} was dropped; " if dropped is not None else ""
    harmful = f", probabilities from {traffic.harmful.name} too" if traffic.harmful is not None and fit.maps else ""
    maps = ", probabilities as they were" if has_old_maps else harmful
    return (
        f"{fit.n_harmless:,} harmless rows of {traffic.benign.name}{copies}{maps}: at most "
        f"{100 * traffic.false_positive_rate:g}% flagged{by_label}, with {CONFIDENCE:.0%} confidence; {counted}{lost}"
        f"{datetime.now(UTC).date().isoformat()}"
    )
