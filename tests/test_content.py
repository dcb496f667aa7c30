"""What says nothing has nothing to judge; whatever can be seen says something."""

from __future__ import annotations

import pytest

from safeside import Message
from safeside.content import holds_text, refuse_empty
from safeside.errors import InputError

UNSEEN = [
    "",
    " ",
    "\n\t\r" * 90,
    "\u200b\u200b",
    "\x00\x00",
    "\xad",
    "\xa0\u3000",
    "\ufeff\u2060\u200d",
    "\ufe0f\u034f",
    "\u3164\u2800",
]


@pytest.mark.parametrize("text", UNSEEN)
def test_characters_that_are_not_seen_are_no_text(text: str) -> None:
    assert not holds_text([Message("user", text)])
    assert not holds_text([Message("system", text), Message("user", ""), Message("assistant", text)])
    with pytest.raises(InputError, match=r"holds no text.* Send some text\."):
        refuse_empty([Message("user", text)])


@pytest.mark.parametrize("text", ["a", "\u200ba", "0", ".", "\u4e2d", "\U0001f600\ufe0f", "<|pad|>", "\u0301e"])
def test_what_is_seen_is_text_wherever_it_stands(text: str) -> None:
    assert holds_text([Message("user", text)])
    refuse_empty([Message("user", ""), Message("assistant", text)])
    refuse_empty([Message("system", ""), Message("user", text)])


def test_a_conversation_of_no_message_or_of_something_else_is_refused_as_ever() -> None:
    with pytest.raises(InputError, match="at least one message"):
        refuse_empty([])
    with pytest.raises(InputError, match="list of Message"):
        refuse_empty("text")
