"""What the tables in README and docs are made of: reading a result, choosing rows, writing a cell."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, object]


def read_result(path: Path) -> dict[str, list[Row]] | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def absent(path: Path) -> str:
    return f"*No figures yet: there is no `benchmarks/results/{path.name}`. `make bench-{path.stem}` writes it.*"


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def commits_of(facts: Mapping[str, Any], mark: str = "`") -> str:
    """The commit of a part, or where its rows are of several runs that of each."""
    own = facts["notes"].get("commits") or {"": facts["commit"]}
    return ", ".join(f"{what} {mark}{commit}{mark}".strip() for what, commit in own.items())


def share_cell(rows: Sequence[Row]) -> str:
    if not rows:
        return ""
    share = max(float(row["flops_share"]) for row in rows)
    return f"{share * 100:.3g}%" if share >= 1e-4 else "under 0.01%"


def ratio_cell(row: Row) -> str:
    value, low, high = (float(row[name]) for name in ("value", "low", "high"))
    return f"{value:.3f}" if low == high else f"{value:.3f} ({low:.3f} to {high:.3f})"


def pooled(rows: Sequence[Row]) -> tuple[float, float, float]:
    """Mean over seeds, and the lowest and highest end of their intervals."""
    mean = sum(float(str(row["value"])) for row in rows) / len(rows)
    return mean, min(float(str(row["low"])) for row in rows), max(float(str(row["high"])) for row in rows)


def text_of(rows: Sequence[Row], form: str = "{:.3f}", has_interval: bool = True) -> str:
    """The same in words; empty without rows."""
    if not rows:
        return ""
    value, low, high = (form.format(number) for number in pooled(rows))
    return f"{value} ({low} to {high})" if has_interval and low != high else value


def columns(row: Row, *names: str) -> tuple[str, ...]:
    """Some columns as text."""
    return tuple(str(row.get(name, "")) for name in names)


def grouped(rows: Sequence[Row], metric: str, *names: str) -> dict[tuple[str, ...], list[Row]]:
    """The rows of a metric by the values of some columns, in their order."""
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        if row["metric"] == metric:
            found.setdefault(columns(row, *names), []).append(row)
    return found


def mean_of(rows: Sequence[Row]) -> float:
    return sum(float(row["value"]) for row in rows) / len(rows)


def signed_cell(row: Row) -> str:
    return f"{float(row['value']):+.3f} ({float(row['low']):+.3f} to {float(row['high']):+.3f})"


def met_cell(row: Row, goals: Mapping[str, float]) -> str:
    """Whether the interval's worse end meets the goal of alignment, or its value at least."""
    metric = str(row["metric"])
    is_ceiling = metric == "over_refusal_change"

    def meets(end: str) -> bool:
        above = round(float(str(row[end])) - goals[metric], 9)
        return above <= 0 if is_ceiling else above >= 0

    if meets("high" if is_ceiling else "low"):
        return "met"
    return "met by the value, not by the interval" if meets("value") else "missed"


def count_cell(rows: Sequence[Row]) -> str:
    return f"{max((int(row['value']) for row in rows), default=0):,}"


def chosen_rows(rows: Sequence[Row], metric: str, task: object, method: str, base: object = None) -> list[Row]:
    return [
        row
        for row in rows
        if row["metric"] == metric
        and row["method"] == method
        and task in (None, row["task"])
        and base in (None, row["base"])
    ]


def auroc_cell(rows: Sequence[Row]) -> str:
    if not rows:
        return ""
    low, high = min(float(row["low"]) for row in rows), max(float(row["high"]) for row in rows)
    return f"{mean_of(rows):.3f} ({low:.3f} to {high:.3f})"
