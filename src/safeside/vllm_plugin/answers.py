"""vLLM's answers read and written again: the slots' log-probabilities out, ``safety`` in."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from safeside.vllm_plugin.slots import read
from safeside.vllm_plugin.told import Told

_NAMED = "token_id:"  # how vLLM spells tokens when asked for ids
_DATA = b"data: "


class Answers:
    """One request's answer, of any number of choices, whole or in chunks."""

    def __init__(self, slots: Sequence[int], told: Told, *, keeps_logprobs: bool, with_tokens: bool) -> None:
        self.names = [f"{_NAMED}{slot}" for slot in slots]
        self.slots = list(slots)
        self.told = told
        self.keeps_logprobs = keeps_logprobs
        self.with_tokens = with_tokens
        self.steps: dict[int, list[list[float]]] = {}

    @property
    def asked(self) -> dict[str, Any]:
        """What the request has to ask for, so that the answer carries the slots."""
        return {"logprobs": 1, "logprob_token_ids": self.slots, "return_tokens_as_token_ids": True}

    def whole(self, body: bytes) -> bytes:
        """A complete answer with ``safety`` in each choice."""
        answer = json.loads(body)
        for choice in answer.get("choices", []):
            self._take(choice)
            self._tell(choice)
        return json.dumps(answer).encode()

    def event(self, event: bytes) -> bytes:
        """One event of a stream; the last of each choice gets its ``safety``."""
        if not event.startswith(_DATA) or event == _DATA + b"[DONE]":
            return event
        chunk = json.loads(event.removeprefix(_DATA))
        for choice in chunk.get("choices", []):
            self._take(choice)
            if choice.get("finish_reason") is not None:
                self._tell(choice)
        return _DATA + json.dumps(chunk).encode()

    def _tell(self, choice: dict[str, Any]) -> None:
        unread = [[math.nan] * (len(self.slots) - 1)]  # nothing came: every guard flags
        steps = self.steps.get(choice["index"]) or unread
        choice["safety"] = self.told.safety(steps, with_tokens=self.with_tokens)

    def _take(self, choice: dict[str, Any]) -> None:
        """Move the slots of a choice's tokens to ``steps``."""
        logprobs = choice.get("logprobs")
        if logprobs is None:
            return
        rows = _chat_rows(logprobs) if "content" in logprobs else logprobs.get("top_logprobs") or []
        steps = self.steps.setdefault(choice["index"], [])
        tells_strength = self.told.tells_strength
        steps += [read([row.get(name, math.nan) for name in self.names], tells_strength=tells_strength) for row in rows]
        choice["logprobs"] = _cleaned(logprobs) if self.keeps_logprobs else None


def _chat_rows(logprobs: dict[str, Any]) -> list[dict[str, float]]:
    content = logprobs["content"] or []
    return [{top["token"]: top["logprob"] for top in entry["top_logprobs"]} for entry in content]


def _cleaned(logprobs: dict[str, Any]) -> dict[str, Any]:
    """Log-probabilities of the drawn tokens alone; those of chats spelled by their bytes again."""
    if "content" not in logprobs:
        return {**logprobs, "top_logprobs": None}
    content = [
        {**entry, "token": bytes(entry["bytes"] or ()).decode(errors="replace"), "top_logprobs": []}
        for entry in logprobs["content"] or []
    ]
    return {**logprobs, "content": content}
