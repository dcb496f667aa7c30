"""Scores of whole texts: one forward pass of the base serves every guard."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from safeside.adapters.adapter import Adapter
from safeside.attach import attach
from safeside.base.model import Base
from safeside.chat import pad_batch
from safeside.guards.windows import windows
from safeside.types import Message, Verdict
from safeside.verdicts import verdict_of

Conversation = Sequence[Message]


@dataclass(frozen=True, slots=True)
class Scores:
    """Scores of one conversation by guard (K values each), and how many windows it took."""

    by_guard: dict[str, tuple[float, ...]]
    n_windows: int = 1


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

    ``advance`` is told how many conversations were finished, for a progress bar.
    """
    parts = [(row, part) for row, messages in enumerate(conversations) for part in windows(base, messages)]
    encoded = [base.encode(part).ids for _, part in parts]
    order = sorted(range(len(parts)), key=lambda index: len(encoded[index]))
    best: list[dict[str, torch.Tensor]] = [{} for _ in conversations]
    n_windows = [0] * len(conversations)
    with attach(base, guards=guards) as attachment:
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            ids, keep = pad_batch([encoded[index] for index in batch], base.tokenizer.pad_token_id or 0)
            base.decoder(input_ids=ids.to(base.device), attention_mask=keep.to(base.device), use_cache=False)
            last = keep.sum(1) - 1
            for name, scores in attachment.record.scores.items():
                ends = scores[torch.arange(len(batch)), last].cpu()  # (B, K)
                for index, value in zip(batch, ends, strict=True):
                    row = parts[index][0]
                    seen = best[row].get(name)
                    best[row][name] = value if seen is None else torch.maximum(seen, value)  # NaN wins: fails closed
            for index in batch:
                n_windows[parts[index][0]] += 1
            advance(len({parts[index][0] for index in batch}))
    return [
        Scores({name: tuple(value.tolist()) for name, value in row.items()}, count)
        for row, count in zip(best, n_windows, strict=True)
    ]


def judge(
    base: Base, guards: Sequence[Adapter], conversations: Sequence[Conversation], *, batch_size: int = 32
) -> list[tuple[Verdict, ...]]:
    """One verdict of each guard on each conversation; windowed texts say so in the reason."""
    scored = score_conversations(base, guards, conversations, batch_size=batch_size)
    return [
        tuple(
            verdict_of(
                guard,
                row.by_guard[guard.name],
                notes=[f"highest of {row.n_windows} windows"] if row.n_windows > 1 else [],
            )
            for guard in guards
        )
        for row in scored
    ]
