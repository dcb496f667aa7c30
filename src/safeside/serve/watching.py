"""What the rules that do not end an answer say of it while it is written, and what it would be if they all acted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from safeside.serve.effective import Decision, EffectivePolicy, Watched
from safeside.serve.passes import Scores
from safeside.serve.rules import SEVERITY, Action, FlagRule, Rule
from safeside.serve.stream import StreamGuard
from safeside.types import Mode, Stop, Verdict

Found = tuple[tuple[Verdict, ...], Decision]
ENDS = ("block", "replace")
"""Actions after which nothing more of an answer is sent."""


def verdicts_of(policy: EffectivePolicy, scores: Scores, mode: Mode) -> tuple[Verdict, ...]:
    """The verdicts of every guard of the policy on a text with these scores."""
    return tuple(verdict for name in policy.guards for verdict in policy.verdicts(name, scores[name], mode))


def ending_by(policy: EffectivePolicy, scores: Scores, stop: Stop | None, met: Mapping[Rule, str]) -> Found:
    """The verdicts and the decision where a rule was met or a guard failed: by whichever line it reached."""
    modes: tuple[Mode, ...] = ("answer",) if stop is None else ("stream", "answer")
    found = [
        (verdicts, policy.decide_answer(verdicts, met))
        for verdicts in (verdicts_of(policy, scores, mode) for mode in modes)
    ]
    verdicts, decision = next((pair for pair in found if pair[1].action in ENDS), found[0])
    return verdicts, _ended_by(stop, decision)


def _ended_by(stop: Stop | None, decision: Decision) -> Decision:
    """The decision on an answer that a guard's stop rule ended, even where no single label is over its own line."""
    if stop is None or decision.action in ENDS:
        return decision
    reason = f"{stop.guard}: {stop.score:.3f} >= {stop.threshold:.3f}, where an answer is ended"
    by_guard: dict[str, Action] = {**decision.by_guard, stop.guard: "block"}
    return replace(decision, action="block", intended="block", reason=reason, guard=stop.guard, by_guard=by_guard)


def risks_of(scores: Scores, broken: Scores) -> dict[str, float]:
    """By guard the highest score of one token; 0 for those that could not score it, which are dealt with apart."""
    return {name: 0.0 if name in broken else max(values) for name, values in scores.items()}


class AnswerWatch:
    """The rules on one answer that do not end it, token by token.  It changes nothing of the answer."""

    def __init__(self, policy: EffectivePolicy) -> None:
        self._policy = policy
        self._watched = policy.watched()
        self._runs = [0] * len(self._watched)
        self._marks: dict[tuple[str, str], Verdict] = {}
        self._failed: dict[str, tuple[float, ...]] = {}
        self._enforced = policy.enforced()
        self._stream = StreamGuard({} if self._enforced is None else self._enforced.stop_rules())
        self._end: Decision | None = None
        self._n_heard = 0
        self.met: dict[Rule, str] = {}
        """By rule that spoke, why it did so first."""

    def add(self, scores: Scores, broken: Scores) -> None:
        """Take the scores of the next token; ``broken`` are those of guards that could not score it."""
        self._n_heard += 1
        self._failed.update(broken)
        for number, watched in enumerate(self._watched):
            self._runs[number] = self._heard(watched, self._runs[number], scores, broken)
        if self._enforced is None or self._end is not None:
            return
        stop = self._stream.add(risks_of(scores, broken))
        if broken or stop is not None:
            _, decision = ending_by(self._enforced, {**scores, **self._failed}, stop, self.met)
            self._end = decision if decision.action in ENDS else None

    def settled(self, decision: Decision) -> Decision:
        """``decision`` on the answer, with what it would be if its end had come where every rule acts."""
        if self._end is None or SEVERITY[self._end.action] <= SEVERITY[decision.action]:
            return decision
        return replace(decision, intended=self._end.action, reason=self._end.reason)

    def _heard(self, watched: Watched, run: int, scores: Scores, broken: Scores) -> int:
        """How many risky tokens in a row end with this one; where they are enough, the rule has spoken."""
        guard = watched.rule.guard
        own = scores[guard]
        over = [label for label, line in enumerate(watched.lines) if own[label] >= line and guard not in broken]
        run = run + 1 if over else 0
        if over and run >= watched.n_consecutive:
            labels = self._policy.adapters[guard].config.labels
            first = f"{guard}: {labels[over[0]]} {own[over[0]]:.3f} >= {watched.lines[over[0]]:.3f}"
            self.met.setdefault(watched.rule, f"{first} at token {self._n_heard}")
            if isinstance(watched.rule, FlagRule):
                self._mark(guard, watched.lines, own, over)
        return run

    def _mark(self, guard: str, lines: Sequence[float], scores: Sequence[float], over: Sequence[int]) -> None:
        """Keep the riskiest verdict of each of these labels."""
        names = self._policy.adapters[guard].config.labels
        kept = [self._marks.get((guard, names[label])) for label in over]
        if all(before is not None and before.score >= scores[label] for before, label in zip(kept, over, strict=True)):
            return
        verdicts = self._policy.verdicts(guard, scores, "stream")
        for before, label in zip(kept, over, strict=True):
            if before is None or before.score < scores[label]:
                verdict = verdicts[label]
                reason = "; ".join([*([verdict.reason] if verdict.reason else []), f"at token {self._n_heard}"])
                line = min(lines[label], verdict.threshold)
                self._marks[guard, names[label]] = replace(verdict, flagged=True, threshold=line, reason=reason)

    def marked(self, verdicts: Sequence[Verdict]) -> tuple[Verdict, ...]:
        """``verdicts`` on the whole answer, with the riskiest token's for each label that only its middle flags."""
        return tuple(
            verdict if verdict.flagged else self._marks.get((verdict.task, verdict.label), verdict)
            for verdict in verdicts
        )
