"""Tables in README and docs, made from result files and never typed.

A block stands between ``<!-- table:core -->`` and ``<!-- /table:core -->``.

    python benchmarks/tables.py --check README.md docs/*.md    fails when a block is stale
    python benchmarks/tables.py --write README.md docs/*.md    makes them anew
"""

from __future__ import annotations

import argparse
import functools
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from gene_tables import genes_table
from guard_tables import PART_TABLES, grounding_table, guards_table, part_table
from scale_tables import bulk_table, capacity_table, memory_table, serve_table, vllm_table
from table_cells import (
    Row,
    absent,
    auroc_cell,
    chosen_rows,
    commits_of,
    count_cell,
    markdown,
    mean_of,
    met_cell,
    ratio_cell,
    read_result,
    share_cell,
    signed_cell,
)

RESULTS = Path(__file__).parent / "results"
METHODS = ("plr", "rtb", "lst", "standalone")
_BLOCK = re.compile(r"<!-- table:([\w-]+) -->\n(.*?)<!-- /table:\1 -->", re.DOTALL)
_MARK = re.compile(r"<!-- /?table:[\w-]* -->")


class TableError(Exception):
    """A block that names no known table, or that does not end."""


def core_table(path: Path) -> str:
    """AUROC by task and method over seeds, and what each method costs."""
    result = read_result(path)
    if result is None:
        return absent(path)
    rows = [row for row in result["rows"] if row["task"] != "geometry"]
    methods = [method for method in METHODS if any(row["method"] == method for row in rows)]
    lines = []
    for task in dict.fromkeys(row["task"] for row in rows):
        cells = [auroc_cell(chosen_rows(rows, "auroc", task, method)) for method in methods]
        n_rows = max(int(row["n"]) for row in rows if row["task"] == task and row["metric"] == "auroc")
        lines.append([f"{task} ({n_rows:,} test rows)", *cells])
    lines.append(
        ["multiply-adds, share of the base", *(share_cell(chosen_rows(rows, "auroc", None, m)) for m in methods)]
    )
    lines.append(
        ["trainable parameters", *(count_cell(chosen_rows(rows, "trainable_params", None, m)) for m in methods)]
    )
    n_seeds = len({row["seed"] for row in rows})
    bases = ", ".join(sorted({str(row["base"]) for row in rows}))
    return (
        f"AUROC on the frozen base `{bases}`: mean of {n_seeds} seeds (lowest to highest end of the seeds' 95% "
        f"bootstrap intervals). Commit `{result['commit']}`, {result['machine']}.\n\n"
        + markdown(["task", *methods], lines)
    )


def geometry_table(path: Path) -> str:
    """Share of the base's multiply-adds by base and method at the default size."""
    result = read_result(path)
    if result is None:
        return absent(path)
    rows = result["rows"]
    methods = [method for method in METHODS if any(row["method"] == method for row in rows)]
    lines = [
        [base, *(share_cell([row for row in rows if row["base"] == base and row["method"] == m]) for m in methods)]
        for base in dict.fromkeys(row["base"] for row in rows)
    ]
    return markdown(["base", *methods], lines)


def taps_table(path: Path) -> str:
    """Seconds to train ten adapters on live and on stored states."""
    result = read_result(path)
    if result is None:
        return absent(path)
    rows = result["rows"]
    seconds = {row["method"]: float(row["value"]) for row in rows if row["metric"] == "train_seconds"}
    speed_up = next(row for row in rows if row["metric"] == "speed_up")
    lines = [
        ["states computed live for every batch", f"{seconds['live']:.1f}", ""],
        [
            "states stored once (storing included)",
            f"{seconds['stored']:.1f}",
            f"{speed_up['value']:.2f}x ({speed_up['low']:.2f} to {speed_up['high']:.2f})",
        ],
    ]
    head = f"{speed_up['n']} adapters on the same rows. Commit `{result['commit']}`, {result['machine']}.\n\n"
    return head + markdown(["training", "seconds", "faster by"], lines)


