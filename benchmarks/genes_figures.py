"""The rows of genes.json: figures of every cell by itself, and the share of lost safety that a method brings back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np

from genes_board import JUDGE_NAMES, METHODS, Board, Figure, Pair, interval_of, judged, share_back
from genes_cells import MAIN_SHOTS
from genes_judge import Outcome
from genes_port import CONTROL, Move
from genes_rows import TASKS
from tidy import Row, figure_row

WITH_SHOTS = ("gene", "gene_random_layers", "gene_all_layers", "resta", "safelora", "safemerge")
SHARES: Mapping[Outcome, str] = {
    "success": "attack_success",
    "refused": "refused_share",
    "off_topic": "off_topic_share",
}
RECOVERED: Mapping[Outcome, str] = {"success": "recovered_share", "refused": "recovered_refusals"}


def rows_of(board: Board, key: str) -> list[Row]:
    """The figures of every cell by itself: shots other than the main ones have rows of their own."""
    rows: list[Row] = []
    for pair, found in board.cells.items():
        for name, method in _named(found).items():
            if name in found:
                labels = {"task": pair[1], "method": method, "seed": pair[0], "shots": shots_of(name, method)}
                rows += _answer_rows(board, pair, name, labels, key)
                right, common = board.accuracy(pair, name), {**labels, "judge": "none"}
                rows.append(figure_row(common, "task_accuracy", float(right.mean()), interval_of(right), n=len(right)))
                costs = [metric for metric in ("seconds", "trainable_params") if metric in found[name]]
                rows += [figure_row(common, metric, float(str(found[name][metric]))) for metric in costs]
    return rows


def _named(names: Sequence[str] | Mapping[str, object]) -> dict[str, str]:
    """By a cell's name the method that it is of: those of the table, and the gene fitted on other numbers of shots."""
    methods = {name: method for method, name in METHODS.items()}
    return methods | {name: "gene" for name in names if name.startswith("gene-")}


def _answer_rows(board: Board, pair: Pair, name: str, labels: Mapping[str, object], key: str) -> list[Row]:
    rows = []
    for judge, (kind, metric) in product(JUDGE_NAMES, SHARES.items()):
        hits = board.hits(pair, name, judge, kind)
        counts = {"n": int(np.isfinite(hits).sum()), "n_unscored": int(np.isnan(hits).sum()), "config_hash": key}
        value = float(np.nanmean(hits))
        rows.append(figure_row({**labels, "judge": judge}, metric, value, interval_of(hits), **counts))
    return rows


def shots_of(name: str, method: str) -> int:
    """Examples that a cell was fitted or chosen on; 0 where none were."""
    if method == "gene":
        return int(name.removeprefix("gene-"))
    return MAIN_SHOTS if method in WITH_SHOTS else 0


def recovered_rows(board: Board) -> list[Row]:
    """Shares on each qualifying task model, over all of them (task ``all``, seed -1), and after transfer."""
    pairs = board.qualifying
    groups = [((task, seed), [(seed, task)]) for seed, task in pairs] + [(("all", -1), pairs)]
    names = _named([name for found in board.cells.values() for name in found])
    rows: list[Row] = []
    for ((task, seed), some), (name, method), judge in product(groups, names.items(), JUDGE_NAMES):
        labels = {"task": task, "method": method, "seed": seed, "judge": judge, "shots": shots_of(name, method)}
        for kind, metric in RECOVERED.items():
            rows += _share_row(share_back(board, some, (name, "aligned"), judge, kind), labels, metric, len(some))
    return [*rows, *_transfer_rows(board)]


def _transfer_rows(board: Board) -> list[Row]:
    """The gene fitted on one task's model in another's: by seed, and over seeds (seed -1) as a ratio of means."""
    pairs, rows = board.qualifying, list[Row]()
    for target, source, judge in product(dict.fromkeys(task for _, task in pairs), TASKS, JUDGE_NAMES):
        own = [pair for pair in pairs if pair[1] == target]
        name = METHODS["gene"] if source == target else f"transfer-{source}"
        labels = {"source": source, "target": target, "method": "gene", "judge": judge, "shots": MAIN_SHOTS}
        for seed, some in [*((pair[0], [pair]) for pair in own), (-1, own)]:
            found = share_back(board, some, (name, "aligned"), judge)
            rows += _share_row(found, {**labels, "seed": seed}, "recovered_share", len(some))
    return rows


def _share_row(found: Figure | None, labels: Mapping[str, object], metric: str, n_models: int) -> list[Row]:
    """One row, or none where there is no such share; draws that gave none are counted where there were any."""
    if found is None:
        return []
    counts = {"n": n_models, **({"n_undefined": found.n_undefined} if found.n_undefined else {})}
    return [figure_row(labels, metric, found.value, found.interval, **counts)]


@dataclass(frozen=True)
class Port:
    """The ports from one base's models to another's, judged."""

    source: str
    target: str
    cell: str
    board: Board


def ports_of(moves: Sequence[Move]) -> list[Port]:
    """What there is of every pair of bases."""
    ports = []
    for source, target in dict.fromkeys((move.source, move.target) for move in moves):
        some = [move for move in moves if (move.source, move.target) == (source, target)]
        board = judged(target, sorted({move.seed for move in some}), sorted({move.task for move in some}))
        ports.append(Port(Path(source.base).name, Path(target.base).name, some[0].cell, board))
    return ports


def port_rows(ports: Sequence[Port]) -> list[Row]:
    """Over the target's models that qualify and were ported to: what a ported gene brings back, what the target's own
    does, and a control; ``n`` counts the models.

    ``kept_share`` is what is back divided by what the target's own gene brings back; there is none where that is
    nothing.
    """
    rows: list[Row] = []
    for port in ports:
        names = {"gene_ported": port.cell, "gene_refusals": CONTROL, "gene_own": METHODS["gene"]}
        for (method, name), judge in product(names.items(), JUDGE_NAMES):
            labels = {"source": port.source, "target": port.target, "method": method, "task": "all", "seed": -1}
            labels |= {"judge": judge, "shots": MAIN_SHOTS}
            board = port.board
            pairs = [pair for pair in board.qualifying if set(names.values()) <= set(board.cells[pair])]
            found = share_back(port.board, pairs, (name, "aligned"), judge)
            rows += _share_row(found, labels, "recovered_share", len(pairs))
            if found and method != "gene_own":
                kept = share_back(port.board, pairs, (name, METHODS["gene"]), judge)
                rows += _share_row(kept, labels, "kept_share", len(pairs))
    return rows
