"""A run of the alignment benchmark: what was chosen so far, and the rows of one method at its strengths."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from align_answers import MAIN, Dial, Study, oracle
from align_choice import TRIES, Choice
from align_figures import rate_rows, utility_rows
from align_training import KINDS, Changes, MissingError, Trained, trained
from safeside.evals.records import Record
from tidy import Row

STRENGTHS = (0.4, 1.0, 1.6, 2.0)  # beside 0, which is the base
HEADLINE_STRENGTHS = tuple(round(0.2 * index, 1) for index in range(1, 11))
BASELINE = "lora_dpo"
TRAINED_FACTS = ("train_seconds", "peak_bytes", "trainable_params")


@dataclass
class Bench:
    """A run of the benchmark: its study, and what was chosen on the way."""

    study: Study
    seeds: tuple[int, ...] = (0, 1, 2)
    n_tries: int = 3
    """Of the settings of an aligner, where it has so many."""
    n_baseline_tries: int = 7
    """Of the settings of LoRA-DPO, and of LoRA-SFT where it has so many."""
    kinds: tuple[str, ...] = KINDS
    """Of aligners."""
    changes: dict[str, Changes] = field(default_factory=dict)
    """By method, what the best try changed."""
    choice: Choice | None = None
    """The headline's setting."""
    notes: dict[str, object] = field(default_factory=dict)

    def one(self, name: str, seed: int = 0, *, makes: bool = True) -> Trained:
        """A trained method, at the settings that were chosen for it."""
        if name in TRIES and name not in self.changes:
            raise MissingError
        return trained(self.study.setup, name, seed, self.changes.get(name, {}), makes=makes)

    def trained_seeds(self, name: str) -> list[Trained]:
        """Those of a method that are there."""
        found = []
        for seed in self.seeds:
            try:
                found.append(self.one(name, seed, makes=False))
            except MissingError:
                continue
        return found

    @property
    def chosen(self) -> Choice:
        """The headline's setting, or MissingError."""
        if self.choice is None:
            raise MissingError
        return self.choice

    def labels(self, method: str, policy: str, strength: float, suite: str, seed: int) -> Row:
        """The columns that say what a row is of."""
        judge = "" if suite == "helpful" else self.study.questions.judge
        return {
            "base": self.study.setup.base_name,
            "method": method,
            "policy": policy,
            "strength": strength,
            "suite": suite,
            "judge": judge,
            "seed": seed,
        }

    def rows(self, labels: Row, records: Sequence[Record], share: float = 0.0) -> list[Row]:
        """The figures of one suite's records."""
        if labels["suite"] == "helpful":
            return utility_rows(labels, self.study.of_base("helpful"), records, flops_share=share)
        return rate_rows(labels, records, flops_share=share)


def suite_rows(
    bench: Bench,
    method: str,
    policy: str,
    strength: float,
    records_of: Callable[[str], Sequence[Record]],
    *,
    seed: int = 0,
    suites: Sequence[str] = MAIN,
    share: float = 0.0,
) -> list[Row]:
    return [
        row
        for suite in suites
        for row in bench.rows(bench.labels(method, policy, strength, suite, seed), records_of(suite), share)
    ]


def gated_rows(bench: Bench, one: Trained, strength: float, suites: Sequence[str] = MAIN) -> list[Row]:
    """Rows of the learned gate up to a strength and of the oracle, picked from fixed strengths."""
    found: list[Row] = []
    ways: dict[str, tuple[Callable[[str], Dial], float]] = {"oracle": (lambda suite: oracle(strength), one.share)}
    if bench.choice is not None:
        gate = bench.choice.gate.up_to(strength)
        ways["targeted_step"] = gate.dial, one.share + gate.share
    for policy, (dial, share) in ways.items():
        found += suite_rows(
            bench,
            one.name,
            policy,
            strength,
            lambda suite, dial=dial: bench.study.picked(one, suite, dial(suite)),
            seed=one.seed,
            suites=suites,
            share=share,
        )
    return found


def strength_rows(bench: Bench, name: str, seed: int, strengths: Sequence[float]) -> list[Row]:
    one, found = bench.one(name, seed), list[Row]()
    for strength in strengths:
        found += suite_rows(
            bench,
            name,
            "fixed",
            strength,
            lambda suite, strength=strength: bench.study.at(one, suite, strength),
            seed=seed,
            share=one.share,
        )
        found += gated_rows(bench, one, strength) if name in KINDS else []
    return found
