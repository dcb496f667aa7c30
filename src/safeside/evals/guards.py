"""How good a guard is on labelled rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from safeside.adapters.adapter import Adapter
from safeside.base.model import Base
from safeside.errors import InputError
from safeside.evals.metrics import Array, Figure, guard_figures
from safeside.guards.score import Scores, score_conversations
from safeside.tasks.learnt import Hashes, unseen_of
from safeside.tasks.rows import BadRow, load_examples
from safeside.types import Example


@dataclass(slots=True)
class GuardReport:
    """Figures by label and metric, the scores behind them, and what was left out."""

    figures: dict[str, dict[str, Figure]]
    """By label and metric (auroc, auprc, f1, tpr, fpr, ece), value and 95% interval."""
    labels: Array
    """(n, K), 0 or 1, of the rows that were not left out."""
    scores: Array
    """(n, K) in [0, 1], NaN where the guard could not score."""
    n: int
    """Rows behind the figures."""
    n_skipped: int
    """Rows that could not be read."""
    n_unscored: int
    """Rows whose score is not a number."""
    n_windowed: int
    """Rows longer than the base's context, scored in windows."""
    bad: list[BadRow] = field(default_factory=list)
    """The rows that could not be read or scored, and why."""
    notes: list[str] = field(default_factory=list)
    """What the verdicts say of thresholds that stand in for others, and of how many rows."""
    n_learnt: int | None = None
    """Rows left out because the guard learnt from them; None where no record of those was given."""


def evaluate_guard(
    base: Base,
    guard: Adapter,
    path: str | Path,
    *,
    learnt: Hashes | None = None,
    batch_size: int = 32,
    advance: Callable[[int], None] = lambda count: None,
    tell: Callable[[BadRow], None] = lambda row: None,
) -> GuardReport:
    """Figures of ``guard`` on a file of labelled rows, at the thresholds of its preset, if one is chosen.

    ``learnt`` is the record in the guard's folder, as ``load_learnt`` reads it: the rows that it learnt from are left
    out and counted, for figures on them would flatter it.  Without unseen rows of both classes nothing is measured.

    ``tell`` hears of every bad row as soon as it is known, so also when no figure can be made: without a usable row,
    or with rows of one class only, that is an InputError before anything is scored.
    """
    examples, bad = load_examples(path, guard.config.labels)
    for row in bad:
        tell(row)
    if not examples:
        first = f" The first problem of {len(bad)}: line {bad[0].line}, {bad[0].problem}." if bad else ""
        raise InputError(f"{path} holds no usable row.{first}")
    return report_on(base, guard, examples, bad, learnt=learnt, batch_size=batch_size, advance=advance, tell=tell)


def report_on(
    base: Base,
    guard: Adapter,
    examples: Sequence[Example],
    bad: Sequence[BadRow] = (),
    *,
    learnt: Hashes | None = None,
    batch_size: int = 32,
    advance: Callable[[int], None] = lambda count: None,
    tell: Callable[[BadRow], None] = lambda row: None,
) -> GuardReport:
    """The same on examples in memory.  A row whose score is not a number is unscored: counted, never dropped unseen."""
    examples, n_learnt = _unseen(examples, learnt)
    labels = np.array([example.labels for example in examples], dtype=np.float64)  # (n, K)
    _check_classes(labels, guard.config.labels, len(bad), n_learnt)
    conversations = [example.messages for example in examples]
    scored = score_conversations(base, [guard], conversations, batch_size=batch_size, advance=advance)
    scores = np.array([row.by_guard[guard.name] for row in scored], dtype=np.float64)  # (n, K)
    unscored = [BadRow(example.line, row.problem) for example, row in zip(examples, scored, strict=True) if row.problem]
    for bad_row in unscored:
        tell(bad_row)
    finite = np.isfinite(scores).all(1)
    _check_classes(labels[finite], guard.config.labels, len(bad) + len(unscored), n_learnt)
    fallbacks = Counter(note for row in scored if (note := guard.fallback_note(row.mode_for(guard))))
    return GuardReport(
        figures=_figures(guard, scored, scores, labels),
        labels=labels,
        scores=scores,
        n=int(finite.sum()),
        n_skipped=len(bad),
        n_unscored=int((~finite).sum()),
        n_windowed=sum(row.n_windows > 1 for row in scored),
        bad=[*bad, *unscored],
        notes=[f"{count} rows: {note}" for note, count in sorted(fallbacks.items())],
        n_learnt=n_learnt,
    )


def _unseen(examples: Sequence[Example], learnt: Hashes | None) -> tuple[list[Example], int | None]:
    """The rows that the guard did not learn from, and how many others there are; none left is an InputError."""
    unseen, n_learnt = unseen_of(examples, learnt)
    if n_learnt and not unseen:
        raise InputError(
            f"The guard learnt from every one of the {n_learnt} rows, and figures on rows that it knows would flatter "
            "it. Give rows that it has not seen."
        )
    return unseen, n_learnt


def _figures(guard: Adapter, scored: Sequence[Scores], scores: Array, labels: Array) -> dict[str, dict[str, Figure]]:
    """Figures by label of the rows that have a score, each at the threshold of the mode it was read in."""
    modes = [row.mode_for(guard) for row in scored]
    thresholds = np.array([guard.thresholds_in(mode) for mode in modes])  # (n, K)
    probabilities = np.stack([guard.probabilities(row[None], mode)[0] for row, mode in zip(scores, modes, strict=True)])
    finite = np.isfinite(scores).all(1)
    return {
        label: guard_figures(
            labels[finite, index],
            scores[finite, index],
            thresholds[finite, index],
            probabilities=probabilities[finite, index],
        )
        for index, label in enumerate(guard.config.labels)
    }


def _check_classes(labels: Array, names: Sequence[str], n_bad: int, n_learnt: int | None) -> None:
    """Raise an InputError unless every column of the (n, K) labels holds both 0 and 1."""
    left_out, which = (
        (f"; {n_learnt} more were left out, for the guard learnt from them", " that it has not seen")
        if n_learnt
        else ("", "")
    )
    for name, column in zip(names, labels.T, strict=True):
        n_harmful = int(column.sum())
        if n_harmful in (0, len(column)):
            raise InputError(
                f"Figures need both harmful and harmless rows; got {n_harmful} harmful and {len(column) - n_harmful} "
                f"harmless for {name!r}, and {n_bad} bad rows{left_out}. Add rows of the other kind{which}, "
                "or mend the bad ones."
            )
