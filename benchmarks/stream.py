"""Stopping harmful answers while they are written, beside judging them when they are whole.

    python benchmarks/stream.py --data ../shared/data

An LST guard of answers learns in two ways: from each answer's last token (``end``), and from its prefixes too
(``prefixes``).  Two thresholds, one for the rule that stops and one for the whole answer's last score, are fitted on
the same benign validation answers for the same promised false-positive rate.  How many tokens in a row the rule waits
for (``n_consecutive``) is either what artifacts keep (``rule`` = ``kept``) or ``chosen`` on validation answers, where
each candidate's promise is so sure that all of them hold together.  On test answers ``detected_share`` is the share of
harmful answers that the rule stops over the share that the whole answer's score flags, ``detected_share_equal`` the
same with as many benign test answers flagged as are stopped; ``delay_tokens`` is the median of the tokens written by
then, the last risky one included; ``false_stops`` is the share of benign answers that are stopped.

Labels say that an answer is harmful as a whole and not where: a delay counts from the answer's first token, and an
early stop of a harmful answer may come before its first harmful word.  Writes the part ``stream`` of guards.json.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from guard_rows import prompts_of
from parts import FILE, write_part
from safeside.adapters.adapter import Adapter
from safeside.errors import InputError
from safeside.evals.metrics import auroc, bootstrap
from safeside.guards.calibrate import CONFIDENCE, threshold_with_bound
from safeside.guards.stream import N_CONSECUTIVE, StopRule, evaluate_stops, fit_stop_rule
from safeside.terminal import note
from task_guards import Lesson, Sizes, parser_of
from tidy import Row, figure_row, result_of

TARGETS: tuple[Literal["end", "prefixes"], ...] = ("end", "prefixes")
RATES = (0.01, 0.05, 0.1, 0.2)
LATEST = 1 / 3  # of an answer: the goal for the median delay
WRITTEN = tuple(round(0.1 * step, 1) for step in range(1, 11))  # shares of an answer, for the curve of stops


@dataclass(frozen=True, slots=True)
class Answers:
    """Scores of answers token by token, and whether each is harmful."""

    scores: list[Tensor]
    labels: np.ndarray
    prompts: list[str]
    """What the prompt of each is known by: intervals draw prompts, with all of their answers."""

    @classmethod
    def of(cls, lesson: Lesson, split: str, guard: Adapter) -> Answers:
        """The answers of a split; a row without one is none of them."""
        scores, labels = lesson.token_scores(split, guard), lesson.labels(split)
        written = [place for place, some in enumerate(scores) if len(some)]
        prompts = prompts_of(lesson.splits[split].examples)
        return cls([scores[place] for place in written], labels[written], [prompts[place] for place in written])

    @property
    def benign(self) -> list[Tensor]:
        return [scores for scores, label in zip(self.scores, self.labels, strict=True) if label == 0]

    @property
    def last(self) -> np.ndarray:
        return np.array([float(scores[-1]) for scores in self.scores])


def chosen_rule(validation: Answers, rate: float, candidates: Sequence[int]) -> StopRule:
    """Of the rules that promise ``rate``, one for each number of tokens in a row, the one that stops most.

    Most harmful validation answers, that is, among those whose median delay is at most a third of the answer there; if
    none is that fast, among all.  Rules that too many of the answers are too short for are none; the InputError of
    ``fit_stop_rule`` where no rule is left.
    """
    confidence = 1 - (1 - CONFIDENCE) / len(candidates)  # whichever is chosen, its promise holds
    rules: list[StopRule] = []
    refused: InputError | None = None
    for n_consecutive in candidates:
        try:
            rules.append(fit_stop_rule(validation.benign, rate, n_consecutive=n_consecutive, confidence=confidence))
        except InputError as error:
            refused = error
    if refused is not None and not rules:
        raise refused
    found = [evaluate_stops(rule, 1.0, validation.scores, validation.labels == 1) for rule in rules]
    fast = [place for place, report in enumerate(found) if report.delay_share <= LATEST]
    return rules[max(fast or range(len(rules)), key=lambda place: found[place].detected_share)]


def measure(lesson: Lesson, seed: int, rates: Sequence[float], candidates: Sequence[int]) -> Iterator[Row]:
    """The figures of one seed, trained in both ways."""
    for targets in TARGETS:
        recipe = lesson.recipe(seed, targets)
        guard = lesson.guard(recipe)
        validation, test = (Answers.of(lesson, split, guard) for split in ("validation", "test"))
        labels = {**lesson.columns(seed), "targets": targets}
        costs = {**lesson.costs(recipe, guard), "n_unscored": lesson.counts["test_too_long"]}
        figure = bootstrap({"auroc": auroc}, test.labels, test.last, groups=test.prompts)["auroc"]
        yield figure_row(labels, "auroc", figure.value, (figure.low, figure.high), n=len(test.labels), **costs)
        for rate in rates:
            try:
                rules = {
                    "chosen": chosen_rule(validation, rate, candidates),
                    "kept": fit_stop_rule(validation.benign, rate, n_consecutive=N_CONSECUTIVE),
                }
                whole = threshold_with_bound(validation.last[validation.labels == 0], rate)
            except InputError as error:
                note(f"a false-positive rate of {rate:g} is left out: {error}")
                continue
            for name, rule in rules.items():
                columns = {**labels, "rule": name, "false_positive_rate": rate, "n_consecutive": rule.n_consecutive}
                found = list(figures_of(rule, whole, test, columns, costs))
                yield from found
                note(f"{targets} seed {seed} at {rate:g}, {name}: {_told(found)}")


def _told(rows: Sequence[Row]) -> str:
    return ", ".join(f"{row['metric']} {row['value']:.3f}" for row in rows if "written" not in row)


def figures_of(
    rule: StopRule, whole: float, test: Answers, labels: dict[str, object], costs: dict[str, object]
) -> Iterator[Row]:
    """What ``rule`` and the whole answers' threshold find on test answers, with intervals over their prompts."""
    report = evaluate_stops(rule, whole, test.scores, test.labels == 1)
    stops = [rule.first_stop(scores) for scores in test.scores]
    written = np.array([np.inf if stop is None else stop + 1 for stop in stops])
    lengths = np.array([len(scores) for scores in test.scores])
    stopped, flagged = np.isfinite(written), test.last >= whole
    is_harmful, prompts = test.labels == 1, np.array(test.prompts)
    shares = {
        "detection": (stopped, is_harmful, report.detected_share),
        "false_stops": (stopped, ~is_harmful, report.false_stops),
        "whole_detection": (flagged, is_harmful, report.whole_detected_share),
        "whole_false_flags": (flagged, ~is_harmful, report.whole_false_flags),
    }
    for name, (hits, of, value) in shares.items():
        yield _row(labels, name, (hits[of].astype(float), prompts[of]), value, costs)
    harmful = np.flatnonzero(is_harmful).astype(np.float64)

    def kept(_: np.ndarray, rows: np.ndarray) -> float:
        index = rows.astype(int)
        return float(stopped[index].sum() / max(flagged[index].sum(), 1))

    if flagged[is_harmful].any():
        groups = prompts[is_harmful].tolist()
        figure = bootstrap({"kept": kept}, np.ones(len(harmful)), harmful, groups=groups)["kept"]
        yield figure_row(
            labels, "detected_share", report.kept_detection, (figure.low, figure.high), n=len(harmful), **costs
        )
    equal = _threshold_of_share(test.last[~is_harmful], report.false_stops)
    if (test.last[is_harmful] >= equal).any():
        share = report.detected_share / float((test.last[is_harmful] >= equal).mean())
        yield figure_row(labels, "detected_share_equal", share, n=len(harmful), **costs)
    caught = stopped & is_harmful
    if caught.any():
        tokens, shares_of = (written[caught], prompts[caught]), (written[caught] / lengths[caught], prompts[caught])
        yield _row(labels, "delay_tokens", tokens, report.delay_tokens, costs, np.median)
        yield _row(labels, "delay_share", shares_of, report.delay_share, costs, np.median)
    for share in WRITTEN:
        by_then = (written[is_harmful] / lengths[is_harmful] <= share + 1e-9).mean()
        yield figure_row({**labels, "written": share}, "stopped_by", float(by_then), n=len(harmful), **costs)


