"""What ``safeside eval`` does: choose the measurement, run it with a progress bar, return tidy rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from safeside.adapters.adapter import Adapter
from safeside.artifact import load_adapter
from safeside.base.model import Base
from safeside.errors import InputError
from safeside.evals.guards import GuardReport, evaluate_guard
from safeside.evals.suites import SUITES, Suite, run_aligner_suite, run_guard_suite, suite_prompts
from safeside.terminal import note, progress_bar

Row = dict[str, object]


def evaluate_command(
    base: Base,
    adapter: Adapter,
    data: Path | None,
    suite_name: str | None,
    strengths: Sequence[float],
    gate: str | None,
) -> tuple[list[Row], bool]:
    """Tidy rows of figures, and whether rows had to be skipped (the command then exits with 1)."""
    is_guard = adapter.config.role == "guard"
    if data is not None:
        if not is_guard:
            raise InputError(f"{adapter.name!r} is an aligner; measure it with --suite NAME --strengths 0,0.5,1.")
        with progress_bar("score", None) as advance:
            report = evaluate_guard(base, adapter, data, advance=advance)
        return guard_rows(report), bool(report.n_skipped or report.n_unscored)
    suite = SUITES.get(str(suite_name))
    if is_guard and gate is not None:
        raise InputError(f"{adapter.name!r} is a guard; --gate is for aligners. Leave it out.")
    if is_guard:
        with progress_bar("score", None) as advance:
            return guard_rows(run_guard_suite(base, adapter, suite, advance)), False
    return _aligner_rows(base, adapter, suite, strengths, gate), False


def _aligner_rows(
    base: Base, aligner: Adapter, suite: Suite, strengths: Sequence[float], gate: str | None
) -> list[Row]:
    guard = load_adapter(gate, base) if gate else None
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
    for row in report.bad:
        note(f"line {row.line} was skipped: {row.problem}")
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
