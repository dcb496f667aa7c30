"""What clients get: OpenAI's answers and stream chunks, with a ``safety`` object."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping, Sequence
from typing import Literal

from pydantic import BaseModel
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from safeside.moderation import finite
from safeside.serve.row import Finish, Trace
from safeside.serve.rules import Action
from safeside.serve.sampling import Token
from safeside.types import Verdict

Kind = Literal["chat", "text"]


class VerdictTold(BaseModel):
    """What one guard says of one text, by label."""

    guard: str
    label: str
    stage: Literal["prompt", "answer"]
    score: float | None
    """Risk in [0, 1]; null when the guard could not score."""
    threshold: float
    flagged: bool
    probability: float | None
    reason: str

    @classmethod
    def of(cls, verdict: Verdict, stage: Literal["prompt", "answer"]) -> VerdictTold:
        """The verdict as it is told; NaN is not JSON."""
        return cls(
            guard=verdict.task,
            label=verdict.label,
            stage=stage,
            score=finite(verdict.score),
            threshold=verdict.threshold,
            flagged=verdict.flagged,
            probability=finite(verdict.probability),
            reason=verdict.reason,
        )


class TokenTold(BaseModel):
    """What stood behind one token of the answer."""

    text: str
    risk: dict[str, float | None]
    """By guard the highest of its scores of everything up to this token."""
    strength: float

    @classmethod
    def of(cls, trace: Trace, tokenizer: PreTrainedTokenizerBase) -> TokenTold:
        """The trace as it is told."""
        risk = {name: finite(max(scores)) for name, scores in trace.risk.items()}
        return cls(text=spelled(tokenizer, trace.token), risk=risk, strength=trace.strength)


class SafetyTold(BaseModel):
    """What guards and aligners did."""

    verdicts: list[VerdictTold] = []
    strength: float = 0.0
    """The highest of any token, in [0, 2]."""
    action: Action = "allow"
    intended: Action = "allow"
    """What would have been done if every rule acted: more than ``action`` in shadow mode."""
    reason: str = ""
    policy: str = ""
    trace_id: str = ""
    leak_bound: int | None = None
    """Most tokens of the run that ends an answer that can reach the client; 0 where tokens are held back."""
    tokens: list[TokenTold] | None = None


class Usage(BaseModel):
    """Tokens of one request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int

    @classmethod
    def of(cls, n_prompt: int, n_answer: int) -> Usage:
        """Of so many tokens."""
        return cls(prompt_tokens=n_prompt, completion_tokens=n_answer, total_tokens=n_prompt + n_answer)


class Reply:
    """Builds the objects of one answer, whole or in chunks."""

    def __init__(self, kind: Kind, model: str, trace_id: str) -> None:
        self.kind = kind
        self._head = {
            "id": f"{'chatcmpl' if kind == 'chat' else 'cmpl'}-{trace_id}",
            "created": int(time.time()),
            "model": model,
        }

    def whole(
        self, text: str, finish: Finish, logprobs: dict[str, object] | None, rest: Mapping[str, object]
    ) -> dict[str, object]:
        """A complete answer; ``rest`` holds usage, safety and, where asked for, moderation."""
        name = "chat.completion" if self.kind == "chat" else "text_completion"
        said: dict[str, object] = {"text": text}
        if self.kind == "chat":
            said = {"message": {"role": "assistant", "content": text, "refusal": None}}
        choice = {"index": 0, **said, "logprobs": logprobs, "finish_reason": finish}
        return {**self._head, "object": name, "choices": [choice], **rest}

    def chunk(
        self,
        text: str | None,
        finish: Finish | None = None,
        logprobs: dict[str, object] | None = None,
        rest: Mapping[str, object] = {},
    ) -> str:
        """One event of a stream with a choice."""
        said: dict[str, object] = {"text": text or ""}
        if self.kind == "chat":
            said = {"delta": {} if text is None else {"content": text}}
        choice = {"index": 0, **said, "logprobs": logprobs, "finish_reason": finish}
        return self._event([choice], rest)

    def opening(self) -> str:
        """The first event of a chat's stream."""
        delta = {"role": "assistant", "content": ""}
        return self._event([{"index": 0, "delta": delta, "logprobs": None, "finish_reason": None}], {})

    def extra(self, rest: Mapping[str, object]) -> str:
        """An event without a choice: usage or moderation."""
        return self._event([], rest)

    def _event(self, choices: list[dict[str, object]], rest: Mapping[str, object]) -> str:
        name = "chat.completion.chunk" if self.kind == "chat" else "text_completion"
        return event({**self._head, "object": name, "choices": choices, **rest})


def event(body: Mapping[str, object]) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(body)}\n\n"


DONE = "data: [DONE]\n\n"


def logprobs_of(kind: Kind, tokens: Sequence[Token], tokenizer: PreTrainedTokenizerBase) -> dict[str, object]:
    """OpenAI's logarithms of probabilities for these tokens."""
    if kind == "chat":
        return {
            "content": [
                {
                    **_entry(tokenizer, token.id, token.logprob),
                    "top_logprobs": [_entry(tokenizer, index, value) for index, value in token.likeliest],
                }
                for token in tokens
            ],
            "refusal": None,
        }
    return {
        "tokens": [spelled(tokenizer, token.id) for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [{spelled(tokenizer, index): value for index, value in token.likeliest} for token in tokens],
    }


def _entry(tokenizer: PreTrainedTokenizerBase, index: int, logprob: float) -> dict[str, object]:
    text = spelled(tokenizer, index)
    return {"token": text, "logprob": max(logprob, -9999.0), "bytes": bytes_of(tokenizer, index)}


def spelled(tokenizer: PreTrainedTokenizerBase, index: int) -> str:
    """One token as text."""
    return str(tokenizer.decode([index]))


def bytes_of(tokenizer: PreTrainedTokenizerBase, index: int) -> list[int] | None:
    """What one token adds to a text in UTF-8; None where it is a part of a character that the tokenizer cannot tell."""
    text = spelled(tokenizer, index)
    if _HALF not in text:
        return list(text.encode())
    piece = str(tokenizer.convert_ids_to_tokens(index))
    if byte := _BYTE_TOKEN.fullmatch(piece):
        return [int(byte[1], 16)]
    if _HALF in piece:  # the character itself
        return list(text.encode())
    return [_BYTES[character] for character in piece] if set(piece) <= set(_BYTES) else None


_HALF = "\ufffd"  # what a decoder writes for bytes that are no whole character
_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
# Of byte-level vocabularies: the byte behind each character.
_BYTES = {character: byte for byte, character in bytes_to_unicode().items()}  # type: ignore[no-untyped-call]
