"""``safety`` in the answers of a server that speaks as vLLM's does: whole and as a stream, chats and completions."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest

from engine_for_tests import MODELS, SLOTS, chat_entry, engine, slots_of
from safeside import Base
from safeside.vllm_plugin.answers import Answers
from safeside.vllm_plugin.middleware import SafetyMiddleware, Texts
from safeside.vllm_plugin.plan import CONFIG_KEY, EngineConfig

STEPS = [(0.2, 0.7, 0.25), (0.9, 0.1, 0.5), (0.4, 0.3, 0.5)]  # two labels and the strength, behind each token


def served(path: str, asked: Mapping[str, Any], config: EngineConfig, *, stream: bool = False) -> tuple[int, Any, Any]:
    """Status, what came back, and what the server inside was asked."""
    heard: list[Any] = []

    async def inside(scope: Any, receive: Any, send: Any) -> None:
        heard.append(json.loads((await receive())["body"]))
        is_chat = path.endswith("chat/completions")
        if not heard[-1].get("logprobs"):
            pieces: list[Any] = [None] * len(STEPS)
        elif is_chat:
            pieces = [{"content": [chat_entry(step)]} for step in STEPS]
        else:
            named = [{f"token_id:{slot}": value for slot, value in slots_of(step).items()} for step in STEPS]
            shown = {"tokens": ["token_id:9"], "text_offset": [10], "token_logprobs": [-0.5]}
            pieces = [{**shown, "top_logprobs": [row]} for row in named]
        if stream:
            await send(
                {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]}
            )
            for index, piece in enumerate(pieces):
                choice = {"index": 0, "delta": {}, "logprobs": piece, "finish_reason": "stop" if index == 2 else None}
                event = b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n"
                for part in (event[:20], event[20:]):
                    await send({"type": "http.response.body", "body": part, "more_body": True})
            await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})
            return
        logprobs = (
            None if pieces[0] is None else {key: [part for piece in pieces for part in piece[key]] for key in pieces[0]}
        )
        body = json.dumps({"choices": [{"index": 0, "logprobs": logprobs, "finish_reason": "stop"}]}).encode()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"1")]})
        await send({"type": "http.response.body", "body": body})

    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "http.request", "body": json.dumps(asked).encode()}

    async def send(message: Any) -> None:
        sent.append(message)

    vllm_config = SimpleNamespace(
        additional_config={CONFIG_KEY: config.as_json()},
        model_config=SimpleNamespace(tokenizer="nowhere"),
    )
    state = SimpleNamespace(vllm_config=vllm_config, openai_serving_models=MODELS)
    scope = {"type": "http", "method": "POST", "path": path, "headers": [], "app": SimpleNamespace(state=state)}
    asyncio.run(SafetyMiddleware(inside)(scope, receive, send))
    body = b"".join(message.get("body", b"") for message in sent[1:])
    if stream:
        lines = [line.removeprefix("data: ") for line in body.decode().split("\n\n") if line]
        assert lines.pop() == "[DONE]"
        return sent[0]["status"], [json.loads(line) for line in lines], heard[0]
    headers = dict(sent[0]["headers"])
    assert headers[b"content-length"] == str(len(body)).encode()
    return sent[0]["status"], json.loads(body), heard[0] if heard else None


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize("stream", [False, True])
def test_each_choice_gets_its_verdicts(path: str, stream: bool) -> None:
    status, answer, heard = served(path, {"safety": {"tokens": True, "strength": 0.5}}, engine(), stream=stream)
    assert status == 200
    assert heard["logprob_token_ids"] == list(SLOTS)
    assert heard["vllm_xargs"] == {"safeside_strength": "0.5"}
    assert "safety" not in heard
    choice = answer[-1]["choices"][0] if stream else answer["choices"][0]
    assert choice["logprobs"] is None
    safety = choice["safety"]
    told = [
        (verdict["stage"], verdict["label"], verdict["score"], verdict["flagged"]) for verdict in safety["verdicts"]
    ]
    assert told == [("prompt", "hate", pytest.approx(0.7), True), ("answer", "harm", pytest.approx(0.4), False)]
    assert safety["maximum"] == {"harm": pytest.approx(0.9)}
    assert safety["strength"] == pytest.approx(0.5)
    assert safety["unscored_tokens"] == 1
    assert [token["risk"]["harm"] for token in safety["tokens"]] == [pytest.approx(0.9), pytest.approx(0.4), None]
    assert [token["strength"] for token in safety["tokens"]] == pytest.approx([0.25, 0.5, 0.5])


def test_log_probabilities_that_were_asked_for_stay() -> None:
    _, answer, _ = served("/v1/chat/completions", {"logprobs": True}, engine())
    entries = answer["choices"][0]["logprobs"]["content"]
    assert [(entry["token"], entry["top_logprobs"]) for entry in entries] == [("hi", [])] * 3
    _, answer, _ = served("/v1/chat/completions", {"logprobs": True, "return_tokens_as_token_ids": True}, engine())
    assert answer["choices"][0]["logprobs"]["content"][0]["token"] == "token_id:9"


@pytest.mark.parametrize("stream", [False, True])
def test_tokens_of_completions_are_spelled_as_text(
    stream: bool, session_base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Texts, "tokenizer", session_base.tokenizer)
    text = session_base.tokenizer.decode([9])
    for asked, token, offsets in (
        ({"logprobs": 0}, text, [len(text) * index for index in range(3)]),
        ({"logprobs": 0, "return_tokens_as_token_ids": True}, "token_id:9", [10, 10, 10]),
    ):
        _, answer, _ = served("/v1/completions", asked, engine(), stream=stream)
        chunks = [choice["logprobs"] for part in (answer if stream else [answer]) for choice in part["choices"]]
        assert [token for chunk in chunks for token in chunk["tokens"]] == [token] * 3
        assert [offset for chunk in chunks for offset in chunk["text_offset"]] == offsets
        assert [value for chunk in chunks for value in chunk["token_logprobs"]] == [-0.5] * 3
        assert {chunk["top_logprobs"] for chunk in chunks} == {None}


def test_the_text_of_a_token_is_the_tokenizers(session_base: Base) -> None:
    texts = Texts(str(session_base.folder))
    assert [texts(f"token_id:{index}") for index in (9, 12)] == [session_base.tokenizer.decode([i]) for i in (9, 12)]


def test_scores_that_were_masked_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{__name__}.STEPS", [(math.nan, 0.1, 0.0)])
    _, answer, _ = served("/v1/completions", {}, engine())
    (verdict,) = answer["choices"][0]["safety"]["verdicts"]
    assert (verdict["score"], verdict["flagged"]) == (None, True)
    assert "failing closed" in verdict["reason"]


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"safety": {"strength": 3.0}}, "must lie in"),
        ({"safety": {"strength": {"policy": "ramp", "guard": "nobody"}}}, "asks guard 'nobody'"),
        ({"safety": {"policy": "minors"}}, "'strength' and 'tokens'"),
        ({"response_format": {"type": "json_object"}}, "masks the ids"),
        ({"logprobs": True, "top_logprobs": 3}, "cannot be asked for"),
        ({"echo": True}, "Beam search and echo"),
        ({"include_reasoning": False}, "'include_reasoning'"),
        ({"vllm_xargs": "x", "safety": {"strength": 1.0}}, "is an object"),
        ([1], "not a JSON object"),
    ],
)
def test_what_cannot_be_answered_is_a_bad_request(asked: Any, said: str) -> None:
    status, answer, heard = served("/v1/chat/completions", asked, engine())
    assert (status, heard) == (400, None)
    assert said in answer["error"]["message"]


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/messages", "/invocations"])
def test_ways_to_an_answer_without_verdicts_are_refused(path: str) -> None:
    status, answer, heard = served(path, {}, engine())
    assert (status, heard) == (400, None)
    assert "gives no verdicts" in answer["error"]["message"]


def test_a_choice_without_scores_is_flagged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Answers, "asked", {})
    _, answer, _ = served("/v1/completions", {}, engine())
    (verdict,) = answer["choices"][0]["safety"]["verdicts"]
    assert (verdict["score"], verdict["flagged"]) == (None, True)


def test_a_strength_without_an_aligner_is_a_bad_request() -> None:
    status, answer, _ = served("/v1/completions", {"safety": {"strength": 0.5}}, engine(aligner=False))
    assert status == 400
    assert "no aligner" in answer["error"]["message"]
