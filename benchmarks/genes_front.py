"""Where repairs stand between safety and accuracy: by points, by curves over their strength, and curve against curve.

A stronger gene is safer and does the task a little worse, and so is more of RESTA's vector.  So the two are compared at
equal utility: the gene at several weights, against what RESTA's curve reads there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from genes_board import JUDGE_NAMES, METHODS, Array, Board, Pair, drawn, figure_of, times
from genes_cells import CHANCE, FEW, RESTA, SELECTED, WEIGHT

Note = dict[str, object]
AT = (0.5, 1.0, 1.5, 2.0)  # weights of the gene that are compared with RESTA's curve
TOGETHER = {"both": ("first", "second"), "all": ("first", "second", "aligner")}  # parts, and what they are made of


def front(board: Board) -> list[Note]:
    """Mean attack success and task accuracy of every method that all qualifying models have.

    ``on_front`` says that no other one is as good in both and better in one.  The aligned model, which was never tuned
    on the task, beats nobody.
    """
    pairs, rows = board.qualifying, list[Note]()
    for judge in JUDGE_NAMES:
        points = {
            method: (
                _mean_success(board, pairs, name, judge),
                float(np.mean([board.accuracy(pair, name).mean() for pair in pairs])),
            )
            for method, name in METHODS.items()
            if pairs and all(name in board.cells[pair] for pair in pairs)
        }
        repairs = [point for method, point in points.items() if method != "aligned"]
        for method, (success, accuracy) in points.items():
            beaten = any(
                other[0] <= success and other[1] >= accuracy and other != (success, accuracy) for other in repairs
            )
            labels: Note = {"method": method, "judge": judge, "n_models": len(pairs)}
            rows.append({**labels, "attack_success": success, "task_accuracy": accuracy, "on_front": not beaten})
    return rows


def _mean_success(board: Board, pairs: Sequence[Pair], name: str, judge: str) -> float:
    return float(np.mean([np.nanmean(board.hits(pair, name, judge)) for pair in pairs]))


def curves(board: Board) -> list[Note]:
    """Over the weight of the fitted gene and the strength of RESTA's vector, in the models that have them."""
    return [
        {"seed": pair[0], "task": pair[1], "method": method, "strength": strength, "judge": judge}
        | point(board, pair, name, judge)
        for pair in board.cells
        for method, names in _curves_of(board, pair).items()
        for strength, name in sorted(names.items())
        for judge in JUDGE_NAMES
    ]


def _curves_of(board: Board, pair: Pair) -> Mapping[str, Mapping[float, str]]:
    """By method and strength the cell; 0 is the task model as it is, 1 of the gene is the gene's own row."""
    found, result = board.cells[pair], {}
    ends = {"gene": {1.0: METHODS["gene"]}, "resta": {0.0: "finetuned"}}
    for method, prefix in (("gene", WEIGHT), ("resta", RESTA)):
        names = {float(name.removeprefix(prefix)): name for name in found if name.startswith(prefix)}
        if names:
            result[method] = {at: name for at, name in {**ends[method], **names}.items() if name in found}
    return result


def point(board: Board, pair: Pair, name: str, judge: str) -> Note:
    """A cell's share of attacks that succeed, and how well it does the task."""
    success = float(np.nanmean(board.hits(pair, name, judge)))
    return {
        "attack_success": success,
        "task_accuracy": float(board.accuracy(pair, name).mean()),
        "utility": utility(board, pair, name),
    }


def utility(board: Board, pair: Pair, name: str) -> float:
    """Task accuracy; of an open-ended task the mean log-likelihood of the known answers, which sees smaller changes."""
    return float(_utilities(board, pair, name).mean())


def together(board: Board) -> list[Note]:
    """Attack success of several in one model minus that of the best of them alone, pooled over the models."""
    rows: list[Note] = []
    for whole, alone in TOGETHER.items():
        names = [f"interference-{name}" for name in (whole, *alone)]
        pairs = [pair for pair in board.qualifying if set(names) <= set(board.cells[pair])]
        for judge in JUDGE_NAMES if pairs else ():
            draws = drawn(pairs, len(board.hits(pairs[0], names[0], judge)))
            means = [draws.mean(board.stacked(pairs, name, judge)) for name in names]
            figure = figure_of(means[0] - np.min(means[1:], 0))
            labels: Note = {"parts": whole, "minus_best_of": list(alone), "judge": judge, "n_models": len(pairs)}
            rows.append({**labels, **vars(figure)})
    return rows


