"""Judging whole texts in the engine's thread, in parts small enough for the answers in progress."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Future

from safeside.adapters.adapter import Adapter
from safeside.errors import InputError, ServingError
from safeside.guards.score import Scores, Scoring, Window
from safeside.serve.engine import Engine, stopped
from safeside.serve.passes import Runner
from safeside.types import Message

POLL_S = 0.25
"""How often a silent client is looked at."""


async def score_in_parts(
    engine: Engine,
    guards: Mapping[str, Adapter],
    conversations: Sequence[Sequence[Message]],
    max_tokens: int,
    is_gone: Callable[[], Awaitable[bool]],
) -> list[Scores] | None:
    """Scores by the path of ``safeside guard``, in calls of the engine that read ``judged_tokens`` of windows each.

    More than ``max_tokens`` in all are an InputError, a guard that is no longer the one given a ServingError.  None
    once the client has left, which is looked at before each call and while it waits; the rest is then not read.
    """
    scoring = await asyncio.to_thread(Scoring, engine.base, list(guards.values()), conversations)
    refuse_too_many(scoring.n_tokens, max_tokens)
    for batch in scoring.batches(max_tokens=engine.limits.judged_tokens):
        if await is_gone():
            return None
        asked = engine.call(lambda runner, batch=batch: _read(runner, guards, scoring, batch))  # type: ignore[misc]
        if not await _is_heard(asked, engine, is_gone):
            return None
    return scoring.scores()


def refuse_too_many(n_tokens: int, max_tokens: int) -> None:
    """Raise an InputError where one request would have guards read more than ``max_tokens``."""
    if n_tokens > max_tokens:
        raise InputError(
            f"These texts take {n_tokens:,} tokens to judge; one request may take {max_tokens:,}. Send them in several."
        )


def _read(runner: Runner, guards: Mapping[str, Adapter], scoring: Scoring, batch: Sequence[Window]) -> None:
    heads = {guard.name: guard.head for guard in runner.guards}
    is_same = all(heads.get(name) is guard.head for name, guard in guards.items())
    if runner.attachment is None or not runner.is_attached or not is_same:
        raise ServingError("A guard was exchanged while this text waited for it. Ask again.")
    scoring.read(batch, runner.attachment)


async def _is_heard(asked: Future[None], engine: Engine, is_gone: Callable[[], Awaitable[bool]]) -> bool:
    """Wait for a call, raising its error; False once the client has left.  What has not begun then never does."""
    answer = asyncio.wrap_future(asked)
    try:
        while not answer.done():
            has_ended = engine.has_ended
            await asyncio.wait({answer}, timeout=POLL_S)
            if answer.done():
                break
            if has_ended:  # it is stuck in a pass
                raise stopped()
            if await is_gone():
                return False
        answer.result()
        return True
    finally:
        answer.cancel()
