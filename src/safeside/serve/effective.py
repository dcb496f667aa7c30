"""What holds for one request, and what it decides."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from safeside.adapters.adapter import Adapter
from safeside.mixing import Fixed
from safeside.mixing import Policy as StrengthPolicy
from safeside.policies import ByCategory, Timed
from safeside.serve.curves import loaded, steering_lines, strength_policy
from safeside.serve.rules import (
    DEFAULT_HOLD_BACK,
    DEFAULT_ON_ERROR,
    SEVERITY,
    Action,
    FlagRule,
    OnError,
    Policy,
    Rule,
    Stage,
    SteerRule,
)
from safeside.stopping import StopRule
from safeside.types import Mode, Verdict
from safeside.verdicts import verdict_of

_STAGES: tuple[Stage, ...] = ("prompt", "answer")
_ANSWER_MODES: tuple[Mode, ...] = ("stream", "answer")
_READ_AS: dict[Mode, tuple[Stage, ...]] = {"prompt": ("prompt",), "windowed": _STAGES}
_ENDS = ("block", "replace")


@dataclass(frozen=True, slots=True)
class Decision:
    """What is done with one prompt or answer."""

    action: Action
    """What is done."""
    reason: str = ""
    """Which guard at which score, or why it could not score; none of the user's words."""
    strength: float = 0.0
    """The highest strength in [0, 2] that the policy asks for, by the verdicts on this text."""
    intended: Action = "allow"
    """What would be done if every rule acted: more than ``action`` only in shadow mode."""
    guard: str = ""
    """Name of the guard that decided; empty where none did."""
    text: str = ""
    """What is sent instead; for ``replace``."""
    by_guard: Mapping[str, Action] = field(default_factory=dict, repr=False)
    """By guard the most severe that it asked for; a guard that asked for nothing is left out."""


@dataclass(frozen=True, slots=True)
class Watched:
    """A rule on answers that ends none, and where it speaks while one is written."""

    rule: Rule
    lines: tuple[float, ...]
    """By label of its guard the score in [0, 1] from which on a token counts; inf where the rule leaves it out."""
    n_consecutive: int
    """Such tokens in a row."""