def against_chance(board: Board) -> list[Note]:
    """Attack success with the few layers that are selected minus that with as many by chance, the mean of its draws."""
    names = sorted({name for found in board.cells.values() for name in found if name.startswith(CHANCE)})
    pairs = [pair for pair in board.qualifying if names and {SELECTED, *names} <= set(board.cells[pair])]
    rows: list[Note] = []
    for judge in JUDGE_NAMES if pairs else ():
        mine, *others = (board.stacked(pairs, name, judge) for name in (SELECTED, *names))
        figure = figure_of(drawn(pairs, mine.shape[1]).mean(mine - np.mean(others, 0)))
        labels: Note = {"layers": FEW, "draws": len(names), "judge": judge, "n_models": len(pairs)}
        rows.append({**labels, **vars(figure)})
    return rows


def against_curve(board: Board) -> list[Note]:
    """Attack success of the gene minus what RESTA's curve reads at the same utility, at each weight and over all.

    Intervals are over seeds, prompts and test rows: the curve is read anew at the utilities of every draw.
    """
    rows: list[Note] = []
    for judge in JUDGE_NAMES:
        pairs = [pair for pair in board.qualifying if _has_both(board, pair)]
        if pairs:
            gaps = {at: gaps_of(board, pairs, at, judge) for at in AT}
            for at, draws in (*gaps.items(), ("all", np.mean(list(gaps.values()), 0))):
                figure = figure_of(draws)
                labels: Note = {"weight": at, "judge": judge, "n_models": len(pairs)}
                rows.append({**labels, **vars(figure)})
    return rows


def _has_both(board: Board, pair: Pair) -> bool:
    found = _curves_of(board, pair)
    return "resta" in found and set(AT) <= set(found.get("gene", {}))


def gaps_of(board: Board, pairs: Sequence[Pair], weight: float, judge: str) -> Array:
    """(draws), first what was found: means over models, and within each over prompts."""
    n_prompts = len(board.hits(pairs[0], "finetuned", judge))
    draws, generator = drawn(pairs, n_prompts), np.random.default_rng(2)
    gaps = np.stack([_gap(board, pair, weight, (draws.prompts, judge, generator)) for pair in pairs], 1)
    return (draws.pairs * gaps).sum(1) / draws.pairs.sum(1)  # type: ignore[no-any-return]


def _gap(board: Board, pair: Pair, weight: float, how: tuple[Array, str, np.random.Generator]) -> Array:
    """(draws) of one model."""
    prompts, judge, generator = how
    found = _curves_of(board, pair)
    names = [found["gene"][weight], *found["resta"].values()]
    rows = np.stack([_utilities(board, pair, name) for name in names], 1)
    utilities = times(generator, len(rows), len(prompts)) @ rows / len(rows)
    hits = np.stack([board.hits(pair, name, judge) for name in names], 1)
    known = np.isfinite(hits)
    success = (prompts @ np.nan_to_num(hits)) / (prompts @ known)
    read = [read_curve(places[1:], values[1:], places[0]) for places, values in zip(utilities, success, strict=True)]
    return success[:, 0] - np.array(read)


def read_curve(utilities: Array, success: Array, wanted: float) -> float:
    """What a curve reads at a utility: on the straight line between two of its cells, beyond an end the end.

    Cells that another is better than in both are left out.
    """
    order = np.lexsort((success, -utilities))  # from the best utility on, where most attacks succeed
    lowest = np.minimum.accumulate(success[order])
    is_better = np.concatenate([[True], success[order][1:] < lowest[:-1]])
    best = order[is_better][::-1]
    return float(np.interp(wanted, utilities[best], success[best]))


def _utilities(board: Board, pair: Pair, name: str) -> Array:
    """Of each test row; their mean is the utility."""
    nll = np.array(board.cells[pair][name]["nll"], dtype=np.float64)
    return -nll if len(nll) else board.accuracy(pair, name)
