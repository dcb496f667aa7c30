"""Ids that hold no token of a conversation's contents say nothing."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from safeside import Base, Message
from safeside.errors import InputError
from safeside.guards.blank import BlankIds


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_ids_without_a_token_of_the_contents_are_refused(tiny_family: Callable[[str], Base], family: str) -> None:
    base = tiny_family(family)
    blank, talk = BlankIds(base), [Message("user", "hi"), Message("assistant", "no")]
    empty = [Message(message.role, "") for message in talk]
    blank.refuse(talk, base.encode(talk).ids)
    blank.refuse([talk[0], empty[1]], base.encode([talk[0], empty[1]]).ids)
    with pytest.raises(InputError, match="makes no token of this conversation"):
        blank.refuse(talk, base.encode(empty).ids)


def test_a_template_that_refuses_empty_messages_reads_none_as_one(tiny_base: Base) -> None:
    base = tiny_base
    before = base.tokenizer.chat_template
    base.tokenizer.chat_template = "{% if not messages[0].content %}{{ raise_exception('empty') }}{% endif %}" + before
    try:
        blank, (message,) = BlankIds(base), [Message("user", "hi")]
        blank.refuse([message], base.encode([message]).ids)
    finally:
        base.tokenizer.chat_template = before
