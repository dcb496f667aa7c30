"""Pictures: what they show stands in them, they never change, and they leave no settings behind."""

from __future__ import annotations

import re

import matplotlib as mpl
import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from safeside.evals.pictures import (
    Axis,
    Dot,
    Line,
    dots_picture,
    histogram_picture,
    lines_picture,
    reliability_picture,
    roc_picture,
    roc_points,
)

LABELS = np.array([0.0, 1.0] * 20)
SCORES = np.linspace(0, 1, 40)
LINES = [Line(f"curve {index}", [0, 1], [0, index]) for index in range(6)]
DOTS = [
    Dot("lst", 0.8, 0.7, 0.9, kind="before"),
    Dot("lst", 0.9, 0.8, 1.0, "#c0392b", "after"),
    Dot("plr", 0.5, 0.4, 0.6),
]


def all_pictures() -> dict[str, str]:
    return {
        "roc": roc_picture(LABELS, {"guard": SCORES}),
        "histogram": histogram_picture(LABELS, SCORES, 0.5, "answers"),
        "reliability": reliability_picture({"before": (LABELS, SCORES), "after": (LABELS, SCORES**2)}),
        "lines": lines_picture(LINES, Axis("x", (0.0, None)), Axis("y", goal=0.9)),
        "dots": dots_picture(DOTS, Axis("AUROC", goal=0.95)),
    }


def test_pictures_are_the_same_every_time_and_leave_no_settings_behind() -> None:
    before = dict(mpl.rcParams)
    first = all_pictures()
    assert all_pictures() == first
    assert dict(mpl.rcParams) == before
    for picture in first.values():
        assert picture.startswith("<svg")
        assert "http" not in picture
        assert not re.search(r"\d{4}-\d\d-\d\d", picture)


def strokes(picture: str, colour: str) -> int:
    return len(re.findall(rf"stroke: {colour}", picture))


def test_each_dot_has_its_colour_and_interval() -> None:
    picture = dots_picture(DOTS, Axis("AUROC"))
    assert strokes(picture, "#c0392b") >= 2  # the dot and its interval
    without = dots_picture([DOTS[0], DOTS[2]], Axis("AUROC"))
    assert strokes(without, "#c0392b") == 0


def test_more_names_make_a_taller_picture_so_that_none_overlap() -> None:
    def height(picture: str) -> float:
        found = re.search(r'height="([\d.]+)pt"', picture)
        assert found is not None
        return float(found.group(1))

    few, many = (dots_picture([Dot(f"row {row}", 0, 0, 1) for row in range(n)], Axis("")) for n in (3, 20))
    assert height(many) > height(few) + 300
    beside = dots_picture([Dot("one", place, place, place) for place in range(12)], Axis(""))
    assert height(beside) > height(few)
    assert height(lines_picture(LINES, Axis(""), Axis(""))) > height(lines_picture(LINES[:4], Axis(""), Axis("")))


def test_a_goal_is_a_dashed_line_and_open_limits_follow_the_curves() -> None:
    dashed = "stroke-dasharray"
    line = [Line("one", [0, 10], [2, 5])]
    assert dashed in lines_picture(line, Axis("x"), Axis("y", goal=3.0))
    assert dashed not in lines_picture(line, Axis("x"), Axis("y"))
    assert lines_picture(line, Axis("x"), Axis("y")) != lines_picture(line, Axis("x"), Axis("y", (0.0, None)))


def test_roc_points_are_few_and_keep_the_area() -> None:
    generator = np.random.default_rng(0)
    labels = (generator.random(3000) < 0.3).astype(float)
    scores = labels + generator.normal(size=3000)
    x, y = roc_points(labels, scores)
    assert len(x) == len(y) < 80
    assert (x[0], y[0], x[-1], y[-1]) == (0, 0, 1, 1)
    assert sorted(y) == y
    assert np.trapezoid(y, x) == pytest.approx(roc_auc_score(labels, scores), abs=0.005)
    assert roc_points(labels, generator.random(3000))[0] == x  # the same, so that curves can be averaged


def test_roc_points_of_a_perfect_guard_go_up_at_once() -> None:
    x, y = roc_points(LABELS, LABELS)
    assert (x[:2], y[:2]) == ([0.0, 0.0], [0.0, 1.0])


@pytest.mark.filterwarnings("error")
def test_a_reliability_picture_takes_probabilities_at_both_ends() -> None:
    assert "<svg" in reliability_picture({"sure": (LABELS, LABELS)})
