"""Sections of the alignment page about how the figures came to be: tries, answers, training, cost, provenance."""

from __future__ import annotations

from collections import Counter

from align_page import METHODS, Page
from safeside.evals.pictures import BLUE, GREY, RED, Axis, Dot, dots_picture
from safeside.evals.report import Section
from table_cells import pooled, text_of
from tidy import Row


def choice_section(page: Page) -> Section | None:
    """What was tried on validation prompts."""
    rows: list[tuple[str, ...]] = []
    for what in ("tries", "baseline_tries"):
        told = page.notes.get(what)
        for one in told if isinstance(told, list) else []:
            changed = {name: value for name, value in one["changes"].items() if name != "validation"}
            changes = ", ".join(f"{name} {_told(value)}" for name, value in changed.items())
            figures = [f"{one[name]:.3f}" for name in ("harmful_rate", "utility", "over_refusal")]
            rows.append((one["method"], changes or "as in the recipe", f"{one['strength']:g}", *figures))
    heads = ("method", "changed", "strength", "harmful rate", "utility", "over-refusal")
    tried = Counter(str(name) for name, _ in dict.fromkeys((row[0], row[1]) for row in rows))
    counts = ", ".join(f"{name} {count}" for name, count in tried.items())
    text = f"Validation prompts, no gate. Settings tried: {counts}."
    return Section("What was tried", text, columns=heads, rows=rows) if rows else None


def _told(value: float | list[str]) -> str:
    return ", ".join(value) if isinstance(value, list) else f"{value:g}"


def answers_section(page: Page) -> Section | None:
    """Answers side by side."""
    told = page.notes.get("answers")
    if not isinstance(told, list) or not told:
        return None
    heads = [name for name in told[0] if name != "is_harmful"]
    rows = [tuple(str(one[name]) for name in heads) for one in told]
    text = "Prompts written for this project. The base has seven million parameters: its help is none."
    return Section("Answers side by side", text, columns=heads, rows=rows)


def training_section(page: Page) -> Section | None:
    """What training took."""
    rows = []
    for method in (*METHODS, "gate"):
        found = page.of(method=method, suite="training")
        if found:
            by = {m: [row for row in found if row["metric"] == m] for m in {str(row["metric"]) for row in found}}
            share = float(str(found[0]["flops_share"]))
            rows.append(
                (
                    method,
                    str(len(by["train_seconds"])),
                    text_of(by["train_seconds"], "{:.0f}", has_interval=False),
                    f"{pooled(by['peak_bytes'])[0] / 1e6:,.0f}",
                    f"{pooled(by['trainable_params'])[0]:,.0f}",
                    f"{share:.2%}",
                )
            )
    heads = ("method", "seeds", "seconds", "peak, MB", "parameters", "multiply-adds over the base")
    text = "Seconds of a machine that others worked on. One thread; the base's states are stored once for our aligners."
    return Section("Training", text, columns=heads, rows=rows) if rows else None


def cost_section(page: Page) -> Section | None:
    """Decoding beside the base alone, a second model, and LoRA-DPO."""
    rows = page.of(metric="decode_ratio")
    if not rows:
        return None
    colours = {"base": BLUE, "second_model": GREY, "lora_dpo": RED}
    dots = [Dot(_timed(row), *pooled([row]), colours[str(row["against"])], f"over {row['against']}") for row in rows]
    text = (
        f"One decoded token at the geometry of {rows[0]['base']} with random weights, batch {rows[0]['batch']}, "
        f"{rows[0]['n']} interleaved rounds; median and its 95% bootstrap interval."
    )
    table = [(_timed(row), str(row["against"]), text_of([row])) for row in rows]
    picture = [("Time of a token", dots_picture(dots, Axis("ratio", goal=1.0)))]
    return Section("What decoding costs", text, picture, ("method", "over", "ratio"), table)


def _timed(row: Row) -> str:
    return f"{row['method']} behind a guard" if row["policy"] != "fixed" else str(row["method"])


def limits_section(page: Page, result: dict[str, object]) -> Section:
    """Where the figures come from, and what they cannot say."""
    left_out = page.notes.get("left_out") or []
    seeds = page.notes.get("headline_seeds") or {}
    assert isinstance(left_out, list)
    rows = [
        ("commit", str(result["commit"])),
        ("machine", str(result["machine"])),
        ("training seeds", ", ".join(f"{name} {count}" for name, count in dict(seeds).items()) or "one"),
        ("not measured in this run", ", ".join(left_out) or "nothing"),
    ]
    text = (
        "What carries over to a base of 7 billion parameters: the code, the losses, the policies and the cost of "
        "decoding. What does not: how much is refused, how useful answers are, and how far a guard can be trusted. "
        "MMLU, MT-Bench and graded harm need a base that knows something and a judge; neither is in this page."
    )
    return Section("Where the figures come from", text, columns=("", ""), rows=rows)
