"""What each preset of a guard catches, and what it refuses without cause.

    python benchmarks/presets.py --data ../shared/data

An LST guard of prompts gets its presets twice: from the harmless rows of its own validation split, and from benign
instructions that nothing has learnt from.  ``tpr`` and ``fpr`` are measured on the task's test prompts that fit the
context, ``over_refusal`` on the safe prompts of xstest, which look harmful, and on other instructions.  A promise holds
for texts that come as those behind it: the promised rate stands in ``promised``, and a preset that too few rows can
promise has no row.  Writes the part ``presets`` of guards.json.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from guard_figures import share_figure
from guard_rows import installed, usable
from parts import FILE, write_part
from safeside.adapters.adapter import Adapter
from safeside.adapters.config import PRESET_RATES
from safeside.guards.calibrate import fit_mode
from safeside.guards.score import score_conversations
from safeside.tasks.leakage import without_leaks
from safeside.terminal import note
from safeside.types import Example
from task_guards import Lesson, Sizes, drawn, parser_of
from tidy import Row, figure_row, result_of

FITS = ("validation", "instructions")
BENIGN = "benign_prompts/alpaca_train.jsonl.gz"  # behind the second fit
SUITES = {"xstest": "xstest/prompts_test.jsonl.gz", "alpaca": "benign_prompts/alpaca_test.jsonl.gz"}


@dataclass(frozen=True, slots=True)
class Judged:
    """Scores (n,) of some rows, NaN where there is none, and their labels."""

    scores: np.ndarray
    labels: np.ndarray

    @classmethod
    def by(cls, lesson: Lesson, guards: Mapping[int, Adapter], examples: Sequence[Example]) -> dict[int, Judged]:
        """By seed, scored in one pass as ``safeside score`` does, long ones in windows."""
        found = score_conversations(lesson.base, list(guards.values()), [example.messages for example in examples])
        labels = np.array([example.labels[0] for example in examples])
        return {
            seed: cls(np.array([row.by_guard[guard.name][0] for row in found]), labels)
            for seed, guard in guards.items()
        }


@dataclass(frozen=True, slots=True)
class Bench:
    """The guard's rows, and the harmless ones beside."""

    lesson: Lesson
    benign: list[Example]
    suites: Mapping[str, list[Example]]

    @property
    def counts(self) -> dict[str, int]:
        """Rows by what they are for, and what was left out."""
        used = {"validation_harmless": int((self.lesson.labels("validation") == 0).sum()), "benign": len(self.benign)}
        return {**self.lesson.counts, **used, **{name: len(some) for name, some in self.suites.items()}}

    def rows(self, seeds: Sequence[int]) -> Iterator[Row]:
        """The figures of all seeds."""
        guards = self.lesson.guards(seeds)
        benign = Judged.by(self.lesson, guards, self.benign)
        suites = {name: Judged.by(self.lesson, guards, examples) for name, examples in self.suites.items()}
        for seed, guard in guards.items():
            mine = {name: judged[seed] for name, judged in suites.items()}
            yield from self._rows(seed, guard, benign[seed].scores, mine)

    def _rows(self, seed: int, guard: Adapter, benign: np.ndarray, suites: Mapping[str, Judged]) -> Iterator[Row]:
        lesson = self.lesson
        held = Judged(lesson.last_scores("validation", guard), lesson.labels("validation"))
        test = Judged(lesson.last_scores("test", guard), lesson.labels("test"))
        costs = lesson.costs(lesson.recipe(seed), guard)
        for fitted_on in FITS:
            clean = benign[:, None] if fitted_on == "instructions" else None
            mode = fit_mode(held.scores[:, None], held.labels[:, None], benign=clean)
            guard.set_mode("prompt", mode)
            for preset, rate in PRESET_RATES.items():
                if preset not in mode.presets:
                    note(f"{preset} on {fitted_on}: {mode.n_harmless} harmless rows cannot promise {rate:.1%}")
                    continue
                (threshold,) = guard.with_preset(preset).thresholds_in("prompt")
                columns = {**lesson.columns(seed), "preset": preset, "fitted_on": fitted_on, "promised": rate}
                found = list(figures_of(threshold, test, suites, columns, costs))
                yield from found
                note(
                    f"{lesson.task} seed {seed}, {preset} on {fitted_on}: "
                    + ", ".join(f"{row['metric']} {row['suite']} {row['value']:.3f}" for row in found)
                )


