"""Texts longer than the base's context: overlapping windows, never a cut."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from safeside.base.model import Base
from safeside.errors import InputError
from safeside.types import Message

_OVERLAP = 0.25  # share of a window that the next one repeats, so that a phrase is whole in one of them
_LEAST_ROOM = 32  # tokens: smaller windows would say nothing


def windows(base: Base, messages: Sequence[Message], limit: int | None = None) -> list[tuple[Message, ...]]:
    """The conversation as one or more conversations that each fit ``limit`` tokens (the base's context by default).

    Only the longest message is cut, with a quarter of overlap; the others are repeated in every window.  A conversation
    whose other messages leave too little room is an InputError.
    """
    limit = base.max_tokens if limit is None else limit
    n_tokens = len(base.encode(messages).ids)
    if n_tokens <= limit:
        return [tuple(messages)]
    index = max(range(len(messages)), key=lambda place: len(messages[place].content))
    text = messages[index].content

    def window(piece: str) -> tuple[Message, ...]:
        return tuple(
            replace(message, content=piece) if place == index else message for place, message in enumerate(messages)
        )

    def n_spare(piece: str) -> int:
        return limit - len(base.encode(window(piece)).ids)

    if n_spare(text.strip()[:1]) < _LEAST_ROOM:
        raise InputError(
            f"The conversation has {n_tokens} tokens for a context of {limit}, and its longest message cannot be cut "
            "small enough. Score its messages apart."
        )
    pieces = _cut(text, lambda piece: n_spare(piece) >= 0, len(text) * limit // n_tokens)
    return [window(piece) for piece in pieces if piece.strip()] or [window(pieces[0])]


def _cut(text: str, fits: Callable[[str], bool], size: int) -> list[str]:
    """Overlapping pieces that fit and together cover every character of ``text``; ``size`` is their likely length."""
    pieces, start = [], 0
    while True:
        size = _longest(text, start, fits, size)
        pieces.append(text[start : start + size])
        if start + size == len(text):
            return pieces
        start += max(1, int(size * (1 - _OVERLAP)))


def _longest(text: str, start: int, fits: Callable[[str], bool], guess: int) -> int:
    """How many characters from ``start`` fit: the most, to within a sixteenth, and at least one."""
    left = len(text) - start
    low, high = 1, min(max(guess, 1), left)
    while fits(text[start : start + high]):
        if high == left:
            return left
        low, high = high, min(left, high + high // 4 + 1)
    while high - low > 1 + low // 16:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(text[start : start + middle]) else (low, middle)
    return low
