"""The parts of the alignment benchmark by weight: each answers what is missing and gives its rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch

from align_answers import CHECKED, FURTHER, MAIN
from align_bench import (
    BASELINE,
    HEADLINE_STRENGTHS,
    STRENGTHS,
    TRAINED_FACTS,
    Bench,
    strength_rows,
    suite_rows,
)
from align_choice import (
    CHECKED_STRENGTHS,
    LORA_SCALES,
    TRIES,
    Candidate,
    Gate,
    best_scale,
    blocking_gate,
    choose,
    gate_of,
    told_try,
    validation_side,
)
from align_figures import refused, trend_rows
from align_headline import further, generated, headline, wins
from align_training import GATE, LORAS, MissingError, trained
from safeside.attach import attach
from safeside.evals.classifier import agreement_rows
from safeside.evals.judges import JUDGES, Judgement
from safeside.evals.methods import Aligned, Method, WithSystemPrompt
from safeside.evals.records import Record
from safeside.evals.runs import wilson
from safeside.evals.safe_decoding import SafeDecoding
from safeside.mixing import ramp
from safeside.types import Message
from tidy import Row, figure_row

OFFLINE_JUDGES = ("refusal_phrases", "classifier")
Job = tuple[str, Callable[[], list[Row]]]


def jobs_of(bench: Bench) -> Iterator[Job]:
    """Every part; where one is missing something its rows are left out, and the others go on."""
    yield "the base", lambda: suite_rows(bench, "base", "fixed", 0.0, bench.study.of_base)
    yield "the choice", lambda: _choice(bench)
    yield "the headline", lambda: strength_rows(bench, bench.chosen.name, 0, STRENGTHS)
    for name in (name for name in LORAS if name in TRIES):
        yield f"tries of {name}", _tries(bench, name)
    yield f"{BASELINE} by scale", lambda: strength_rows(bench, BASELINE, 0, LORA_SCALES)
    yield "eleven strengths", lambda: _eleven(bench)
    for name in (*bench.kinds, *LORAS):
        if name not in (BASELINE, bench.choice.name if bench.choice else ""):
            yield f"{name} by strength", _by_strength(bench, name)
    yield "other ways", lambda: _others(bench)
    for name in bench.kinds:
        yield f"{name} by ramp", _ramp(bench, name)
    for seed in bench.seeds[1:]:
        yield f"seed {seed}", _with_seed(bench, seed)
    yield "headline figures", lambda: headline(bench)
    yield "further suites", lambda: further(bench)
    yield "the gate itself", lambda: generated(bench)
    yield "wins and ties", lambda: wins(bench)
    yield "judges beside people", lambda: _agreement(bench)
    yield "strength 0", lambda: _identical(bench)
    yield "training", lambda: _training(bench)
    yield "answers", lambda: _answers(bench)


def _by_strength(bench: Bench, name: str) -> Callable[[], list[Row]]:
    strengths = LORA_SCALES if name in LORAS else STRENGTHS
    return lambda: strength_rows(bench, name, 0, strengths)


def _with_seed(bench: Bench, seed: int) -> Callable[[], list[Row]]:
    """The headline and the baseline, trained once more."""

    def rows() -> list[Row]:
        found = strength_rows(bench, bench.chosen.name, seed, [bench.chosen.strength])
        return found + strength_rows(bench, BASELINE, seed, LORA_SCALES)

    return rows


def _tries(bench: Bench, name: str) -> Callable[[], list[Row]]:
    """A baseline's settings; those of aligners are chosen with their gate."""

    def rows() -> list[Row]:
        bench.changes[name], told = best_scale(bench.study, name, bench.n_baseline_tries)
        bench.notes["baseline_tries"] = [*bench.notes.get("baseline_tries", []), *told]  # type: ignore[misc]
        return []

    return rows


def _choice(bench: Bench) -> list[Row]:
    study, found = bench.study, list[Candidate]()
    gate = gate_of(study, (*MAIN, *FURTHER, *CHECKED))
    for name in bench.kinds:
        try:
            own = [
                (trained(study.setup, name, 0, changes), changes) for changes in TRIES.get(name, ({},))[: bench.n_tries]
            ]
            bench.changes[name] = choose(study, own, gate).changes
            found += own
        except MissingError:
            continue
    if not found:
        raise MissingError
    chosen = bench.choice = choose(study, found, gate)
    bench.changes[chosen.name] = chosen.changes
    bench.notes["choice"] = {
        "method": chosen.name,
        "changes": dict(chosen.changes),
        "strength": chosen.strength,
        "gate_steps": [[round(threshold, 4), high] for threshold, high in chosen.gate.steps],
        "validation": chosen.validation,
    }
    bench.notes["tries"] = [
        told_try(one.name, changes, strength, validation_side(study, one, strength))
        for one, changes in found
        for strength in CHECKED_STRENGTHS
    ]
    return []


def _eleven(bench: Bench) -> list[Row]:
    """The headline aligner at eleven strengths, and whether the dial is one."""
    name = bench.chosen.name
    one = bench.one(name)
    by_strength = {s: refused(bench.study.at(one, "strongreject", s)) for s in (0.0, *HEADLINE_STRENGTHS)}
    found = trend_rows(bench.labels(name, "fixed", 2.0, "strongreject", 0), by_strength)
    for strength in HEADLINE_STRENGTHS:
        try:
            found += [] if strength in STRENGTHS else strength_rows(bench, name, 0, [strength])
        except MissingError:
            continue
    return found


