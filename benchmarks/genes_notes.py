"""The notes of genes.json, what its rows do not say: contrasts, the front, who qualifies, curves, guards, counts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from genes_board import JUDGE_NAMES, METHODS, Board, Figure, Pair, drawn, figure_of
from genes_cells import DRAWS, FEW, Values
from genes_figures import Port
from genes_front import against_chance, against_curve, curves, front, point, together
from genes_goals import goals_of
from genes_judge import Outcome
from genes_models import RATE_OF, SAFE_LORA, SAFE_MERGE, SALORA_RATES, TRIED_RESTA, Models, Setup
from genes_rows import MIXED

AGAINST = ("gene_random_layers", "gene_all_layers", "resta", "safelora", "safemerge", "salora", "realigned")
CONTRASTED: Mapping[str, Outcome] = {"attack_success": "success", "refused_share": "refused"}
Note = dict[str, object]


_MEANINGS = {
    "intervals": "95% bootstrap: of attack_success, refused_share and off_topic_share over prompts, of task_accuracy "
    "over test rows, of shares that are back over seeds and prompts, which are drawn together for all models, of "
    "contrasts over seeds, prompts and test rows; elsewhere low and high are the value.  n_undefined counts draws in "
    "which nothing was lost, and which are left out",
    "task_accuracy": "share of test rows with the right class; of open-ended tasks the share of the known answer's "
    "tokens that rank first",
    "shots": "gene-*: examples of each kind that scalars are fitted on; resta, safelora and safemerge choose their "
    "settings on as many, by the same loss, in every model.  salora's learning rate was chosen in that way once, on "
    f"seed {RATE_OF[0]}'s {RATE_OF[1]} model, from two: of lower ones the best is none, and by task rows alone the "
    "higher one is better by 0.01 nats; its seconds leave that out",
    "task_rows": f"{', '.join(MIXED)} are learnt together with plain instructions (counts in `rows`), others than "
    "those that the degraded copy learns but of the same set; dolly and dolly_harmful are not",
    "chosen_beforehand": "refusal_tokens and learning_rate of the fit and the epochs of the degraded copy were chosen "
    "on seed 0's ag_news and dolly models by validation refusals and HarmBench's validation prompts, of which one is "
    "nearly one of the attacks; the rivals' recipes are their papers', with the grids of `settings`",
    "against_resta_curve": "over_resta_curve is the gene's attack success minus what RESTA's curve over strengths "
    "reads at the same utility (task accuracy; of open-ended tasks likelihood), on the tasks of the curves, with "
    "intervals over seeds, prompts and test rows.  Exploratory: it was decided on when the attacks at several weights "
    "of the gene had been seen, and the gene's recipe was chosen on these two tasks",
    "grids": f"resta: strengths and densities {TRIED_RESTA}; safelora: thresholds {SAFE_LORA}; safemerge: thresholds "
    f"and shares {SAFE_MERGE}; salora: rates {SALORA_RATES} times the recipe's; no change is in the first three",
    "against_chance": f"{FEW} layers of a gene, selected against {DRAWS} draws by chance, on the tasks of the curves.  "
    "Of the four that a gene keeps, three or two were the same by chance",
    "seconds": "of a gene its fit, of resta, safelora and safemerge the choice of a setting, of others the training.  "
    "What is made once for all tasks is left out: extraction and selection of the gene, RESTA's unaligned model and "
    "SafeMERGE's safety fine-tune",
    "outcomes": "an answer to an attack is a success, a refusal, off topic (a label, babble, nothing) or unscored; "
    "attack_success, refused_share and off_topic_share are shares of those that are scored",
}


def notes_of(board: Board, setup: Setup, ports: Sequence[Port]) -> Note:
    """All of them."""
    cells = [values for found in board.cells.values() for values in found.values()]
    compared, changes, chance = contrasts(board), _accuracy_changes(board), against_chance(board)
    return {
        **_MEANINGS,
        "goals": goals_of(board, compared, changes, chance),
        "qualifying": [_label(pair) for pair in board.qualifying],
        "excluded": _excluded(board),
        "n_excluded": len(_excluded(board)),
        "left_out": {
            method: n_missing
            for method, name in METHODS.items()
            if (n_missing := sum(name not in board.cells[pair] for pair in board.qualifying))
        },
        "contrasts": compared,
        "front": front(board),
        "accuracy_change": changes,
        "curves": curves(board),
        "over_resta_curve": against_curve(board),
        "selection": chance,
        "together": together(board),
        "interference": _interference(board),
        "guard": _by_cell(board, "guard", ("dsa",)),
        "ports": [_port_note(port) for port in ports],
        "port_excluded": sum(len(_excluded(port.board)) for port in ports),
        "rows": _row_counts(setup, sorted({seed for seed, _ in board.cells})),
        "settings": _by_cell(board, "setting"),
        "coefficients": {
            key: dict(zip(map(str, values["layers"]), values["coefficients"], strict=True))  # type: ignore[call-overload]
            for key, values in _cells_with(board, "coefficients").items()
        },
        "cell_seconds": round(sum(float(str(values["cell_seconds"])) for values in cells), 1),
        "cell_commits": sorted({str(values["commit"]) for values in cells}),
    }


def contrasts(board: Board) -> list[Note]:
    """The gene minus each rival, paired, pooled over the qualifying models that have both."""
    rows: list[Note] = []
    for rival in AGAINST:
        names = METHODS["gene"], METHODS[rival]
        pairs = [pair for pair in board.qualifying if set(names) <= set(board.cells[pair])]
        if pairs:
            found = {
                (metric, judge): _outcome_change(board, pairs, names, (judge, kind))
                for judge in JUDGE_NAMES
                for metric, kind in CONTRASTED.items()
            }
            found["task_accuracy", "none"] = _accuracy_change(board, pairs, names)
            for (metric, judge), figure in found.items():
                labels: Note = {"against": rival, "metric": metric, "judge": judge, "n_models": len(pairs)}
                rows.append({**labels, "value": figure.value, "low": figure.low, "high": figure.high})
    return rows


def _outcome_change(board: Board, pairs: Sequence[Pair], names: tuple[str, str], which: tuple[str, Outcome]) -> Figure:
    first, second = (board.stacked(pairs, name, *which) for name in names)
    return figure_of(drawn(pairs, first.shape[1]).mean(first - second))


def _accuracy_change(board: Board, pairs: Sequence[Pair], names: tuple[str, str]) -> Figure:
    changes = [board.accuracy(pair, names[0]) - board.accuracy(pair, names[1]) for pair in pairs]
    return figure_of(drawn(pairs, 1).mean_of_rows(changes))


def _accuracy_changes(board: Board) -> dict[str, Note]:
    """Of each method, against the fine-tuned model."""
    changes: dict[str, Note] = {}
    for method, name in METHODS.items():
        pairs = [pair for pair in board.qualifying if name in board.cells[pair]]
        if pairs and method != "finetuned":
            found = _accuracy_change(board, pairs, (name, "finetuned"))
            changes[method] = {"mean": found.value, "interval": found.interval}
    return changes


def _interference(board: Board) -> list[Note]:
    """Two genes and the packaged aligner: each alone, and together."""
    return [
        {
            **_label(pair),
            "parts": name.removeprefix("interference-"),
            "judge": judge,
            **point(board, pair, name, judge),
        }
        for pair, found in board.cells.items()
        for name in found
        if name.startswith("interference-")
        for judge in JUDGE_NAMES
    ]


def _label(pair: Pair) -> Note:
    return {"seed": pair[0], "task": pair[1]}


def _excluded(board: Board) -> list[Note]:
    """The task models that do not count, and why."""
    return [
        {**_label(pair), "learnt_its_task": board.learnt(pair), "lost_safety": board.lost(pair)}
        for pair in board.measured
        if pair not in board.qualifying
    ]


def _port_note(port: Port) -> Note:
    labels: Note = {"source": port.source, "target": port.target}
    return {**labels, "qualifying": [_label(pair) for pair in port.board.qualifying], "excluded": _excluded(port.board)}


def _row_counts(setup: Setup, seeds: Sequence[int]) -> dict[str, object]:
    """By seed, how many rows each file has and what was left out: some sets hold fewer than were asked for."""
    paths = {str(seed): Models(setup, seed).folder / "rows" / "counts.json" for seed in seeds}
    return {seed: json.loads(path.read_text(encoding="utf-8")) for seed, path in paths.items() if path.is_file()}


def _cells_with(board: Board, field: str, names: Sequence[str] = ()) -> dict[str, Values]:
    """By task, seed and name (without the name where only one is asked for) the cells that have a field."""
    return {
        " ".join([task, str(seed), *([] if names else [name])]): values
        for (seed, task), found in board.cells.items()
        for name, values in found.items()
        if field in values and (not names or name in names)
    }


def _by_cell(board: Board, field: str, names: Sequence[str] = ()) -> Mapping[str, object]:
    return {key: values[field] for key, values in _cells_with(board, field, names).items()}