def overhead_table(path: Path) -> str:
    """Time and peak memory of every variant over the base's, by geometry, phase and batch, beside the goals."""
    result = read_result(path)
    if result is None:
        return absent(path)
    rows = result["rows"]
    variants = [name for name in dict.fromkeys(row["variant"] for row in rows) if name != "base"]
    parts = result["notes"]["parts"]
    judged = [goal for part in parts.values() for goal in part["notes"]["goals"]]
    goals = {(*_place(goal), goal["metric"]): goal["goal"] for goal in judged}
    lines = []
    for metric, what in (("ratio_to_base", "time"), ("peak_ratio", "peak memory")):
        chosen = [row for row in rows if row["metric"] == metric]
        for place in dict.fromkeys(map(_place, chosen)):
            found = {row["variant"]: ratio_cell(row) for row in chosen if _place(row) == place}
            head = f"{place[0]}, {place[1]}, batch {place[2]}: {what}"
            goal = goals.get((*place, metric))
            lines.append([head, *(found.get(name, "") for name in variants), f"{goal:.2f}" if goal else ""])
    for geometry in dict.fromkeys(row["geometry"] for row in rows):
        shares = [
            share_cell([row for row in rows if (row["geometry"], row["variant"]) == (geometry, v)]) for v in variants
        ]
        lines.append([f"{geometry}: multiply-adds", *shares, "1%" if geometry != "builtin" else ""])
    commits = "; ".join(f"{part} {commits_of(facts)}" for part, facts in parts.items())
    head = (
        "Median over interleaved rounds (95% bootstrap interval); a goal is met where the interval's upper end meets "
        f"it: {_goals_met(judged)}. `guard` taps all layers, `guard_N` taps N at equal multiply-adds, "
        "`_group_G` lets G heads of queries share one of keys and values, "
        "`_every_K` judges decoded tokens K at a time. "
        f"Commits: {commits}; {result['machine']}.\n\n"
    )
    return head + markdown(["over the base", *(str(name) for name in variants), "goal of the guards"], lines)


def _goals_met(judged: Sequence[dict[str, object]]) -> str:
    """How many goals of each kind are met; a guard's share of compute, which several rows tell, is one goal."""
    told = []
    for metric, kind in {"ratio_to_base": "time", "peak_ratio": "memory", "flops_share": "multiply-adds"}.items():
        chosen = [goal for goal in judged if goal["metric"] == metric]
        if metric == "flops_share":
            met = {(goal["geometry"], goal["value"]): goal["met"] for goal in chosen}
        else:
            met = {(*_place(goal), goal["variant"]): goal["met"] for goal in chosen}
        told += [f"{sum(map(bool, met.values()))} of {len(met)} of {kind}"] if met else []
    return f"{', '.join(told) or 'none'} are"


def align_table(path: Path) -> str:
    """The headline beside its goals, and every method at the headline's strength, targeted and not."""
    result = read_result(path)
    if result is None:
        return absent(path)
    rows, notes = result["rows"], result["notes"]
    chosen = notes.get("choice")
    if not chosen:
        return "*The headline was not measured in this run.*"
    head = (
        f"On `{rows[0]['base']}`, {notes['prompts_a_suite']} prompts a suite; `harmful_rate` is the share of "
        "StrongREJECT prompts that is not refused, a proxy of compliance. Mean over seeds of the aligner (lowest to "
        f"highest end of their 95% intervals); the gate is one. Commit `{result['commit']}`, {result['machine']}.\n\n"
    )
    strength = float(chosen["strength"])
    parts = (
        _align_headline(rows, notes["goals"], f"`{chosen['method']}` at strength {strength:g}"),
        _align_methods(rows, strength),
        _align_suites(rows, str(chosen["method"]), strength),
    )
    return head + "\n\n".join(markdown(*part) for part in parts)


