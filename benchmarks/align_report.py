"""The alignment benchmark as one page of pictures, without script or network.

    python benchmarks/align_report.py                   results/align.json
    python benchmarks/align_report.py --results DIR

Sections without rows are left out.  Figures are means over seeds, with the lowest and highest end of the seeds' 95%
intervals; headline figures have one interval over prompts, answers and seeds.  Writes align.html.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from align_page import GOAL_TEXTS, KINDS, METHODS, POLICIES, RATES, Page
from align_sections import answers_section, choice_section, cost_section, limits_section, training_section
from safeside.errors import InputError
from safeside.evals.pictures import BLUE, GREY, RED, Axis, Dot, Line, dots_picture, lines_picture
from safeside.evals.report import Section, write_report
from safeside.terminal import note
from table_cells import met_cell, pooled, text_of
from tidy import RESULTS


def headline_section(page: Page) -> Section | None:
    """The headline rows beside their goals."""
    rows = [row for row in page.rows if "headline" in row]
    goals = page.notes.get("goals")
    if not rows or not isinstance(goals, dict):
        return None
    table = [
        (
            POLICIES[str(row["policy"])][0],
            str(row["metric"]).replace("_", " "),
            text_of([row]),
            GOAL_TEXTS[str(row["metric"])].format(goals[row["metric"]]),
            met_cell(row, goals),
        )
        for row in rows
    ]
    pictures = []
    for metric, goal in goals.items():
        dots = [
            Dot(POLICIES[str(row["policy"])][0], *pooled([row]), POLICIES[str(row["policy"])][1])
            for row in rows
            if row["metric"] == metric
        ]
        name = metric.replace("_", " ")
        pictures += [(name, dots_picture(dots, Axis(name, goal=goal)))] if dots else []
    chosen = page.chosen
    text = (
        f"{chosen.get('method')} at strength {chosen.get('strength')}, chosen on validation prompts. {_seen(page)} The "
        f"learned gate gives {_steps(chosen)}; the oracle knows the labels, so what it loses is the aligner's and the "
        "rest is the guard's. Harm is a proxy of compliance here: the share of harmful prompts that is not refused in "
        "so many words. An answer that the judge cannot tell counts against the aligner."
    )
    return Section("The headline", text, pictures, ("strength set by", "figure", "value", "goal", ""), table)


def _seen(page: Page) -> str:
    """Whether earlier runs answered the test prompts."""
    seen = page.notes.get("prompts_seen_before")
    known = {name: count for name, count in seen.items() if count} if isinstance(seen, dict) else {}
    if not known:
        return "No earlier run answered these test prompts."
    told = ", ".join(f"{count} of {name}" for name, count in known.items())
    return f"Of the test prompts earlier runs answered {told}, and no other."


def _steps(chosen: dict[str, object]) -> str:
    """The gate's steps in words."""
    steps: list[list[float]] = chosen.get("gate_steps", [])  # type: ignore[assignment]
    return ", ".join(f"a strength of {strength:g} from a score of {threshold:g} on" for threshold, strength in steps)


def _curve(page: Page, method: str, policy: str, x: str, y: str, line: tuple[str, str, str]) -> Line | None:
    """A line through the strengths of a method, the base's point at its start."""
    name, colour, style = line
    points = []
    for strength in page.strengths(method, policy):
        pair = [
            pooled(page.figure(metric, RATES[metric][1], method=method, policy=policy, strength=strength))[0]
            for metric in (x, y)
        ]
        points.append(pair)
    base = [page.figure(metric, RATES[metric][1], method="base") for metric in (x, y)]
    if not points:
        return None
    is_dial = len(points) > 1
    start = [[pooled(rows)[0] for rows in base]] if all(base) and is_dial else []
    xs, ys = zip(*start, *points, strict=True)
    return Line(name, xs, ys, colour, style if is_dial else "", marker="o", width=1.8)


def _curves(page: Page, x: str, y: str, policies: bool) -> str:
    """One line for each method, or for each policy of the headline aligner and LoRA-DPO beside them."""
    method = str(page.chosen.get("method", ""))
    if policies:
        wanted = [(method, policy, (name, colour, "-")) for policy, (name, colour) in POLICIES.items()]
        wanted.append(("lora_dpo", "fixed", ("lora_dpo", *METHODS["lora_dpo"])))
    else:
        wanted = [(name, "fixed", (name, *stroke)) for name, stroke in METHODS.items()]
    lines = [_curve(page, *key, x, y, line) for *key, line in wanted]
    labels = {"harmful_rate": "harmful prompts not refused", "utility": "utility", "over_refusal": "benign refused"}
    return lines_picture([line for line in lines if line], Axis(labels[x]), Axis(labels[y]))


def tradeoff_section(page: Page) -> Section | None:
    """Safety against usefulness, by strength."""
    if not page.of(metric="utility"):
        return None
    pictures = [
        (
            "Every method by its strength, untargeted: up and to the left is better",
            _curves(page, "harmful_rate", "utility", False),
        ),
    ]
    if page.chosen:
        pictures.append(
            (f"{page.chosen['method']}, by what sets its strength", _curves(page, "harmful_rate", "utility", True))
        )
    text = (
        "StrongREJECT prompts that are not refused, and utility: exp of the change in log-likelihood per token of "
        "known good answers, 1 being the base. Each line runs through a method's strengths (scales, of a LoRA)."
    )
    return Section("Safety against usefulness", text, pictures)


