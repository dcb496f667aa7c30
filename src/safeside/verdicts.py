"""From scores to verdicts.  A score that is not a number fails closed."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from safeside.adapters.adapter import Adapter
from safeside.request import History
from safeside.types import Mode, Verdict

LORA_NOTE = "a LoRA or a gene in the base shifts the states that the guard reads"

_MISMATCH_NOTE = "the base's weights or chat template differ from those the guard was trained on"


def verdict_of(guard: Adapter, scores: Sequence[float], mode: Mode = "prompt", notes: Sequence[str] = ()) -> Verdict:
    """The verdict of one guard on one text that was read in ``mode``.

    Its label nearest to (or farthest over) its threshold decides.  ``notes`` go into the reason.
    """
    config = guard.config
    thresholds = guard.thresholds_in(mode)
    margins = [score - threshold for score, threshold in zip(scores, thresholds, strict=True)]
    broken = [index for index, score in enumerate(scores) if not math.isfinite(score)]
    worst = broken[0] if broken else max(range(len(margins)), key=margins.__getitem__)
    own_notes = [
        *(["the score is not a number: failing closed"] if broken else []),
        *([_MISMATCH_NOTE] if config.allow_mismatch else []),
        *([note] if (note := guard.fallback_note(mode)) else []),
    ]
    return Verdict(
        task=guard.name,
        score=scores[worst],
        threshold=thresholds[worst],
        label=config.labels[worst],
        flagged=bool(broken) or margins[worst] >= 0,
        mode=mode,
        probability=math.nan if broken else float(guard.probabilities(np.array([scores]), mode)[0, worst]),
        reason="; ".join([*own_notes, *notes]),
    )


def prompt_and_answer_verdicts(
    guards: Sequence[Adapter],
    history: History,
    prompt_ends: Sequence[int],
    answer_lengths: Sequence[int] | None,
    base_has_lora: bool,
) -> list[tuple[Verdict, ...]]:
    """For each row, every guard's verdict on the prompt and, if there is one, on the answer (``mode`` says which)."""
    notes = [LORA_NOTE] if base_has_lora else []
    rows = []
    for row, end in enumerate(prompt_ends):
        last = int(history.positions[row].max()) if answer_lengths is None else end + answer_lengths[row] - 1
        places: list[tuple[Mode, int]] = [("prompt", end - 1), ("answer", last)]
        verdicts = []
        for mode, position in places[: 2 if last >= end else 1]:
            scores = history.at(history.scores, row, position).tolist()
            start = 0
            for guard in guards:
                stop = start + len(guard.config.labels)
                verdicts.append(verdict_of(guard, scores[start:stop], mode, notes))
                start = stop
        rows.append(tuple(verdicts))
    return rows
