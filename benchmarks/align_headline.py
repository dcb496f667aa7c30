"""The headline of the alignment benchmark: the chosen aligner behind its gate and behind an oracle."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from align_answers import FURTHER, MAIN, Dial, constant, oracle
from align_bench import BASELINE, Bench, gated_rows, suite_rows
from align_choice import LORA_SCALES
from align_figures import Side, headline_rows, side_of
from align_training import MissingError, Trained
from safeside.evals.compare import win_results
from safeside.evals.judges import JUDGES, Judge
from safeside.evals.methods import Aligned, Method, Oracle
from safeside.evals.records import Record, Setting, safely
from tidy import Row, figure_row


def _sides(bench: Bench, ones: Sequence[Trained], dial: Callable[[str], Dial], over: str) -> Side:
    def of(suite: str) -> list[list[Record]]:
        return [bench.study.picked(one, suite, dial(suite)) for one in ones]

    return side_of(of("strongreject"), of(over), of("helpful"), bench.study.of_base("helpful"))


def _available(bench: Bench, name: str, strengths: Sequence[float]) -> list[Trained]:
    """The seeds of a method whose answers are all there."""
    found = []
    for one in bench.trained_seeds(name):
        try:
            for suite in MAIN:
                for strength in strengths:
                    bench.study.at(one, suite, strength)
            found.append(one)
        except MissingError:
            continue
    if not found:
        raise MissingError
    return found


def headline(bench: Bench) -> list[Row]:
    """The headline rows: learned gate and oracle; seeds are pooled, hence seed -1."""
    chosen = bench.chosen
    ours = _available(bench, chosen.name, [strength for _, strength in chosen.gate.steps])
    try:
        theirs = _available(bench, BASELINE, LORA_SCALES)
    except MissingError:
        theirs = []

    def always(strength: float) -> Callable[[str], Dial]:
        return lambda suite: constant(strength)

    bench.notes["headline_seeds"] = {chosen.name: len(ours), BASELINE: len(theirs)}
    ways: Mapping[str, Callable[[str], Dial]] = {
        "targeted_step": chosen.gate.dial,
        "oracle": lambda suite: oracle(chosen.strength),
        "fixed": always(chosen.strength),
    }
    found: list[Row] = []
    for policy, dial in ways.items():
        for over in ("benign", "xstest"):
            base = _sides(bench, ours[:1], always(0.0), over)
            scales = LORA_SCALES if theirs else ()
            front = [_sides(bench, theirs, always(scale), over) for scale in scales]
            front += [base] if front else []
            side = _sides(bench, ours, dial, over)
            labels = bench.labels(chosen.name, policy, chosen.strength, over, -1)
            share = ours[0].share + (chosen.gate.share if policy == "targeted_step" else 0.0)
            rows = headline_rows(labels, side, base, front, flops_share=share)
            if over == "xstest":
                found += [_beside(row) for row in rows if row["metric"] == "over_refusal_change"]
                continue
            found += [_placed(row, is_headline=policy != "fixed") for row in rows]
    return found


def _placed(row: Row, *, is_headline: bool) -> Row:
    """The row with the suite that its figure is of; what is no headline is shown beside it."""
    suites = {"harm_reduction": "strongreject", "over_refusal_change": "benign"}
    suite = suites.get(str(row["metric"]), "helpful")
    return {**row, "suite": suite, "judge": "" if suite == "helpful" else row["judge"], "headline": is_headline}


def _beside(row: Row) -> Row:
    """The row as one that is reported beside the headline."""
    return {name: value for name, value in row.items() if name != "headline"}


def further(bench: Bench) -> list[Row]:
    """The other harmful suites, for the base, the headline and LoRA-DPO at scale 1."""
    chosen, study, found = bench.chosen, bench.study, list[Row]()
    one, other = bench.one(chosen.name), bench.one(BASELINE)
    for suite in FURTHER:
        try:
            found += suite_rows(bench, "base", "fixed", 0.0, study.of_base, suites=[suite])
            found += gated_rows(bench, one, chosen.strength, [suite])
            for trained_, strength in ((one, chosen.strength), (other, 1.0)):
                found += suite_rows(
                    bench,
                    trained_.name,
                    "fixed",
                    strength,
                    lambda suite, t=trained_, s=strength: study.at(t, suite, s),
                    suites=[suite],
                    share=trained_.share,
                )
        except MissingError:
            continue
    return found


def wins(bench: Bench) -> list[Row]:
    """How often the headline's answers to benign prompts are graded above the base's, like them, or below.

    MT-Bench's grades by the endpoint; without one nothing is graded, and the notes say so.
    """
    chosen, study = bench.chosen, bench.study
    options = study.questions.judge_options
    if options.endpoint is None:
        bench.notes["win_rate"] = "not graded: no endpoint was given"
        return []
    judge = JUDGES.get("mt_bench")(options)
    setting = Setting("benign", chosen.name, "targeted_step", chosen.strength, "")
    answers = study.picked(bench.one(chosen.name), "benign", chosen.gate.dial("benign"))
    ours = [_graded(record.model_copy(update={"setting": setting}), judge) for record in answers]
    theirs = [_graded(record, judge) for record in study.of_base("benign")]
    labels = bench.labels(chosen.name, "targeted_step", chosen.strength, "benign", 0) | {"judge": "mt_bench"}
    return [
        figure_row(labels, found.metric, found.value, (found.low, found.high), n=found.n, n_unscored=found.n_unscored)
        for found in win_results(ours, theirs)
    ]


def _graded(record: Record, judge: Judge) -> Record:
    return record.model_copy(update={"judge": "mt_bench", "judgement": safely(judge, record)})


def generated(bench: Bench) -> list[Row]:
    """The headline once more, generated under the gate and under the oracle, and how many answers differ."""
    chosen, study, found = bench.chosen, bench.study, list[Row]()
    one = bench.one(chosen.name)
    base = study.setup.base
    for suite in ("strongreject", "benign"):
        harmful = frozenset(p.turns[0] for p in study.questions.prompts(suite) if p.is_harmful)
        gated = Aligned(base, one.adapter, chosen.gate.policy, (chosen.gate.guard,))
        pairs: list[tuple[Method, str, Dial]] = [
            (gated, "targeted_step", chosen.gate.dial(suite)),
            (Oracle(base, one.adapter, chosen.strength, harmful), "oracle", oracle(chosen.strength)),
        ]
        for method, policy, dial in pairs:
            made = study.ask(method, suite)
            expected = study.picked(one, suite, dial)
            n_other = sum(a.answers != b.answers for a, b in zip(made, expected, strict=True))
            labels = bench.labels(one.name, policy, chosen.strength, suite, 0)
            found.append(figure_row(labels, "answers_unlike_picked", n_other, n=len(made)))
    return found