@dataclass(frozen=True, slots=True)
class EffectivePolicy:
    """What holds for one request.  Made by ``PolicyBook.resolve``."""

    name: str
    """Names of the policies that hold, joined by ``+``."""
    version: str
    """The book's."""
    policy: Policy
    """The strictest of them all, every rule with its own mode."""
    adapters: Mapping[str, Adapter] = field(default_factory=dict, repr=False)
    """The loaded guards by name."""
    aligners: tuple[str, ...] = ()
    """The loaded aligners."""
    exact_strength: float | None = None
    """The strength in [0, 2] that a request with the right to loosen asked for, whatever the policy says."""

    @property
    def guards(self) -> tuple[str, ...]:
        """Guards that have to judge: those of any rule, sorted."""
        return tuple(sorted({rule.guard for stage in _STAGES for rule in self._rules(stage)}))

    @property
    def is_shadow(self) -> bool:
        """Whether no rule acts."""
        return not any(_acts(rule) for stage in _STAGES for rule in self._rules(stage))

    @property
    def hold_back(self) -> int:
        """Tokens of a stream that are held back; 0 sends at once."""
        return DEFAULT_HOLD_BACK if self.policy.hold_back is None else self.policy.hold_back

    @property
    def on_error(self) -> OnError:
        """What is done when a guard cannot score."""
        return self.policy.on_error or DEFAULT_ON_ERROR

    @property
    def audit_text(self) -> bool:
        """Whether the audit log keeps texts."""
        return bool(self.policy.audit_text)

    def verdicts(self, guard: str, scores: Sequence[float], mode: Mode) -> tuple[Verdict, ...]:
        """One verdict for each label of a guard's scores, at the lowest threshold of the rules for this stage.

        ``scores`` are its K calibrated scores at one token; a guard that failed or timed out has NaN for each.
        """
        adapter = loaded(guard, self.adapters)
        own = verdict_of(adapter, scores, mode, self._notes(adapter, mode))
        lines = self._lowest_lines(adapter, mode)
        chances = _probabilities(adapter, scores, mode)
        return tuple(
            replace(
                own,
                label=label,
                score=score,
                threshold=lines[label],
                flagged=not score < lines[label],  # NaN flags
                probability=chance,
            )
            for label, score, chance in zip(adapter.config.labels, scores, chances, strict=True)
        )

    def decide_prompt(self, verdicts: Sequence[Verdict]) -> Decision:
        """What is done with a prompt; a guard of a rule without a verdict counts as one that cannot score."""
        return self._decide("prompt", verdicts)

    def decide_answer(self, verdicts: Sequence[Verdict], met: Mapping[Rule, str] = {}) -> Decision:
        """The same for an answer, or for what is there of it; ``met`` says why, by rule that spoke before its end."""
        return self._decide("answer", verdicts, met)

    def strengths(self) -> dict[str, StrengthPolicy]:
        """By aligner, what sets its strength; ready for ``attachment.request(strength=...)``."""
        if self.exact_strength is not None:
            return {name: Fixed((self.exact_strength,)) for name in self.aligners}
        return self._strengths(_STAGES, acting_only=True)

    def stop_rules(self) -> dict[str, StopRule]:
        """By guard, when it ends an answer that is being written: of the rules that block or replace, and act.

        Its threshold is the lower one of streams and of whole answers: what was sent is never flagged at the end.
        """
        rules: dict[str, StopRule] = {}
        for rule in self._rules("answer"):
            if not isinstance(rule, FlagRule) or not _ends(rule):
                continue
            adapter = loaded(rule.guard, self.adapters)
            threshold = self._lowest_line(rule, adapter)
            n_consecutive = _tokens_in_a_row(rule, adapter)
            before = rules.get(rule.guard, StopRule(threshold, n_consecutive))
            rules[rule.guard] = StopRule(min(threshold, before.threshold), min(n_consecutive, before.n_consecutive))
        return rules

    def watched(self) -> tuple[Watched, ...]:
        """The rules on answers that end none, each where it would have ended one if it blocked, or steers at all."""
        return tuple(
            self._watched(rule)
            for rule in self._rules("answer")
            if not _ends(rule) and (isinstance(rule, FlagRule) or self.exact_strength is None)
        )

    def enforced(self) -> EffectivePolicy | None:
        """The same with every rule on answers acting; None where they all do."""
        if all(map(_acts, self.policy.answer)):
            return None
        answer = tuple(rule.model_copy(update={"mode": "enforce"}) for rule in self.policy.answer)
        return replace(self, policy=self.policy.model_copy(update={"answer": answer}))

    def _watched(self, rule: Rule) -> Watched:
        adapter = loaded(rule.guard, self.adapters)
        labels = adapter.config.labels
        if isinstance(rule, SteerRule):
            lines, n_consecutive = steering_lines(rule, self.adapters), 1
        else:
            lines = dict.fromkeys(rule.labels or labels, self._lowest_line(rule, adapter))
            n_consecutive = _tokens_in_a_row(rule, adapter)
        return Watched(rule, tuple(lines.get(label, math.inf) for label in labels), n_consecutive)

    def _rules(self, stage: Stage) -> tuple[Rule, ...]:
        return self.policy.prompt if stage == "prompt" else self.policy.answer

    def _decide(self, stage: Stage, verdicts: Sequence[Verdict], met: Mapping[Rule, str] = {}) -> Decision:
        acting = self._worst(stage, verdicts, met, acting_only=True)
        every = self._worst(stage, verdicts, met, acting_only=False)
        is_held = every.action != acting.action
        return replace(acting, intended=every.action, reason=every.reason if is_held else acting.reason)

    def _worst(
        self, stage: Stage, verdicts: Sequence[Verdict], met: Mapping[Rule, str], *, acting_only: bool
    ) -> Decision:
        """The most severe of what the rules ask for; of equals the first."""
        strength = self._strength(stage, verdicts, acting_only)
        found = [Decision("steer", f"strength {strength:.2f}") if strength > 0 else Decision("allow")]
        rules = [rule for rule in self._rules(stage) if _acts(rule) or not acting_only]
        steering = {rule.guard for rule in rules if isinstance(rule, SteerRule)}
        by_guard: dict[str, Action] = dict.fromkeys(steering if strength > 0 else (), "steer")
        for rule in rules:
            if problem := self._problem(rule, verdicts):
                on_error = "block" if self.on_error == "steer" and rule.guard not in steering else self.on_error
                found.append(Decision(on_error, f"{rule.guard} could not score: {problem}", guard=rule.guard))
            elif reason := self._flag_reason(rule, verdicts) or met.get(rule, ""):
                text = rule.text or "" if isinstance(rule, FlagRule) else ""
                found.append(Decision(rule.action, reason, guard=rule.guard, text=text))
        for each in found[1:]:
            by_guard[each.guard] = max(each.action, by_guard.get(each.guard, "allow"), key=SEVERITY.__getitem__)
        worst = max(found, key=lambda decision: SEVERITY[decision.action])
        return replace(worst, strength=strength, by_guard=by_guard)

    def _problem(self, rule: Rule, verdicts: Sequence[Verdict]) -> str:
        """Why the rule cannot be decided; empty when it can."""
        own = [verdict for verdict in verdicts if verdict.task == rule.guard]
        adapter = self.adapters.get(rule.guard)
        needed = set(rule.labels or (adapter.config.labels if adapter is not None else ()))
        if not own or needed - {verdict.label for verdict in own}:
            return "it gave no verdict"
        broken = [verdict.label for verdict in own if not math.isfinite(verdict.score)]
        return f"the score of {broken[0]} is not a number" if broken else ""

    def _flag_reason(self, rule: Rule, verdicts: Sequence[Verdict]) -> str:
        """Which label is over its line, and by how much; empty when none is, and for rules that steer."""
        if isinstance(rule, SteerRule):
            return ""
        for verdict in verdicts:
            if verdict.task != rule.guard or (rule.labels and verdict.label not in rule.labels):
                continue
            line = self._line(rule, verdict)
            if verdict.score >= line:
                return f"{rule.guard}: {verdict.label} {verdict.score:.3f} >= {line:.3f}"
        return ""

    def _line(self, rule: FlagRule, verdict: Verdict) -> float:
        if rule.threshold is not None:
            return rule.threshold
        return self._lines(rule, loaded(rule.guard, self.adapters), verdict.mode)[verdict.label]

    def _lines(self, rule: FlagRule, adapter: Adapter, mode: Mode) -> dict[str, float]:
        """By label the score from which on the rule flags."""
        labels = adapter.config.labels
        chosen = adapter.with_preset(rule.preset)
        lines = (rule.threshold,) * len(labels) if rule.threshold is not None else chosen.thresholds_in(mode)
        return {
            label: line for label, line in zip(labels, lines, strict=True) if not rule.labels or label in rule.labels
        }

    def _lowest_line(self, rule: FlagRule, adapter: Adapter) -> float:
        """The lowest of its lines for streams and for whole answers."""
        return min(min(self._lines(rule, adapter, mode).values()) for mode in _ANSWER_MODES)

    def _flag_rules(self, guard: str, mode: Mode) -> list[FlagRule]:
        """The rules that flag by a guard's scores of texts that were read in ``mode``."""
        rules = (rule for stage in _READ_AS.get(mode, ("answer",)) for rule in self._rules(stage))
        return [rule for rule in rules if isinstance(rule, FlagRule) and rule.guard == guard]

    def _notes(self, adapter: Adapter, mode: Mode) -> list[str]:
        """Where other thresholds stand in for those of a rule's preset."""
        presets = {rule.preset for rule in self._flag_rules(adapter.name, mode) if rule.preset is not None}
        notes = [adapter.with_preset(preset).fallback_note(mode) for preset in sorted(presets)]
        return [note for note in notes if note]

    def _lowest_lines(self, adapter: Adapter, mode: Mode) -> dict[str, float]:
        """By label the lowest line of the rules for a stage; the guard's own where no rule has one."""
        lowest: dict[str, float] = {}
        for rule in self._flag_rules(adapter.name, mode):
            for label, line in self._lines(rule, adapter, mode).items():
                lowest[label] = min(line, lowest.get(label, line))
        own = dict(zip(adapter.config.labels, adapter.thresholds_in(mode), strict=True))
        return own | lowest

    def _strength(self, stage: Stage, verdicts: Sequence[Verdict], acting_only: bool) -> float:
        if self.exact_strength is not None:
            return self.exact_strength
        scores: dict[str, dict[str, float]] = {}
        for verdict in verdicts:
            scores.setdefault(verdict.task, {})[verdict.label] = verdict.score
        policies = self._strengths((stage,), acting_only=acting_only).values()
        return max((_strength_at(policy, scores, self.adapters) for policy in policies), default=0.0)

    def _strengths(self, stages: Iterable[Stage], *, acting_only: bool) -> dict[str, StrengthPolicy]:
        rules = [
            (stage, rule)
            for stage in stages
            for rule in self._rules(stage)
            if isinstance(rule, SteerRule) and (_acts(rule) or not acting_only)
        ]
        return {
            name: strength_policy(
                [(stage, rule) for stage, rule in rules if rule.aligner in (None, name)],
                self.adapters,
                self.policy.floor,
            )
            for name in self.aligners
        }


