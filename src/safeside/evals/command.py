"""What ``safeside eval`` does: choose the measurement, run it with a progress bar, return tidy rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from safeside.adapters.adapter import Adapter
from safeside.artifact import find_adapter, load_adapter
from safeside.base.model import Base
from safeside.errors import InputError, MissingExtraError
from safeside.evals.compare import check_grades, counterparts, win_results
from safeside.evals.guards import GuardReport, evaluate_guard
from safeside.evals.judges import JUDGES, Judge, JudgeOptions
from safeside.evals.methods import Aligned, aligned
from safeside.evals.records import Record, RecordLog, read_records, rejudge
from safeside.evals.runs import judging, results_of, run_suite
from safeside.evals.suites import SUITES, Suite, draw
from safeside.registry import Registry
from safeside.tasks.learnt import learnt_notes, load_learnt
from safeside.tasks.rows import BadRow
from safeside.terminal import note, progress_bar
from safeside.types import Preset, Result

Row = dict[str, object]


class ChoiceRun(Protocol):
    """Measures an aligned base on questions with choices."""

    def __call__(self, method: Aligned, data: Path, *, limit: int | None = None) -> Result:
        """The share of right answers, over at most ``limit`` of the questions that the suite draws."""
        ...


CHOICES: Registry[ChoiceRun] = Registry("suite of questions with choices")
CHOICES.register("mmlu", "safeside.evals.mmlu:run_mmlu")  # imported on first use: it needs an extra
STRENGTHS = (0.0, 0.5, 1.0)  # of an aligner, unless given


@dataclass(frozen=True, slots=True)
class JudgeChoice:
    """Who judges the answers of an aligner, and where its records go."""

    judge: str | None = None
    """Name of a judge; the suite's own unless given."""
    options: JudgeOptions = field(default_factory=JudgeOptions)
    """What it is made with."""
    records: Path | None = None
    """File of records: a run goes on with those that it holds."""
    compare: Path | None = None
    """File of records, of the base for example, that answers are compared with by their grades."""


@dataclass(frozen=True, slots=True)
class EvalOptions:
    """The options of ``safeside eval``: ``data`` or ``suite``, or both where the suite is not packaged.

    ``strengths``, ``gate``, ``limit`` and ``judging`` are for aligners.  ``preset`` chooses the thresholds of the
    guard, or of the guard that gates an aligner.
    """

    data: Path | None = None
    suite: str | None = None
    strengths: Sequence[float] | None = None
    gate: str | None = None
    allow_mismatch: str | None = None
    preset: Preset | None = None
    limit: int | None = None
    judging: JudgeChoice = field(default_factory=JudgeChoice)


def evaluate_command(base: Base, adapter: Adapter, options: EvalOptions, source: str) -> tuple[list[Row], bool]:
    """Tidy rows of figures, and whether rows were skipped or unscored (the command then exits with 1).

    ``source`` is where the adapter comes from, for a guard's record of the rows that it learnt from.
    """
    suite = None if options.suite is None else SUITES.get(options.suite)
    if suite is not None and options.data is not None and not suite.is_local:
        raise InputError(f"Suite {suite.name!r} brings its own prompts; --data FOLDER is for others. Leave one out.")
    if adapter.config.role == "align":
        if suite is None:
            raise InputError(f"{adapter.name!r} is an aligner; measure it with --suite NAME --strengths 0,0.5,1.")
        return _aligner_rows(base, adapter, suite, options)
    _check_guard(adapter, suite, options)
    adapter = adapter.with_preset(options.preset)
    path = options.data if suite is None else suite.path
    assert path is not None
    learnt = load_learnt(find_adapter(source))
    with progress_bar("score", None) as advance:
        report = evaluate_guard(base, adapter, path, learnt=learnt, advance=advance, tell=_tell)
    known = learnt_notes(source, report.n_learnt, "figures on them would flatter it")
    for text in [*report.notes, *known]:
        note(text)
    return guard_rows(report), bool(report.n_skipped or report.n_unscored)


def _check_guard(guard: Adapter, suite: Suite | None, options: EvalOptions) -> None:
    choice = options.judging
    for option, given in (
        ("--gate", options.gate),
        ("--strengths", options.strengths),
        ("--limit", options.limit),
        ("--judge", choice.judge),
        ("--endpoint", choice.options.endpoint),
        ("--records", choice.records),
        ("--compare", choice.compare),
    ):
        if given is not None:
            raise InputError(f"{guard.name!r} is a guard; {option} is for aligners. Leave it out.")
    if suite is not None and suite.is_local:
        raise InputError(f"{guard.name!r} is a guard, and suite {suite.name!r} is for aligners. Use --data FILE.")


def rejudge_command(path: Path, choice: JudgeChoice) -> tuple[list[Row], bool]:
    """Figures of the records in ``path`` by another judge, and whether some stay unscored.

    With ``choice.compare`` they include wins and ties against the records there.  The new records go to
    ``choice.records``, or beside the old ones under the judge's name.
    """
    if choice.judge is None:
        raise InputError("--rejudge needs --judge NAME, the judge to ask.")
    output = choice.records or _beside(path, choice.judge)
    if output.resolve() == path.resolve():
        raise InputError(f"{path} would be written while it is read. Give another file to --records.")
    records = read_records(path)
    if not records:
        raise InputError(f"{path} holds no record to judge. Check the path.")
    asked = (choice.judge, JUDGES.get(choice.judge)(choice.options))
    suites = [record.setting.suite for record in records]
    others = _others(choice.compare, suites, asked, own=path)
    with progress_bar("judge", len(records), "answers") as advance:
        judged = rejudge(records, asked, RecordLog(output, note), advance)
    note(f"wrote {output}")
    results = [*results_of(judged), *_wins(choice.compare, judged, others)]
    return _rows(results), any(result.n_unscored for result in results)


