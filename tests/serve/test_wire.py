"""Requests as the official client makes them."""

from __future__ import annotations

import pytest
from openai.types.chat import ChatCompletion
from pydantic import ValidationError

from safeside.moderation import ModerationRequest, Record
from safeside.serve.replies import Reply
from safeside.serve.wire import ChatRequest, CompletionRequest, DryRunRequest, LoadRequest


def test_an_answer_can_be_sent_back_as_history() -> None:
    """The client's ``messages.append(answer.choices[0].message)`` sends every field that the answer had."""
    whole = Reply("chat", "tiny", "1").whole("Hello.", "stop", None, {})
    said = ChatCompletion.model_validate(whole).choices[0].message.model_dump(exclude_unset=True)
    turns = [{"role": "user", "content": "Hi"}, said, {"role": "user", "content": "And?"}]
    assert ChatRequest.model_validate({"model": "tiny", "messages": turns}).messages[1].content == "Hello."
    with pytest.raises(ValidationError, match="refusal"):
        ChatRequest.model_validate({"model": "tiny", "messages": [{**said, "refusal": "No."}]})


TURNS = [{"role": "user", "content": "Hi"}]
REQUESTS: list[tuple[type, dict[str, object]]] = [
    (ChatRequest, {"model": "tiny", "messages": TURNS}),
    (CompletionRequest, {"model": "tiny", "prompt": "Hi"}),
    (ModerationRequest, {"input": "Hi"}),
    (DryRunRequest, {"messages": TURNS}),
    (LoadRequest, {"name": "calm", "path": "calm"}),
]


@pytest.mark.parametrize(("kind", "body"), REQUESTS)
def test_a_null_is_as_if_it_were_left_out(kind: type[Record], body: dict[str, object]) -> None:
    nulls = dict.fromkeys([*kind.model_fields, "tools", "response_format", "logit_bias"])
    assert kind.model_validate({**nulls, **body}) == kind.model_validate(body)
    for name in body:
        with pytest.raises(ValidationError, match="Field required"):
            kind.model_validate({**body, name: None})


@pytest.mark.parametrize(
    ("prompt", "told"),
    [(["a", "b"], "expected one prompt; got a list of 2"), ([], "got a list of 0"), ([5], "token ids are not taken")],
)
def test_one_request_has_one_prompt(prompt: list[object], told: str) -> None:
    with pytest.raises(ValidationError) as raised:
        CompletionRequest.model_validate({"model": "tiny", "prompt": prompt})
    (error,) = raised.value.errors()
    assert (error["loc"], told in error["msg"]) == (("prompt",), True)
    assert CompletionRequest.model_validate({"model": "tiny", "prompt": ["a"]}).text == "a"


def test_nulls_deeper_down_are_left_out_too() -> None:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "Hi", "tool_calls": None}], "stream": True}
    nulls = {"safety": {"tokens": None, "policy": None}, "stream_options": {"include_usage": None}}
    found = ChatRequest.model_validate({**body, **nulls, "moderation": {"policy": None}})
    assert (found.safety.tokens, found.wanted.mode) == (False, None)
    with pytest.raises(ValidationError, match="tools"):
        ChatRequest.model_validate({**body, "tools": []})
