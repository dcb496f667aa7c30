"""Tests of the shape of result files."""

from __future__ import annotations

import pytest

from tidy import ratio_figure


def test_the_median_ratio_and_its_interval_are_of_rounds() -> None:
    base = [1.0, 2.0, 4.0, 8.0, 16.0] * 6  # the machine slows down, both sides alike
    value, (low, high) = ratio_figure([1.1 * taken for taken in base], base)
    assert (value, low, high) == pytest.approx((1.1, 1.1, 1.1))
    noisy = [taken * factor for taken, factor in zip(base, [0.9, 1.0, 1.1] * 10, strict=True)]
    value, (low, high) = ratio_figure(noisy, base)
    assert value == pytest.approx(1.0)
    assert low < 1.0 < high
