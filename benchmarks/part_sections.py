"""Sections of the guards page for everything beside the table of methods: one function for each part."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

from guard_tables import (
    FLAGGED,
    intercept_table,
    needle_table,
    patch_table,
    port_table,
    presets_table,
    resplits_table,
    stream_table,
    teaching_table,
    training_table,
)
from safeside.evals.pictures import BLUE, GREY, RED, Axis, Dot, Line, dots_picture, lines_picture
from safeside.evals.report import Section
from table_cells import Row, columns, grouped, pooled

SHADES = ("#9cc3ea", "#5b9bd5", BLUE, "#0d2b57")
SECOND = "#e67e22"
GREEN = "#00897b"
TARGETS = {"end": GREY, "prefixes": BLUE}  # what a guard of answers learnt from


def stream_sections(rows: Sequence[Row]) -> list[Section]:
    """Stopping while the answer is written, beside judging the whole answer."""
    chosen = [row for row in rows if row.get("rule", "chosen") == "chosen"]
    rates = [rate for (rate, _) in grouped(chosen, "false_stops", "false_positive_rate", "targets")]
    if not rates:
        return []
    rate = "0.05" if "0.05" in rates else rates[-1]
    pictures = [(f"Harmful answers stopped by then, at {float(rate):.0%} promised", _stop_curves(chosen, rate))]
    wanted = (
        ("detected_share", "Detection kept, of whole-answer detection at the same promise (goal 0.9)", 0.9),
        ("delay_share", "Median delay as a share of the answer (goal a third)", 1 / 3),
        ("false_stops", "Benign answers stopped", None),
    )
    for metric, caption, goal in wanted:
        dots = [
            Dot(f"{float(promised):.0%} promised", *pooled(some), TARGETS[targets], targets)
            for (promised, targets), some in sorted(grouped(chosen, metric, "false_positive_rate", "targets").items())
        ]
        if dots:
            pictures.append((caption, dots_picture(dots, Axis(metric.replace("_", " "), goal=goal))))
    text = (
        "The rule stops at a run of risky tokens; its threshold and that of whole answers promise the same rate on the "
        "same benign validation answers. Labels say that an answer is harmful as a whole, not where."
    )
    return [Section("Stopping an answer while it is written", text, pictures, *stream_table(rows))]


def _stop_curves(rows: Sequence[Row], rate: str) -> str:
    """Share of the harmful answers that is stopped over the share that is written, and what whole answers show."""
    lines = []
    for targets, colour in TARGETS.items():
        here = [row for row in rows if columns(row, "targets", "false_positive_rate") == (targets, rate)]
        points = {float(key[0]): pooled(some) for key, some in grouped(here, "stopped_by", "written").items()}
        if not points:
            continue
        values, lows, highs = zip(*points.values(), strict=True)
        band = ([0.0, *lows], [0.0, *highs])
        name = f"learnt from {'the last token' if targets == 'end' else 'prefixes too'}"
        lines.append(Line(name, [0.0, *points], [0.0, *values], colour, "-", band, "o"))
        whole = pooled(grouped(here, "whole_detection", "targets")[targets,])[0]
        lines.append(Line("whole answers, same guard", [0.0, 1.0], [whole, whole], colour, ":"))
    return lines_picture(lines, Axis("share of the answer that is written"), Axis("share stopped", (0.0, None)))


def presets_sections(rows: Sequence[Row]) -> list[Section]:
    """What each preset catches and refuses."""
    kinds = dict(zip(FLAGGED, (BLUE, GREY, RED, SECOND), strict=True))
    sections = []
    for place in dict.fromkeys(columns(row, "task", "base") for row in rows):
        mine, pictures = [row for row in rows if columns(row, "task", "base") == place], []
        for (fitted,) in dict.fromkeys(columns(row, "fitted_on") for row in mine):
            here = [row for row in mine if row["fitted_on"] == fitted]
            groups = {
                (preset, promised, metric, suite): some
                for metric in ("tpr", "fpr", "over_refusal")
                for (preset, promised, suite), some in grouped(here, metric, "preset", "promised", "suite").items()
            }
            order = sorted(groups, key=lambda key: (-float(key[1]), list(kinds).index((key[2], key[3]))))
            dots = [
                Dot(f"{key[0]} ({float(key[1]):.1%})", *pooled(groups[key]), kinds[key[2:]], FLAGGED[key[2:]])
                for key in order
            ]
            pictures.append((f"Presets fitted on {fitted}", dots_picture(dots, Axis("share flagged"))))
        text = (
            "A promise is for texts that come as those it was fitted on. A preset that too few rows can promise is "
            "missing."
        )
        title = f"Detection and over-refusal at each preset: {', '.join(place)}"
        sections.append(Section(title, text, pictures, *presets_table(mine)))
    return sections


def needle_sections(rows: Sequence[Row]) -> list[Section]:
    """A harmful prompt hidden in a long text."""
    pictures = []
    asked = (
        (("auroc",), "AUROC", "AUROC by place"),
        (("tpr", "fpr"), "share flagged", "Flagged at the guard's own threshold"),
    )
    colours = {"auroc": (BLUE, ""), "tpr": (BLUE, "harmful needles"), "fpr": (GREY, "harmless needles")}
    for way, (metrics, axis, caption) in itertools.product(
        dict.fromkeys(columns(row, "base", "method") for row in rows), asked
    ):
        mine = [row for row in rows if columns(row, "base", "method") == way]
        dots = [
            Dot("alone" if text == "alone" else f"{text}, {place}", *pooled(some), *colours[metric])
            for metric in metrics
            for (text, place), some in grouped(mine, metric, "text", "place").items()
        ]
        pictures.append((f"{caption}: {', '.join(way)}", dots_picture(dots, Axis(axis))))
    text = (
        "Short test prompts among benign instructions: in texts of one window of the base, of several, or as one "
        "turn of many. lst learnt from no such text, lst_needles from some; both read the last token of each window."
    )
    return [Section("A needle in a long text", text, pictures, *needle_table(rows))]


def intercept_sections(rows: Sequence[Row]) -> list[Section]:
    """A guard that reads the first k blocks, and what stopping there saves."""
    found = {int(key[0]): pooled(some) for key, some in grouped(rows, "auroc", "block").items()}
    blocks = sorted(found)
    values, lows, highs = zip(*(found[block] for block in blocks), strict=True)
    area = lines_picture([Line("", blocks, values, BLUE, "-", (lows, highs), "o")], Axis("blocks read"), Axis("AUROC"))
    lines = []
    for (batch, blocked), some in grouped(rows, "prefill_ratio", "batch", "blocked").items():
        points = sorted((int(str(row["block"])), *pooled([row])) for row in some)
        x, y, low, high = zip(*points, strict=True)
        colour = {"0.0": GREY, "0.1": SECOND, "1.0": BLUE}.get(blocked, GREEN)
        style = "-" if batch == "1" else "--"
        lines.append(Line(f"{float(blocked):.0%} blocked, batch {batch}", x, y, colour, style, (low, high), "o"))
    ratio = lines_picture(lines, Axis("blocks read"), Axis("prefill, of the base alone", goal=1.0))
    text = "A guard of the first k blocks blocks harmful prompts before the deeper ones run."
    pictures = [("AUROC by depth", area), ("Time of the prefill with the guard over that without", ratio)]
    return [Section("Blocking a prompt early", text, pictures, *intercept_table(rows))]


def patch_sections(rows: Sequence[Row]) -> list[Section]:
    """A new family of jailbreaks, before and after a patch."""
    sizes = sorted({int(str(row["examples"])) for row in rows})
    colours = dict(zip(map(str, sizes), SHADES, strict=False))
    caught = [
        Dot(_held_out(*key), *pooled(some), GREY, "before")
        for key, some in grouped(rows, "before", "family", "held_out").items()
    ]
    after = [
        Dot(_held_out(family, where), *pooled(some), colours[size], f"{size} examples")
        for (family, where, size), some in grouped(rows, "after", "family", "held_out", "examples").items()
    ]
    pictures = [
        (
            "Share of the family caught, before and after",
            dots_picture([*caught, *after], Axis("share caught", goal=0.9)),
        )
    ]
    for (suite,) in grouped(rows, "elsewhere_change", "suite"):
        dots = [
            Dot(family, *pooled(some), colours[size], f"{size} examples")
            for (family, where, size), some in grouped(rows, "elsewhere_change", "family", "suite", "examples").items()
            if where == suite
        ]
        pictures.append((f"Change elsewhere: {suite}", dots_picture(dots, Axis("change of AUROC", goal=-0.005))))
    text = (
        "Caught at 1% false alarms, of prompts of the family whose goal, or template where that is held out, no "
        "example had (goal 0.9); and what changes on prompts of other sets (at most half a point down). What is told "
        "to be in force is by the thresholds that the patched folder holds."
    )
    return [Section("Learning a new family of jailbreaks", text, pictures, *patch_table(rows))]


def _held_out(family: str, held_out: str) -> str:
    return f"{family}, by {held_out}" if held_out else family


def port_sections(rows: Sequence[Row]) -> list[Section]:
    """What is left of a guard on another base."""
    colours = dict(zip(("map", "distill", "both", "scratch"), (*SHADES[1:3], GREEN, GREY), strict=True))
    kept = grouped(rows, "kept_auroc", "source", "target", "method")
    dots = [
        Dot(f"{source} to {target}", *pooled(some), colours.get(method, RED), method)
        for (source, target, method), some in kept.items()
    ]
    text = (
        "AUROC of the ported guard over that of its source, on the same rows (goal 0.95); scratch learnt from as many "
        "rows with labels."
    )
    pictures = [("Share of the source's AUROC kept", dots_picture(dots, Axis("kept AUROC", goal=0.95)))]
    return [Section("Porting a guard to another base", text, pictures, *port_table(rows))]


def training_sections(rows: Sequence[Row]) -> list[Section]:
    """What an optimiser step costs beside a LoRA and beside tuning every weight of the blocks."""
    pictures = []
    for metric in ("ratio_to_full", "peak_bytes"):
        dots = [Dot(method, *pooled(some), BLUE) for (method,), some in grouped(rows, metric, "method").items()]
        pictures.append((metric.replace("_", " "), dots_picture(dots, Axis(metric.replace("_", " ")))))
    text = (
        "One optimiser step on the same batch, in turns. lst_stored reads the base's states from disk, where one pass "
        "has put them for every epoch and every guard; the others run the base each time."
    )
    return [Section("The cost of training", text, pictures, *training_table(rows))]


def teaching_sections(rows: Sequence[Row]) -> list[Section]:
    """Seconds of training with all that comes before, beside a LoRA guard."""
    colours = {"lora_full": GREY}
    dots = [
        Dot(f"{task}, {base}: {method}", *pooled(some), colours.get(method, BLUE))
        for (task, base, method), some in grouped(rows, "seconds", "task", "base", "method").items()
    ]
    text = (
        "One after the other in one process. All guards of a task share its states, the pass for pruned starts and the "
        "teacher: two LoRAs on the whole base, each of half of the rows. The first distilled guard pays for them, "
        "every further one for its own training alone."
    )
    pictures = [("Seconds", dots_picture(dots, Axis("seconds")))]
    return [Section("The cost of a guard with its teacher", text, pictures, *teaching_table(rows))]


def resplits_sections(rows: Sequence[Row]) -> list[Section]:
    """How often a promised false-positive rate is kept on other rows."""
    dots = [
        Dot(f"{suite}, {float(rate):.0%}, {fit}", *pooled(some), BLUE if fit == "bound" else GREY)
        for (suite, rate, fit), some in grouped(rows, "kept_share", "suite", "promised", "fit").items()
    ]
    text = (
        "Harmless prompts of a set are split at random 2,000 times; a threshold fitted on one half is counted on the "
        "other. plain flags the promised share of its own half, bound promises it of rows to come (95% confidence)."
    )
    pictures = [("Splits that keep the promise", dots_picture(dots, Axis("share of splits")))]
    return [Section("Promises on other rows of the same traffic", text, pictures, *resplits_table(rows))]


SECTIONS: dict[str, Callable[[Sequence[Row]], list[Section]]] = {
    "stream": stream_sections,
    "presets": presets_sections,
    "resplits": resplits_sections,
    "needle": needle_sections,
    "intercept": intercept_sections,
    "patch": patch_sections,
    "port": port_sections,
    "training": training_sections,
    "teaching": teaching_sections,
}
