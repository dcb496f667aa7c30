"""When a guard ends an answer while it is written.

Guards score every token as it is fed to the base, so a rule over these scores costs nothing.  A single token is noisy;
a rule waits for ``n_consecutive`` risky ones in a row (the debounce of Qwen3Guard-Stream).  Until that many tokens have
passed nobody knows whether a risky one stands alone, so it is held back: what was shown is never taken back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from safeside.adapters.adapter import Adapter
from safeside.errors import InputError
from safeside.types import Stop


@dataclass(frozen=True, slots=True)
class StopRule:
    """Stop at the ``n_consecutive``-th token in a row whose score reaches ``threshold``.

    Of several labels the highest score counts.  A score that is not a number stops at once (guards fail closed).
    """

    threshold: float
    """Score in [0, 1]; ``safeside.guards.stream.fit_stop_rule`` chooses it."""
    n_consecutive: int = 2
    """Tokens in a row, 1 or more.  An answer of fewer tokens is never stopped; its verdict still judges it."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.threshold <= 1.0:  # also refuses NaN
            raise InputError(f"A stop rule's threshold must lie in [0, 1]; got {self.threshold}.")
        if self.n_consecutive < 1:
            raise InputError(f"A stop rule needs 1 token in a row or more; got n_consecutive={self.n_consecutive}.")

    def first_stop(self, scores: Float[Tensor, " T"]) -> int | None:
        """Index of the token at which an answer with these scores is stopped; None when it is not."""
        met = run_scores(scores, self.n_consecutive) >= self.threshold
        return int(met.int().argmax()) if met.any() else None

    def n_clear(self, scores: Float[Tensor, " T"]) -> int:
        """How many of the first tokens can no longer become part of a run of risky ones."""
        clear = (scores < self.threshold).nonzero()  # NaN is not below
        return int(clear[-1]) + 1 if len(clear) else 0


def run_scores(scores: Float[Tensor, " T"], n_consecutive: int) -> Float[Tensor, " T"]:
    """At each token the lowest of the last ``n_consecutive`` scores: the highest threshold at which a rule is met.

    It is -inf where fewer tokens precede, and inf at a score that is not a number.
    """
    known = torch.where(scores.isfinite(), scores, torch.inf)
    lowest = torch.full_like(known, -torch.inf)
    if len(known) >= n_consecutive:
        lowest[n_consecutive - 1 :] = known.unfold(0, n_consecutive, 1).amin(1)
    return torch.where(scores.isfinite(), lowest, torch.inf)


@dataclass(frozen=True, slots=True)
class Standing:
    """How one answer stands while it is written."""

    n_clear: int
    """How many of its first tokens no guard can take back any more."""
    stop: Stop | None = None
    """Where a guard ends it."""
    is_blocked: bool = False
    """The prompt was blocked, so there is no answer."""


def kept_rule(guard: Adapter) -> StopRule | None:
    """The rule that a guard's artifact keeps for streams, at the preset chosen; None where it keeps none."""
    found = guard.config.modes.get("stream")
    promise = found.of_preset(guard.config.preset) if found is not None else None
    if found is None or promise is None or found.n_consecutive is None:
        return None
    return StopRule(min(promise.threshold), found.n_consecutive)


def as_rules(stop: object, attached: Sequence[Adapter]) -> dict[str, StopRule]:
    """One rule for each guard that may stop.

    ``stop`` is None, a rule for the only guard, rules by guard's name, or True: of every guard the rule that its
    artifact keeps.  Where none keeps one, True is an InputError.
    """
    guards = [guard.name for guard in attached]
    if stop is None:
        return {}
    if stop is True:
        return _kept_rules(attached)
    if isinstance(stop, StopRule):
        if len(guards) != 1:
            raise InputError(
                f"One stop rule was given for {len(guards)} guards ({', '.join(guards) or 'none attached'}); expected "
                "one guard. Pass stop={'name': rule, ...}."
            )
        return {guards[0]: stop}
    if not isinstance(stop, Mapping) or not all(isinstance(rule, StopRule) for rule in stop.values()):
        raise InputError(f"stop cannot be {stop!r}; expected a StopRule, or a mapping from guard to StopRule, or True.")
    unknown = sorted(set(stop) - set(guards))
    if unknown:
        raise InputError(
            f"No guard called {', '.join(map(str, unknown))} to stop by; attached are {', '.join(guards) or 'none'}."
        )
    return dict(stop)


def _kept_rules(attached: Sequence[Adapter]) -> dict[str, StopRule]:
    rules = {guard.name: rule for guard in attached if (rule := kept_rule(guard)) is not None}
    if not rules:
        names = ", ".join(f"{guard.name!r} at preset {guard.config.preset or 'none'}" for guard in attached)
        raise InputError(
            f"No guard attached keeps a stop rule ({names or 'there is none'}). Make one with safeside calibrate "
            "--mode stream, choose a preset that it has, or pass stop=StopRule(threshold)."
        )
    return rules


def standing_of(rules: Mapping[str, StopRule], scores: Mapping[str, Float[Tensor, " T"]], length: int) -> Standing:
    """How an answer of ``length`` tokens stands.

    ``scores`` holds, by guard, those of its first tokens: the newest one is not fed yet, and so neither scored nor
    clear.
    """
    stops = {name: rule.first_stop(scores[name]) for name, rule in rules.items()}
    found = [(token, name) for name, token in stops.items() if token is not None]
    if not found:
        return Standing(min((rule.n_clear(scores[name]) for name, rule in rules.items()), default=length))
    token, name = min(found)
    n_kept = min(rule.n_clear(scores[other][: token + 1]) for other, rule in rules.items())
    run = scores[name][max(0, token + 1 - rules[name].n_consecutive) : token + 1]
    return Standing(n_kept, Stop(name, token, n_kept, float(run.min()), rules[name].threshold))
