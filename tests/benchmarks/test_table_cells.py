"""Cells of tables: means over seeds, with the widest interval."""

from __future__ import annotations

import pytest

from table_cells import commits_of, pooled, text_of
from tidy import figure_row


def test_figures_are_means_over_seeds_with_the_widest_interval() -> None:
    rows = [figure_row({}, "auroc", value, (value - 0.05, value + 0.05)) for value in (0.8, 0.9)]
    assert pooled(rows) == pytest.approx((0.85, 0.75, 0.95))
    assert text_of(rows) == "0.850 (0.750 to 0.950)"
    assert text_of(rows, "{:+.1f}", has_interval=False) == "+0.9"
    assert text_of([]) == ""


def test_the_commit_of_a_part_is_told_and_that_of_each_run_where_there_were_several() -> None:
    assert commits_of({"commit": "abc", "notes": {}}) == "`abc`"
    several = {"commit": "abc", "notes": {"commits": {"builtin": "abc", "minilm": "def"}}}
    assert commits_of(several) == "builtin `abc`, minilm `def`"
    assert commits_of(several, mark="") == "builtin abc, minilm def"