def _others(bench: Bench) -> list[Row]:
    """System prompt, SafeDecoding and a fixed refusal behind the gate."""
    study, found = bench.study, list[Row]()
    expert = bench.one("lora_sft")
    methods: list[Method] = [WithSystemPrompt(study.setup.base), SafeDecoding(study.setup.base, expert.folder)]
    for method in methods:
        found += suite_rows(bench, method.name, "fixed", 1.0, lambda suite, method=method: study.ask(method, suite))
    gate = blocking_gate(study, bench.chosen.gate)
    bench.notes["blocking_threshold"] = round(gate.steps[0][0], 4)

    return found + _canned(bench, gate)


def _canned(bench: Bench, gate: Gate) -> list[Row]:
    """A fixed refusal to what the gate blocks, which has no likelihood: of known answers the share blocked is told."""

    def answered(suite: str) -> list[Record]:
        refusal = {"judgement": Judgement("refused", "a guard blocked the prompt")}
        dial, records = gate.dial(suite), bench.study.of_base(suite)
        return [record.model_copy(update=refusal) if dial(record.prompt) > 0 else record for record in records]

    suites = [suite for suite in MAIN if suite != "helpful"]
    found = suite_rows(bench, "guard_canned", "targeted_step", 1.0, answered, suites=suites, share=gate.share)
    blocked = [gate.dial("helpful")(prompt) > 0 for prompt in bench.study.questions.prompts("helpful")]
    labels = bench.labels("guard_canned", "targeted_step", 1.0, "helpful", 0)
    interval = wilson(sum(blocked), len(blocked))
    row = figure_row(labels, "over_refusal", float(np.mean(blocked)), interval, n=len(blocked), flops_share=gate.share)
    return [*found, row]


def _ramp(bench: Bench, name: str) -> Callable[[], list[Row]]:
    """An aligner under a ramp that ends where the headline's gate is wide open."""

    def rows() -> list[Row]:
        gate, found = bench.chosen.gate, list[Row]()
        one, guard = bench.one(name), gate.guard
        (end, _), *before = reversed(gate.steps)
        start = before[0][0] if before else end / 2
        for strength in STRENGTHS:
            policy = ramp(guard, start, end, ceiling=strength)
            method = Aligned(bench.study.setup.base, one.adapter, policy, (guard,))
            found += suite_rows(
                bench,
                name,
                "targeted_ramp",
                strength,
                lambda suite, method=method: bench.study.ask(method, suite),
                share=one.share + gate.share,
            )
        return found

    return rows


@torch.no_grad()
def _identical(bench: Bench) -> list[Row]:
    """Whether the logits at strength 0 are the base's, bit for bit, for every aligner that is there."""
    study, found = bench.study, list[Row]()
    base = study.setup.base
    prompts = study.questions.own_prompts()
    ids = [torch.tensor([base.encode([Message("user", prompt.turns[0])]).ids]) for prompt in prompts]
    plain = [base.model(input_ids=some).logits for some in ids]
    for name in bench.kinds:
        try:
            adapter = bench.one(name).adapter
        except MissingError:
            continue
        with attach(base, [adapter], strength=0.0):
            same = [torch.equal(base.model(input_ids=some).logits, one) for some, one in zip(ids, plain, strict=True)]
        labels = bench.labels(name, "fixed", 0.0, "demo", 0)
        found.append(figure_row(labels, "identical_at_0", float(np.mean(same)), n=len(same)))
    return found


def _training(bench: Bench) -> list[Row]:
    """Seconds, memory and parameters of every training run that is there; 0 of what is not trained."""
    untrained = bench.labels("system_prompt", "fixed", 1.0, "training", 0)
    found = [figure_row(untrained, fact, 0.0) for fact in TRAINED_FACTS]
    commits = set[str]()
    behind = {
        **{name: name for name in (*bench.kinds, *LORAS, GATE)},
        "safe_decoding": "lora_sft",
        "guard_canned": GATE,
    }
    for method, name in behind.items():
        for one in bench.trained_seeds(name):
            commits.add(one.facts["commit"])
            labels = bench.labels(method, "fixed", 1.0, "training", one.seed)
            found += [figure_row(labels, fact, float(one.facts[fact]), flops_share=one.share) for fact in TRAINED_FACTS]
    bench.notes["settings"] = {name: dict(changes) for name, changes in bench.changes.items()}
    bench.notes["trained_at_commits"] = sorted(commits)
    return found


def _agreement(bench: Bench) -> list[Row]:
    """How often judges that need no endpoint say what people said of answers that none of them learnt from."""
    questions = bench.study.questions
    judges = {name: JUDGES.get(name)(questions.judge_options) for name in OFFLINE_JUDGES}
    bench.notes["judges"] = agreement_rows(judges, questions.setup.data)
    return []


def _answers(bench: Bench) -> list[Row]:
    """Answers side by side, to prompts written for this project, for the page."""
    chosen, study = bench.chosen, bench.study
    one, other = bench.one(chosen.name), bench.one(BASELINE)
    base, guard = study.setup.base, chosen.gate.guard
    methods: dict[str, Method] = {
        "base": one.at(0.0),
        "targeted": Aligned(base, one.adapter, chosen.gate.policy, (guard,)),
        "untargeted": one.at(chosen.strength),
        BASELINE: other.at(1.0),
    }
    prompts = study.questions.own_prompts()
    texts = {
        name: [answer.text for answer in method.answers([[Message("user", p.turns[0])] for p in prompts], 40)]
        for name, method in methods.items()
    }
    bench.notes["answers"] = [
        {"prompt": prompt.turns[0], "is_harmful": prompt.is_harmful, **{name: texts[name][i] for name in texts}}
        for i, prompt in enumerate(prompts)
    ]
    return []