def _tokens_in_a_row(rule: FlagRule, adapter: Adapter) -> int:
    """Risky tokens that end an answer: those of the rule, else those that the guard's promise counts on."""
    fit = adapter.config.modes.get("stream") if rule.threshold is None else None
    return rule.n_consecutive or (fit.n_consecutive if fit is not None else None) or 1


def _acts(rule: Rule) -> bool:
    return rule.mode != "shadow"


def _ends(rule: Rule) -> bool:
    """Whether the rule ends an answer that it flags."""
    return rule.action in _ENDS and _acts(rule)


def _probabilities(guard: Adapter, scores: Sequence[float], mode: Mode) -> list[float]:
    """By label the calibrated probability; NaN for all where a score is not a number."""
    if not all(map(math.isfinite, scores)):
        return [math.nan] * len(scores)
    return [float(chance) for chance in guard.probabilities(np.array([scores], dtype=np.float64), mode)[0]]


def _strength_at(
    policy: StrengthPolicy, scores: Mapping[str, Mapping[str, float]], guards: Mapping[str, Adapter]
) -> float:
    """The strength for one text, by guard and label its scores; one that is missing counts as not a number."""
    if policy.guard is None:
        return policy.ceiling
    own = scores.get(policy.guard, {})
    guard = guards.get(policy.guard)
    row = torch.tensor([own.get(label, math.nan) for label in (guard.config.labels if guard is not None else own)])
    curve = policy.policy if isinstance(policy, Timed) else policy
    return float(curve.strength(row if isinstance(curve, ByCategory) else row.amax(-1)))
