"""The ids that a base makes of a conversation that says nothing."""

from __future__ import annotations

from collections.abc import Sequence

from safeside.base.model import Base
from safeside.errors import InputError
from safeside.types import Message, Role


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
