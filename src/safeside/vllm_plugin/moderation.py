"""OpenAI's moderation on vLLM: every text is a chat that draws one token, for its prompt's score stands behind it."""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError

from safeside.content import holds_text
from safeside.errors import InputError, problems_of
from safeside.moderation import ModerationRequest, chosen, result_of, unsupported
from safeside.types import Message
from safeside.vllm_plugin.answers import Answers, Kept
from safeside.vllm_plugin.plan import EngineConfig
from safeside.vllm_plugin.strengths import KEY
from safeside.vllm_plugin.told import Told

PATH = "/v1/moderations"


class Moderation:
    """One request of moderation, for one guard or all of them."""

    def __init__(self, body: bytes, config: EngineConfig, told: Told, served: Sequence[str]) -> None:
        if not config.slots:
            raise InputError("The engine has no guard, so no text can be judged. Start it with --guard.")
        try:
            asked = ModerationRequest.model_validate_json(body)
        except ValidationError as error:
            raise InputError(f"This is no request of moderation: {problems_of(error)}") from error
        self.texts = asked.texts
        self.model = asked.model or served[0]
        self._config, self._told = config, told
        whole = asked.model if asked.model is not None and asked.model in served else served[0]
        self._guards = chosen(asked.model, [guard.name for guard in config.guards], whole)

    def chat(self, text: str) -> dict[str, Any]:
        """The chat that has ``text`` judged; an aligner, which its one token has no use for, stays out of it."""
        plain: dict[str, Any] = {"messages": [{"role": "user", "content": text}], "max_tokens": 1, "temperature": 0.0}
        strength = {"vllm_xargs": {KEY: "0.0"}} if self._config.aligner is not None else {}
        return {**plain, **strength}

    def answers(self, kept: Kept | None) -> Answers:
        """What reads the scores of one chat."""
        return Answers(self._config.slots, self._told, with_tokens=False, keeps_logprobs=False, kept=kept)

    def answer(self, scores: Sequence[list[float]]) -> dict[str, Any]:
        """OpenAI's answer from the scores of each text's prompt, in the order of ``texts``; NaN is flagged.

        What holds no text has no score: the chat's template alone was read.
        """
        says = [holds_text([Message("user", text)]) for text in self.texts]
        known = [row if is_text else [math.nan] * len(row) for row, is_text in zip(scores, says, strict=True)]
        found = [self._told.verdicts(row, "prompt") for row in known]
        own = [[verdict for verdict in verdicts if verdict.task in self._guards] for verdicts in found]
        return {
            "id": f"modr-{secrets.token_hex(12)}",
            "model": self.model,
            "results": [result_of(verdicts) for verdicts in own],
            "unsupported_categories": unsupported([one for one in self._told.guards if one.name in self._guards]),
        }
