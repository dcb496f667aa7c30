"""OpenAI's moderation through a server that speaks as vLLM's does: one chat of one token for each text."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Sequence
from typing import Any

import pytest

from engine_for_tests import SLOTS, application, chat_entry, engine
from safeside.vllm_plugin.middleware import SafetyMiddleware
from safeside.vllm_plugin.moderation import Moderation
from safeside.vllm_plugin.plan import EngineConfig
from safeside.vllm_plugin.told import Told

RISKS = {
    "fine": (0.1, 0.2, 0.0), "bad": (0.9, 0.3, 0.0), "masked": (math.nan, 0.1, 0.0),
    "": (0.1, 0.2, 0.0), "\u200b": (0.1, 0.2, 0.0),
}  # fmt: skip


class Workers:
    """vLLM's client, of one rank that keeps the scores of each text by the tag of its chat, until they are read."""

    def __init__(self) -> None:
        self.kept: dict[str, str] = {}

    async def collective_rpc(self, method: str, args: tuple[str, ...]) -> list[Any]:
        text = self.kept.pop(*args, None)
        return [[] if text is None else [list(RISKS[text])]]


def moderated(
    asked: Any, config: EngineConfig, *, status: int = 200, workers: Workers | None = None, **server: Any
) -> tuple[int, Any, list[Any]]:
    """Status, what came back, and each chat that the server inside was asked, with its path.

    The server answers the first chat last, and has no scores for a text that RISKS lacks.
    """
    heard: list[Any] = []

    async def inside(scope: Any, receive: Any, send: Any) -> None:
        values = json.loads((await receive())["body"])
        heard.append((scope["path"], values))
        await asyncio.sleep(0.05 / len(heard))
        text = values["messages"][0]["content"]
        content = [chat_entry(RISKS[text])] if text in RISKS else []
        if workers is not None:
            workers.kept[values["vllm_xargs"]["safeside_tag"]] = text
            content = [{**entry, "top_logprobs": []} for entry in content]
        fails = status != 200 and text == "bad"
        body = {"error": "full"} if fails else {"choices": [{"index": 0, "logprobs": {"content": content}}]}
        await send({"type": "http.response.start", "status": status if fails else 200, "headers": []})
        whole = json.dumps(body).encode()
        await send({"type": "http.response.body", "body": whole[:9], "more_body": True})
        await send({"type": "http.response.body", "body": whole[9:]})

    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "http.request", "body": asked if isinstance(asked, bytes) else json.dumps(asked).encode()}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http", "method": "POST", "path": "/v1/moderations", "headers": [],
        "app": application(config, client=workers, **server),
    }  # fmt: skip
    asyncio.run(SafetyMiddleware(inside)(scope, receive, send))
    return sent[0]["status"], json.loads(sent[1]["body"]), heard


