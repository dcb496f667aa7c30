"""Tables of guards.json: of the methods, and of the parts beside them, which the page of pictures shows too."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from parts import GUARDS, read_parts
from table_cells import (
    Row,
    absent,
    chosen_rows,
    commits_of,
    grouped,
    markdown,
    mean_of,
    read_result,
    share_cell,
    signed_cell,
    text_of,
)

Table = tuple[Sequence[str], list[list[str]]]
CAUGHT = ("before", "after")
IN_FORCE = {  # by the thresholds that the patched folder holds
    "after, by goal, in force": ("after_in_force", ("held_out", "goal")),
    "harmless flagged before, in force": ("harmless_before_in_force", ("held_out", "")),
    "harmless flagged after, in force": ("harmless_after_in_force", ("held_out", "")),
}
STOP_METRICS = (
    "detection", "whole_detection", "detected_share", "detected_share_equal", "delay_tokens", "delay_share",
    "false_stops", "whole_false_flags",
)  # fmt: skip
FLAGGED = {
    ("tpr", "test"): "harmful prompts caught (tpr)",
    ("fpr", "test"): "harmless test prompts flagged (fpr)",
    ("over_refusal", "xstest"): "safe xstest prompts flagged (over_refusal)",
    ("over_refusal", "alpaca"): "instructions flagged (over_refusal)",
}


def cells_of(rows: Sequence[Row], names: Sequence[str], key: tuple[str, ...], forms: Mapping[str, str]) -> list[str]:
    """A line's figures, one for each metric of ``forms``: of the rows with these values of the columns ``names``."""
    return [text_of(grouped(rows, metric, *names).get(key, []), form) for metric, form in forms.items()]


def stream_table(rows: Sequence[Row]) -> Table:
    """A line for each way of learning, each rule and promised rate."""
    names, lines = ("targets", "rule", "false_positive_rate"), []
    forms = {metric: "{:.0f}" if metric == "delay_tokens" else "{:.3f}" for metric in STOP_METRICS}
    for (targets, rule, rate), some in grouped(rows, "detection", *names).items():
        in_a_row = ", ".join(map(str, sorted({int(str(row["n_consecutive"])) for row in some})))
        figures = cells_of(rows, names, (targets, rule, rate), forms)
        lines.append([targets, rule, f"{float(rate):.0%}", in_a_row, *figures])
    return (
        "learnt at",
        "rule",
        "promised",
        "tokens in a row",
        *(metric.replace("_", " ") for metric in STOP_METRICS),
    ), lines


def presets_table(rows: Sequence[Row]) -> Table:
    """A line for each task, base, preset and what it was fitted on."""
    names, lines = ("task", "base", "preset", "promised", "fitted_on"), []
    for key in grouped(rows, "tpr", *names):
        cells = [text_of(grouped(rows, metric, *names, "suite").get((*key, suite), [])) for metric, suite in FLAGGED]
        task, base, preset, promised, fitted = key
        lines.append([task, base, preset, f"{float(promised):.1%}", fitted, *cells])
    return ("task", "base", "preset", "promised", "fitted on", *FLAGGED.values()), lines


def needle_table(rows: Sequence[Row]) -> Table:
    """A line for each base, method and needles alone, or kind of text and place in it."""
    names, forms = ("base", "method", "text", "place"), dict.fromkeys(("auroc", "tpr", "fpr"), "{:.3f}")
    lines = [[*key, *cells_of(rows, names, key, forms)] for key in grouped(rows, "auroc", *names)]
    return (*names, "AUROC", "harmful flagged (tpr)", "harmless flagged (fpr)"), lines


def intercept_table(rows: Sequence[Row]) -> Table:
    """A line for each block: AUROC, and the prefill over the base's at every batch size and blocked share."""
    areas, times = grouped(rows, "auroc", "block"), grouped(rows, "prefill_ratio", "batch", "blocked", "block")
    ways = dict.fromkeys((batch, blocked) for batch, blocked, _ in times)
    lines = [
        [block, text_of(areas[block,]), *(text_of(times.get((*way, block), []), "{:.2f}") for way in ways)]
        for block in sorted((block for (block,) in areas), key=int)
    ]
    return ("blocks read", "AUROC", *(f"{float(share):.0%} blocked, batch {batch}" for batch, share in ways)), lines


def patch_table(rows: Sequence[Row]) -> Table:
    """A line for each family and number of examples: by what was held out, and by suite elsewhere."""
    names = ("family", "examples")
    held = dict.fromkeys(str(row["held_out"]) for row in rows if "held_out" in row)
    suites = dict.fromkeys(str(row["suite"]) for row in rows if "suite" in row)
    columns = [
        *((f"{metric}, by {name}", metric, ("held_out", name), "{:.3f}") for name in held for metric in CAUGHT),
        ("benign flagged", "benign_flagged", ("held_out", ""), "{:.3f}"),
        *((head, metric, key, "{:.3f}") for head, (metric, key) in IN_FORCE.items()),
        *((f"change on {suite}", "elsewhere_change", ("suite", suite), "{:+.4f}") for suite in suites),
        ("seconds", "seconds", ("held_out", ""), "{:.0f}"),
    ]
    lines = [
        [*key]
        + [
            text_of(grouped(rows, metric, *names, column).get((*key, value), []), form)
            for _, metric, (column, value), form in columns
        ]
        for key in grouped(rows, "elsewhere_change", *names)
    ]
    return (*names, *(head for head, *_ in columns)), lines


