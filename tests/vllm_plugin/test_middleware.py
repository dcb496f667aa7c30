"""``safety`` in the answers of a server that speaks as vLLM's does: whole and as a stream, chats and completions."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from engine_for_tests import SLOTS, application, chat_entry, engine, slots_of
from safeside import Base
from safeside.vllm_plugin.answers import Answers
from safeside.vllm_plugin.middleware import SafetyMiddleware, Texts
from safeside.vllm_plugin.plan import EngineConfig

STEPS = [(0.2, 0.7, 0.25), (0.9, 0.1, 0.5), (0.4, 0.3, 0.5)]  # two labels and the strength, behind each token


class Workers:
    """vLLM's client, of two ranks that keep the same scores."""

    def __init__(self, rows: Sequence[Sequence[float]] = STEPS, *, fails: bool = False) -> None:
        self.rows, self.fails = [list(row) for row in rows], fails
        self.calls: list[tuple[str, Any]] = []

    async def collective_rpc(self, method: str, args: tuple[str, ...]) -> list[Any]:
        self.calls.append((method, *args))
        if self.fails:
            raise RuntimeError("a worker has died")
        return [self.rows, self.rows]


def served(
    path: str,
    asked: Mapping[str, Any],
    config: EngineConfig,
    *,
    stream: bool = False,
    workers: Workers | None = None,
    **server: Any,
) -> tuple[int, Any, Any]:
    """Status, what came back, and what the server inside was asked."""
    heard: list[Any] = []

    async def inside(scope: Any, receive: Any, send: Any) -> None:
        heard.append(json.loads((await receive())["body"]))
        is_chat = path.endswith("chat/completions")
        assert not (workers and workers.calls), "nothing is read before there is an answer"
        has_slots = "logprob_token_ids" in heard[-1]
        if not heard[-1].get("logprobs"):
            pieces: list[Any] = [None] * len(STEPS)
        elif is_chat:
            entries = [chat_entry(step) for step in STEPS]
            pieces = [{"content": [entry if has_slots else {**entry, "top_logprobs": []}]} for entry in entries]
        else:
            found = [slots_of(step) if has_slots else {9: -0.5} for step in STEPS]
            named = [{f"token_id:{token}": value for token, value in row.items()} for row in found]
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
        length = (b"content-length", str(len(body)).encode())
        await send({"type": "http.response.start", "status": 200, "headers": [length]})
        await send({"type": "http.response.body", "body": body})

    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "http.request", "body": json.dumps(asked).encode()}

    async def send(message: Any) -> None:
        sent.append(message)

    app = application(config, client=workers, **server)
    scope = {"type": "http", "method": "POST", "path": path, "headers": [], "app": app}
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
        ({"response_format": {"type": "json_object"}, "n": 2}, "tell neither several answers of one request apart"),
        ({"structured_outputs": {"regex": "a"}, "prompt": ["a", "b"]}, "Ask for n=1 and one prompt"),
        ({"structured_outputs": {"regex": "a"}, "prompt": [[1, 2], [3]]}, "Ask for n=1 and one prompt"),
        ({"structured_outputs": {"regex": "a"}, "prompt_embeds": ["a"]}, "Ask for n=1 and one prompt"),
        ({"tools": [{}], "tool_choice": "required", "n": 2}, "'tool_choice' masks the ids"),
        ({"vllm_xargs": {"safeside_tag": "a"}}, "safeside_tag is given by the server alone"),
        ({"logprobs": True, "top_logprobs": 3}, "cannot be asked for"),
        ({"echo": True}, "Beam search and echo"),
        ({"include_reasoning": False}, "'include_reasoning'"),
        ({"vllm_xargs": "x", "safety": {"strength": 1.0}}, "is an object"),
        ([1], "not a JSON object"),
        ({"messages": [{"role": "user", "content": " "}, {"role": "assistant", "content": None}]}, "holds no text"),
        ({"messages": [{"role": "user", "content": "", "name": "bob", "refusal": None}]}, "holds no text"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "\u200b"}]}]}, "holds no text"),
        ({"prompt": " "}, "holds no text"),
        ({"prompt": ["a", ""]}, "holds no text"),
    ],
)
def test_what_cannot_be_answered_is_a_bad_request(asked: Any, said: str) -> None:
    status, answer, heard = served("/v1/chat/completions", asked, engine())
    assert (status, heard) == (400, None)
    assert said in answer["error"]["message"]


def test_messages_of_other_things_than_text_are_left_to_the_server() -> None:
    pictures = [{"type": "image_url", "image_url": {"url": "x"}}]
    called = {"role": "assistant", "content": "", "tool_calls": [{}]}
    empty = {"messages": [{"role": "user", "content": ""}]}
    for asked in (
        {"messages": [{"role": "user", "content": pictures}]},
        {"messages": [called]},
        {**empty, "documents": [{"text": "a"}]},
        {"prompt": [1, 2]},
        {"prompt": [[1, 2]]},
    ):
        assert served("/v1/chat/completions", asked, engine())[0] == 200