@pytest.mark.parametrize("aligner", [False, True])
def test_each_text_is_judged_in_order(aligner: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not aligner:
        monkeypatch.setattr("engine_for_tests.SLOTS", SLOTS[:3])
        monkeypatch.setattr(f"{__name__}.RISKS", {text: risk[:2] for text, risk in RISKS.items()})
    status, answer, heard = moderated({"input": ["bad", "fine", "bad"]}, engine(aligner=aligner))
    assert status == 200
    assert [result["flagged"] for result in answer["results"]] == [True, False, True]
    harmful = answer["results"][0]
    assert harmful["category_scores"] == {name: pytest.approx(0.9) for name in harmful["categories"]}
    assert answer["model"] == "toy"
    assert answer["id"].startswith("modr-")
    assert len(answer["unsupported_categories"]) in (12, 13)
    assert {path for path, _ in heard} == {"/v1/chat/completions"}
    for _, asked in heard:
        assert asked["max_tokens"] == 1
        assert asked["logprob_token_ids"] == list(SLOTS[: 3 + aligner])
        assert asked.get("vllm_xargs") == ({"safeside_strength": "0.0"} if aligner else None)


ONE_TEXT = [
    {"input": "bad"},
    {"input": [{"type": "text", "text": "bad"}], "model": "harm"},
    {"input": "bad", "model": "small"},
]


@pytest.mark.parametrize("asked", ONE_TEXT)
def test_one_text_as_a_string_or_in_parts(asked: Any) -> None:
    _, answer, _ = moderated(asked, engine())
    assert [result["flagged"] for result in answer["results"]] == [True]
    assert answer["model"] == asked.get("model", "toy")


@pytest.mark.parametrize("text", ["masked", "a text without scores", "", "\u200b"])
def test_a_text_without_scores_is_flagged(text: str) -> None:
    _, answer, _ = moderated({"input": ["fine", text]}, engine())
    fine, unread = answer["results"]
    assert (fine["flagged"], unread["flagged"]) == (False, True)
    assert set(unread["category_scores"].values()) == {None}


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({}, "Field required"),
        (b"{", "no request of moderation"),
        ({"input": []}, "at least 1"),
        ({"input": [{"type": "image_url", "image_url": {"url": "x"}}]}, "Pictures cannot be read"),
    ],
)
def test_what_cannot_be_judged_is_a_bad_request(asked: Any, said: str) -> None:
    status, answer, heard = moderated(asked, engine())
    assert (status, heard) == (400, [])
    assert said in answer["error"]["message"]


def test_a_model_that_nobody_serves_is_not_found() -> None:
    status, answer, heard = moderated({"input": "x", "model": "nobody"}, engine())
    assert (status, heard) == (404, [])
    assert "nobody" in answer["error"]["message"]
    assert answer["error"]["type"] == "NotFoundError"


def test_some_texts_are_judged_at_a_time_and_none_after_one_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("safeside.vllm_plugin.middleware.AT_ONCE", 2)
    status, _, heard = moderated({"input": ["fine"] * 5}, engine())
    assert (status, len(heard)) == (200, 5)
    status, _, heard = moderated({"input": ["fine", "bad", *["fine"] * 20]}, engine(), status=503)
    assert status == 503
    assert len(heard) < 10


@pytest.mark.parametrize("body", [b"null", b'{"choices": []}'])
def test_an_answer_without_a_choice_is_no_score(body: bytes) -> None:
    config = engine()
    asked = Moderation(b'{"input": "fine"}', config, Told(config), ["toy"])
    scores = asyncio.run(asked.answers(None).first(body))
    assert asked.answer([scores])["results"][0]["flagged"]


@pytest.mark.parametrize("server", [{"parser": "mistral"}, {"reasoning": "cohere_command4"}])
def test_where_a_parser_gives_every_chat_a_grammar_the_workers_keep_the_scores(server: dict[str, Any]) -> None:
    workers = Workers()
    status, answer, heard = moderated({"input": ["bad", "fine"]}, engine(), workers=workers, **server)
    assert status == 200
    assert [result["flagged"] for result in answer["results"]] == [True, False]
    assert [set(values["vllm_xargs"]) for _, values in heard] == [{"safeside_strength", "safeside_tag"}] * 2
    assert not any("logprob_token_ids" in values for _, values in heard)
    assert workers.kept == {}
    status, _, _ = moderated({"input": ["bad", "fine"]}, engine(), workers=workers, status=503, **server)
    assert (status, workers.kept) == (503, {}), "what was not read is forgotten"


def test_without_a_guard_nothing_is_judged() -> None:
    config = engine()
    alone = config.model_copy(update={"adapters": config.adapters[1:], "slots": ()})
    status, answer, heard = moderated({"input": "fine"}, alone)
    assert (status, heard) == (400, [])
    assert "no guard" in answer["error"]["message"]


@pytest.mark.parametrize("texts", [["fine", "bad"], ["bad", "fine"]])
def test_a_chat_that_fails_is_the_answer(texts: Sequence[str]) -> None:
    status, answer, _ = moderated({"input": texts}, engine(), status=503)
    assert (status, answer) == (503, {"error": "full"})
