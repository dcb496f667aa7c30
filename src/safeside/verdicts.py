"""From scores to verdicts.  A score that is not a number fails closed."""

from __future__ import annotations

import math
from collections.abc import Sequence

from safeside.adapters.adapter import Adapter
from safeside.request import History
from safeside.types import Verdict

LORA_NOTE = "a LoRA on the base shifts the states that the guard reads"


def verdict_of(guard: Adapter, scores: Sequence[float], reason: str = "", notes: Sequence[str] = ()) -> Verdict:
    """The verdict of one guard on one text: its label nearest to (or farthest over) its threshold decides."""
    config = guard.config
    reasons = [reason] if reason else []
    margins = [score - threshold for score, threshold in zip(scores, guard.thresholds, strict=True)]
    broken = [index for index, score in enumerate(scores) if not math.isfinite(score)]
    worst = broken[0] if broken else max(range(len(margins)), key=margins.__getitem__)
    if broken:
        reasons.append("the score is not a number: failing closed")
    if config.allow_mismatch:
        reasons.append("the base's weights or chat template differ from those the guard was trained on")
    return Verdict(
        task=guard.name,
        score=scores[worst],
        threshold=guard.thresholds[worst],
        label=config.labels[worst],
        flagged=bool(broken) or margins[worst] >= 0,
        reason="; ".join([*reasons, *notes]),
    )


def prompt_and_answer_verdicts(
    guards: Sequence[Adapter],
    history: History,
    prompt_ends: Sequence[int],
    answer_lengths: Sequence[int] | None,
    base_has_lora: bool,
) -> list[tuple[Verdict, ...]]:
    """For each row, every guard's verdict on the prompt and, if there is one, on the answer (``reason`` says which)."""
    notes = [LORA_NOTE] if base_has_lora else []
    rows = []
    for row, end in enumerate(prompt_ends):
        last = int(history.positions[row].max()) if answer_lengths is None else end + answer_lengths[row] - 1
        places = [("prompt", end - 1)] + ([("answer", last)] if last >= end else [])
        verdicts = []
        for place, position in places:
            scores = history.at(history.scores, row, position).tolist()
            start = 0
            for guard in guards:
                stop = start + len(guard.config.labels)
                verdicts.append(verdict_of(guard, scores[start:stop], place, notes))
                start = stop
        rows.append(tuple(verdicts))
    return rows
