"""vLLM's answers read and written again: the slots' log-probabilities out, ``safety`` in."""

from __future__ import annotations

import json
import math
from collections.abc import Awaitable, Callable, Sequence
from itertools import accumulate, chain, islice, repeat
from typing import Any

from safeside.vllm_plugin.slots import in_range, read
from safeside.vllm_plugin.told import Told

NAMED = "token_id:"
"""Before a token's id: how vLLM spells tokens when it is asked to, as it has to be for slots to be told apart."""
_DATA = b"data: "
Kept = Callable[[], Awaitable[list[list[float]]]]
"""Reads what a worker has kept of one request: the scores behind every token."""


class Answers:
    """One request's answer, of any number of choices, whole or in chunks.

    With ``kept`` it has one choice, whose log-probabilities tell how many tokens it has; the worker has their scores.
    """

    def __init__(
        self,
        slots: Sequence[int],
        told: Told,
        *,
        with_tokens: bool,
        keeps_logprobs: bool,
        text_of: Callable[[str], str] | None = None,
        kept: Kept | None = None,
    ) -> None:
        self.names = [f"{NAMED}{slot}" for slot in slots]
        self.slots = list(slots)
        self.told = told
        self.with_tokens = with_tokens
        self.keeps_logprobs = keeps_logprobs
        self.text_of = text_of
        """The text of a token from its name; None where the client asked for names."""
        self.kept = kept
        """None where the scores are in the slots."""
        self.steps: dict[int, list[list[float]]] = {}
        self.ends: dict[int, int] = {}
        """By choice, how many characters its tokens have so far."""

    @property
    def asked(self) -> dict[str, Any]:
        """What the request has to ask for, so that the answer carries the slots."""
        slots = {"logprob_token_ids": self.slots} if self.kept is None else {}
        return {"logprobs": 1, "return_tokens_as_token_ids": True, **slots}

    async def whole(self, body: bytes) -> bytes:
        """A complete answer with ``safety`` in each choice; ``null``, as for a client that has left, has none."""
        answer = json.loads(body)
        for choice in (answer or {}).get("choices", []):
            self._take(choice)
            await self._tell(choice)
        return json.dumps(answer).encode()

    async def first(self, body: bytes) -> list[float]:
        """The scores behind the prompt of a complete answer's first choice; NaN where it has none, or no choice."""
        answer = json.loads(body)
        choice = next(iter(answer["choices"]), {"index": 0}) if answer is not None else {"index": 0}
        self._take(choice)
        return (await self._steps(choice))[0]

    async def event(self, event: bytes) -> bytes:
        """One event of a stream; the last of each choice gets its ``safety``."""
        if not event.startswith(_DATA) or event == _DATA + b"[DONE]":
            return event
        chunk = json.loads(event.removeprefix(_DATA))
        for choice in chunk.get("choices", []):
            self._take(choice)
            if choice.get("finish_reason") is not None:
                await self._tell(choice)
        return _DATA + json.dumps(chunk).encode()

    async def _tell(self, choice: dict[str, Any]) -> None:
        choice["safety"] = self.told.safety(await self._steps(choice), with_tokens=self.with_tokens)

    async def _steps(self, choice: dict[str, Any]) -> list[list[float]]:
        """The scores behind each token of a choice; at least those of its prompt, which may be unread."""
        steps = self.steps.get(choice["index"]) or [self._unread]
        if self.kept is None:
            return steps
        rows = islice(chain(await self.kept(), repeat(self._unread)), len(steps))
        return [in_range(row, tells_strength=self.told.tells_strength) for row in rows]

    @property
    def _unread(self) -> list[float]:
        """In place of scores that did not come: every guard flags."""
        return [math.nan] * (len(self.slots) - 1)

    def _take(self, choice: dict[str, Any]) -> None:
        """Move the slots of a choice's tokens to ``steps``."""
        logprobs = choice.get("logprobs")
        if logprobs is None:
            return
        rows = _chat_rows(logprobs) if "content" in logprobs else logprobs.get("top_logprobs") or []
        steps = self.steps.setdefault(choice["index"], [])
        tells_strength = self.told.tells_strength
        steps += [read([row.get(name, math.nan) for name in self.names], tells_strength=tells_strength) for row in rows]
        choice["logprobs"] = self._cleaned(logprobs, choice["index"]) if self.keeps_logprobs else None

    def _cleaned(self, logprobs: dict[str, Any], index: int) -> dict[str, Any]:
        """Log-probabilities of a choice's drawn tokens alone, which are spelled as text again."""
        if "content" in logprobs:
            entries = [{**entry, "top_logprobs": []} for entry in logprobs["content"] or []]
            if self.text_of is not None:  # it lies beside the name
                entries = [
                    {**entry, "token": bytes(entry["bytes"] or ()).decode(errors="replace")} for entry in entries
                ]
            return {**logprobs, "content": entries}
        if self.text_of is None:
            return {**logprobs, "top_logprobs": None}
        tokens = [self.text_of(name) for name in logprobs["tokens"]]
        *offsets, self.ends[index] = accumulate(map(len, tokens), initial=self.ends.get(index, 0))
        return {**logprobs, "tokens": tokens, "text_offset": offsets, "top_logprobs": None}


def _chat_rows(logprobs: dict[str, Any]) -> list[dict[str, float]]:
    content = logprobs["content"] or []
    return [{top["token"]: top["logprob"] for top in entry["top_logprobs"]} for entry in content]
