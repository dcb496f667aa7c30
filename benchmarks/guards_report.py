"""The guards benchmark as one page of pictures, without script or network.

    python benchmarks/guards_report.py                            results/guards.json and the cells behind it
    python benchmarks/guards_report.py --results DIR --cells DIR

Parts that are not there have no section, and a cell that is gone leaves its curves out; the page says so.  Figures are
means over seeds, with the lowest and highest end of the seeds' 95% intervals.  Writes guards.html.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from guard_figures import Array, probability_of, threshold_of
from guards import CELLS
from part_sections import SECTIONS
from parts import FILE, read_parts
from safeside.errors import InputError
from safeside.evals.metrics import auroc
from safeside.evals.pictures import (
    Axis,
    Dot,
    Line,
    dots_picture,
    histogram_picture,
    lines_picture,
    reliability_picture,
    roc_points,
)
from safeside.evals.report import Section, write_report
from safeside.guards.probability import expected_calibration_error
from safeside.terminal import note
from table_cells import Row, columns, commits_of, pooled, text_of
from tidy import RESULTS

# One colour and stroke for each method on all pictures; blues read the base, reds do not.
METHODS = {
    "lst_distilled": ("#2457a6", "-"),
    "lst_pruned": ("#4a7fc1", "--"),
    "lst_taught": ("#8fb8e8", "--"),
    "lst": ("#5b9bd5", "-"),
    "lst_3_taps": ("#1b3a6b", "--"),
    "lst_3_taps_group_4": ("#5a3e9c", "--"),
    "rtb": ("#17a398", "-"),
    "plr": ("#7fb800", "-"),
    "standalone_pruned_distilled": ("#7b241c", "--"),
    "standalone_distilled": ("#c0392b", "--"),
    "standalone_pruned": ("#e67e22", "--"),
    "standalone": ("#e6a5a0", "--"),
    "lst_shared": ("#00a3a3", "--"),
    "probe": ("#7b5ea7", ":"),
    "tfidf": ("#8a8f98", ":"),
    "length": ("#c9ccd1", ":"),
    "prompted": ("#1c2430", ":"),
    "lora_full": ("#00695c", "-."),
}
TITLES = {
    "hate": "Hate speech",
    "prompt_harm": "Harmful prompts",
    "response_harm": "Harmful answers",
    "grounding": "Unsupported claims",
}
VERDICTS = {1: ("#2457a6", "wins"), 0: ("#8a8f98", "interval spans zero"), -1: ("#c0392b", "loses")}
OVER = {"over_best_standalone": "over all rows", "within_sources": "within sources"}
CALIBRATED = "lst_distilled"  # whose scores are drawn
WINDOWED = {"of texts that fit": "auroc_fit", "of windowed texts": "auroc_windowed"}
SECONDS = (
    "Training seconds are those of the guard's own loop, beside other work: states, pruned starts and the teacher come "
    "on top, and the section on the teacher tells what all of it takes."
)


@dataclass(frozen=True, slots=True)
class Page:
    """Rows of guards.json and the cells behind them."""

    rows: list[Row]
    cells: Path

    def of(self, **wanted: object) -> list[Row]:
        """The rows with these columns."""
        return [row for row in self.rows if all(row.get(column) == value for column, value in wanted.items())]

    def found_cells(self, task: str, base: str, method: str) -> list[dict[str, dict[str, list[float]]]]:
        """The cells of all seeds that are still there."""
        keys = [str(row["config_hash"]) for row in self.of(task=task, base=base, method=method, metric="auroc")]
        paths = [self.cells / f"{key}.json" for key in dict.fromkeys(keys)]
        return [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.is_file()]

    def n_missing_cells(self) -> int:
        """Cells behind the rows that are gone."""
        rows = [row for row in self.of(part="methods", metric="auroc") if row["method"] in METHODS]
        keys = {str(row["config_hash"]) for row in rows}
        return sum(not (self.cells / f"{key}.json").is_file() for key in keys)


def split_of(cell: dict[str, dict[str, list[float]]], split: str) -> tuple[Array, Array]:
    """Labels and values of the rows of a split that have a score."""
    labels, values = np.array(cell["labels"][split]), np.array(cell["values"][split], dtype=np.float64)
    return labels[np.isfinite(values)], values[np.isfinite(values)]


def wins_section(page: Page) -> Section | None:
    """lst_distilled against the best standalone, on every task and base."""
    pictures, table = [], []
    for over, what in OVER.items():
        gains = page.of(metric=f"gain_{over}")
        wins = page.of(metric=f"win_{over}")
        verdicts = {columns(row, "task", "base"): VERDICTS[int(row["value"])] for row in wins}
        dots = [
            Dot(f"{row['task']}, {row['base']}", *pooled([row]), *verdicts[columns(row, "task", "base")])
            for row in gains
        ]
        if dots:
            picture = dots_picture(dots, Axis("difference in AUROC", goal=0.0))
            pictures.append((f"Gain over the best standalone, {what}", picture))
        table += [
            (*place, what, str(row["against"]), text_of([row], "{:+.3f}"), verdicts[place][1])
            for row, place in ((row, columns(row, "task", "base")) for row in gains)
        ]
    if not table:
        return None
    return Section(
        "Does reading the base beat a network of equal cost that does not?",
        "AUROC of lst_distilled minus that of the best standalone (plain, distilled, pruned from the base, or both), "
        "by a paired bootstrap over prompts, each with all its test rows, and seeds. The sources of a task differ in "
        "how many of their rows are harmful; within sources, telling them apart helps nobody.",
        pictures,
        ("task", "base", "AUROC", "best standalone", "gain", "verdict"),
        table,
    )


def task_section(page: Page, task: str, base: str) -> Section:
    """Pictures and figures of all methods on one task and base."""
    rows = page.of(part="methods", task=task, base=base)
    methods = [method for method in METHODS if any(row["method"] == method for row in rows)]

    def of(method: str, metric: str) -> list[Row]:
        return [row for row in rows if row["method"] == method and row["metric"] == metric]

    dots = [Dot(method, *pooled(of(method, "auroc")), METHODS[method][0]) for method in methods]
    pictures = [("AUROC of every method", dots_picture(dots, Axis("AUROC")))]
    pictures += _curves(page, task, base, methods)
    windowed = {head: metric for head, metric in WINDOWED.items() if any(row["metric"] == metric for row in rows)}
    shown = {
        "AUROC": "auroc",
        **windowed,
        "within sources": "auroc_within",
        "caught where 1% of validation is flagged": "tpr_at_fpr1",
        "false alarms there": "fpr_at_fpr1",
        "ECE": "ece",
        "over-refusal": "over_refusal",
    }
    table = [
        (
            method,
            *(text_of(of(method, metric), has_interval="auroc" in metric) for metric in shown.values()),
            _share(max(float(row["flops_share"]) for row in of(method, "auroc"))),
            text_of(of(method, "train_seconds"), "{:.0f}", has_interval=False),
        )
        for method in methods
    ]
    n_rows = max(int(row["n"]) for row in rows if row["metric"] == "auroc")
    n_seeds = len({row["seed"] for row in rows if row["metric"] == "auroc"})
    return Section(
        f"{TITLES.get(task, task)} ({task}) on {base}",
        f"{n_rows:,} test rows, {n_seeds} seed{'s' * (n_seeds > 1)}{_windowed(rows)}. {_alone(rows)} {SECONDS}",
        pictures,
        ("method", *shown, "share of the base's compute", "training, s"),
        table,
    )


def _windowed(rows: Sequence[Row]) -> str:
    n_windowed = [int(row["n"]) for row in rows if row["metric"] == "auroc_windowed"]
    return f", {max(n_windowed):,} of the rows in windows" if n_windowed else ""


def _alone(rows: Sequence[Row]) -> str:
    found = [row for row in rows if row["method"] == "source_alone"]
    return f"Knowing nothing but a row's source has AUROC {text_of(found)}." if found else ""


def _share(share: float) -> str:
    return f"{share:.2%}" if share >= 1e-4 or not share else "under 0.01%"


def _curves(page: Page, task: str, base: str, methods: Sequence[str]) -> list[tuple[str, str]]:
    """ROC of all methods; reliability and scores of one.  Nothing where no cell is left."""
    lines = []
    for method in methods:
        cells = [split_of(cell, "test") for cell in page.found_cells(task, base, method)]
        if cells:
            area = np.mean([auroc(*cell) for cell in cells])
            points = [roc_points(*cell) for cell in cells]
            hits = np.mean([caught for _, caught in points], axis=0).tolist()
            colour, style = METHODS[method]
            width = 2.6 if method == CALIBRATED else 1.5
            name = f"{method} {area:.3f}"
            lines.append((area, Line(name, points[0][0], hits, colour, style, width=width)))
    lines.sort(key=lambda pair: -pair[0])
    pictures = []
    if lines:
        roc = lines_picture(
            [line for _, line in lines],
            Axis("share of harmless rows flagged"),
            Axis("share of harmful rows caught"),
            has_diagonal=True,
        )
        pictures.append(("ROC on the test rows, mean over seeds, by falling AUROC", roc))
    cells = page.found_cells(task, base, CALIBRATED)
    return [*pictures, *_calibrated(cells)] if cells else pictures


def _calibrated(cells: Sequence[dict[str, dict[str, list[float]]]]) -> list[tuple[str, str]]:
    """Probabilities before and after calibration on validation rows, and where the threshold for 1% stands."""
    before, after, truth, thresholds = [], [], [], []
    for cell in cells:
        validation, (labels, values) = split_of(cell, "validation"), split_of(cell, "test")
        probability: Callable[[Array], Array] = probability_of(*validation)
        truth.append(labels)
        before.append(1 / (1 + np.exp(-np.clip(values, -30, 30))))
        after.append(probability(values))
        thresholds.append(float(probability(np.array([threshold_of(*validation)]))[0]))
    labels = np.concatenate(truth)
    curves = {"before": (labels, np.concatenate(before)), "after": (labels, np.concatenate(after))}
    errors = {name: expected_calibration_error(*curve) for name, curve in curves.items()}
    named = {f"{name} calibration, ECE {errors[name]:.3f}": curve for name, curve in curves.items()}
    return [
        (f"Reliability of {CALIBRATED}, test rows of all seeds", reliability_picture(named)),
        (
            f"Calibrated scores of {CALIBRATED}; 1% of harmless validation rows are above the threshold",
            histogram_picture(labels, curves["after"][1], float(np.mean(thresholds)), "test rows, all seeds"),
        ),
    ]


def sections_of(page: Page) -> list[Section]:
    """All sections for which there are rows."""
    pairs = [columns(row, "base", "task") for row in page.of(part="methods", metric="auroc")]
    found = [wins_section(page), *(task_section(page, task, base) for base, task in dict.fromkeys(pairs))]
    for part, section in SECTIONS.items():
        rows = page.of(part=part)
        found += section(rows) if rows else []
    return [section for section in found if section is not None]


def write_page(results: Path, cells: Path) -> Path:
    """Write guards.html beside guards.json; without one that is an InputError."""
    if not (results / FILE).is_file():
        raise InputError(f"{results} holds no {FILE}. Run make bench-guards, or one part of it.")
    parts = read_parts(results / FILE)
    page = Page([{"part": name, **row} for name, part in parts.items() for row in part["rows"]], cells)
    missing = [name for name in ("methods", *SECTIONS) if name not in parts]
    gone = page.n_missing_cells()
    subtitle = [
        "Figures are means over seeds; bars reach from the lowest to the highest end of the seeds' 95% intervals.",
        *([f"Not measured here: {', '.join(missing)}."] if missing else []),
        *([f"{gone} cells are gone: their curves are left out."] if gone else []),
        *_not_run(parts.get("methods", {}).get("notes", {})),
    ]
    sections = [*sections_of(page), _provenance(parts)]
    return write_report(results / "guards.html", "safeside: the guards benchmark", " ".join(subtitle), sections)


def _not_run(notes: dict[str, Sequence[str]]) -> list[str]:
    """What the page lacks of tasks, bases and methods, from the notes of the part ``methods``."""
    words = {"not_run": "Not run", "left_out": "Left out, for not every schedule of them was run"}
    return [f"{said}: {', '.join(notes[name])}." for name, said in words.items() if notes.get(name)]


def _provenance(parts: dict[str, dict[str, object]]) -> Section:
    """Where each part's figures come from."""
    rows = [
        (name, commits_of(part, ""), str(part["machine"]), f"{float(str(part['seconds'])):,.0f}")
        for name, part in parts.items()
    ]
    text = "Seconds are those of the last run of a part, which may have found much of the work done."
    return Section("Where the figures come from", text, columns=("part", "commit", "machine", "seconds"), rows=rows)


def main(arguments: Sequence[str] | None = None) -> Path:
    """Parse and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result files")
    parser.add_argument("--cells", type=Path, default=CELLS, help="folder of cached cells")
    options = parser.parse_args(arguments)
    path = write_page(options.results, options.cells)
    note(f"wrote {path} ({path.stat().st_size / 1e6:.2f} MB)")
    return path


if __name__ == "__main__":
    main()
