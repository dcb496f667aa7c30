"""The gene's curve over its weight against RESTA's over its strength."""

from __future__ import annotations

import numpy as np
import pytest

from judged_for_tests import board  # isort: skip  (it finds the benchmarks)

import genes_front
import genes_report

LOST = [1] * 16 + [0] * 4
CELLS = {
    "aligned": [0] * 20,
    "finetuned": LOST,
    "gene-32": [1] * 4 + [0] * 16,
    "weight-0": LOST,
    "weight-0.5": [1] * 10 + [0] * 10,
    "weight-1.5": [1] * 2 + [0] * 18,
    "weight-2": [0] * 20,
    "resta-strength-1": [0] * 8 + [1] * 12,
    "resta-strength-2": [0] * 16 + [1] * 4,
    "resta-strength-3": [0] * 10 + [1] * 10,
}
ACCURACIES = {
    "gene-32": [0.9],
    "weight-0.5": [0.9],
    "weight-1.5": [0.7],
    "weight-2": [0.2],
    "resta-strength-1": [0.8],
    "resta-strength-2": [0.6],
    "resta-strength-3": [0.5],
}


def whole(name: str) -> list[float]:
    return ACCURACIES.get(name, [1.0]) * 8


MADE = board(CELLS, CELLS, accuracies={name: whole(name) for name in CELLS})
PAIR = (0, "sst2")


@pytest.mark.parametrize(
    ("wanted", "success"),
    [(1.2, 0.8), (0.9, 0.7), (0.8, 0.6), (0.65, 0.3), (0.1, 0.2)],
)
def test_a_curve_is_read_between_its_cells(wanted: float, success: float) -> None:
    """The task model as it is, strengths 1, 2 and 3: the last is worse than 2 in both, so nothing is read from it."""
    utilities, successes = np.array([1.0, 0.8, 0.6, 0.5]), np.array([0.8, 0.6, 0.2, 0.5])
    for order in ([0, 1, 2, 3], [3, 1, 0, 2]):
        assert genes_front.read_curve(utilities[order], successes[order], wanted) == pytest.approx(success)
    tied = genes_front.read_curve(np.array([1.0, 1.0, 0.5]), np.array([0.9, 0.4, 0.4]), 1.0)
    assert tied == 0.4, "of two that do the task as well the safer one"


def test_the_gene_against_the_curve_at_equal_utility() -> None:
    """By hand: the curve reads 0.7 at the gene's 0.9, 0.4 at 0.7 and ends at 0.2."""
    found = {item["weight"]: item for item in genes_front.against_curve(MADE) if item["judge"] == "rules"}
    assert {at: item["value"] for at, item in found.items()} == pytest.approx(
        {0.5: 0.5 - 0.7, 1.0: 0.2 - 0.7, 1.5: 0.1 - 0.4, 2.0: 0.0 - 0.2, "all": -0.3}
    )
    assert found["all"]["n_models"] == 2
    assert found["all"]["low"] <= -0.3 <= found["all"]["high"]
    alone = board({name: hits for name, hits in CELLS.items() if not name.startswith("resta")})
    assert genes_front.against_curve(alone) == []
    assert {item["method"] for item in genes_front.curves(alone)} == {"gene"}


def test_the_interval_knows_that_utilities_are_of_few_rows() -> None:
    """One test row more or less decides whether the curve is read at its end."""
    sure = {name: [1.0] * 8 for name in CELLS}
    unsure = {**sure, "gene-32": [1.0] * 7 + [0.0], "resta-strength-2": [0.0] + [1.0] * 7}
    widths = []
    for accuracies in (sure, unsure):
        made = board(CELLS, accuracies=accuracies)
        widths.append(float(np.ptp(genes_front.gaps_of(made, [PAIR], 1.0, "rules"))))
    assert widths[1] > widths[0] + 0.15


def test_several_together_are_compared_with_the_best_alone() -> None:
    cells = {
        "aligned": [0] * 20,
        "finetuned": LOST,
        "interference-first": [1] * 8 + [0] * 12,
        "interference-second": [1] * 6 + [0] * 14,
        "interference-both": [1] * 2 + [0] * 18,
    }
    found = [item for item in genes_front.together(board(cells, cells)) if item["judge"] == "rules"]
    assert [(item["parts"], item["value"]) for item in found] == [("both", pytest.approx(0.1 - 0.3))]


def test_selected_layers_against_as_many_by_chance() -> None:
    cells = {
        "aligned": [0] * 20,
        "finetuned": LOST,
        "few-shift": [1] * 4 + [0] * 16,
        "few-random-1": [1] * 8 + [0] * 12,
        "few-random-2": [1] * 4 + [0] * 16,
    }
    (rules, _) = genes_front.against_chance(board(cells, cells))
    assert (rules["draws"], rules["value"]) == (2, pytest.approx(-0.1))
    assert rules["low"] <= -0.1 <= rules["high"]
    assert genes_front.against_chance(board({name: cells[name] for name in ("aligned", "finetuned")})) == []
    section = genes_report.chance_section({"selection": [rules]})
    assert section is not None
    assert section.rows[0][:2] == ("rules", "2")


def test_utility_of_an_open_ended_task_is_likelihood() -> None:
    made = board(CELLS)
    made.cells[PAIR]["gene-32"]["nll"] = [1.0, 2.0]  # type: ignore[index]
    assert genes_front.utility(made, PAIR, "gene-32") == -1.5
    assert genes_front.utility(made, PAIR, "finetuned") == 1.0
    strengths = [item["strength"] for item in genes_front.curves(made) if (item["seed"], item["judge"]) == (0, "rules")]
    assert strengths == [0.0, 0.5, 1.0, 1.5, 2.0, 0.0, 1.0, 2.0, 3.0]
    success = {(item["method"], item["strength"]): item["attack_success"] for item in genes_front.curves(made)}
    assert (success["gene", 0.0], success["resta", 0.0]) == (0.8, 0.8)
    assert np.isclose(success["resta", 3.0], 0.5)


def test_the_page_draws_both_curves() -> None:
    notes = {"curves": genes_front.curves(MADE), "over_resta_curve": genes_front.against_curve(MADE)}
    section = genes_report.curves_section([], notes)
    assert section is not None
    assert [title for title, _ in section.pictures] == ["SST-2: the gene and RESTA, each at several strengths"]
    assert "resta" in section.pictures[0][1]
    assert section.rows[0][:3] == ("0.5", "rules", "2")
    assert genes_report.curves_section([], {"curves": [], "over_resta_curve": []}) is None