def port_table(rows: Sequence[Row]) -> Table:
    """A line for each source, target and method."""
    names, forms = ("source", "target", "method"), dict.fromkeys(("kept_auroc", "auroc"), "{:.3f}")
    lines = [
        [*key, str(len({row.get("seed") for row in some})), *cells_of(rows, names, key, forms), share_cell(some)]
        for key, some in grouped(rows, "kept_auroc", *names).items()
    ]
    return (*names, "seeds", "AUROC kept", "AUROC", "of the target's compute"), lines


def training_table(rows: Sequence[Row]) -> Table:
    """A line for each method and geometry."""
    names = ("method", "geometry")
    forms = {"step_seconds": "{:.2f}", "ratio_to_full": "{:.4f}", "storing_seconds": "{:.2f}"}
    sizes = {"peak_bytes": 1e9, "trainable_params": 1e6}
    lines = []
    for key in grouped(rows, "step_seconds", *names):
        big = [grouped(rows, metric, *names).get(key, []) for metric in sizes]
        amounts = [text_of(_divided(some, size), "{:.2f}") for some, size in zip(big, sizes.values(), strict=True)]
        lines.append([*key, *cells_of(rows, names, key, forms), *amounts])
    heads = (
        "seconds of a step", "over full tuning", "seconds to store its states", "peak memory (GB)",
        "trained parameters (millions)",
    )  # fmt: skip
    return (*names, *heads), lines


def teaching_table(rows: Sequence[Row]) -> Table:
    """A line for each task and base: what a first distilled guard costs, each further one, and a LoRA."""
    lines = []
    for task, base in grouped(rows, "seconds", "task", "base"):
        own = [row for row in rows if (row["task"], row["base"]) == (task, base)]
        found = {str(row["method"]): float(str(row["value"])) for row in own}
        first = sum(found[name] for name in ("states", "importance", "teacher", "lst_distilled"))
        ends = (found["states"] + found["lst"], first, found["lst_distilled"], found["lora_full"])
        parts = [found[name] for name in ("states", "importance", "teacher")]
        lines.append([task, base, *(f"{seconds:.0f}" for seconds in (*parts, *ends))])
    heads = ("states", "importance", "teacher", "first lst", "first lst_distilled", "each further one", "lora_full")
    return ("task", "base", *heads), lines


def resplits_table(rows: Sequence[Row]) -> Table:
    """A line for each set, promised rate and way of fitting a threshold."""
    names, forms = ("suite", "fitted_rows", "promised", "fit"), {"kept_share": "{:.3f}", "fpr": "{:.4f}"}
    lines = [
        [suite, n_rows, f"{float(rate):.0%}", fit, *cells_of(rows, names, (suite, n_rows, rate, fit), forms)]
        for suite, n_rows, rate, fit in grouped(rows, "kept_share", *names)
    ]
    return ("set", "rows behind it", "promised", "fit", "splits that keep it", "flagged of other rows"), lines


def _divided(rows: Sequence[Row], size: float) -> list[Row]:
    return [{**row, **{end: float(str(row[end])) / size for end in ("value", "low", "high")}} for row in rows]


PART_TABLES: dict[str, Callable[[Sequence[Row]], Table]] = {
    "stream": stream_table,
    "presets": presets_table,
    "needle": needle_table,
    "intercept": intercept_table,
    "patch": patch_table,
    "port": port_table,
    "training": training_table,
    "teaching": teaching_table,
    "resplits": resplits_table,
}


