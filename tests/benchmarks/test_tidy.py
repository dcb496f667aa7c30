"""Tests of the shape of result files."""

from __future__ import annotations

import numpy as np
import pytest

from safeside.evals.runs import wilson
from tidy import ratio_figure, share_figure


def test_the_median_ratio_and_its_interval_are_of_rounds() -> None:
    base = [1.0, 2.0, 4.0, 8.0, 16.0] * 6  # the machine slows down, both sides alike
    value, (low, high) = ratio_figure([1.1 * taken for taken in base], base)
    assert (value, low, high) == pytest.approx((1.1, 1.1, 1.1))
    noisy = [taken * factor for taken, factor in zip(base, [0.9, 1.0, 1.1] * 10, strict=True)]
    value, (low, high) = ratio_figure(noisy, base)
    assert value == pytest.approx(1.0)
    assert low < 1.0 < high


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
