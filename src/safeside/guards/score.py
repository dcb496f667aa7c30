"""Scores of whole texts: one forward pass of the base serves every guard."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from safeside.adapters.adapter import Adapter
from safeside.attach import attach
from safeside.base.families import has_lora
from safeside.base.model import Base
from safeside.chat import pad_batch
from safeside.errors import InputError
from safeside.guards.windows import windows
from safeside.types import Message, Verdict
from safeside.verdicts import LORA_NOTE, verdict_of

Conversation = Sequence[Message]

_NOT_A_NUMBER = "a score is not a number"  # verdicts say so themselves


@dataclass(frozen=True, slots=True)
class Scores:
    """Scores of one conversation."""

    by_guard: dict[str, tuple[float, ...]]
    """By guard, one score in [0, 1] for each label; NaN where it could not score."""
    n_windows: int = 1
    """Windows that the text was cut into; 1 when it fits the base's context."""
    problem: str | None = None
    """Why it has no score, or one that is not a number; None when all is well."""


@torch.no_grad()
def score_conversations(
    base: Base,
    guards: Sequence[Adapter],
    conversations: Sequence[Conversation],
    *,
    batch_size: int = 32,
    advance: Callable[[int], None] = lambda count: None,
) -> list[Scores]:
    """Scores in the order given.  Longer texts are scored in windows and the highest score of each label counts.

    A conversation that cannot be encoded, or not cut to size, gets NaN and its ``problem``: no row stops the others.
    ``advance`` is told how many conversations were finished, for a progress bar.
    """
    parts = [_encoded_windows(base, messages) for messages in conversations]
    windows_of = [(row, ids) for row, (encoded, _) in enumerate(parts) for ids in encoded]
    windows_of.sort(key=lambda window: len(window[1]))
    waiting = [len(encoded) for encoded, _ in parts]
    best: list[dict[str, torch.Tensor]] = [{} for _ in parts]
    advance(waiting.count(0))
    with attach(base, guards=guards) as attachment:
        for start in range(0, len(windows_of), batch_size):
            batch = windows_of[start : start + batch_size]
            ids, keep = pad_batch([encoded for _, encoded in batch], base.tokenizer.pad_token_id or 0)
            base.decoder(input_ids=ids.to(base.device), attention_mask=keep.to(base.device), use_cache=False)
            last = keep.sum(1) - 1
            for name, scores in attachment.record.scores.items():
                ends = scores[torch.arange(len(batch)), last].float().cpu()  # (B, K)
                for (row, _), value in zip(batch, ends, strict=True):
                    best[row][name] = torch.maximum(best[row].get(name, value), value)  # NaN wins: fails closed
            for row, _ in batch:
                waiting[row] -= 1
                advance(int(waiting[row] == 0))
    return [
        unscored(guards, problem) if problem else _scores(row, len(encoded))
        for row, (encoded, problem) in zip(best, parts, strict=True)
    ]


def unscored(guards: Sequence[Adapter], problem: str) -> Scores:
    """The scores of a text that no guard could score: NaN, with the reason."""
    return Scores({guard.name: (math.nan,) * len(guard.config.labels) for guard in guards}, problem=problem)


def _scores(by_guard: dict[str, torch.Tensor], n_windows: int) -> Scores:
    is_finite = all(bool(values.isfinite().all()) for values in by_guard.values())
    values = {name: tuple(values.tolist()) for name, values in by_guard.items()}
    return Scores(values, n_windows, None if is_finite else _NOT_A_NUMBER)


def _encoded_windows(base: Base, messages: Conversation) -> tuple[list[tuple[int, ...]], str | None]:
    """Ids of every window of a conversation, or none and why it cannot be encoded."""
    try:
        return [base.encode(part).ids for part in windows(base, messages)], None
    except InputError as error:
        return [], str(error)


def judge(
    base: Base, guards: Sequence[Adapter], conversations: Sequence[Conversation], *, batch_size: int = 32
) -> list[tuple[Verdict, ...]]:
    """One verdict of each guard on the end of each conversation, in order; windowed texts say so in the reason."""
    scored = score_conversations(base, guards, conversations, batch_size=batch_size)
    return [verdicts_of(base, guards, row) for row in scored]


def verdicts_of(base: Base, guards: Sequence[Adapter], scores: Scores) -> tuple[Verdict, ...]:
    """One verdict of each guard on the conversation that ``scores`` belong to; without a score it is flagged."""
    notes = [
        *([scores.problem] if scores.problem and scores.problem != _NOT_A_NUMBER else []),
        *([f"highest of {scores.n_windows} windows"] if scores.n_windows > 1 else []),
        *([LORA_NOTE] if has_lora(base.model) else []),
    ]
    return tuple(verdict_of(guard, scores.by_guard[guard.name], notes=notes) for guard in guards)
