"""What a client gets of an answer that was judged as a whole."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from types import SimpleNamespace

import pytest

from safeside.serve import replies
from safeside.serve.answers import Answer
from safeside.serve.effective import Decision
from safeside.serve.row import Ended, Event, Judged, Piece, Trace
from safeside.serve.sampling import Sampling, Token
from safeside.serve.wire import ChatRequest
from safeside.types import Stop


class Told:
    """A service whose one answer is these events."""

    model = "tiny"
    base = SimpleNamespace(tokenizer=SimpleNamespace(decode=lambda ids: f"<{ids[0]}>"))

    def __init__(self, ended: Ended) -> None:
        self.ended = ended

    async def events(self, answering: SimpleNamespace, is_gone: object) -> AsyncIterator[Event]:
        answering.judged, answering.ended = Judged((), Decision("allow")), self.ended
        yield answering.judged
        yield Piece("the recipe", (Token(5),), (Trace(5, {"harm": (0.2,)}, 0.0),))
        yield self.ended


def answer_of(ended: Ended, *, stream: bool = False) -> Answer:
    sampling = Sampling(max_tokens=9, n_logprobs=0)
    answering = SimpleNamespace(
        trace_id="1", job=SimpleNamespace(ids=(1,), sampling=sampling), policy=SimpleNamespace(name="p"), verdicts=[]
    )
    asked = ChatRequest.model_validate(
        {"model": "tiny", "messages": [{"role": "user", "content": "?"}], "safety": {"tokens": True}, "stream": stream}
    )
    return Answer(Told(ended), asked, answering, "chat")  # type: ignore[arg-type]


def whole(ended: Ended) -> dict:
    found = asyncio.run(answer_of(ended).whole(lambda: None))  # type: ignore[arg-type]
    assert found is not None
    return found


def test_the_chunks_of_a_stream_share_their_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(100, 200))
    monkeypatch.setattr(replies.time, "time", lambda: next(clock))

    async def read() -> list[str]:
        found = answer_of(Ended("stop", 1, (), Decision("allow"), 0.0, "the recipe"), stream=True)
        return [chunk async for chunk in found.stream(lambda: None)]  # type: ignore[arg-type]

    chunks = [json.loads(chunk.removeprefix("data: ")) for chunk in asyncio.run(read())[:-1]]
    assert len(chunks) == 3
    assert {(chunk["id"], chunk["created"]) for chunk in chunks} == {("chatcmpl-1", 100)}


@pytest.mark.parametrize("stop", [None, Stop("harm", 4, 2, 0.9)])
def test_of_an_answer_that_is_blocked_as_a_whole_nothing_is_sent(stop: Stop | None) -> None:
    """What came before the place at which a rule stopped an answer was clear, and is."""
    found = whole(Ended("content_filter", 9, (), Decision("block"), 0.0, "the recipe for it", stop))
    choice, safety = found["choices"][0], found["safety"]
    assert choice["finish_reason"] == "content_filter"
    told = (choice["message"]["content"], choice["logprobs"] is not None, len(safety["tokens"]))
    assert told == (("", False, 0) if stop is None else ("the recipe", True, 1))
