"""Scores of whole texts: one forward pass of the base serves every guard."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Literal

import torch

from safeside.adapters.adapter import Adapter
from safeside.attach import Attachment, attach
from safeside.base.families import is_updated
from safeside.base.model import Base
from safeside.chat import pad_batch
from safeside.errors import InputError
from safeside.guards.windows import windows
from safeside.types import Message, Mode, Verdict
from safeside.verdicts import LORA_NOTE, verdict_of

Conversation = Sequence[Message]
Combine = Literal["max", "min"]

_COMBINE: Mapping[Combine, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "max": torch.maximum,
    "min": torch.minimum,
}  # of either NaN is the result: a text of which one window cannot be scored fails closed
_NOT_A_NUMBER = "a score is not a number"  # verdicts say so themselves


@dataclass(frozen=True, slots=True)
class Scores:
    """Scores of one conversation."""

    by_guard: dict[str, tuple[float, ...]]
    """By guard, one score in [0, 1] for each label; NaN where it could not score."""
    n_windows: int = 1
    """Windows that the text was cut into, the most of any guard; 1 when it fits the base's context."""
    problem: str | None = None
    """Why it has no score, or one that is not a number; None when all is well."""
    windows_of: Mapping[str, int] = field(default_factory=dict)
    """Windows by guard, where they were cut for some guards' highest score and for others' lowest."""
    place: Mode = "prompt"
    """Whether a prompt or an answer ends the conversation."""

    def mode_for(self, guard: Adapter) -> Mode:
        """How the guard read it: in windows, or to the end of its ``place``."""
        return "windowed" if self.windows_of.get(guard.name, self.n_windows) > 1 else self.place


@torch.no_grad()
def score_conversations(
    base: Base,
    guards: Sequence[Adapter],
    conversations: Sequence[Conversation],
    *,
    batch_size: int = 32,
    advance: Callable[[int], None] = lambda count: None,
    attachment: Attachment | None = None,
) -> list[Scores]:
    """Scores in the order given.  Longer texts are scored in windows and the highest score of each label counts, or
    the lowest for a guard whose configuration says so.

    A conversation that cannot be encoded, or not cut to size, gets NaN and its ``problem``: no row stops the others.
    ``advance`` is told how many conversations were finished, for a progress bar.  ``attachment`` holds these guards
    already, aligners at strength 0 beside them perhaps; without it they are attached for the call.
    """
    modes = {guard.name: guard.config.windows for guard in guards}
    cuts = [_cuts(base, messages, sorted(set(modes.values()))) for messages in conversations]
    windows_of = [(row, ids, wanted) for row, cut in enumerate(cuts) for ids, wanted in cut.windows]
    windows_of.sort(key=lambda window: len(window[1]))
    waiting = [len(cut.windows) for cut in cuts]
    found: list[dict[str, torch.Tensor]] = [{} for _ in cuts]
    advance(waiting.count(0))
    with nullcontext(attachment) if attachment is not None else attach(base, guards=guards) as attached:
        for start in range(0, len(windows_of), batch_size):
            batch = windows_of[start : start + batch_size]
            ids, keep = pad_batch([encoded for _, encoded, _ in batch], base.tokenizer.pad_token_id or 0)
            base.decoder(input_ids=ids.to(base.device), attention_mask=keep.to(base.device), use_cache=False)
            last = keep.sum(1) - 1
            for name in modes:
                scores = attached.record.scores[name]
                ends = scores[torch.arange(len(batch)), last].float().cpu()  # (B, K)
                for (row, _, wanted), value in zip(batch, ends, strict=True):
                    if modes[name] in wanted:
                        found[row][name] = _COMBINE[modes[name]](found[row].get(name, value), value)
            for row, _, _ in batch:
                waiting[row] -= 1
                advance(int(waiting[row] == 0))
    return [
        replace(_scores(guards, by_guard, cut), place=place_of(messages))
        for by_guard, cut, messages in zip(found, cuts, conversations, strict=True)
    ]


@dataclass(frozen=True, slots=True)
class _Cut:
    """A conversation as windows that fit."""

    windows: list[tuple[tuple[int, ...], list[Combine]]]
    """Ids of each window, and the ways of combining that it was cut for."""
    counts: dict[Combine, int]
    """Windows for each way; none where the conversation cannot be cut for it."""
    problem: str | None
    """Why not."""


def _cuts(base: Base, messages: Conversation, modes: Sequence[Combine]) -> _Cut:
    cut: dict[tuple[tuple[int, ...], ...], list[Combine]] = defaultdict(list)
    counts: dict[Combine, int] = {}
    problem = None
    for mode in modes:
        try:
            encoded = tuple(base.encode(part).ids for part in windows(base, messages, combine=mode))
        except InputError as error:
            problem = str(error)
            continue
        counts[mode] = len(encoded)
        cut[encoded].append(mode)  # a text that fits is read once for all
    return _Cut([(ids, wanted) for encoded, wanted in cut.items() for ids in encoded], counts, problem)


def place_of(messages: Conversation) -> Mode:
    """``answer`` when an assistant's message ends the conversation, else ``prompt``."""
    return "answer" if messages and messages[-1].role == "assistant" else "prompt"


def unscored(guards: Sequence[Adapter], problem: str) -> Scores:
    """The scores of a text that no guard could score: NaN, with the reason."""
    return Scores(_no_scores(guards), problem=problem)


def _no_scores(guards: Sequence[Adapter]) -> dict[str, tuple[float, ...]]:
    return {guard.name: (math.nan,) * len(guard.config.labels) for guard in guards}


def _scores(guards: Sequence[Adapter], by_guard: dict[str, torch.Tensor], cut: _Cut) -> Scores:
    values = _no_scores(guards) | {name: tuple(scores.tolist()) for name, scores in by_guard.items()}
    is_finite = all(math.isfinite(score) for scores in values.values() for score in scores)
    return Scores(
        values,
        max(cut.counts.values(), default=1),
        cut.problem or (None if is_finite else _NOT_A_NUMBER),
        {guard.name: cut.counts.get(guard.config.windows, 1) for guard in guards},
    )


def judge(
    base: Base, guards: Sequence[Adapter], conversations: Sequence[Conversation], *, batch_size: int = 32
) -> list[tuple[Verdict, ...]]:
    """One verdict of each guard on the end of each conversation, in order; windowed texts say so in the reason."""
    scored = score_conversations(base, guards, conversations, batch_size=batch_size)
    return [verdicts_of(base, guards, row) for row in scored]


def verdicts_of(base: Base, guards: Sequence[Adapter], scores: Scores) -> tuple[Verdict, ...]:
    """One verdict of each guard on the conversation that ``scores`` belong to; without a score it is flagged."""
    return tuple(
        verdict_of(guard, scores.by_guard[guard.name], scores.mode_for(guard), _notes(base, guard, scores))
        for guard in guards
    )


def _notes(base: Base, guard: Adapter, scores: Scores) -> list[str]:
    is_scored = all(map(math.isfinite, scores.by_guard[guard.name]))
    n_windows = scores.windows_of.get(guard.name, scores.n_windows)
    which = "highest" if guard.config.windows == "max" else "lowest"
    return [
        *([scores.problem] if scores.problem and scores.problem != _NOT_A_NUMBER and not is_scored else []),
        *([f"{which} of {n_windows} windows"] if n_windows > 1 else []),
        *([LORA_NOTE] if is_updated(base.model) else []),
    ]
