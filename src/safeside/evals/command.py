"""What ``safeside eval`` does: choose the measurement, run it with a progress bar, return tidy rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from safeside.adapters.adapter import Adapter
from safeside.artifact import load_adapter
from safeside.base.model import Base
from safeside.errors import InputError
from safeside.evals.guards import GuardReport, evaluate_guard
from safeside.evals.suites import SUITES, Suite, run_aligner_suite, suite_prompts
from safeside.tasks.rows import BadRow
from safeside.terminal import note, progress_bar
from safeside.types import Preset

Row = dict[str, object]
STRENGTHS = (0.0, 0.5, 1.0)  # of an aligner, unless given


@dataclass(frozen=True, slots=True)
class EvalOptions:
    """The options of ``safeside eval``: one of ``data`` and ``suite``; ``strengths`` and ``gate`` for aligners.

    ``preset`` chooses the thresholds of the guard, or of the guard that gates an aligner.
    """

    data: Path | None = None
    suite: str | None = None
    strengths: Sequence[float] | None = None
    gate: str | None = None
    allow_mismatch: str | None = None
    preset: Preset | None = None


def evaluate_command(base: Base, adapter: Adapter, options: EvalOptions) -> tuple[list[Row], bool]:
    """Tidy rows of figures, and whether rows had to be skipped (the command then exits with 1)."""
    if adapter.config.role == "align":
        if options.suite is None:
            raise InputError(f"{adapter.name!r} is an aligner; measure it with --suite NAME --strengths 0,0.5,1.")
        return _aligner_rows(base, adapter, SUITES.get(options.suite), options), False
    for option, given in (("--gate", options.gate), ("--strengths", options.strengths)):
        if given is not None:
            raise InputError(f"{adapter.name!r} is a guard; {option} is for aligners. Leave it out.")
    adapter = adapter.with_preset(options.preset)
    path = options.data or SUITES.get(str(options.suite)).path
    with progress_bar("score", None) as advance:
        report = evaluate_guard(base, adapter, path, advance=advance, tell=_tell)
    for text in report.notes:
        note(text)
    return guard_rows(report), bool(report.n_skipped or report.n_unscored)


def _tell(row: BadRow) -> None:
    note(f"line {row.line} was skipped: {row.problem}")


def _aligner_rows(base: Base, aligner: Adapter, suite: Suite, options: EvalOptions) -> list[Row]:
    strengths = STRENGTHS if options.strengths is None else options.strengths
    if options.preset is not None and options.gate is None:
        raise InputError(f"{aligner.name!r} is an aligner; --preset needs a guard. Add --gate builtin:harm.")
    guard = None
    if options.gate is not None:
        guard = load_adapter(options.gate, base, allow_mismatch=options.allow_mismatch).with_preset(options.preset)
    total = len(strengths) * sum(len(prompts) for prompts in suite_prompts(suite))
    with progress_bar("answer", total, "prompts") as advance:
        results = run_aligner_suite(base, aligner, suite, strengths, guard=guard, advance=advance)
    return [
        {
            "suite": result.benchmark,
            "strength": float(result.provenance["strength"]),
            "metric": result.metric,
            "value": result.value,
            "low": result.low,
            "high": result.high,
            "n": result.n,
            "n_unscored": result.n_unscored,
        }
        for result in results
    ]


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
        }
        for label, figures in report.figures.items()
        for metric, figure in figures.items()
    ]