def guards_table(path: Path) -> str:
    """Mean test AUROC of every method by task and base, and what the distilled ladder gains over the standalones."""
    result = read_result(path)
    if result is None:
        return absent(path)
    rows = [row for row in result["rows"] if row["part"] == "methods"]
    places = dict.fromkeys((row["task"], row["base"]) for row in rows)
    heads = ["method", *(f"{task}, {base}" for task, base in places)]
    any_of_three = "of `standalone`, `standalone_distilled`, `standalone_pruned`"
    over_all = _guards_lines(
        rows, places, "auroc", {"gain_over_best_standalone": "standalone", "gain_over_best_of_three": any_of_three}
    )
    within = _guards_lines(rows, places, "auroc_within", {"gain_within_sources": "standalone"})
    n_seeds = len({row["seed"] for row in rows if row["method"] == "lst_distilled" and row["metric"] == "auroc"})
    facts = result["notes"]["parts"]["methods"]
    n_left_out, n_not_run = (len(facts["notes"].get(name, ())) for name in ("left_out", "not_run"))
    left_out = f" {n_left_out} cells are left out: not every schedule of them was run." if n_left_out else ""
    left_out += " Empty cells were not run; an encoder cannot be prompted." if n_not_run else ""
    head = (
        f"AUROC on test rows, mean of {n_seeds} seeds (one where nothing is drawn). Last lines: differences, their 95% "
        "intervals by a paired bootstrap over prompts (each with all its rows) and seeds. Commit "
        f"`{facts['commit']}`, {facts['machine']}.{left_out}\n\n"
    )
    between = (
        "\n\nAUROC within sources: the mean over a task's sources of that among the rows of each. What the sources "
        "alone tell is `source_alone` above.\n\n"
    )
    return (
        head + markdown(heads, over_all) + between + markdown(heads, within) + _calibration_lines(rows, heads, places)
    )


def _calibration_lines(rows: Sequence[Row], heads: Sequence[str], places: Iterable[tuple[object, object]]) -> str:
    """Calibration error before and after the fit on validation rows, of guards that give logits."""
    lines = []
    for method in dict.fromkeys(row["method"] for row in rows if row["metric"] == "ece_before"):
        cells = []
        for task, base in places:
            ends = [chosen_rows(rows, name, task, str(method), base) for name in ("ece_before", "ece")]
            cells.append(" to ".join(f"{mean_of(end):.3f}" for end in ends) if ends[0] else "")
        lines.append([f"{method}", *cells])
    title = (
        "\n\nExpected calibration error in 15 bins, before and after Platt's fit on validation rows. Of the claims "
        "a third (MiniLM) to a half are windowed.\n\n"
    )
    return title + markdown(heads, lines) if lines else ""


def _guards_lines(
    rows: Sequence[Row], places: Iterable[tuple[object, object]], metric: str, gains: Mapping[str, str]
) -> list[list[str]]:
    """A line for each method that has the metric, and one for each of the ``gains``, over what is their title."""
    lines = []
    for method in dict.fromkeys(row["method"] for row in rows if row["metric"] == metric):
        found = [chosen_rows(rows, metric, task, str(method), base) for task, base in places]
        lines.append([f"{method}", *(f"{mean_of(some):.3f}" if some else "" for some in found)])
    for gain, title in gains.items():
        rivals = [chosen_rows(rows, gain, task, "lst_distilled", base) for task, base in places]
        told = [f"{signed_cell(found[0])} ({found[0]['against']})" if found else "" for found in rivals]
        lines.append([f"`lst_distilled` over the best {title}", *told])
    return lines


def grounding_table(path: Path) -> str:
    """A line for each base and method: claims whose document fits the context, windowed ones, and by source."""
    path = path.with_name(GUARDS.file)
    if not path.is_file():
        return absent(path)
    rows = [row for row in read_parts(path)["methods"]["rows"] if row["task"] == "grounding"]
    sources = sorted({str(row["source"]) for row in rows if row["metric"] == "auroc_source"})
    names, by_source = ("base", "method"), grouped(rows, "auroc_source", "base", "method", "source")
    apart = {name: grouped(rows, name, *names) for name in ("auroc_fit", "auroc_windowed")}
    counts = {
        base: [str(apart[name][base, method][0]["n"]) for name in apart] for base, method in apart["auroc_windowed"]
    }
    lines = [["claims", base, *numbers, *[""] * len(sources)] for base, numbers in counts.items()] + [
        [
            method,
            base,
            *(text_of(some.get((base, method), [])) for some in apart.values()),
            *(text_of(by_source.get((base, method, source), []), has_interval=False) for source in sources),
        ]
        for base, method in apart["auroc_fit"]
    ]
    return markdown(("method", "base", "document fits", "windowed", *sources), lines)


def part_table(path: Path, part: str) -> str:
    """The table of a part for the docs, or what would measure it."""
    path = path.with_name(GUARDS.file)
    if not path.is_file():
        return absent(path)
    found = read_parts(path).get(part)
    if found is None:
        return f"*Not measured yet: `python benchmarks/{part}.py` writes it.*"
    rows = found["rows"]
    bases = ", ".join(dict.fromkeys(f"`{row['base']}`" for row in rows if "base" in row))
    n_seeds = len({row["seed"] for row in rows if "seed" in row})
    means = f"means of {n_seeds} seeds (lowest to highest end of their 95% intervals)"
    seeds = {0: "random weights (95% interval)", 1: "one seed (95% interval)"}.get(n_seeds, means)
    facts = [*([f"base {bases}"] if bases else []), seeds]
    head = f"Measured with {', '.join(facts)}. Commit {commits_of(found)}, {found['machine']}.\n\n"
    return head + markdown(*PART_TABLES[part](rows))