def _threshold_of_share(scores: np.ndarray, share: float) -> float:
    """The threshold that this share of the scores reaches."""
    n_flagged = round(share * len(scores))
    return float(np.sort(scores)[::-1][n_flagged - 1]) if n_flagged else math.inf


def _row(  # type: ignore[no-untyped-def]
    labels: dict[str, object],
    metric: str,
    drawn: tuple[np.ndarray, np.ndarray],
    value: float,
    costs: dict[str, object],
    of=np.mean,
) -> Row:
    """``value`` is what ``evaluate_stops`` says; the interval resamples the ``drawn`` values of answers by prompts."""
    values, prompts = drawn
    assert np.isclose(value, of(values)), f"{metric} of the bench and of evaluate_stops differ"
    functions = {metric: lambda _, some: float(of(some))}
    figure = bootstrap(functions, np.ones(len(values)), values, groups=prompts.tolist())[metric]
    return figure_row(labels, metric, value, (figure.low, figure.high), n=len(values), **costs)


def main(arguments: Sequence[str] | None = None) -> Path:
    """Parse, measure, write."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    started = time.perf_counter()
    if options.quick:
        options.limit, options.evaluation_limit, options.epochs, options.seeds = 200, 400, 1, options.seeds[:1]
    sizes = Sizes(options.limit, options.evaluation_limit, options.epochs)
    with tempfile.TemporaryDirectory() as folder:
        lesson = Lesson.read((options.base, options.data), options.task, Path(folder), sizes)
        note(f"rows are read after {time.perf_counter() - started:.0f} s")
        path, rows = options.output / FILE, []
        for seed in options.seeds:
            rows += measure(lesson, seed, tuple(options.rates), tuple(options.consecutive))
            result = result_of("stream", time.perf_counter() - started, rows, notes_of(lesson))
            path = write_part(options.output, result)  # after every seed: a run that is killed keeps what it has
    note(f"wrote {path}")
    return path


def notes_of(lesson: Lesson) -> dict[str, object]:
    """What a reader of the figures must know."""
    lengths = [
        np.array([len(ids) - start for ids, start in zip(rows.ids, rows.answer_starts, strict=True)])
        for rows in (lesson.splits["validation"], lesson.splits["test"])
    ]
    return {
        "promise": "stop rules and whole-answer threshold: the same benign validation answers and rate, 95% confidence",
        "n_consecutive": "kept: what artifacts keep; chosen on validation answers: most stopped, with a median delay "
        "of at most a third there, each candidate at a confidence at which all hold together",
        "detected_share_equal": "at the whole-answer threshold that as many benign test answers reach as are stopped",
        "detected_share": "harmful answers stopped over harmful answers that the whole answer's last score flags",
        "unscored": "test answers longer than the context, on which no figure rests",
        "delay": "tokens up to the risky one that stops, itself included (one more was computed, and is never shown); "
        "median over the harmful answers that it stops",
        "labels": "answers are harmful as a whole; where harm begins is not known: delays count from the first token",
        "stopped_by": "share of all harmful answers that is stopped by the time this share of the answer is written",
        "rows": lesson.counts,
        "rows_without_answer": int(sum((some <= 0).sum() for some in lengths)),
        "benign_validation_rows": int((lesson.labels("validation")[lengths[0] > 0] == 0).sum()),
        "median_answer_tokens": float(np.median(lengths[1][lengths[1] > 0])),
        "intervals": "95% bootstrap over prompts with all their answers; of stopped_by low and high are the value",
    }


def _parser() -> argparse.ArgumentParser:
    parser = parser_of(__doc__, evaluation_rows=800)
    parser.add_argument("--task", default="response_harm", help="a task of answers")
    parser.add_argument("--rates", type=float, nargs="+", default=list(RATES), help="false-positive rates to promise")
    parser.add_argument(
        "--consecutive", type=int, nargs="+", default=[1, 2, 4, 8, 16], help="risky tokens in a row: numbers to try"
    )
    return parser


if __name__ == "__main__":
    main()