def _align_headline(rows: Sequence[Row], goals: dict[str, float], title: str) -> tuple[Sequence[str], list[list[str]]]:
    lines = []
    for metric, goal in goals.items():
        found = {
            policy: [row for row in rows if "headline" in row and (row["metric"], row["policy"]) == (metric, policy)]
            for policy in ("targeted_step", "oracle", "fixed")
        }
        cells = [signed_cell(some[0]) if some else "" for some in found.values()]
        gated = found["targeted_step"]
        lines.append([metric, *cells, f"{goal:g}", met_cell(gated[0], goals) if gated else ""])
    return (title, "learned gate", "oracle gate", "untargeted", "goal", "by the learned gate"), lines


def _align_suites(rows: Sequence[Row], method: str, strength: float) -> tuple[Sequence[str], list[list[str]]]:
    """A line for each set of harmful prompts: what is not refused, by seed 0."""
    ways = {
        "base": ("base", "fixed", 0.0),
        "learned gate": (method, "targeted_step", strength),
        "oracle gate": (method, "oracle", strength),
        "lora_dpo": ("lora_dpo", "fixed", 1.0),
    }
    plain = [row for row in rows if "headline" not in row and row["metric"] == "harmful_rate" and row["seed"] == 0]
    lines = []
    for suite in dict.fromkeys(row["suite"] for row in plain):
        mine = [row for row in plain if row["suite"] == suite]
        found = [
            [row for row in mine if (row["method"], row["policy"], row["strength"]) == way] for way in ways.values()
        ]
        lines.append([str(suite), *map(auroc_cell, found)])
    return ("harmful_rate, seed 0", *ways), lines


def _align_methods(rows: Sequence[Row], strength: float) -> tuple[Sequence[str], list[list[str]]]:
    """A line for each method and policy: rate, utility, and over-refusal on both harmless suites."""
    figures = {
        "harmful_rate": ("harmful_rate", "strongreject"),
        "utility": ("utility", "helpful"),
        "over-refusal, benign": ("over_refusal", "benign"),
        "over-refusal, XSTest": ("over_refusal", "xstest"),
    }
    plain = [row for row in rows if "headline" not in row and (row["metric"], row["suite"]) in figures.values()]
    lines = []
    for method, policy in dict.fromkeys((row["method"], row["policy"]) for row in plain):
        at = {strength, 1.0, 0.0} if method == "base" else {strength} if policy != "fixed" else {strength, 1.0}
        mine = [row for row in plain if (row["method"], row["policy"]) == (method, policy) and row["strength"] in at]
        top = max((float(row["strength"]) for row in mine), default=0.0)
        mine = [row for row in mine if row["strength"] == top]
        found = [[row for row in mine if (row["metric"], row["suite"]) == figure] for figure in figures.values()]
        if found[0]:
            lines.append([f"{method}, {policy}", f"{top:g}", str(len(found[0])), *map(auroc_cell, found)])
    return ("method", "strength", "seeds", *figures), lines


def decode_table(path: Path) -> str:
    """Time of a decoded token with every aligner, over the base, a second model and LoRA-DPO."""
    result = read_result(path.with_name("align.json"))
    rows = [row for row in result["rows"] if row["metric"] == "decode_ratio"] if result else []
    if not rows:
        return "*No figures yet: `python benchmarks/align_cost.py` and then `make bench-align` write them.*"
    against = ["base", *dict.fromkeys(str(row["against"]) for row in rows if row["against"] != "base")]
    lines = []
    for method, policy in dict.fromkeys((row["method"], row["policy"]) for row in rows):
        found = {str(row["against"]): row for row in rows if (row["method"], row["policy"]) == (method, policy)}
        share = share_cell(list(found.values()))
        lines.append(
            [
                str(method) if policy == "fixed" else f"{method} behind a guard",
                *(ratio_cell(found[name]) if name in found else "" for name in against),
                share,
            ]
        )
    head = (
        f"One token at the geometry of {rows[0]['base']} with random weights, batch {rows[0]['batch']}: median over "
        f"{rows[0]['n']} interleaved rounds (95% bootstrap interval).\n\n"
    )
    return head + markdown(["with", *(f"over {name}" for name in against), "multiply-adds"], lines)


