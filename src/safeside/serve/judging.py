"""Judging texts without answering: moderation, and what a policy would decide."""

from __future__ import annotations

import math
import secrets
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace

from safeside.adapters.adapter import Adapter
from safeside.errors import ServingError
from safeside.guards.score import Scores
from safeside.moderation import ModerationRequest, chosen, result_of, unsupported
from safeside.serve.audit import AuditRecord
from safeside.serve.effective import EffectivePolicy
from safeside.serve.keys import Caller
from safeside.serve.replies import VerdictTold
from safeside.serve.service import Service
from safeside.serve.wire import DryRunRequest
from safeside.types import Message, Verdict

IsGone = Callable[[], Awaitable[bool]]
"""Whether the client has left: nobody reads what is judged from then on, so the rest is not."""


async def moderate(
    service: Service, caller: Caller, asked: ModerationRequest, is_gone: IsGone
) -> dict[str, object] | None:
    """OpenAI's moderation of one or many texts by one loaded guard or all of them; each text has an audit record."""
    policy = service.book.resolve(caller)
    guards = dict(policy.adapters)
    if not guards:
        raise ServingError("No guard is loaded, so no text can be judged. Name one in the policy file.")
    guards = {name: guards[name] for name in chosen(asked.model, list(guards), service.model)}
    found = await service.score(caller, [[Message("user", text)] for text in asked.texts], guards, is_gone)
    if found is None:
        return None
    verdicts = [_verdicts(policy, guards, scores) for scores in found]
    trace_id, known = secrets.token_hex(12), {*guards, *service.genes}
    record = AuditRecord(
        trace_id=trace_id,
        tenant=caller.tenant,
        stage="moderation",
        policy=policy.name,
        policy_version=policy.version,
        action="allow",
        adapters={name: value for name, value in service.fingerprints.items() if name in known},
        keep_text=policy.audit_text,
    )
    records = [_judged(record, text, own) for text, own in zip(asked.texts, verdicts, strict=True)]
    for own in verdicts:
        flagging = {verdict.task for verdict in own if verdict.flagged}
        service.metrics.count_verdicts(guards, dict.fromkeys(flagging, "annotate"))
    await service.record(*records)
    return {
        "id": f"modr-{trace_id}",
        "model": asked.model or service.model,
        "results": [result_of(own) for own in verdicts],
        "unsupported_categories": unsupported(list(guards.values())),
    }


async def dry_run(service: Service, caller: Caller, asked: DryRunRequest, is_gone: IsGone) -> dict[str, object] | None:
    """The decision on a prompt and, where the conversation ends with one, on its answer; nothing is audited."""
    messages = [turn.message() for turn in asked.messages]
    policy = service.book.resolve(caller, asked.safety)
    has_answer = messages[-1].role == "assistant" and len(messages) > 1
    texts = [messages[:-1], messages] if has_answer else [messages]
    guards = {name: policy.adapters[name] for name in policy.guards}
    found = await service.score(caller, texts, guards, is_gone) if guards else [Scores({})] * len(texts)
    if found is None:
        return None
    stages = []
    for scores in found:
        verdicts = _verdicts(policy, guards, scores)
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


def _verdicts(policy: EffectivePolicy, guards: Mapping[str, Adapter], scores: Scores) -> list[Verdict]:
    return [
        verdict
        for name, guard in guards.items()
        for verdict in policy.verdicts(name, scores.by_guard[name], scores.mode_for(guard))
    ]


def _judged(record: AuditRecord, text: str, verdicts: Sequence[Verdict]) -> AuditRecord:
    """The record of one text: what is flagged is marked, and nothing else is done."""
    flagged = [_reason(verdict) for verdict in verdicts if verdict.flagged]
    return replace(
        record,
        action="annotate" if flagged else "allow",
        scores={f"{each.task}/{each.label}": each.score for each in verdicts},
        reason="; ".join(flagged),
        text=text,
    )


def _reason(verdict: Verdict) -> str:
    if not math.isfinite(verdict.score):
        return f"{verdict.task} could not score {verdict.label}"
    return f"{verdict.task}: {verdict.label} {verdict.score:.3f} >= {verdict.threshold:.3f}"
