"""Texts beyond the context are calibrated by what their windows come to, and by no text that fits."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest

from safeside import Adapter, Base, Message
from safeside.adapters.config import PRESET_RATES, ModeCalibration
from safeside.guards.calibrate import threshold_with_bound
from safeside.guards.score import judge, score_conversations
from safeside.guards.windowed import calibrate_windows
from safeside.guards.windows import windows
from safeside.types import Example

ROWS = 70


def long_rows(base: Base, n: int, label: float, seed: int) -> list[Example]:
    """Prompts of two or three windows."""
    generator = random.Random(seed)
    texts = ["".join(generator.choices("abc def ghi ", k=base.max_tokens * 3 // 2)) for _ in range(n)]
    return [Example((Message("user", text),), (label,)) for text in texts]


def scores_of(base: Base, guard: Adapter, rows: list[Example]) -> np.ndarray:
    """By hand: every window by itself, then the highest or the lowest."""
    which = max if guard.config.windows == "max" else min
    found = []
    for row in rows:
        parts = windows(base, row.messages, combine=guard.config.windows)
        assert len(parts) > 1
        found.append(which(one.by_guard[guard.name][0] for one in score_conversations(base, [guard], parts)))
    return np.array(found)


@pytest.mark.parametrize("which", ["max", "min"])
def test_promises_rest_on_the_scores_of_whole_texts(
    tiny_base: Base, random_guard: Callable[..., Adapter], which: str, capsys: pytest.CaptureFixture[str]
) -> None:
    guard = random_guard(tiny_base)
    guard.config = guard.config.model_copy(update={"windows": which})
    claim = (Message("user", "is it so?"),) if which == "min" else ()
    harmless, harmful = (
        [Example((*row.messages, *claim), row.labels) for row in long_rows(tiny_base, ROWS, label, int(label))]
        for label in (0.0, 1.0)
    )
    calibrate_windows(tiny_base, guard, [*harmless, *harmless[:5], *harmful])
    (mode, fit), *others = guard.config.modes.items()
    assert (mode, others, fit.n_harmless) == ("windowed", [], ROWS)  # copies count once
    assert set(fit.presets) == {"strict"}
    expected = threshold_with_bound(scores_of(tiny_base, guard, harmless), PRESET_RATES["strict"])
    assert fit.presets["strict"].threshold == pytest.approx((expected,), abs=1e-5)
    assert len(fit.maps) == 1
    assert f"{2 * ROWS + 5} rows are longer than the base's context" in " ".join(capsys.readouterr().err.split())
    flagged = [
        row[0].flagged for row in judge(tiny_base, [guard.with_preset("strict")], [r.messages for r in harmless])
    ]
    assert np.mean(flagged) <= PRESET_RATES["strict"]


def test_benign_rows_take_the_place_of_harmless_ones(tiny_base: Base, random_guard: Callable[..., Adapter]) -> None:
    guard, benign = random_guard(tiny_base), long_rows(tiny_base, ROWS, 0.0, 3)
    calibrate_windows(tiny_base, guard, long_rows(tiny_base, 4, 0.0, 4), benign)
    assert guard.config.modes["windowed"].n_harmless == ROWS
    expected = threshold_with_bound(scores_of(tiny_base, guard, benign), PRESET_RATES["strict"])
    assert guard.config.modes["windowed"].presets["strict"].threshold == pytest.approx((expected,), abs=1e-6)
    calibrate_windows(tiny_base, other := random_guard(tiny_base), [], benign)
    assert other.config.modes["windowed"].presets == guard.config.modes["windowed"].presets


def test_too_few_long_rows_keep_nothing_and_verdicts_say_so(
    tiny_base: Base, random_guard: Callable[..., Adapter]
) -> None:
    """The guard's own threshold was fitted to texts that fit: it stands in, and is never passed for one of windows."""
    guard, long = random_guard(tiny_base), long_rows(tiny_base, 31, 1.0, 5)
    guard.set_mode("prompt", ModeCalibration(n_harmless=70))
    for rows in ([], long[:1]):
        calibrate_windows(tiny_base, guard, rows)
        assert set(guard.config.modes) == {"prompt"}
    told = "not calibrated for mode 'windowed': the guard's own threshold is used"
    assert told in judge(tiny_base, [guard], [long[0].messages])[0][0].reason
    calibrate_windows(tiny_base, guard, [*long, *long_rows(tiny_base, 31, 0.0, 6)])
    fit = guard.config.modes["windowed"]
    assert (len(fit.maps), fit.presets) == (1, {})
    assert told in judge(tiny_base, [guard], [long[0].messages])[0][0].reason
