"""Whether a conversation says anything: one that does not has nothing to judge, and so no score."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

from safeside.base.model import Base
from safeside.chat import check_messages
from safeside.errors import InputError
from safeside.types import Message, Role

_UNSEEN = {"Cc", "Cf", "Zs", "Zl", "Zp"}  # categories: control and zero-width characters, white space
_DRAWN_AS_NOTHING = {  # of other categories: joiners, fillers, the empty braille cell, variation selectors
    0x034F, 0x115F, 0x1160, 0x17B4, 0x17B5, 0x2800, 0x3164, 0xFFA0,
    *range(0x180B, 0x1810), *range(0xFE00, 0xFE10), *range(0xE0100, 0xE01F0),
}  # fmt: skip


def holds_text(messages: Sequence[Message]) -> bool:
    """Whether any message has a character to be seen: not white space, nor a control or zero-width character."""
    return any(
        unicodedata.category(character) not in _UNSEEN and ord(character) not in _DRAWN_AS_NOTHING
        for message in messages
        for character in message.content
    )


def refuse_empty(messages: Sequence[Message]) -> None:
    """Raise an InputError unless these are messages, of which one at least holds text."""
    check_messages(messages)
    if not holds_text(messages):
        raise InputError(
            "The conversation holds no text, only white space, control or zero-width characters if any; expected "
            "something to judge. Send some text."
        )


class BlankIds:
    """Ids of conversations whose messages are empty: all that a base's template or separators add by themselves."""

    def __init__(self, base: Base) -> None:
        self._base = base
        self._found: dict[tuple[Role, ...], tuple[int, ...] | None] = {}

    def refuse(self, messages: Sequence[Message], ids: tuple[int, ...]) -> None:
        """Raise an InputError where ``ids`` of ``messages`` hold no token of their contents."""
        roles = tuple(message.role for message in messages)
        if roles not in self._found:
            self._found[roles] = self._ids_of(roles)
        if ids == self._found[roles]:
            raise InputError(
                f"The tokenizer of {self._base.name} makes no token of this conversation's text; expected something to "
                "judge. Send other text."
            )

    def _ids_of(self, roles: Sequence[Role]) -> tuple[int, ...] | None:
        """None where the base's template refuses empty messages: then no conversation is read as one."""
        try:
            return self._base.encode([Message(role, "") for role in roles]).ids
        except InputError:
            return None
