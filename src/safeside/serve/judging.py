"""Judging texts without answering: moderation, and what a policy would decide."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence

from safeside.errors import ServingError, UnknownNameError
from safeside.guards.score import Scores
from safeside.registry import did_you_mean
from safeside.serve.effective import EffectivePolicy
from safeside.serve.keys import Caller
from safeside.serve.moderation import result_of, unsupported
from safeside.serve.replies import VerdictTold
from safeside.serve.service import Service
from safeside.serve.wire import DryRunRequest, ModerationRequest
from safeside.types import Message, Verdict


async def moderate(service: Service, caller: Caller, asked: ModerationRequest) -> dict[str, object]:
    """OpenAI's moderation of one or many texts by one loaded guard or all of them."""
    guards = {name: adapter for name, adapter in service.engine.adapters.items() if adapter.config.role == "guard"}
    if not guards:
        raise ServingError("No guard is loaded, so no text can be judged. Name one in the policy file.")
    if asked.model is not None and asked.model not in (*guards, service.model):
        raise UnknownNameError(did_you_mean("guard", asked.model, [*guards, service.model]))
    names = [asked.model] if asked.model in guards else list(guards)
    conversations = [[Message("user", text)] for text in asked.texts]
    policy = service.book.resolve(caller)
    await _admit(service, caller, conversations)
    found = await service.score(conversations, names)
    results = [result_of(_verdicts(service, policy, names, scores)) for scores in found]
    return {
        "id": f"modr-{secrets.token_hex(12)}",
        "model": asked.model or service.model,
        "results": results,
        "unsupported_categories": unsupported([guards[name] for name in names]),
    }


async def dry_run(service: Service, caller: Caller, asked: DryRunRequest) -> dict[str, object]:
    """The decision on a prompt and, where the conversation ends with one, on its answer; nothing is audited."""
    messages = [turn.message() for turn in asked.messages]
    policy = service.book.resolve(caller, asked.safety)
    has_answer = messages[-1].role == "assistant" and len(messages) > 1
    texts = [messages[:-1], messages] if has_answer else [messages]
    await _admit(service, caller, texts)
    found = await service.score(texts, policy.guards) if policy.guards else [Scores({})] * len(texts)
    stages = []
    for scores in found:
        verdicts = _verdicts(service, policy, policy.guards, scores)
        is_answer = scores.place == "answer"
        decision = (policy.decide_answer if is_answer else policy.decide_prompt)(verdicts)
        stages.append(
            {
                "stage": "answer" if is_answer else "prompt",
                "action": decision.action,
                "intended": decision.intended,
                "reason": decision.reason,
                "strength": decision.strength,
                "verdicts": [
                    VerdictTold.of(verdict, "answer" if is_answer else "prompt").model_dump() for verdict in verdicts
                ],
            }
        )
    return {"object": "policy.dry_run", "policy": policy.name, "version": policy.version, "stages": stages}


async def _admit(service: Service, caller: Caller, conversations: Sequence[Sequence[Message]]) -> None:
    """Count the texts by the caller's limits, off the event loop: many of them take a while to encode."""

    def count() -> int:
        return sum(len(service.base.encode(messages).ids) for messages in conversations)

    service.limiter.admit(caller.key or caller.tenant, caller.limits, await asyncio.to_thread(count), 0)


def _verdicts(service: Service, policy: EffectivePolicy, names: Sequence[str], scores: Scores) -> list[Verdict]:
    adapters = service.engine.adapters
    return [
        verdict
        for name in names
        for verdict in policy.verdicts(name, scores.by_guard[name], scores.mode_for(adapters[name]))
    ]
