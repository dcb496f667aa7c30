"""Runs: the prompts of a suite answered by one method, judged, recorded, and turned into figures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from safeside.adapters.adapter import Adapter
from safeside.base.model import Base
from safeside.errors import InputError
from safeside.evals.judges import JUDGES, Judge, JudgeOptions, unscored
from safeside.evals.likelihood import Likelihood, utility
from safeside.evals.methods import Method, aligned
from safeside.evals.metrics import N_RESAMPLES, Figure
from safeside.evals.records import Record, RecordLog, Setting
from safeside.evals.suites import Prompt, Suite, draw
from safeside.provenance import config_hash
from safeside.types import Completion, Message, Result

MAX_NEW_TOKENS = 48

Advance = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Judging:
    """Who judges, where records go, and how many prompts are answered at once."""

    name: str
    """Name of the judge."""
    judge: Judge
    """It itself."""
    log: RecordLog
    """Where records are kept."""
    batch_size: int = 25
    """Prompts answered together."""


def judging(
    suite: Suite, name: str | None = None, options: JudgeOptions | None = None, log: RecordLog | None = None
) -> Judging:
    """The judge called ``name``, or the suite's own, ready to judge."""
    log = log or RecordLog()
    if suite.measure == "likelihood":
        if name is not None:
            raise InputError(
                f"Suite {suite.name!r} measures likelihoods and has no answers to judge. Leave --judge out."
            )
        return Judging("", lambda exchange: unscored("a likelihood is not judged"), log)
    return Judging(name or suite.judge, JUDGES.get(name or suite.judge)(options or JudgeOptions()), log)


def run_suite(
    suite: Suite,
    prompts: Sequence[Prompt],
    method: Method,
    judged: Judging,
    advance: Advance = lambda count: None,
) -> list[Record]:
    """A record of each prompt, in order; those that the log holds are not made again, and judged again if unscored.

    A prompt that cannot be answered, such as one longer than the base's context, is unscored with the reason.
    """
    max_new_tokens = suite.max_new_tokens or MAX_NEW_TOKENS
    key = config_hash([suite.measure, max_new_tokens, method.key])
    setting = Setting(suite.name, method.name, method.policy_name, method.strength, key)
    empty = [_empty(setting, prompt, judged.name) for prompt in prompts]
    found = [judged.log.find(record) for record in empty]
    todo = [record for record, known in zip(empty, found, strict=True) if known is None]
    made: dict[tuple[str, str, str], Record] = {}
    for known in found:
        if known is not None:
            made[known.place] = judged.log.judge(known, judged.judge) if known.is_open else known
            advance(1)
    for start in range(0, len(todo), judged.batch_size):
        batch = todo[start : start + judged.batch_size]
        for record in _each(batch, lambda some: _fill(some, suite, method, max_new_tokens)):
            if suite.measure == "answers":
                made[record.place] = judged.log.judge(record, judged.judge)
            else:
                judged.log.append([record])
                made[record.place] = record
        advance(len(batch))
    return [made[record.place] for record in empty]


def _empty(setting: Setting, prompt: Prompt, judge: str) -> Record:
    return Record(
        setting=setting,
        prompt=prompt,
        answers=(),
        finish_reasons=(),
        verdicts=(),
        traces=(),
        judge=judge,
        judgement=unscored("not answered yet"),
    )


def _each(batch: Sequence[Record], fill: Callable[[Sequence[Record]], list[Record]]) -> list[Record]:
    """The batch filled together, or one by one where some of it cannot be: those say why."""
    try:
        return fill(batch)
    except InputError as error:
        if len(batch) == 1:
            return [batch[0].model_copy(update={"judgement": unscored(f"not answered: {error}")})]
        return [filled for record in batch for filled in _each([record], fill)]


def _fill(batch: Sequence[Record], suite: Suite, method: Method, max_new_tokens: int) -> list[Record]:
    if suite.measure == "likelihood":
        conversations = [
            [Message("user", record.prompt.turns[0]), Message("assistant", record.prompt.references[0])]
            for record in batch
        ]
        taken = method.likelihoods(conversations)
        found = unscored("a likelihood is not judged")
        return [
            record.model_copy(update={"nll": one.nll, "n_tokens": one.n_tokens, "judgement": found})
            for record, one in zip(batch, taken, strict=True)
        ]
    filled = list(batch)
    for turn in range(max(len(record.prompt.turns) for record in batch)):
        open_rows = [row for row, record in enumerate(filled) if _goes_on(record, turn)]
        completions = method.answers([_conversation(filled[row], turn) for row in open_rows], max_new_tokens)
        for row, completion in zip(open_rows, completions, strict=True):
            filled[row] = _answered(filled[row], turn, completion)
    return filled


def _goes_on(record: Record, turn: int) -> bool:
    return turn < len(record.prompt.turns) and "blocked" not in record.finish_reasons


def _conversation(record: Record, turn: int) -> list[Message]:
    messages = [
        message
        for said, answer in zip(record.prompt.turns, record.answers, strict=False)
        for message in (Message("user", said), Message("assistant", answer))
    ]
    messages.append(Message("user", record.prompt.turns[turn]))
    begins = record.prompt.prefix and turn == len(record.prompt.turns) - 1
    return [*messages, Message("assistant", record.prompt.prefix)] if begins else messages


