"""The table of genes; ``tables`` puts it into the docs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from genes_models import MAIN_SHOTS
from genes_rows import MIXED
from table_cells import Row, absent, auroc_cell, markdown, ratio_cell, read_result

Note = Mapping[str, object]


def genes_table(path: Path) -> str:
    """Goals, what every method brings back, one task's gene in another task's model, and ports."""
    result = read_result(path)
    if result is None:
        return absent(path)
    rows, notes = result["rows"], result["notes"]
    n_models, n_excluded = len(notes["qualifying"]), notes["n_excluded"]
    n_seeds = len({row["seed"] for row in notes["qualifying"]})
    head = (
        f"On `builtin`, {n_models} task models of {n_seeds} seeds count, {n_excluded} do not; {', '.join(MIXED)} are "
        "learnt together with plain instructions. Shares are ratios of means over the models that count, with 95% "
        f"intervals over seeds and prompts. Commit `{result['commit']}`, {result['machine']}.\n\n"
    )
    parts = (_goals(notes["goals"]), _methods(rows, notes), _transfers(rows), _ports(rows))
    return head + "\n\n".join(markdown(*part) for part in parts if part[1])


def _goals(goals: Sequence[Note]) -> tuple[Sequence[str], list[list[str]]]:
    lines = [[str(goal["goal"]), str(goal["wanted"]), figure_text(goal), str(goal["verdict"])] for goal in goals]
    return ("goal", "wanted", "measured", ""), lines


def figure_text(item: Note) -> str:
    """A figure with its interval where it has one; nothing where nothing was measured."""
    if "value" not in item:
        return ""
    value, low, high = (float(str(item[name])) for name in ("value", "low", "high"))
    digits = 0 if abs(value) >= 10 else 3
    return f"{value:.{digits}f}" if low == high else f"{value:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def points_text(change: Note | None) -> str:
    """A change of accuracy in points, with its interval; nothing where there is none."""
    if change is None:
        return ""
    low, high = change["interval"]  # type: ignore[misc]
    return f"{100 * float(str(change['mean'])):+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"


def _methods(rows: Sequence[Row], notes: Note) -> tuple[Sequence[str], list[list[str]]]:
    """A line for each method, over all models that count."""
    changes: Mapping[str, Note] = dict(notes["accuracy_change"])  # type: ignore[call-overload]
    counted = {(row["task"], row["seed"]) for row in notes["qualifying"]}  # type: ignore[attr-defined]
    whole = [row for row in rows if "source" not in row and row["task"] == "all" and row["shots"] in (0, MAIN_SHOTS)]
    lines = []
    for method in dict.fromkeys(str(row["method"]) for row in whole):
        mine = [row for row in whole if row["method"] == method]
        wanted = (("recovered_share", "rules"), ("recovered_share", "classifier"), ("recovered_refusals", "rules"))
        shares = [[row for row in mine if (row["metric"], row["judge"]) == one] for one in wanted]
        cells = [ratio_cell(some[0]) if some else "" for some in shares]
        accuracy = points_text(changes.get(method))
        taken = [row for row in rows if (row["method"], row["metric"]) == (method, "seconds")]
        own = [row for row in taken if row["shots"] in (0, MAIN_SHOTS)]
        seconds = [float(str(row["value"])) for row in own if (row["task"], row["seed"]) in counted]
        lines.append([method, *cells, accuracy, f"{sum(seconds) / len(seconds):.0f}" if seconds else ""])
    shares_of = ("recovered share (rules)", "(classifier)", "refusals back (rules)")
    return ("method", *shares_of, "task accuracy, points", "seconds"), lines


def _transfers(rows: Sequence[Row]) -> tuple[Sequence[str], list[list[str]]]:
    """Fitted on a row's task, used on a column's: recovered share by rules, over seeds."""
    targets, lines = transfers_of(rows, ratio_cell)
    return ("one gene, fitted on", *(f"in a model of {target}" for target in targets)), lines


def transfers_of(rows: Sequence[Row], cell_of: Callable[[Row], str]) -> tuple[list[str], list[list[str]]]:
    """The tasks that a gene was used on, and a line for each that it was fitted on: its name, a cell for each use."""
    found = {
        (str(row["source"]), str(row["target"])): row
        for row in rows
        if "source" in row and row["method"] == "gene"
        and (row["metric"], row["judge"], row["seed"]) == ("recovered_share", "rules", -1)
    }  # fmt: skip
    sources, targets = (list(dict.fromkeys(pair[side] for pair in found)) for side in (0, 1))
    lines = [
        [source, *(cell_of(found[source, target]) if (source, target) in found else "" for target in targets)]
        for source in sources
    ]
    return targets, lines


def _ports(rows: Sequence[Row]) -> tuple[Sequence[str], list[list[str]]]:
    found = [
        row for row in rows
        if "source" in row and row["method"] != "gene" and (row["metric"], row["judge"]) == ("recovered_share", "rules")
    ]  # fmt: skip
    lines = []
    for row in found:
        place = (row["source"], row["target"], row["method"])
        kept = [
            other for other in rows
            if "source" in other and (other["source"], other["target"], other["method"]) == place
            and (other["metric"], other["judge"]) == ("kept_share", "rules")
        ]  # fmt: skip
        lines.append([f"{row['source']} to {row['target']}", str(row["method"]), auroc_cell([row]), auroc_cell(kept)])
    return ("from and to", "gene", "recovered share (rules)", "of what the target's own brings back"), lines
