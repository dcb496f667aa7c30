"""Answers of the alignment benchmark: prompts of every suite by every method, kept as records that a run goes on with.

A gate that is latched at the prompt's end leaves an answer at one strength, and an aligner writes nothing into the
base.  So the answers of steps, or of an oracle, are picked from those of the fixed strengths.
That this is what the gate itself would answer is tested, and checked again for the headline, which is generated.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from align_training import Clock, Setup, Trained
from safeside.adapters.adapter import Adapter
from safeside.attach import attach
from safeside.evals.judges import JUDGES, Judge, JudgeOptions
from safeside.evals.likelihood import Likelihood
from safeside.evals.methods import Method, PlainBase
from safeside.evals.records import Record, RecordLog
from safeside.evals.runs import Judging, judging, run_suite
from safeside.evals.suites import SUITES, Prompt, Suite, answered, draw
from safeside.types import Completion, Message

NEW_TOKENS = 24  # of an answer: 99.7% of the refusals that are learnt from say no within them
BATCH = 25
MAIN = ("strongreject", "benign", "xstest", "helpful")  # measured for every method and strength
FURTHER = ("jailbreakbench", "harmbench", "advbench", "prefilled", "attacks")  # for the base and the headline
SEEN = 200  # prompts of a suite that earlier runs answered, before the gate was changed: others are asked now
CHECKED = ("checked_harmful", "checked_harmless", "checked_helpful")  # what settings are chosen on

Dial = Callable[[Prompt], float]
"""The strength of each prompt."""


@dataclass(frozen=True)
class Timed:
    """A method that answers only while there is time; its records are those of the method."""

    method: Method
    clock: Clock

    @property
    def name(self) -> str:
        """The method's."""
        return self.method.name

    @property
    def policy_name(self) -> str:
        """The method's."""
        return self.method.policy_name

    @property
    def strength(self) -> float:
        """The method's."""
        return self.method.strength

    @property
    def key(self) -> object:
        """The method's."""
        return self.method.key

    def answers(self, conversations: Sequence[Sequence[Message]], max_new_tokens: int) -> list[Completion]:
        """The method's, or MissingError."""
        self.clock.check()
        return self.method.answers(conversations, max_new_tokens)

    def likelihoods(self, conversations: Sequence[Sequence[Message]]) -> list[Likelihood]:
        """The method's, or MissingError."""
        self.clock.check()
        return self.method.likelihoods(conversations)


