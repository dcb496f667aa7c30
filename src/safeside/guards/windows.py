"""Texts longer than the base's context: overlapping windows, never a cut."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from safeside.base.model import Base
from safeside.errors import InputError
from safeside.types import Combine, Message

_OVERLAP = 0.25  # share of a window that the next one repeats, so that a phrase is whole in one of them
_LEAST_ROOM = 32  # tokens: smaller windows would say nothing


def windows(
    base: Base, messages: Sequence[Message], limit: int | None = None, combine: Combine = "max"
) -> list[tuple[Message, ...]]:
    """The conversation as one or more conversations that each fit ``limit`` tokens (the base's context by default).

    Only the longest message is cut, with a quarter of overlap; the others are repeated in every window.  Where that
    leaves too little room, each window holds as many whole exchanges (a user's message and what follows it) as fit,
    about a quarter of them from the window before, after the system message.  In a single exchange without room all
    long messages are cut, and a window shows parts that are equally far into them; one of too many messages for that
    is an InputError.  Where the lowest score of the windows counts (``min``), the last message is a claim: it is never
    cut, stands in every window, and one that leaves no room is an InputError.
    """
    limit = base.max_tokens if limit is None else limit
    n_tokens = len(base.encode(messages).ids)
    if n_tokens <= limit:
        return [tuple(messages)]
    index = _longest_of(messages if combine == "max" else messages[:-1])
    text = messages[index].content

    def window(piece: str) -> tuple[Message, ...]:
        return tuple(
            replace(message, content=piece) if place == index else message for place, message in enumerate(messages)
        )

    def n_spare(piece: str) -> int:
        return limit - len(base.encode(window(piece)).ids)

    if n_spare(text.strip()[:1]) < _LEAST_ROOM:
        exchanges = _exchanges(messages)
        if combine == "max" and len(exchanges) > 1:
            return _runs(base, exchanges, [message for message in messages[:1] if message.role == "system"], limit)
        if combine == "max" and (found := _side_by_side(base, messages, limit)):
            return found
        raise InputError(
            f"The conversation has {n_tokens} tokens for a context of {limit}, and its longest message "
            f"{'before the claim ' if combine == 'min' else ''}cannot be cut small enough. Score its messages apart."
        )
    pieces = _cut(text, lambda piece: n_spare(piece) >= 0, len(text) * limit // n_tokens)
    return [window(piece) for piece in pieces if piece.strip()] or [window(pieces[0])]


def _side_by_side(base: Base, messages: Sequence[Message], limit: int) -> list[tuple[Message, ...]]:
    """Windows that show a part of every long message, each as far into it as into the others; short ones are whole.

    Every part of each message is in some window, but not beside every part of the others: that would take the product
    of their numbers.  Nothing where the room for a part would be too little.
    """
    bare = [replace(message, content=message.content.strip()[:1]) for message in messages]
    n_bare = len(base.encode(bare).ids)

    def size(place: int, piece: str) -> int:
        some = [*bare[:place], replace(bare[place], content=piece), *bare[place + 1 :]]
        return len(base.encode(some).ids) - n_bare

    sizes = [size(place, message.content) for place, message in enumerate(messages)]
    share = _fair_share(sizes, limit - n_bare)

    def parts_of(place: int) -> list[str]:
        text = messages[place].content
        if sizes[place] <= share:
            return [text]
        found = _cut(text, lambda piece: size(place, piece) <= share, len(text) * share // sizes[place])
        return [piece for piece in found if piece.strip()] or found[:1]

    parts = [parts_of(place) for place in range(len(messages))] if share >= 2 * _LEAST_ROOM else [[]]
    n_windows = max(map(len, parts))
    if n_windows < 2:  # no room, or nothing that could be cut
        return []
    shown = [[some[number * len(some) // n_windows] for some in parts] for number in range(n_windows)]
    found = [[replace(turn, content=part) for turn, part in zip(messages, some, strict=True)] for some in shown]
    # Together parts may take a token more than each by itself, and are cut again.
    return [window for some in found for window in windows(base, some, limit)]


def _fair_share(sizes: Sequence[int], room: int) -> int:
    """The most that each of ``sizes`` may take of ``room`` where those that take less leave the rest to the others."""
    left, n_left = room, len(sizes)
    for size in sorted(sizes):
        if size * n_left > left:
            break
        left, n_left = left - size, n_left - 1
    return left // max(n_left, 1)


def _exchanges(messages: Sequence[Message]) -> list[list[Message]]:
    """The turns after a first system message, cut before each user's message."""
    turns = messages[1:] if messages[0].role == "system" else messages
    found: list[list[Message]] = []
    for message in turns:
        if message.role == "user" or not found:
            found.append([])
        found[-1].append(message)
    return found


def _runs(
    base: Base, exchanges: Sequence[Sequence[Message]], system: Sequence[Message], limit: int
) -> list[tuple[Message, ...]]:
    """Windows of whole exchanges, as many as fit; one that does not fit by itself is cut."""

    def joined(start: int, stop: int) -> tuple[Message, ...]:
        return (*system, *(message for exchange in exchanges[start:stop] for message in exchange))

    def fits(start: int, stop: int) -> bool:
        return len(base.encode(joined(start, stop)).ids) <= limit

    found: list[tuple[Message, ...]] = []
    start, stop, size = 0, 0, 0
    while stop < len(exchanges):
        if not fits(start, stop + 1):
            start = stop  # beside the next exchange nothing of the window before has room
        first, span = stop + 1, range(stop + 1, len(exchanges) + 1)
        stop = _last_that_fits(span, partial(fits, start), start + size)
        size = stop - start  # the next window will hold about as many
        found += [joined(start, stop)] if stop > first else windows(base, joined(start, stop), limit)
        start = max(start + 1, stop - max(1, round((stop - start) * _OVERLAP)))
    return found


def _last_that_fits(span: range, fits: Callable[[int], bool], guess: int) -> int:
    """The last number of ``span`` up to which all fit, or its first; few are tried when ``guess`` is near it.

    What fits goes on fitting with less, so it is looked for around the guess in steps that double, then by halves.
    """
    low, high, step = span[0], span[-1] + 1, 1  # low is taken to fit, high not to
    probe = min(max(guess, low + 1), high - 1)
    while low < probe < high:
        if fits(probe):
            low, probe = probe, probe + step
        else:
            high, probe = probe, probe - step
        step *= 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _longest_of(messages: Sequence[Message]) -> int:
    if not messages:
        raise InputError(
            "A claim that is longer than the context cannot be checked without a document: a part of it says nothing "
            "of the rest. Send the document as a message of its own before the claim."
        )
    return max(range(len(messages)), key=lambda place: len(messages[place].content))


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