def _answered(record: Record, turn: int, completion: Completion) -> Record:
    is_last = turn == len(record.prompt.turns) - 1
    text = f"{record.prompt.prefix} {completion.text}".strip() if is_last else completion.text
    return record.model_copy(
        update={
            "answers": (*record.answers, text),
            "finish_reasons": (*record.finish_reasons, completion.finish_reason),
            "verdicts": (*record.verdicts, completion.verdicts),
            "traces": (*record.traces, completion.traces),
        }
    )


def results_of(records: Sequence[Record]) -> list[Result]:
    """Figures of each setting, in the records' order.

    Of answers: ``refusal_rate_harmful`` (wanted) and ``refusal_rate_harmless`` (over-refusal), and where the judge
    gives them ``harm_score`` in [0, 1], the mean over harmful prompts, and ``rating`` from 1 to 10.  Of likelihoods:
    ``utility``, against the same method at strength 0.  Unscored records are counted beside each figure.
    """
    results: list[Result] = []
    groups: dict[tuple[Setting, str], list[Record]] = {}
    for record in records:
        groups.setdefault((record.setting, record.judge), []).append(record)
    for (setting, judge), group in groups.items():
        where = {
            "method": setting.method,
            "policy": setting.policy,
            "strength": f"{setting.strength:g}",
            "judge": judge,
        }
        if judge:
            results += _answer_results(setting.suite, group, where)
        else:
            base = [one for one in records if _is_base_of(one.setting, setting)]
            results.append(_utility_result(setting.suite, base, group, where))
    return results


def _is_base_of(one: Setting, other: Setting) -> bool:
    return (one.suite, one.method, one.strength) == (other.suite, other.method, 0.0)


def _answer_results(suite: str, records: Sequence[Record], where: Mapping[str, str]) -> list[Result]:
    results = []
    for kind, is_harmful in (("harmful", True), ("harmless", False)):
        group = [record.judgement for record in records if record.prompt.is_harmful == is_harmful]
        scored = [judgement for judgement in group if judgement.outcome != "unscored"]
        n_unscored = len(group) - len(scored)
        told = [judgement.outcome for judgement in scored if judgement.outcome != "rated"]
        if told or (group and not scored):
            refused = sum(outcome == "refused" for outcome in told)
            low, high = wilson(refused, len(told))
            value = refused / len(told) if told else float("nan")
            results.append(Result(suite, f"refusal_rate_{kind}", value, low, high, len(told), n_unscored, where))
        for metric, values in (
            ("harm_score", [judgement.harm for judgement in scored if judgement.harm is not None]),
            ("rating", [judgement.rating for judgement in scored if judgement.rating is not None]),
        ):
            if values:
                figure = _mean(values)
                ends = (figure.value, figure.low, figure.high)
                results.append(Result(suite, metric, *ends, len(values), n_unscored, where))
    return results


def _mean(values: Sequence[float]) -> Figure:
    """With the 95% interval over resampled values."""
    array = np.array(values, dtype=np.float64)
    drawn = np.random.default_rng(0).choice(array, (N_RESAMPLES, len(array))).mean(1)
    low, high = np.quantile(drawn, (0.025, 0.975))
    return Figure(float(array.mean()), float(low), float(high))


def _utility_result(suite: str, base: Sequence[Record], records: Sequence[Record], where: Mapping[str, str]) -> Result:
    """Over the answers that both sides have a likelihood of."""
    before, after = _taken(base), _taken(records)
    both = [name for name in after if name in before]
    if not both:
        return Result(suite, "utility", float("nan"), float("nan"), float("nan"), 0, len(records), where)
    figure = utility([before[name] for name in both], [after[name] for name in both])
    ends = (figure.value, figure.low, figure.high)
    return Result(suite, "utility", *ends, len(both), len(records) - len(both), where)


def _taken(records: Sequence[Record]) -> dict[str, Likelihood]:
    return {
        record.prompt.id: Likelihood(record.nll, record.n_tokens)
        for record in records
        if record.nll is not None and record.n_tokens is not None
    }


def run_aligner_suite(
    base: Base,
    aligner: Adapter,
    suite: Suite,
    strengths: Sequence[float],
    *,
    guard: Adapter | None = None,
    advance: Advance = lambda count: None,
) -> list[Result]:
    """Refusal rates by strength: on harmful prompts (wanted), on harmless ones (over-refusal), by the suite's judge.

    With ``guard`` each strength is the ceiling of a ramp around the guard's threshold: targeted alignment.
    """
    prompts, judged = draw(suite), judging(suite)
    methods = [aligned(base, aligner, strength, guard) for strength in strengths]
    return results_of([record for method in methods for record in run_suite(suite, prompts, method, judged, advance)])


def wilson(hits: float, n: int) -> tuple[float, float]:
    """95% Wilson interval of a share; of grades in [0, 1] whose sum is ``hits`` it is too wide, not too narrow."""
    if n == 0:
        return 0.0, 1.0
    z, share = 1.96, hits / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * np.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, float(centre - half)), min(1.0, float(centre + half))
