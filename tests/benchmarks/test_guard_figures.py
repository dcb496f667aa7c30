"""Figures of the guards benchmark on made-up cells: what the source tells alone is told apart, and who wins."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from guard_cells import Cell
from guard_figures import (
    STANDALONES,
    codes_of,
    large_sources,
    rows_of,
    share_figure,
    source_alone,
    wins_of,
    within_sources,
)
from guard_rows import Sources
from safeside.evals.metrics import auroc
from safeside.evals.runs import wilson
from tidy import Row

N_ROWS = 200
SOURCES = ["bad"] * 100 + ["good"] * 80 + ["few"] * 20
LABELS = np.array([1.0] * 80 + [0.0] * 20 + [1.0] * 15 + [0.0] * 65 + [1.0] * 5 + [0.0] * 15)
PLACE = ("hate", "builtin")
KNOWN = Sources(SOURCES, [str(row) for row in range(N_ROWS)], LABELS.tolist(), {"bad": 0.9, "good": 0.1, "few": 0.4})


def found_of(seed: int, values: np.ndarray, key: str) -> dict[str, object]:
    """What a cell's file holds."""
    return {
        "key": f"{key}{seed}", "labels": {"validation": [0.0, 1.0] * 60, "test": LABELS.tolist()},
        "values": {"validation": [0.0, 1.0] * 60, "test": values.tolist(), "harmless": []},
        "windowed": [False] * N_ROWS, "flops_share": 0.01, "train_seconds": 1.0, "peak_bytes": 0,
        "trainable_params": 9, "counts": {"test_too_long": 3, "test_bad": 1, "train_too_long": 7},
    }  # fmt: skip


def knows_the_source(seed: int) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(size=N_ROWS)
    return 9.0 * (np.array(SOURCES) == "bad") + noise


def knows_the_text(seed: int) -> np.ndarray:
    return LABELS + np.random.default_rng(seed).normal(size=N_ROWS)


def value_of(rows: list[Row], metric: str, **labels: object) -> Row:
    """The one row of that metric."""
    (row,) = [row for row in rows if row["metric"] == metric and labels.items() <= row.items()]
    return row


def test_knowing_the_source_helps_over_all_rows_and_not_within_sources() -> None:
    rows = rows_of(Cell(*PLACE, "plr", 0), found_of(0, knows_the_source(0), "a"), KNOWN)
    assert value_of(rows, "auroc")["value"] > 0.75
    within = value_of(rows, "auroc_within")
    assert within["low"] < 0.5 < within["high"]
    parts = {row["source"]: row for row in rows if row["metric"] == "auroc_source"}
    assert {name: row["n"] for name, row in parts.items()} == {"bad": 100, "good": 80}  # "few" has 5 harmful rows
    assert within["value"] == pytest.approx(np.mean([row["value"] for row in parts.values()]))


def test_rows_that_no_cell_scores_are_counted_and_what_was_not_measured_has_no_row() -> None:
    values = knows_the_text(0)
    values[0] = np.nan
    rows = rows_of(Cell(*PLACE, "probe", 0), found_of(0, values, "a"), KNOWN)
    assert (value_of(rows, "auroc")["n"], value_of(rows, "auroc")["n_unscored"]) == (199, 5)
    assert not [row for row in rows if row["metric"] == "peak_bytes"]
    assert value_of(rows, "fpr_at_fpr1")["value"] == (values[LABELS == 0] > 0).mean()  # validation's harmless rows: 0


def test_codes_keep_label_and_source() -> None:
    codes = codes_of(LABELS, np.array(SOURCES))
    assert (codes % 2 == LABELS).all()
    assert large_sources(codes) == [0, 2]  # bad, few, good
    values = knows_the_text(0)
    by_hand = [auroc(LABELS[:100], values[:100]), auroc(LABELS[100:180], values[100:180])]
    assert within_sources(codes, values) == pytest.approx(np.mean(by_hand))


