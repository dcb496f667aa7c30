"""Where repairs stand between safety and accuracy: by points, by curves over their strength, and curve against curve.

A stronger gene is safer and does the task a little worse, and so is more of RESTA's vector.  So the two are compared at
equal utility: the gene at several weights, against what RESTA's curve reads there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np

from genes_board import JUDGE_NAMES, METHODS, Array, Board, Figure, Pair, drawn, figure_of
from genes_cells import RESTA, WEIGHT

Note = dict[str, object]
AT = (1.0, 1.5, 2.0)  # weights of the gene that are compared with RESTA's curve


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
    nll = board.cells[pair][name]["nll"]
    return -float(np.mean(nll)) if nll else float(board.accuracy(pair, name).mean())  # type: ignore[arg-type]


def against_curve(board: Board) -> list[Note]:
    """Attack success of the gene minus what RESTA's curve reads at the same utility, at each weight and over all."""
    rows: list[Note] = []
    for judge in JUDGE_NAMES:
        gaps = {at: _gaps(board, at, judge) for at in AT}
        pairs = [pair for pair in board.qualifying if all(pair in gap for gap in gaps.values())]
        if pairs:
            means = {pair: np.mean([gap[pair] for gap in gaps.values()], 0) for pair in pairs}
            for at, gap in (*gaps.items(), ("all", means)):
                figure = _figure(pairs, gap)
                labels: Note = {"weight": at, "judge": judge, "n_models": len(pairs)}
                rows.append({**labels, "value": figure.value, "low": figure.low, "high": figure.high})
    return rows


def _figure(pairs: Sequence[Pair], gap: Mapping[Pair, Array]) -> Figure:
    values = np.stack([gap[pair] for pair in pairs])
    return figure_of(drawn(pairs, values.shape[1]).mean(values))


def _gaps(board: Board, weight: float, judge: str) -> dict[Pair, Array]:
    """By model and prompt the gene's success minus that of RESTA's curve, NaN where one could not be judged."""
    found = {}
    for pair in board.cells:
        own = _curves_of(board, pair)
        name = own.get("gene", {}).get(weight)
        if name is not None and "resta" in own:
            shares = mixture(board, pair, list(own["resta"].values()), utility(board, pair, name))
            known = sum(share * board.hits(pair, cell, judge) for cell, share in shares.items())
            found[pair] = board.hits(pair, name, judge) - known
    return found


def mixture(board: Board, pair: Pair, names: Sequence[str], wanted: float) -> dict[str, float]:
    """The cells of a curve, and the share of each, that read attack success at a utility; a straight line between two.

    Of cells that another is better than in both (judge ``rules``) nothing is read; beyond an end, the end is.
    """
    places = {name: utility(board, pair, name) for name in names}
    best: list[str] = []  # the better the utility, the more attacks succeed
    for name in sorted(names, key=lambda name: (-places[name], _success(board, pair, name))):
        if not best or _success(board, pair, name) < _success(board, pair, best[-1]):
            best.append(name)
    if wanted >= places[best[0]]:
        return {best[0]: 1.0}
    for above, below in pairwise(best):
        if wanted >= places[below]:
            share = (wanted - places[below]) / (places[above] - places[below])
            return {above: share, below: 1 - share}
    return {best[-1]: 1.0}


def _success(board: Board, pair: Pair, name: str) -> float:
    return float(np.nanmean(board.hits(pair, name, "rules")))
