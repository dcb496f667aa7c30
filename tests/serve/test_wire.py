"""Requests as the official client makes them."""

from __future__ import annotations

import pytest
from openai.types.chat import ChatCompletion
from pydantic import ValidationError

from safeside.serve.replies import Reply
from safeside.serve.wire import ChatRequest


def test_an_answer_can_be_sent_back_as_history() -> None:
    """The client's ``messages.append(answer.choices[0].message)`` sends every field that the answer had."""
    whole = Reply("chat", "tiny", "1").whole("Hello.", "stop", None, {})
    said = ChatCompletion.model_validate(whole).choices[0].message.model_dump(exclude_unset=True)
    turns = [{"role": "user", "content": "Hi"}, said, {"role": "user", "content": "And?"}]
    assert ChatRequest.model_validate({"model": "tiny", "messages": turns}).messages[1].content == "Hello."
    with pytest.raises(ValidationError, match="refusal"):
        ChatRequest.model_validate({"model": "tiny", "messages": [{**said, "refusal": "No."}]})
