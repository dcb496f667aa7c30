"""Requests that do not end in an answer: nobody's, broken ones, and those whose client leaves."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import pytest

from engine_for_tests import application, engine
from safeside.vllm_plugin.middleware import SafetyMiddleware

CHAT, MODERATION = "/v1/chat/completions", "/v1/moderations"


class Inside:
    """vLLM's application, which answers whom it lets in by ``body``, and reads nothing of others."""

    def __init__(self, body: bytes = b'{"choices": []}', *, keys: Sequence[str] = ()) -> None:
        self.body, self.keys = body, keys
        self.error: Exception | None = None
        """What is raised once the request was read."""
        self.heard: list[Any] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        given = dict(scope["headers"]).get(b"authorization", b"").decode()
        if self.keys and given.removeprefix("Bearer ") not in self.keys:
            await send({"type": "http.response.start", "status": 401, "headers": []})
            await send({"type": "http.response.body", "body": b'{"error": "Unauthorized"}'})
            return
        self.heard.append(await receive())
        if self.error is not None:
            raise self.error
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": self.body})


def sent_by(
    inside: Inside, body: bytes, path: str = CHAT, *, key: str | None = None, scheme: str = "Bearer", **server: Any
) -> tuple[int, Any, int]:
    """Status, what came back, and how often the request was read."""
    sent: list[Any] = []
    reads: list[None] = []

    async def receive() -> Any:
        reads.append(None)
        return {"type": "http.request", "body": body}

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [] if key is None else [(b"authorization", f"{scheme} {key}".encode())]
    scope = {"type": "http", "method": "POST", "path": path, "headers": headers, "app": application(engine(), **server)}
    asyncio.run(SafetyMiddleware(inside)(scope, receive, send))
    return sent[0]["status"], json.loads(sent[1]["body"]), len(reads)


@pytest.mark.parametrize("path", [CHAT, MODERATION, "/v1/responses"])
@pytest.mark.parametrize("key", [None, "wrong", ""])
def test_without_a_key_nothing_is_read_or_told(path: str, key: str | None) -> None:
    """A strength of a guard that is not there would else be answered with the names of those that are."""
    inside = Inside(keys=["right"])
    body = b'{"safety": {"strength": {"policy": "ramp", "guard": "x"}}}'
    status, answer, n_reads = sent_by(inside, body, path, key=key, keys=["right", ""])
    assert (status, answer, n_reads) == (401, {"error": "Unauthorized"}, 0)


@pytest.mark.parametrize("given", [None, [], [""]])
def test_keys_of_the_flag_stand_before_the_one_of_the_environment(
    given: Sequence[str] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "of the environment")
    by_flag = Inside(keys=["of the flag"])
    assert sent_by(by_flag, b"{}", keys=["of the flag"], key="of the environment")[::2] == (401, 0)
    assert sent_by(by_flag, b"{}", keys=["of the flag"], key="of the flag")[0] == 200
    asks = given != [""]  # a flag without a key: vLLM asks for none
    inside = Inside(keys=["of the environment"] if asks else [])
    assert sent_by(inside, b"{}", keys=given)[::2] == ((401, 0) if asks else (200, 1))
    assert sent_by(inside, b"{}", keys=given, key="of the environment")[0] == 200


def test_with_a_key_everything_is_as_without_any() -> None:
    inside = Inside(keys=["a", "right"])
    for scheme in ("Bearer", "bearer"):
        status, answer, _ = sent_by(inside, b'{"echo": true}', key="right", scheme=scheme, keys=["a", "right"])
        assert status == 400
        assert "Beam search and echo" in answer["error"]["message"]
    assert sent_by(inside, b"{}", key="right", keys=["a", "right"])[0] == 200


def test_what_vllm_would_answer_to_anybody_is_not_given_without_verdicts() -> None:
    """A request that is wrongly taken for one that vLLM turns away has no body; other paths have no key at all."""
    inside = Inside()
    assert sent_by(inside, b"{}", keys=["right"])[2] == 0
    assert inside.heard == [{"type": "http.disconnect"}]
    status, answer, _ = sent_by(inside, b"{}", "/invocations", keys=["right"])
    assert status == 400
    assert "gives no verdicts" in answer["error"]["message"]


@pytest.mark.parametrize("path", [CHAT, MODERATION])
@pytest.mark.parametrize("opening", ["[", '{"a": ', '{"vllm_xargs": [', '{"safety": {"strength": {"a": ['])
def test_what_is_nested_too_deeply_is_a_bad_request(path: str, opening: str) -> None:
    status, answer, _ = sent_by(Inside(), opening.encode() * 100_000, path)
    assert status == 400
    assert answer["error"]["message"]


@pytest.mark.parametrize("form", ['{"a": %s}', '{"vllm_xargs": %s}', '{"safety": {"strength": {"guard": %s}}}'])
def test_every_depth_is_answered(form: str) -> None:
    """Also where a body can be read but not written again."""
    said = [
        sent_by(Inside(), (form % ("[" * depth + "]" * depth)).encode())[0] for depth in (*range(890, 1000), 20_000)
    ]
    assert set(said) <= {200, 400}
    assert said[-1] == 400


def test_what_is_sent_to_a_client_that_left_has_no_verdicts() -> None:
    assert sent_by(Inside(b"null"), b"{}")[:2] == (200, None)


class Workers:
    """vLLM's client, of workers that keep nothing or fail."""

    def __init__(self, *, fails: bool = False) -> None:
        self.calls: list[tuple[str, Any]] = []
        self.fails = fails

    async def collective_rpc(self, method: str, args: tuple[str, ...]) -> list[Any]:
        self.calls.append((method, *args))
        if self.fails:
            raise RuntimeError("a worker has died")
        return [[]]


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("error", [OSError("the client has left"), None])
def test_a_tag_that_nobody_read_is_forgotten(error: Exception | None, fails: bool) -> None:
    """The client left within its answer, or vLLM refused the request: the scores are taken from the workers."""
    inside, workers = Inside(), Workers(fails=fails)
    inside.error = error
    body = b'{"response_format": {"type": "json_object"}}'
    if error is None:
        assert sent_by(inside, body, client=workers)[0] == 200
    else:
        with pytest.raises(OSError, match="the client has left"):
            sent_by(inside, body, client=workers)
    tag = json.loads(inside.heard[0]["body"])["vllm_xargs"]["safeside_tag"]
    assert workers.calls == [("take_safeside_scores", tag)]
