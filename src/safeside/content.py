"""Whether a conversation says anything: one that does not has nothing to judge, and so no score."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

from safeside.chat import check_messages
from safeside.errors import InputError
from safeside.types import Message

_UNSEEN = {"Cc", "Cf", "Zs", "Zl", "Zp"}  # categories: control and zero-width characters, white space
_DRAWN_AS_NOTHING = {  # of other categories: joiners, fillers, the empty braille cell, variation selectors
    0x034F, 0x115F, 0x1160, 0x17B4, 0x17B5, 0x2800, 0x3164, 0xFFA0,
    *range(0x180B, 0x1810), *range(0xFE00, 0xFE10), *range(0xE0100, 0xE01F0),
}  # fmt: skip


def is_seen(text: str) -> bool:
    """Whether a text has a character to be seen: not white space, nor a control or zero-width character."""
    return any(
        unicodedata.category(character) not in _UNSEEN and ord(character) not in _DRAWN_AS_NOTHING for character in text
    )


def holds_text(messages: Sequence[Message]) -> bool:
    """Whether any message has a character to be seen."""
    return any(is_seen(message.content) for message in messages)


def refuse_empty(messages: Sequence[Message]) -> None:
    """Raise an InputError unless these are messages, of which one at least holds text."""
    check_messages(messages)
    if not holds_text(messages):
        raise InputError(
            "The conversation holds no text, only white space, control or zero-width characters if any; expected "
            "something to judge. Send some text."
        )