def _beside(path: Path, judge: str) -> Path:
    """Where records go that ``judge`` judged again."""
    return path.with_name(f"{path.stem}.{judge.replace('/', '-')}.jsonl")


def _others(
    path: Path | None, suites: Sequence[str], asked: tuple[str, Judge], own: Path | None
) -> list[Record] | None:
    """The records in ``path`` to compare with, graded by the judge; None where that file is ``own``, yet to be judged.

    They are graded before anything else is answered: what cannot be compared is told at once.
    """
    if path is None or (own is not None and path.resolve() == own.resolve()):
        return None
    others = counterparts(suites, read_records(path))
    if any(record.judge != asked[0] or record.is_open for record in others):
        with progress_bar("compare", len(others), "answers") as advance:
            others = rejudge(others, asked, RecordLog(_beside(path, asked[0]), note), advance)
    check_grades(others)
    return others


def _wins(path: Path | None, records: Sequence[Record], others: list[Record] | None) -> list[Result]:
    """Wins and ties of ``records`` against ``others``, or against the base among them."""
    if path is None:
        return []
    return win_results(records, others or counterparts([record.setting.suite for record in records], records))


def _tell(row: BadRow) -> None:
    note(f"line {row.line} was skipped: {row.problem}")


def _aligner_rows(base: Base, aligner: Adapter, suite: Suite, options: EvalOptions) -> tuple[list[Row], bool]:
    strengths = list(STRENGTHS if options.strengths is None else options.strengths)
    if options.preset is not None and options.gate is None:
        raise InputError(f"{aligner.name!r} is an aligner; --preset needs a guard. Add --gate builtin:harm.")
    if options.limit is not None:
        suite = replace(suite, limit=options.limit)
    if suite.measure == "likelihood" and 0.0 not in strengths:
        strengths.insert(0, 0.0)  # what the others are compared with
    guard = None
    if options.gate is not None:
        guard = load_adapter(options.gate, base, allow_mismatch=options.allow_mismatch).with_preset(options.preset)
    methods = [aligned(base, aligner, strength, guard) for strength in strengths]
    if suite.measure == "choices":
        return _choice_rows(methods, suite, options)
    prompts, choice = draw(suite, options.data), options.judging
    if choice.compare is not None and suite.measure == "likelihood":
        raise InputError(f"Suite {suite.name!r} compares likelihoods and has no answers; --compare is for others.")
    judged = judging(suite, choice.judge, choice.options, RecordLog(choice.records, note))
    others = _others(choice.compare, [suite.name], (judged.name, judged.judge), own=choice.records)
    with progress_bar("answer", len(strengths) * len(prompts), "prompts") as advance:
        records = [record for method in methods for record in run_suite(suite, prompts, method, judged, advance)]
    results = [*results_of(records), *_wins(choice.compare, records, others)]
    return _rows(results), any(result.n_unscored for result in results)


def _choice_rows(methods: Sequence[Aligned], suite: Suite, options: EvalOptions) -> tuple[list[Row], bool]:
    """Figures of a suite whose questions have choices, through lm-eval."""
    choice = options.judging
    for option, given in (
        ("--judge", choice.judge),
        ("--endpoint", choice.options.endpoint),
        ("--records", choice.records),
        ("--compare", choice.compare),
    ):
        if given is not None:
            raise InputError(f"Suite {suite.name!r} compares likelihoods and has no answers; {option} is for others.")
    if options.data is None:
        raise InputError(
            f"The questions of suite {suite.name!r} are not packaged. Add --data FOLDER with {suite.path}."
        )
    try:
        run = CHOICES.get(suite.name)
    except ImportError as error:
        raise MissingExtraError(
            f"Suite {suite.name!r} needs {error.name!r}, which is not installed. Run: pip install 'safeside[bench]'"
        ) from error
    results = [run(method, options.data, limit=options.limit) for method in methods]
    return _rows(results), any(result.n_unscored for result in results)


def _rows(results: Sequence[Result]) -> list[Row]:
    is_compared = any("against" in result.provenance for result in results)
    return [
        {
            "suite": result.benchmark,
            "method": result.provenance["method"],
            "policy": result.provenance["policy"],
            "strength": float(result.provenance["strength"]),
            "judge": result.provenance["judge"],
            "metric": result.metric,
            "value": _known(result.value),
            "low": _known(result.low),
            "high": _known(result.high),
            "n": result.n,
            "n_unscored": result.n_unscored,
            **({"against": result.provenance.get("against", "")} if is_compared else {}),
        }
        for result in results
    ]


def _known(value: float) -> float | None:
    """None where nothing was scored: JSON has no NaN."""
    return None if math.isnan(value) else value


def guard_rows(report: GuardReport) -> list[Row]:
    """One row for each label and metric."""
    return [
        {
            "label": label,
            "metric": metric,
            "value": figure.value,
            "low": figure.low,
            "high": figure.high,
            "n": report.n,
            "n_skipped": report.n_skipped + report.n_unscored,
            "n_windowed": report.n_windowed,
            "n_learnt": report.n_learnt,
        }
        for label, figures in report.figures.items()
        for metric, figure in figures.items()
    ]
