"""The genes benchmark as one page of pictures, without script or network.

    python benchmarks/genes_report.py                     results/genes.json
    python benchmarks/genes_report.py --results DIR

Figures of one task are means over seeds, with the lowest and highest end of the seeds' 95% intervals; shares that are
back, and contrasts, are pooled with intervals over seeds too.  Writes genes.html.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from gene_tables import figure_text, points_text, transfers_of
from genes_models import MAIN_SHOTS
from part_sections import GREEN, SECOND
from safeside.errors import InputError
from safeside.evals.pictures import BLUE, GREY, RED, Axis, Dot, Line, dots_picture, lines_picture
from safeside.evals.report import Section, write_report
from safeside.terminal import note
from table_cells import Row, pooled, text_of
from tidy import RESULTS

COLOURS = {
    "aligned": GREEN,
    "finetuned": RED,
    "gene": BLUE,
    "gene_random_layers": "#9cc3ea",
    "gene_all_layers": "#5b9bd5",
    "realigned": "#1c2430",
    "dsa": "#7b5ea7",
    "dsa_recalibrated": "#b39ddb",
}
TITLES = {
    "ag_news": "AG News",
    "sst2": "SST-2",
    "dolly": "Dolly",
    "helpful": "Helpful side of HH-RLHF",
    "dolly_harmful": "Dolly with 5% harmful rows",
}
OTHERS = ("#e67e22", "#8d6e63", "#c2185b", "#546e7a")  # of those without a colour of their own
JUDGE = "rules"  # whose figures are drawn; the other's stand in the tables
KINDS = ("refused_share", "off_topic_share")
NOTES = (
    "goals",
    "contrasts",
    "curves",
    "over_resta_curve",
    "selection",
    "together",
    "interference",
    "ports",
    "guard",
)
COSTS = ("task_accuracy", "seconds", "trainable_params")


def of(rows: Sequence[Row], **wanted: object) -> list[Row]:
    """The rows with these columns."""
    return [row for row in rows if all(row.get(column) == value for column, value in wanted.items())]


def main_rows(rows: Sequence[Row], **wanted: object) -> list[Row]:
    """Of those the ones at the main number of shots, or at none."""
    return [row for row in of(rows, **wanted) if row.get("shots") in (0, MAIN_SHOTS)]


def recovered_section(rows: Sequence[Row], notes: Mapping[str, object]) -> Section | None:
    """What share of the lost safety each method brings back, over all qualifying models."""
    rows = [row for row in rows if "source" not in row]  # transfers and ports have sections of their own
    found = main_rows(rows, task="all", metric="recovered_share", judge=JUDGE)
    if not found:
        return None
    dots = [Dot(str(row["method"]), *pooled([row]), COLOURS.get(str(row["method"]), GREY)) for row in found]
    changes: Mapping[str, Mapping[str, object]] = dict(notes["accuracy_change"])  # type: ignore[call-overload]
    table = []
    for row in found:
        method = str(row["method"])
        others = [
            main_rows(rows, task="all", metric=metric, judge=judge, method=method)
            for metric, judge in (("recovered_share", "classifier"), ("recovered_refusals", JUDGE))
        ]
        texts = [text_of(some, "{:.2f}") for some in ([row], *others)]
        table.append((method, *texts, points_text(changes.get(method))))
    return Section(
        "How much of the lost safety comes back?",
        "1 is the aligned model's share of attacks that succeed, 0 the fine-tuned model's. A ratio of means over "
        f"{len(notes['qualifying'])} task models; {notes['n_excluded']} did not qualify. "  # type: ignore[arg-type]
        "An attack fails on a model that babbles, too: refusals that are back tell it from one that refuses.",
        [("Recovered share (goal: 0.5 without loss of accuracy)", dots_picture(dots, Axis("share", goal=0.5)))],
        ("method", "recovered (rules)", "(classifier)", "refusals back (rules)", "change of task accuracy, points"),
        table,
    )


def goals_section(notes: Mapping[str, object]) -> Section | None:
    """What was set out to be shown, and whether it was."""
    goals: list[Mapping[str, object]] = list(notes["goals"])  # type: ignore[call-overload]
    table = [
        (
            str(goal["goal"]),
            str(goal["wanted"]),
            figure_text(goal),
            str(goal["verdict"]),
        )
        for goal in goals
    ]
    return Section("Goals", "", columns=("goal", "wanted", "measured", ""), rows=table) if table else None


def task_section(rows: Sequence[Row], task: str, seeds: Sequence[object]) -> Section:
    """Safety against accuracy of every method on one task, in its models of ``seeds``, which count, else in all."""
    qualifies = bool(seeds)
    own = [row for row in of(rows, task=task) if not qualifies or row.get("seed") in seeds]
    methods = list(dict.fromkeys(str(row["method"]) for row in of(own, metric="attack_success")))
    dots, table = [], []
    for method in methods:
        attacks = main_rows(own, method=method, metric="attack_success", judge=JUDGE)
        if attacks:
            dots.append(Dot(method, *pooled(attacks), COLOURS.get(method, GREY)))
        others = main_rows(own, method=method, metric="attack_success", judge="classifier")
        kinds = [main_rows(own, method=method, metric=metric, judge=JUDGE) for metric in KINDS]
        costs = [main_rows(own, method=method, metric=metric) for metric in COSTS]
        forms = (("{:.3f}", False), ("{:.3f}", False), ("{:.3f}", True), ("{:.0f}", False), ("{:,.0f}", False))
        texts = [
            text_of(some, form, has_interval=wide) for some, (form, wide) in zip([*kinds, *costs], forms, strict=True)
        ]
        table.append((method, text_of(attacks), text_of(others), *texts))
    return Section(
        TITLES.get(task, task),
        f"Seeds {', '.join(map(str, seeds))} count."
        if qualifies
        else "Does not qualify: fine-tuning did not cost ten points of safety, or did not learn the task.",
        [("Attacks that succeed (rules)", dots_picture(dots, Axis("share", (0.0, None))))],
        (
            "method",
            "attack success (rules)",
            "(classifier)",
            "refused",
            "off topic",
            "task accuracy",
            "seconds",
            "trained",
        ),
        table,
    )


def curves_section(rows: Sequence[Row], notes: Mapping[str, object]) -> Section | None:
    """Attack success over shots, and over weights of the fitted gene."""
    pictures = []
    tasks = list(dict.fromkeys(str(row["task"]) for row in of(rows, method="gene", metric="attack_success", shots=4)))
    lines = []
    for task, colour in zip(tasks, (BLUE, SECOND, GREEN), strict=False):
        points = sorted({int(str(row["shots"])) for row in of(rows, task=task, method="gene", metric="attack_success")})
        some = [of(rows, task=task, method="gene", metric="attack_success", judge=JUDGE, shots=n) for n in points]
        lines.append(Line(task, points, [pooled(part)[0] for part in some], colour, marker="o"))
    if lines:
        pictures.append(("Over examples of each kind", lines_picture(lines, Axis("shots"), Axis("attack success"))))
    for task in dict.fromkeys(str(item["task"]) for item in _curves(notes)):
        lines = [_front_line(notes, task, method) for method in ("gene", "resta")]
        known = [line for line in lines if line.x]
        places = Axis("task accuracy"), Axis("attack success")
        title = f"{TITLES.get(task, task)}: the gene and RESTA, each at several strengths"
        pictures.append((title, lines_picture(known, *places)))
    against: list[Mapping[str, object]] = list(notes["over_resta_curve"])  # type: ignore[call-overload]
    table = [(str(item["weight"]), str(item["judge"]), str(item["n_models"]), figure_text(item)) for item in against]
    text = (
        "Strengths rise to the left, from the task model as it is; lower and further right is better. The table has "
        "the gene's attack success minus what RESTA's curve reads at equal utility: task accuracy, of open-ended "
        "tasks likelihood. It was decided on after results had been seen, so it is no goal."
    )
    columns = ("gene's weight", "judge", "models", "minus RESTA's curve")
    return Section("How many examples, how much gene?", text, pictures, columns, table) if pictures else None


def chance_section(notes: Mapping[str, object]) -> Section | None:
    """Selected layers against as many by chance, where few are kept."""
    found: list[Mapping[str, object]] = list(notes["selection"])  # type: ignore[call-overload]
    table = [(str(item["judge"]), str(item["n_models"]), figure_text(item)) for item in found]
    if not table:
        return None
    text = (
        f"Attack success with the {found[0]['layers']} layers that are selected, minus the mean over "
        f"{found[0]['draws']} draws of as many by chance, in the models of the curves. Below 0 selection is better."
    )
    return Section("Does selection help?", text, columns=("judge", "models", "selected minus chance"), rows=table)


def _curves(notes: Mapping[str, object]) -> list[Mapping[str, object]]:
    return list(notes["curves"])  # type: ignore[call-overload]


def _front_line(notes: Mapping[str, object], task: str, method: str) -> Line:
    """Means over seeds by strength."""
    some = [item for item in _curves(notes) if (item["task"], item["method"], item["judge"]) == (task, method, JUDGE)]
    strengths = sorted({float(str(item["strength"])) for item in some}, reverse=True)
    means = {
        key: [_mean([item for item in some if item["strength"] == at], key) for at in strengths]
        for key in ("task_accuracy", "attack_success")
    }
    return Line(method, means["task_accuracy"], means["attack_success"], COLOURS.get(method, OTHERS[0]), marker="o")


def _mean(items: Sequence[Mapping[str, object]], key: str) -> float:
    return sum(float(str(item[key])) for item in items) / len(items)


def transfer_section(rows: Sequence[Row]) -> Section | None:
    """One gene, fitted on one task's model and used on another's."""
    targets, table = transfers_of(rows, lambda row: text_of([row], "{:.2f}"))
    if not table:
        return None
    text = (
        "Recovered share on each column's models with coefficients fitted on each row's; the updates are the same. "
        "Ratios of means over seeds."
    )
    return Section("One gene for all tasks", text, columns=("fitted on", *targets), rows=table)


def port_section(rows: Sequence[Row], notes: Mapping[str, object]) -> Section | None:
    """What share survives in a base of another shape."""
    found = [row for row in of(rows, metric="recovered_share", judge=JUDGE, task="all") if "source" in row]
    table = []
    for row in found:
        labels = {column: row[column] for column in ("source", "target", "method")}
        others = [
            of(rows, **labels, metric=metric, judge=judge, task="all")
            for metric, judge in (
                ("recovered_share", "classifier"),
                ("kept_share", JUDGE),
                ("kept_share", "classifier"),
            )
        ]
        table.append((*map(str, labels.values()), *(text_of(some, "{:.2f}") for some in ([row], *others))))
    ports: list[Mapping[str, Sequence[object]]] = list(notes["ports"])  # type: ignore[call-overload]
    if not ports:
        return None
    counts = "; ".join(
        f"{port['source']} to {port['target']}: {len(port['qualifying'])} models count, {len(port['excluded'])} do not"
        for port in ports
    )
    text = (
        "A gene learnt from what the source says with its own, beside the target's own and a control that learnt the "
        f"refusals of the same rows without a source. Kept: of what the target's own gene brings back. {counts}."
    )
    columns = ("source", "target", "method", "recovered (rules)", "(classifier)", "kept (rules)", "(classifier)")
    return Section("Into a base of another shape", text, columns=columns, rows=table)


def together_section(notes: Mapping[str, object]) -> Section | None:
    """Two genes and the packaged aligner, each alone and together."""
    found: list[Mapping[str, object]] = list(notes["interference"])  # type: ignore[call-overload]
    table = [
        (
            f"{item['task']}, seed {item['seed']}",
            str(item["parts"]),
            f"{float(str(item['attack_success'])):.3f}",
            f"{float(str(item['task_accuracy'])):.3f}",
        )
        for item in found
        if item["judge"] == JUDGE
    ]
    text = (
        "Genes from two halves of the harmful prompts (first, second, both), unfitted, at weight 1 each; the packaged "
        "aligner behind its guard; all of them."
    )
    together: list[Mapping[str, object]] = list(notes["together"])  # type: ignore[call-overload]
    changes = [
        f"{item['parts']} minus the best alone: {figure_text(item)}" for item in together if item["judge"] == JUDGE
    ]
    columns = ("model", "parts", "attack success", "task accuracy")
    full = f"{text} Attack success over all models, {'; '.join(changes)}." if changes else text
    return Section("Several in one model", full, columns=columns, rows=table) if table else None


def contrasts_section(notes: Mapping[str, object]) -> Section | None:
    """The gene against its rivals: paired differences, and where each stands."""
    found: list[Mapping[str, object]] = list(notes["contrasts"])  # type: ignore[call-overload]
    points: list[Mapping[str, object]] = [item for item in notes["front"] if item["judge"] == JUDGE]  # type: ignore[attr-defined]
    if not found or not points:
        return None
    lines = [
        Line(
            f"{item['method']}{' (front)' if item['on_front'] else ''}",
            [float(str(item["task_accuracy"]))],
            [float(str(item["attack_success"]))],
            COLOURS.get(str(item["method"]), shade),
            marker="o",
        )
        for item, shade in zip(points, OTHERS * len(points), strict=False)
    ]
    picture = lines_picture(lines, Axis("task accuracy"), Axis("attack success"))
    table = [
        (
            rival,
            *(
                _contrast(found, rival, metric, judge)
                for metric, judge in (
                    ("attack_success", JUDGE),
                    ("attack_success", "classifier"),
                    ("task_accuracy", "none"),
                )
            ),
        )
        for rival in dict.fromkeys(str(item["against"]) for item in found)
    ]
    text = (
        "The gene minus each other, in points, on the same prompts and test rows of all qualifying models, with "
        "intervals over seeds too. Below 0 the gene lets fewer attacks succeed; above 0 it does the task better."
    )
    columns = ("gene minus", "attack success (rules)", "(classifier)", "task accuracy")
    return Section("Ahead of the others?", text, [("Lower and further right is better", picture)], columns, table)


def _contrast(found: Sequence[Mapping[str, object]], rival: str, metric: str, judge: str) -> str:
    some = [item for item in found if (item["against"], item["metric"], item["judge"]) == (rival, metric, judge)]
    numbers = [100 * float(str(some[0][key])) for key in ("value", "low", "high")] if some else []
    return "{:+.1f} ({:+.1f} to {:+.1f})".format(*numbers) if numbers else ""


def guard_section(rows: Sequence[Row], notes: Mapping[str, object]) -> Section | None:
    """The base's own guard on task models, and its aligner's effect, before and after a threshold moved unlabelled."""
    found: Mapping[str, Mapping[str, object]] = dict(notes["guard"])  # type: ignore[call-overload]
    table = []
    for name, values in found.items():
        rates: list[Mapping[str, float]] = [values["before"], values["after"]]  # type: ignore[list-item]
        shown = [f"{rate[key]:.2f}" for rate in rates for key in ("caught", "false_alarms")]
        task, _, seed = name.rpartition(" ")
        effects = [
            text_of(
                of(rows, task=task, seed=int(seed), method=method, metric="attack_success", judge=JUDGE),
                "{:.2f}",
                False,
            )
            for method in ("finetuned", "dsa", "dsa_recalibrated")
        ]
        aurocs = [f"{float(str(values[key])):.3f}" for key in ("auroc_on_base", "auroc")]
        table.append((name, *aurocs, *shown, *effects))
    columns = (
        "task, seed",
        "AUROC on the base",
        "AUROC here",
        "caught",
        "false alarms",
        "caught, moved",
        "false, moved",
        "attack success without",
        "with the aligner",
        "with it, moved",
    )
    text = "A guard trained on the base, attached to the task model as it is; moving a threshold leaves AUROC as it is."
    return Section("Does the base's guard still see?", text, columns=columns, rows=table) if table else None


def write_page(path: Path) -> Path:
    """Write genes.html beside a genes.json; a file that is none is an InputError."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        rows, notes = list(result["rows"]), dict(result["notes"])
        qualifying = [(str(item["task"]), item["seed"]) for item in notes["qualifying"]]
        missing = [name for name in NOTES if name not in notes]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path} is not a result of the genes benchmark: {error!r}. Run make bench-genes.") from error
    if missing:
        raise InputError(f"{path} is of an older form, without {', '.join(missing)}. Run make bench-genes.")
    tasks = list(dict.fromkeys(str(row["task"]) for row in of(rows, metric="attack_success")))
    sections = [
        recovered_section(rows, notes),
        goals_section(notes),
        contrasts_section(notes),
        *(task_section(rows, task, [seed for name, seed in qualifying if name == task]) for task in tasks),
        curves_section(rows, notes),
        chance_section(notes),
        transfer_section(rows),
        port_section(rows, notes),
        together_section(notes),
        guard_section(rows, notes),
    ]
    n_seeds = len({row["seed"] for row in of(rows, metric="attack_success")})
    subtitle = f"{n_seeds} seed{'s' * (n_seeds != 1)}; commit {result['commit']}; {result['machine']}."
    found = [section for section in sections if section is not None]
    return write_report(path.with_suffix(".html"), "safeside: the genes benchmark", subtitle, found)


def main(arguments: Sequence[str] | None = None) -> Path:
    """Parse and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result file")
    path = write_page(parser.parse_args(arguments).results / "genes.json")
    note(f"wrote {path}")
    return path


if __name__ == "__main__":
    main()
