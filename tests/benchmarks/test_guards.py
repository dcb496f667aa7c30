"""The guards benchmark from its cells: which schedule counts, what is left out, and who wins by what counts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import guards
from guard_cells import Cell, schedules_of
from guard_figures import STANDALONES, rows_of, wins_of
from guard_rows import Setup, Sources

PLACE = ("hate", "builtin")
SEEDS = (0, 1)
SOURCES = ["one"] * 60 + ["two"] * 60
KNOWN = Sources(SOURCES, [str(row) for row in range(120)], [], {})
TRUTH = [0.0, 1.0] * 60
Found = dict[str, object]


@pytest.fixture
def setup() -> Setup:
    return Setup(Path(), (("builtin", "builtin", "print"),), Path(), 8, 8, epochs=12)


def found_of(key: str, known: float, seed: int) -> Found:
    """A cell's file; ``known`` is how far apart it holds harmless and harmful rows."""
    values = known * np.array(TRUTH) + np.random.default_rng(seed).normal(size=len(TRUTH))
    return {
        "key": key, "labels": {"validation": TRUTH, "test": TRUTH}, "counts": {}, "commit": "abc", "seconds": 2.0,
        "values": {"validation": values.tolist(), "test": values.tolist(), "harmless": []}, "epochs": 4,
        "windowed": [False] * 120, "flops_share": 0.01, "train_seconds": 1.0, "peak_bytes": 0, "trainable_params": 9,
    }  # fmt: skip


@pytest.fixture
def tried(setup: Setup) -> dict[Cell, Found]:
    """Ladders know more by the long schedule, standalones by the short one."""
    cells = [Cell(*PLACE, method, seed) for method in ("lst_distilled", *STANDALONES) for seed in SEEDS]
    known = {("lst_distilled", 12): 4.0, ("lst_distilled", 5): 0.1}
    return {
        one: found_of(one.title, known.get((one.method, one.epochs), 0.5 if one.epochs == 5 else 0.1), place)
        for place, cell in enumerate(cells)
        for one in schedules_of(setup, cell)
    }


def test_what_validation_rows_chose_is_what_rows_and_wins_are_of(setup: Setup, tried: dict[Cell, Found]) -> None:
    values = guards.chosen_of(setup, tried)
    assert {cell.epochs for cell in values} == {0}
    assert {found["schedule"] for cell, found in values.items() if cell.method == "lst_distilled"} == {12}
    assert {found["schedule"] for cell, found in values.items() if cell.method == "standalone"} == {5}
    (row, *_) = rows_of(ours := Cell(*PLACE, "lst_distilled", 0), values[ours], KNOWN)
    assert row["config_hash"] == "hate builtin lst_distilled seed 0, 12 epochs"
    wins = wins_of(PLACE, values, KNOWN, SEEDS)
    assert {row["value"] for row in wins if row["metric"] == "win_over_best_standalone"} == {1}


def test_the_best_of_three_leaves_out_what_is_pruned_and_distilled(setup: Setup, tried: dict[Cell, Found]) -> None:
    known = {"standalone_pruned_distilled": 8.0, "lst_distilled": 1.5}  # the others are behind
    for cell in [cell for cell in tried if cell.method in known]:
        tried[cell] = found_of(cell.title, known[cell.method], cell.seed)
    wins = wins_of(PLACE, guards.chosen_of(setup, tried), KNOWN, SEEDS)
    found = {row["metric"]: row for row in wins}
    assert (found["win_over_best_standalone"]["value"], found["win_over_best_of_three"]["value"]) == (-1, 1)
    assert found["gain_over_best_standalone"]["against"] == "standalone_pruned_distilled"
    assert found["gain_over_best_of_three"]["against"] in STANDALONES[:3]


def test_what_has_no_cell_is_told() -> None:
    wanted = [Cell(*PLACE, method, seed) for method in ("lst", "plr") for seed in SEEDS]
    assert guards._not_run(wanted, [Cell(*PLACE, "lst", 0, 5)]) == ["hate builtin plr"]


def test_a_cell_that_lacks_a_schedule_is_left_out_and_told(setup: Setup, tried: dict[Cell, Found]) -> None:
    del tried[Cell(*PLACE, "standalone", 1, 5)]
    values = guards.chosen_of(setup, tried)
    notes = guards._notes(tried, values)
    assert notes["left_out"] == ["hate builtin standalone seed 1"]
    assert notes["schedules"]["hate builtin standalone"] == {0: {"most": 5, "run": 4}}  # type: ignore[index]
    assert notes["cell_seconds"] == 2.0 * len(tried)  # of the tries that were not chosen too
    assert not wins_of(PLACE, values, KNOWN, SEEDS)


def test_what_has_one_schedule_is_chosen_without_a_choice(setup: Setup) -> None:
    tried = {
        Cell("hate", "builtin", "probe", 0): found_of("p", 1.0, 0),
        Cell("grounding", "builtin", "lst", 0): found_of("l", 1.0, 1),
    }
    values = guards.chosen_of(setup, tried)
    assert list(values) == list(tried)
    assert guards._notes(tried, values)["schedules"] == {"grounding builtin lst": {0: {"most": 5, "run": 4}}}