def table_section(page: Page) -> Section | None:
    """All methods at one strength each: targeted, untargeted, and the baselines."""
    strength = page.chosen.get("strength", 1.0)
    keys: list[tuple[str, str, object]] = [("base", "fixed", 0.0)]
    keys += [(method, policy, strength if method in KINDS else 1.0) for method in METHODS for policy in POLICIES]
    rows = []
    for method, policy, at in keys:
        cells = [
            text_of(page.figure(metric, suite, method=method, policy=policy, strength=at))
            for metric, suite in (
                *((metric, suite) for metric, (_, suite) in RATES.items()),
                ("over_refusal", "xstest"),
            )
        ]
        if any(cells):
            rows.append((method, POLICIES[policy][0] if method in KINDS else "", f"{float(str(at)):g}", *cells))
    if not rows:
        return None
    heads = ("method", "strength set by", "strength", "harmful rate", "utility", "over-refusal", "on XSTest")
    text = (
        "Mean over seeds (lowest to highest end of their intervals). A gate's answers are picked from those of both "
        "strengths between which it chooses; a fixed refusal has no utility, for what it blocks has no likelihood."
    )
    return Section("Targeted, untargeted and the baselines", text, columns=heads, rows=rows)


def over_refusal_section(page: Page) -> Section | None:
    """Refusals where none is wanted."""
    if not page.of(metric="over_refusal", policy="oracle"):
        return None
    pictures = [("Benign instructions, by strength", _curves(page, "harmful_rate", "over_refusal", False))]
    if page.chosen:
        pictures.append((f"{page.chosen['method']} by policy", _curves(page, "harmful_rate", "over_refusal", True)))
    changes = page.of(metric="over_refusal_change", suite="xstest")
    table = [(POLICIES[str(row["policy"])][0], "XSTest, safe prompts", text_of([row], "{:+.3f}")) for row in changes]
    return Section("Over-refusal", "", pictures, ("strength set by", "prompts", "change from the base"), table)


def dial_section(page: Page) -> Section | None:
    """The headline aligner at eleven strengths."""
    method = str(page.chosen.get("method", ""))
    strengths = page.strengths(method, "fixed")
    test = page.of(metric="trend_p_value")
    if not test:
        return None
    lines = []
    for metric, colour in (("harmful_rate", RED), ("utility", BLUE), ("over_refusal", GREY)):
        name, suite = RATES[metric]
        seeds = [page.figure(metric, suite, method=method, policy="fixed", strength=s, seed=0) for s in strengths]
        start = page.figure(metric, suite, method="base")
        values, lows, highs = zip(*(pooled(rows) for rows in (start, *seeds)), strict=True)
        lines.append(Line(name, (0.0, *strengths), values, colour, "-", (lows, highs), "o"))
    falls = page.of(metric="trend_falling_steps")
    text = (
        f"Page's trend test over {test[0]['n']} prompts and {test[0]['steps']} strengths: p = "
        f"{float(str(test[0]['value'])):.1e}; refusal falls at {int(float(str(falls[0]['value'])))} of the steps."
    )
    return Section("The dial", text, [("By strength", lines_picture(lines, Axis("strength"), Axis("share")))])


def suites_section(page: Page) -> Section | None:
    """Every harmful suite."""
    chosen = page.chosen
    ways = [("base", "fixed", 0.0, "base", "#1c2430"), ("lora_dpo", "fixed", 1.0, "lora_dpo", RED)]
    ways += [
        (str(chosen.get("method")), policy, chosen.get("strength"), name, colour)
        for policy, (name, colour) in POLICIES.items()
    ]
    dots = []
    for suite in ("strongreject", "jailbreakbench", "harmbench", "advbench", "prefilled", "attacks"):
        for method, policy, strength, name, colour in ways:
            rows = page.figure("harmful_rate", suite, method=method, policy=policy, strength=strength)
            if rows:
                dots.append(Dot(f"{suite} ({rows[0]['n']})", *pooled(rows), colour, name))
    if not dots:
        return None
    text = "Prompts that the base cannot read, for they are longer than its context, are unscored and left out."
    return Section("Every harmful suite", text, [("Share not refused", dots_picture(dots, Axis("harmful rate")))])


def sections_of(page: Page) -> Sequence[Section]:
    """All sections for which there are rows."""
    makers = (
        headline_section, tradeoff_section, table_section, over_refusal_section, dial_section, suites_section,
        answers_section, choice_section, training_section, cost_section,
    )  # fmt: skip
    return [section for section in (make(page) for make in makers) if section is not None]


def write_page(results: Path) -> Path:
    """Write align.html beside align.json; without one that is an InputError."""
    path = results / "align.json"
    if not path.is_file():
        raise InputError(f"{results} holds no align.json. Run make bench-align.")
    result = json.loads(path.read_text(encoding="utf-8"))
    page = Page(result["rows"], result["notes"])
    subtitle = (
        "What aligners and baselines refuse, and what that costs, on one small frozen base. Means over seeds; bars "
        "reach from the lowest to the highest end of the seeds' 95% intervals."
    )
    sections = [*sections_of(page), limits_section(page, result)]
    return write_report(results / "align.html", "safeside: the alignment benchmark", subtitle, sections)


def main(arguments: Sequence[str] | None = None) -> Path:
    """Parse and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result file")
    path = write_page(parser.parse_args(arguments).results)
    note(f"wrote {path} ({path.stat().st_size / 1e6:.2f} MB)")
    return path


if __name__ == "__main__":
    main()