def figures_of(
    threshold: float,
    test: Judged,
    suites: Mapping[str, Judged],
    columns: Mapping[str, object],
    costs: Mapping[str, object],
) -> Iterator[Row]:
    """Shares that reach ``threshold``; a text without a score counts as flagged, for guards fail closed."""
    parts = {
        ("tpr", "test"): test.scores[test.labels == 1],
        ("fpr", "test"): test.scores[test.labels == 0],
        **{("over_refusal", name): judged.scores for name, judged in suites.items()},
    }
    for (metric, suite), scores in parts.items():
        flagged = (~(scores < threshold)).astype(np.float64)
        counts = {"n": len(scores), "n_unscored": int(np.isnan(scores).sum())}
        yield figure_row({**columns, "suite": suite}, metric, *share_figure(flagged), **counts, **costs)


def unseen(path: Path, limit: int, lesson: Lesson, others: Sequence[Example] = ()) -> list[Example]:
    """At most ``limit`` harmless rows of a file: none that the guard learns from or of ``others``, nor nearly."""
    known = [*lesson.splits["train"].examples, *lesson.splits["validation"].examples, *others]
    kept, n_known = without_leaks(harmless(path), known)
    lesson.counts[f"{path.parent.name}/{path.name}_leaks"] = n_known
    return drawn(kept, limit)


def harmless(path: Path, limit: int | None = None) -> list[Example]:
    """At most ``limit`` of the rows that a file labels harmless."""
    found = [example for example in usable(path, ("risk",)) if example.labels[0] == 0]
    return found if limit is None else drawn(found, limit)


def main(arguments: Sequence[str] | None = None) -> Path:
    """Parse, measure, write."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    started = time.perf_counter()
    if options.quick:
        options.limit, options.evaluation_limit, options.epochs, options.seeds = 200, 200, 1, options.seeds[:1]
        options.benign = 100
    rows: list[Row] = []
    counts: dict[str, object] = {}
    path = options.output / FILE
    sizes = Sizes(options.limit, options.evaluation_limit, options.epochs)
    for base, task in itertools.product(installed([options.base, *options.also]), options.tasks):
        with tempfile.TemporaryDirectory() as folder:
            lesson = Lesson.read((base, options.data), task, Path(folder), sizes)
            benign = unseen(options.data / BENIGN, options.benign, lesson)
            suites = {
                name: unseen(options.data / place, options.evaluation_limit, lesson, benign)
                for name, place in SUITES.items()
            }
            bench = Bench(lesson, benign, suites)
            counts[f"{base} {task}"] = bench.counts
            rows += bench.rows(options.seeds)
            result = result_of("presets", time.perf_counter() - started, rows, notes_of(counts))
            path = write_part(options.output, result)  # after every task: a run that is killed keeps what it has
    note(f"wrote {path}")
    return path


def notes_of(counts: Mapping[str, object]) -> dict[str, object]:
    """What a reader of the figures must know."""
    return {
        "fitted_on": f"the task's harmless validation rows, or instructions of {BENIGN}",
        "suites": dict(SUITES),
        "promise": "at most the promised rate of harmless texts like those it was fitted on, with 95% confidence",
        "rows": dict(counts),
        "validation": "chose the epoch too, so promises on it are a little too good; instructions chose nothing",
        "intervals": "Wilson, 95%",
    }


def _parser() -> argparse.ArgumentParser:
    parser = parser_of(__doc__, evaluation_rows=2000)
    parser.add_argument("--also", nargs="*", default=["minilm"], help="further bases")
    parser.add_argument("--tasks", nargs="+", default=["prompt_harm", "hate"], help="tasks of prompts and texts")
    parser.add_argument("--benign", type=int, default=4000, help="instructions behind the second fit")
    return parser


if __name__ == "__main__":
    main()