@dataclass(frozen=True)
class Questions:
    """The suites of a run, with their prompts in order of length: little padding."""

    setup: Setup
    limit: int
    judge: str = "refusal_phrases"
    """Name of the judge of all answers."""
    judge_options: JudgeOptions = field(default_factory=JudgeOptions)
    """What it is made with."""
    new_tokens: int = NEW_TOKENS
    """Of an answer, at most."""
    drawn: dict[str, list[Prompt]] = field(default_factory=dict, repr=False, compare=False)
    """The prompts of suites that were asked for, each file read once."""

    @functools.cached_property
    def made_judge(self) -> Judge:
        """The judge, made once."""
        return JUDGES.get(self.judge)(self.judge_options)

    def suite(self, name: str) -> Suite:
        """The suite, public or of validation prompts."""
        if name not in CHECKED:
            measured = replace(SUITES.get(name), limit=self.limit)
            return measured if measured.measure == "likelihood" else replace(measured, max_new_tokens=self.new_tokens)
        path = self.setup.rows / f"{name}.jsonl"
        if name == "checked_helpful":
            return Suite(name, path, "", self.limit, answered, "harmless", measure="likelihood")
        holds = "harmful" if name == "checked_harmful" else "harmless"
        return Suite(name, path, limit=self.limit, holds=holds, max_new_tokens=self.new_tokens)  # type: ignore[arg-type]

    def prompts(self, name: str) -> list[Prompt]:
        """The prompts drawn: of a public suite those after the first ``SEEN``, if it has so many more."""
        if name not in self.drawn:
            suite = self.suite(name)
            found = draw(suite, self.setup.data) if name in CHECKED else self._unseen(suite)
            length = {prompt.id: len(prompt.turns[0]) + sum(map(len, prompt.references)) for prompt in found}
            self.drawn[name] = sorted(found, key=lambda prompt: length[prompt.id])
        return self.drawn[name]

    def _unseen(self, suite: Suite) -> list[Prompt]:
        seen = {prompt.id for prompt in draw(replace(suite, limit=SEEN), self.setup.data)}
        more = draw(replace(suite, limit=SEEN + self.limit), self.setup.data)
        found = [prompt for prompt in more if prompt.id not in seen]
        return found if len(found) == self.limit else draw(suite, self.setup.data)

    def n_seen(self, name: str) -> int:
        """How many of a suite's prompts earlier runs answered."""
        seen = {prompt.id for prompt in draw(replace(self.suite(name), limit=SEEN), self.setup.data)}
        return sum(prompt.id in seen for prompt in self.prompts(name))

    def own_prompts(self) -> list[Prompt]:
        """A few harmful and harmless prompts that were written for this project, and can be shown."""
        return draw(replace(SUITES.get("demo"), limit=4))

    def ask(self, name: str, method: Method, log: RecordLog) -> list[Record]:
        """A record of each prompt; those that ``log`` holds are not made again.  Without time it is a MissingError."""
        suite = self.suite(name)
        if suite.measure == "answers":
            judged = Judging(self.judge, self.made_judge, log, BATCH)
        else:
            judged = replace(judging(suite, log=log), batch_size=BATCH // 2)
        return run_suite(suite, self.prompts(name), Timed(method, self.setup.clock), judged)


@dataclass
class Study:
    """Questions, and one file of records for each method and seed."""

    questions: Questions
    logs: dict[str, RecordLog] = field(default_factory=dict)

    @property
    def setup(self) -> Setup:
        """What the run shares."""
        return self.questions.setup

    def ask(self, method: Method, suite: str, seed: int = 0) -> list[Record]:
        """Records of a suite's prompts by a method."""
        name = f"{method.name}-{seed}"
        if name not in self.logs:
            self.logs[name] = RecordLog(self.setup.cells / "records" / f"{name}.jsonl")
        return self.questions.ask(suite, method, self.logs[name])

    def of_base(self, suite: str) -> list[Record]:
        """The base's records."""
        return self.ask(PlainBase(self.setup.base), suite)

    def at(self, trained: Trained, suite: str, strength: float) -> list[Record]:
        """Records at a fixed strength; 0 is the base, whatever was trained."""
        return self.of_base(suite) if strength == 0.0 else self.ask(trained.at(strength), suite, trained.seed)

    def picked(self, trained: Trained, suite: str, dial: Dial) -> list[Record]:
        """Records of a gate that gives every prompt a strength of its own."""
        return picked_from(lambda strength: self.at(trained, suite, strength), dial)


def picked_from(at: Callable[[float], list[Record]], dial: Dial) -> list[Record]:
    """From the records of one suite ``at`` fixed strengths, in one order, each prompt's at the strength it is given."""
    strengths = [dial(record.prompt) for record in at(0.0)]
    by_strength = {strength: at(strength) for strength in set(strengths)}
    return [by_strength[strength][place] for place, strength in enumerate(strengths)]


def constant(strength: float) -> Dial:
    """The same for every prompt."""
    return lambda prompt: strength


def oracle(strength: float) -> Dial:
    """For prompts that are labelled harmful, else 0."""
    return lambda prompt: strength if prompt.is_harmful else 0.0


def gate_scores(guard: Adapter, questions: Questions, names: Sequence[str]) -> dict[str, float | None]:
    """By suite and prompt, the guard's score at the prompt's end: what a latched gate reads.

    A prompt that the base cannot read has None: it is not answered either.
    """
    base, found = questions.setup.base, dict[str, float | None]()
    with attach(base, guards=[guard]):
        for name in names:
            prompts = questions.prompts(name)
            found |= {f"{name} {prompt.id}": None for prompt in prompts}
            prompts = [prompt for prompt in prompts if _fits(questions, prompt)]
            for start in range(0, len(prompts), BATCH):
                some = prompts[start : start + BATCH]
                answers = base.chat_batch([asked(prompt) for prompt in some], max_new_tokens=1, begun=True)
                for prompt, answer in zip(some, answers, strict=True):
                    found[f"{name} {prompt.id}"] = answer.verdicts[0].score
    return found


def asked(prompt: Prompt) -> list[Message]:
    """The conversation that the last turn's answer goes on from; suites here have one turn."""
    begun = [Message("assistant", prompt.prefix)] if prompt.prefix else []
    return [Message("user", prompt.turns[-1]), *begun]


def _fits(questions: Questions, prompt: Prompt) -> bool:
    base = questions.setup.base
    return len(base.encode(asked(prompt), begun=True).ids) + questions.new_tokens <= base.max_tokens


def refusal_of(record: Record) -> float | None:
    """1 where the answer refuses, 0 where it does not, between them where the judge grades harm; None if unscored."""
    if record.judgement.outcome == "unscored":
        return None
    harm = record.judgement.harm
    return float(record.judgement.outcome == "refused") if harm is None else 1.0 - harm
