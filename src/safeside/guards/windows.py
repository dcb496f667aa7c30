"""Texts longer than the base's context: overlapping windows, never a cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from safeside.base.model import Base
from safeside.errors import InputError
from safeside.types import Message

_OVERLAP = 0.25  # share of a window that the next one repeats, so that a phrase is whole in one of them


def windows(base: Base, messages: Sequence[Message], limit: int | None = None) -> list[tuple[Message, ...]]:
    """The conversation as one or more conversations that each fit ``limit`` tokens (the base's context by default).

    Only the longest message is cut, at token borders, with a quarter of overlap; the others are repeated in every
    window.  A conversation whose other messages alone do not fit is an InputError.
    """
    limit = base.max_tokens if limit is None else limit
    n_tokens = len(base.encode(messages).ids)
    if n_tokens <= limit:
        return [tuple(messages)]
    index = max(range(len(messages)), key=lambda place: len(messages[place].content))
    text = messages[index].content
    room = limit - (n_tokens - _count(base, text)) - 8  # a few tokens spare: borders tokenise differently when cut
    if room < 32:
        raise InputError(
            f"The conversation has {n_tokens} tokens for a context of {limit}, and its longest message cannot be cut "
            "small enough. Score its messages apart."
        )
    pieces = _cut(base, text, room)
    return [
        tuple(replace(message, content=piece) if place == index else message for place, message in enumerate(messages))
        for piece in pieces
    ]


def _count(base: Base, text: str) -> int:
    return len(base.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _cut(base: Base, text: str, room: int) -> list[str]:
    """Overlapping pieces of at most ``room`` tokens that together cover every character of ``text``."""
    offsets = base.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)[
        "offset_mapping"
    ]
    stride = max(1, int(room * (1 - _OVERLAP)))
    pieces = []
    for start in range(0, len(offsets), stride):
        stop = min(start + room, len(offsets))
        first = 0 if start == 0 else offsets[start][0]
        last = len(text) if stop == len(offsets) else offsets[stop][0]
        pieces.append(text[first:last])
        if stop == len(offsets):
            break
    return [piece for piece in pieces if piece.strip()]