HELD: dict[str, Any] = {"response_format": {"type": "json_schema", "json_schema": {}}}


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize("stream", [False, True])
def test_what_a_grammar_holds_gets_what_the_worker_kept(path: str, stream: bool) -> None:
    """The slow twin is the same answer with its scores in the slots; rows behind the last token are not read."""
    workers = Workers([*STEPS, (math.nan,) * 3])
    asked = {"safety": {"tokens": True, "strength": 0.5}}
    status, answer, heard = served(path, {**asked, **HELD}, engine(), stream=stream, workers=workers)
    _, wanted, _ = served(path, asked, engine(), stream=stream)
    assert status == 200
    assert "logprob_token_ids" not in heard
    tag = heard["vllm_xargs"]["safeside_tag"]
    assert workers.calls == [("take_safeside_scores", tag)], "once, for the last chunk"
    assert heard["vllm_xargs"] == {"safeside_strength": "0.5", "safeside_tag": tag}
    found, twin = (part[-1]["choices"][0] if stream else part["choices"][0] for part in (answer, wanted))
    assert rounded(found) == rounded(twin)
    assert not stream or not any("safety" in chunk["choices"][0] for chunk in answer[:-1])


def rounded(choice: Any) -> Any:
    """Differences of log-probabilities are not exact."""
    return json.loads(json.dumps(choice), parse_float=lambda number: round(float(number), 6))


@pytest.mark.parametrize("rows", [[], STEPS[:2], [*STEPS[:2], (0.4, math.nan, 0.5)], [*STEPS[:2], (7.0, 0.4, 0.5)]])
def test_scores_that_were_not_kept_flag(rows: Sequence[Sequence[float]]) -> None:
    _, answer, _ = served("/v1/completions", HELD, engine(), workers=Workers(rows))
    safety = answer["choices"][0]["safety"]
    told = {verdict["stage"]: (verdict["score"], verdict["flagged"]) for verdict in safety["verdicts"]}
    assert told["answer"] == (None, True)
    assert told["prompt"] == ((pytest.approx(0.7), True) if rows else (None, True))
    assert safety["maximum"] == {"harm": None}


@pytest.mark.parametrize(
    ("asked", "is_kept"),
    [
        ({"response_format": {"type": "json_object"}}, True),
        ({"structured_outputs": {"regex": "a"}, "prompt": [1, 2, 3], "n": 1}, True),
        ({"structured_outputs": {"regex": "a"}, "prompt": ["a"]}, True),
        ({"tools": [{}], "tool_choice": "required"}, True),
        ({"tools": [{}], "tool_choice": {"type": "function", "function": {"name": "f"}}}, True),
        ({"tools": [{}]}, True),
        ({"tools": [{}], "n": 2}, False),
        ({"tools": [{}], "tool_choice": "none"}, False),
        ({"tool_choice": "auto"}, False),
        ({"response_format": {"type": "text"}, "n": 2}, False),
        ({"response_format": {"type": "text", "json_schema": None}, "n": 2}, False),
        ({"response_format": None, "prompt": ["a", "b"]}, False),
        ({}, False),
    ],
)
def test_a_tag_is_given_only_where_a_grammar_may_mask_the_ids(asked: Any, is_kept: bool) -> None:
    workers = Workers() if is_kept else None
    status, _, heard = served("/v1/chat/completions", asked, engine(), workers=workers)
    assert status == 200
    assert ("safeside_tag" in heard.get("vllm_xargs", {})) == is_kept
    assert ("logprob_token_ids" in heard) != is_kept


@pytest.mark.parametrize(
    ("path", "asked", "server", "is_kept"),
    [
        ("/v1/chat/completions", {}, {"parser": "mistral"}, True),
        ("/v1/chat/completions", {"tools": [{}], "tool_choice": "none"}, {"parser": "cohere_command3"}, True),
        ("/v1/chat/completions", {}, {"reasoning": "mistral"}, True),
        ("/v1/chat/completions", {"n": 2}, {"parser": "mistral"}, False),
        ("/v1/chat/completions", {}, {"parser": "mistral", "n_copies": 2}, False),
        ("/v1/chat/completions", {}, {"parser": "hermes", "reasoning": "qwen3"}, False),
        ("/v1/completions", {}, {"parser": "mistral"}, False),
    ],
)
def test_chats_that_the_servers_parser_may_give_a_grammar_have_a_tag(
    path: str, asked: Any, server: dict[str, Any], is_kept: bool
) -> None:
    status, answer, heard = served(path, asked, engine(), workers=Workers(), **server)
    assert status == 200
    assert ("safeside_tag" in heard.get("vllm_xargs", {})) == is_kept
    assert answer["choices"][0]["safety"]["maximum"] == {"harm": pytest.approx(0.9)}


@pytest.mark.parametrize("stream", [False, True])
def test_workers_that_fail_leave_an_answer_whose_guards_flag(stream: bool, capsys: pytest.CaptureFixture[str]) -> None:
    workers = Workers(fails=True)
    status, answer, _ = served("/v1/completions", HELD, engine(), stream=stream, workers=workers)
    assert status == 200
    safety = (answer[-1] if stream else answer)["choices"][0]["safety"]
    assert [(verdict["score"], verdict["flagged"]) for verdict in safety["verdicts"]] == [(None, True)] * 2
    assert all("failing closed" in verdict["reason"] for verdict in safety["verdicts"])
    assert safety["maximum"] == {"harm": None}
    assert len(workers.calls) == 1
    assert "a worker has died" in capsys.readouterr().err


def test_of_several_engines_beside_each_other_nothing_is_read() -> None:
    status, answer, _ = served("/v1/chat/completions", HELD, engine(), n_copies=2)
    assert status == 400
    assert "data parallelism" in answer["error"]["message"]
    assert served("/v1/chat/completions", {"tools": [{}]}, engine(), n_copies=2)[0] == 200


def test_an_engine_without_guards_gives_no_tags() -> None:
    aligner = engine().model_copy(update={"slots": ()})
    status, _, heard = served("/v1/chat/completions", {**HELD, "n": 2}, aligner)
    assert (status, heard) == (200, {**HELD, "n": 2})


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
