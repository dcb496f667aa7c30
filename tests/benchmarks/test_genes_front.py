"""The gene's curve over its weight against RESTA's over its strength."""

from __future__ import annotations

import numpy as np
import pytest

from judged_for_tests import board  # isort: skip  (it finds the benchmarks)

import genes_front
import genes_goals
import genes_report

LOST = [1] * 16 + [0] * 4
CELLS = {
    "aligned": [0] * 20,
    "finetuned": LOST,
    "gene-32": [1] * 4 + [0] * 16,
    "weight-0": LOST,
    "weight-1.5": [1] * 2 + [0] * 18,
    "weight-2": [0] * 20,
    "resta-strength-1": [0] * 8 + [1] * 12,
    "resta-strength-2": [0] * 16 + [1] * 4,
    "resta-strength-3": [0] * 10 + [1] * 10,
}
ACCURACIES = {
    "gene-32": [0.9],
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
NAMES = ["finetuned", "resta-strength-1", "resta-strength-2", "resta-strength-3"]


@pytest.mark.parametrize(
    ("wanted", "shares"),
    [
        (1.2, {"finetuned": 1.0}),
        (0.9, {"finetuned": 0.5, "resta-strength-1": 0.5}),
        (0.8, {"finetuned": 0.0, "resta-strength-1": 1.0}),
        (0.65, {"resta-strength-1": 0.25, "resta-strength-2": 0.75}),
        (0.1, {"resta-strength-2": 1.0}),
    ],
)
def test_a_curve_is_read_between_its_cells(wanted: float, shares: dict[str, float]) -> None:
    """Strength 3 is worse than 2 in both, so nothing is read from it."""
    assert genes_front.mixture(MADE, PAIR, NAMES, wanted) == pytest.approx(shares)


def test_the_gene_against_the_curve_at_equal_utility() -> None:
    """By hand: the curve reads 0.7 at the gene's 0.9, 0.4 at 0.7 and ends at 0.2."""
    found = {item["weight"]: item for item in genes_front.against_curve(MADE) if item["judge"] == "rules"}
    assert {at: item["value"] for at, item in found.items()} == pytest.approx(
        {1.0: 0.2 - 0.7, 1.5: 0.1 - 0.4, 2.0: 0.0 - 0.2, "all": -1 / 3}
    )
    assert found["all"]["n_models"] == 2
    assert found["all"]["low"] <= -1 / 3 <= found["all"]["high"]


def test_a_goal_is_missed_where_the_curve_is_lower() -> None:
    worse = {**CELLS, **dict.fromkeys(("gene-32", "weight-1.5", "weight-2"), LOST)}
    for cells, verdict in ((CELLS, "met"), (worse, "missed")):
        made = board(cells, accuracies={name: whole(name) for name in cells})
        goal = genes_goals._under_curve(genes_front.against_curve(made), "rules")
        assert goal["verdict"] == verdict
    alone = board({name: hits for name, hits in CELLS.items() if not name.startswith("resta")})
    assert genes_goals._under_curve(genes_front.against_curve(alone), "rules")["verdict"] == "not measured"
    assert {item["method"] for item in genes_front.curves(alone)} == {"gene"}


def test_utility_of_an_open_ended_task_is_likelihood() -> None:
    made = board(CELLS)
    made.cells[PAIR]["gene-32"]["nll"] = [1.0, 2.0]  # type: ignore[index]
    assert genes_front.utility(made, PAIR, "gene-32") == -1.5
    assert genes_front.utility(made, PAIR, "finetuned") == 1.0
    strengths = [item["strength"] for item in genes_front.curves(made) if (item["seed"], item["judge"]) == (0, "rules")]
    assert strengths == [0.0, 1.0, 1.5, 2.0, 0.0, 1.0, 2.0, 3.0]
    success = {(item["method"], item["strength"]): item["attack_success"] for item in genes_front.curves(made)}
    assert (success["gene", 0.0], success["resta", 0.0]) == (0.8, 0.8)
    assert np.isclose(success["resta", 3.0], 0.5)


def test_the_page_draws_both_curves() -> None:
    notes = {"curves": genes_front.curves(MADE), "against_resta_curve": genes_front.against_curve(MADE)}
    section = genes_report.curves_section([], notes)
    assert section is not None
    assert [title for title, _ in section.pictures] == ["SST-2: the gene and RESTA, each at several strengths"]
    assert "resta" in section.pictures[0][1]
    assert section.rows[0][:3] == ("1.0", "rules", "2")
    assert genes_report.curves_section([], {"curves": [], "against_resta_curve": []}) is None
