"""The ``safety`` object of an answer: what each guard says, from the scores behind every token.

The first scores are of the prompt, at its last token: a prefix-cache hit never covers it.  Behind each token of the
answer but the last stand the scores of everything up to it; the last was drawn but never read.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from safeside.adapters.adapter import Adapter
from safeside.moderation import finite
from safeside.types import Mode, Verdict
from safeside.verdicts import verdict_of
from safeside.vllm_plugin.plan import EngineConfig, shell_of

Safety = dict[str, object]


class Told:
    """Turns scores into what clients get, for one engine."""

    def __init__(self, config: EngineConfig) -> None:
        self.guards = [shell_of(guard) for guard in config.guards]
        self.tells_strength = config.tells_strength

    def safety(self, steps: Sequence[Sequence[float]], *, with_tokens: bool = False) -> Safety:
        """Verdicts on prompt and answer, the running maximum by guard, and the highest strength.

        ``steps`` holds for each token of the answer, one or more, the scores of all guards' labels, then the strength
        if it is told; a score that could not be read is NaN, and its guard flags.
        """
        stages: list[tuple[Mode, Sequence[float]]] = [("prompt", steps[0])]
        stages += [("answer", steps[-1])] if len(steps) > 1 else []
        risks = [{guard.name: max_or_nan(part) for guard, part in self._parts(step)} for step in steps]
        safety: Safety = {
            "verdicts": [_fields(verdict) for mode, step in stages for verdict in self.verdicts(step, mode)],
            "maximum": {guard.name: finite(max_or_nan([risk[guard.name] for risk in risks])) for guard in self.guards},
            "unscored_tokens": 1,
        }
        if self.tells_strength:
            safety["strength"] = finite(max_or_nan([step[-1] for step in steps]))
        if with_tokens:
            safety["tokens"] = self._tokens(steps, risks)
        return safety

    def verdicts(self, step: Sequence[float], mode: Mode) -> list[Verdict]:
        """One verdict of each guard, from the scores of all their labels."""
        return [verdict_of(guard, part, mode) for guard, part in self._parts(step)]

    def _tokens(self, steps: Sequence[Sequence[float]], risks: Sequence[dict[str, float]]) -> list[Safety]:
        unread = dict.fromkeys((guard.name for guard in self.guards), math.nan)
        tokens: list[Safety] = []
        for step, risk in zip(steps, [*risks[1:], unread], strict=True):
            token: Safety = {"risk": {name: finite(value) for name, value in risk.items()}}
            tokens.append({**token, "strength": finite(step[-1])} if self.tells_strength else token)
        return tokens

    def _parts(self, step: Sequence[float]) -> list[tuple[Adapter, Sequence[float]]]:
        """Each guard with the scores of its labels."""
        parts, start = [], 0
        for guard in self.guards:
            stop = start + len(guard.config.labels)
            parts.append((guard, step[start:stop]))
            start = stop
        return parts


def _fields(verdict: Verdict) -> Safety:
    return {
        "guard": verdict.task, "label": verdict.label, "stage": verdict.mode, "score": finite(verdict.score),
        "threshold": verdict.threshold, "flagged": verdict.flagged, "probability": finite(verdict.probability),
        "reason": verdict.reason,
    }  # fmt: skip


def max_or_nan(values: Sequence[float]) -> float:
    """The highest; NaN where one is no number, or there is none."""
    return math.nan if not values or any(math.isnan(value) for value in values) else max(values)
