"""One answer while it is written: what of it is told where a guard breaks, or flags only the whole of it."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from safeside import Adapter, Base
from safeside.adapters.config import Calibration, ModeCalibration, Promise
from serving_for_tests import Script, effective

ANNOTATE = {"action": "annotate", "guard": "harm", "threshold": 0.9}
BLOCK = {"action": "block", "guard": "harm"}


@pytest.fixture
def guard(tiny_base: Base, random_guard: Callable[..., Adapter]) -> Adapter:
    """Flags a whole answer at 0.3 and a token of one at 0.9."""
    guard = random_guard(tiny_base)
    guard.set_calibration(Calibration(scale=(1.0,), bias=(0.0,), threshold=(0.3,)))
    guard.set_mode(
        "stream",
        ModeCalibration(n_harmless=320, presets={"strict": Promise(threshold=(0.9,), false_positive_rate=0.05)}),
    )
    return guard


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("fields", [{"hold_back": 1, "answer": [{**BLOCK, "threshold": 0.9}]}, {"answer": [ANNOTATE]}])
def test_a_token_that_a_guard_could_not_score_is_not_told(
    tiny_base: Base, guard: Adapter, fields: dict[str, object], broken: float
) -> None:
    script = Script(tiny_base, effective([guard], prompt=[ANNOTATE], **fields), 6)
    heard = script.run(0.1, 0.1, broken)
    assert heard.ended.finish == "content_filter"
    assert heard.ended.decision.action == "block"
    assert heard.tokens == script.ids[:2]


def test_the_decision_says_that_the_answer_was_ended(tiny_base: Base, random_guard: Callable[..., Adapter]) -> None:
    """Labels have lines of their own, and the lowest ends an answer whichever label is over it."""
    guard = random_guard(tiny_base, labels=("hate", "violence"))
    guard.set_calibration(Calibration(scale=(1.0, 1.0), bias=(0.0, 0.0), threshold=(0.9, 0.4)))
    heard = Script(tiny_base, effective([guard], answer=[BLOCK]), 6).run((0.1, 0.1), (0.5, 0.1))
    assert heard.ended.finish == "content_filter"
    assert (heard.ended.decision.action, heard.ended.decision.guard) == ("block", "harm")
    assert heard.ended.decision.reason == "harm: 0.500 >= 0.400, where an answer is ended"