def gate_table(path: Path) -> str:
    """By attack the share of harmful prompts on which the gate stays shut and of answers that are no refusals."""
    result = read_result(path)
    if result is None:
        return absent(path)
    rows = result["rows"]
    cures = list(dict.fromkeys(str(row["cure"]) for row in rows))
    lines = []
    for suite, attack in dict.fromkeys(
        (row["suite"], row["attack"]) for row in rows if row["metric"] == "harmful_rate"
    ):
        found = [
            [row for row in rows if (row["suite"], row["attack"], row["cure"]) == (suite, attack, c)] for c in cures
        ]
        lines.append([f"{attack} ({suite})", *map(_gate_cell, found)])
    for metric in ("over_refusal", "utility"):
        for suite in dict.fromkeys(row["suite"] for row in rows if row["metric"] == metric):
            some = [row for row in rows if (row["suite"], row["metric"]) == (suite, metric)]
            found = [[row for row in some if row["cure"] == cure] for cure in cures]
            lines.append([f"{metric} ({suite})", *(f"{mean_of(cell):.2f}" if cell else "" for cell in found)])
    head = (
        "Harmful prompts: share of answers that are no refusal by the rules judge, and in brackets the share on which "
        f"the gate stayed shut; {result['notes']['prompts']}; means over seeds where guards or suffixes are drawn. "
        f"Commit `{result['commit']}`, {result['machine']}.\n\n"
    )
    if not result["notes"]["is_whole"]:
        head = f"**The run behind this table was cut off: most attacks are missing.** {head}"
    return head + markdown(["attack", *cures], lines)


def _gate_cell(rows: Sequence[Row]) -> str:
    harmful, shut = ([row for row in rows if row["metric"] == metric] for metric in ("harmful_rate", "gate_shut"))
    if not harmful:
        return ""
    return f"{mean_of(harmful):.2f}" + (f" ({mean_of(shut):.2f})" if shut else "")


def _place(row: Row) -> tuple[object, ...]:
    return row["geometry"], row["phase"], row["batch"]


TABLES: dict[str, Callable[[Path], str]] = {
    "core": core_table,
    "geometry": geometry_table,
    "capacity": capacity_table,
    "taps": taps_table,
    "bulk": bulk_table,
    "overhead": overhead_table,
    "guards": guards_table,
    "align": align_table,
    "decode": decode_table,
    "genes": genes_table,
    "memory": memory_table,
    "gate": gate_table,
    "serve": serve_table,
    "vllm": vllm_table,
    "grounding": grounding_table,
    **{part: functools.partial(part_table, part=part) for part in PART_TABLES},
}


def rendered(text: str, results: Path = RESULTS) -> str:
    """``text`` with every block made anew from the files in ``results``; a broken block is a TableError."""
    marks = _MARK.findall(_BLOCK.sub("", text))
    if marks:
        raise TableError(f"{marks[0]} has no partner; expected <!-- table:NAME --> and then <!-- /table:NAME -->.")

    def replace(block: re.Match[str]) -> str:
        name = block.group(1)
        if name not in TABLES:
            raise TableError(f"There is no table {name!r}; expected one of {', '.join(TABLES)}.")
        table = TABLES[name](results / f"{name}.json")
        return f"<!-- table:{name} -->\n{table}\n<!-- /table:{name} -->"

    return _BLOCK.sub(replace, text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Check or write the blocks of some files; 1 when one is stale or broken."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--check", action="store_true", help="change nothing, fail when a block is stale")
    action.add_argument("--write", action="store_true", help="make every block anew")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result files")
    parser.add_argument("files", type=Path, nargs="+", metavar="FILES")
    options = parser.parse_args(arguments)
    problems = 0
    for path in options.files:
        text = path.read_text(encoding="utf-8")
        try:
            fresh = rendered(text, options.results)
        except TableError as error:
            print(f"{path}: {error}", file=sys.stderr)
            problems += 1
            continue
        if fresh != text and options.write:
            path.write_text(fresh, encoding="utf-8")
        elif fresh != text:
            print(f"{path}: a table is stale. Run python benchmarks/tables.py --write {path}", file=sys.stderr)
            problems += 1
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