def cells_of(ours: object, theirs: object, seeds: tuple[int, ...] = (0, 1)) -> dict[Cell, dict[str, object]]:
    """Cells of the distilled ladder and all standalones."""
    return {
        Cell(*PLACE, method, seed): found_of(seed, make(seed + 10 * place), method)  # type: ignore[operator]
        for place, (method, make) in enumerate([("lst_distilled", ours), *((name, theirs) for name in STANDALONES)])
        for seed in seeds
    }


@pytest.mark.parametrize(
    ("ours", "theirs", "over_all", "within"),
    [
        (knows_the_source, knows_the_source, 0, 0),
        (lambda seed: 3 * knows_the_text(seed) + knows_the_source(seed), knows_the_source, 1, 1),
        (knows_the_source, lambda seed: 3 * knows_the_text(seed) + knows_the_source(seed), -1, -1),
    ],
)
def test_a_win_is_told_over_all_rows_and_within_sources(
    ours: object, theirs: object, over_all: int, within: int
) -> None:
    rows = wins_of(PLACE, cells_of(ours, theirs), KNOWN, (0, 1))
    assert value_of(rows, "win_over_best_standalone")["value"] == over_all
    assert value_of(rows, "win_within_sources")["value"] == within
    assert all(row["config_hash"] and row["flops_share"] == 0.01 and row["seeds"] == 2 for row in rows)


def test_the_best_of_some_and_fewer_seeds_are_no_win() -> None:
    cells = cells_of(knows_the_text, knows_the_source)
    assert wins_of(PLACE, cells, KNOWN, (0, 1))
    assert wins_of(PLACE, cells, KNOWN, (0, 1, 2)) == []
    del cells[Cell(*PLACE, STANDALONES[-1], 1)]
    assert wins_of(PLACE, cells, KNOWN, (0, 1)) == []


def test_a_source_alone_has_the_figure_of_its_training_share() -> None:
    (row,) = source_alone(PLACE, KNOWN, LABELS)
    expected = auroc(LABELS, np.array([0.9] * 100 + [0.1] * 80 + [0.4] * 20))
    assert (row["method"], row["metric"], row["value"]) == ("source_alone", "auroc", expected)


def test_rows_of_one_prompt_are_drawn_together() -> None:
    """Twenty answers to each prompt that are all alike say no more than one."""
    values = np.repeat(np.random.default_rng(0).normal(size=10), 20) + 0.3 * LABELS
    alike = replace(KNOWN, prompts=[str(row // 20) for row in range(N_ROWS)])  # rows of both labels in some
    cell = Cell(*PLACE, "plr", 0)
    for metric in ("auroc", "auroc_within"):
        apart, together = (value_of(rows_of(cell, found_of(0, values, "a"), some), metric) for some in (KNOWN, alike))
        assert apart["value"] == together["value"]
        assert together["high"] - together["low"] > 2 * (apart["high"] - apart["low"])
    cells = cells_of(lambda seed: values + knows_the_text(seed) / 9, lambda seed: knows_the_text(seed))
    apart, together = (value_of(wins_of(PLACE, cells, some, (0, 1)), "gain_within_sources") for some in (KNOWN, alike))
    assert together["high"] - together["low"] > 1.5 * (apart["high"] - apart["low"])


def test_a_share_has_wilsons_interval_or_that_of_its_groups() -> None:
    hits = np.array([1.0] * 8 + [0.0] * 2)
    assert share_figure(hits) == (0.8, wilson(8, 10))
    value, (low, high) = share_figure(np.ones(20), [f"goal {row // 4}" for row in range(20)])
    assert (value, (low, high)) == (1.0, wilson(5, 5))  # a bootstrap would say that it is certain
    alike = np.repeat([1.0, 1.0, 0.0, 1.0, 0.0], 8)
    groups = [str(row // 8) for row in range(40)]
    _, (low, high) = share_figure(alike, groups)
    alone_low, alone_high = share_figure(alike)[1]
    assert high - low > 1.5 * (alone_high - alone_low)
