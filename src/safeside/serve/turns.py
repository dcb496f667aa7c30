"""The user's earlier turns, each judged by itself.

A history is the client's word: behind a made-up answer the end of a conversation says little of what was asked before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from safeside.adapters.adapter import Adapter
from safeside.content import is_seen
from safeside.guards.score import Scores
from safeside.serve.effective import Decision, EffectivePolicy
from safeside.serve.watching import ENDS
from safeside.types import Message, Verdict

Judgement = tuple[tuple[Verdict, ...], Decision]


def earlier_turns(messages: Sequence[Message]) -> list[tuple[Message]]:
    """Each message of the user but the last message, by itself; one that holds no text has nothing to judge."""
    return [(message,) for message in messages[:-1] if message.role == "user" and is_seen(message.content)]


def verdicts_on(policy: EffectivePolicy, guards: Mapping[str, Adapter], scores: Scores) -> tuple[Verdict, ...]:
    """The verdicts of ``guards`` on a text with these scores, by the lines of the policy."""
    return tuple(
        verdict
        for name, guard in guards.items()
        for verdict in policy.verdicts(name, scores.by_guard[name], scores.mode_for(guard))
    )


def refusal_by_turns(
    policy: EffectivePolicy, guards: Mapping[str, Adapter], found: Sequence[Scores]
) -> Judgement | None:
    """Verdicts and decision on the first of the earlier turns that a rule on prompts blocks or replaces; else None.

    ``found`` are the turns' scores by ``guards``, those of the policy's rules on prompts.
    """
    for number, scores in enumerate(found, 1):
        verdicts = verdicts_on(policy, guards, scores)
        decision = policy.decide_prompt(verdicts)
        if decision.action in ENDS:
            where = f"an earlier turn, {number} of {len(found)}"
            told = [replace(each, reason="; ".join(filter(None, (where, each.reason)))) for each in verdicts]
            return tuple(told), replace(decision, reason=f"{decision.reason} ({where})")
    return None
