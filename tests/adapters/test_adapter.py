"""A guard's thresholds by reading mode and preset; architectures have the suite of ``conformance``."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from safeside import Adapter, Base, Message, attach, load_adapter, ramp, save_adapter, step
from safeside.adapters.adapter import GuardHead
from safeside.adapters.config import Calibration, ModeCalibration, ProbabilityMap, Promise
from safeside.base.taps import Tape
from safeside.errors import InputError
from safeside.guards.score import judge
from safeside.verdicts import verdict_of

MAP = ProbabilityMap(method="platt", slope=2.0, error_before=0.1, error_after=0.05, n_harmless=40, n_harmful=30)
PROMPT = ModeCalibration(
    n_harmless=320,
    presets={
        "strict": Promise(threshold=(0.55,), false_positive_rate=0.05),
        "balanced": Promise(threshold=(0.75,), false_positive_rate=0.01),
    },
    maps=(MAP,),
)
ANSWER = ModeCalibration(
    n_harmless=80,
    promise=Promise(threshold=(0.65,), false_positive_rate=0.1),
    presets={"strict": Promise(threshold=(0.7,), false_positive_rate=0.05)},
)


@pytest.fixture
def guard(tiny_base: Base, random_guard: Callable[..., Adapter]) -> Adapter:
    guard = random_guard(tiny_base)
    guard.set_calibration(Calibration(scale=(1.0,), bias=(0.0,), threshold=(0.6,)))
    guard.set_mode("prompt", PROMPT)
    guard.set_mode("answer", ANSWER)
    return guard


def test_thresholds_are_those_of_preset_and_mode(guard: Adapter) -> None:
    modes = ("prompt", "answer", "windowed", "stream")
    found = {
        preset: [guard.with_preset(preset).thresholds_in(mode)[0] for mode in modes]
        for preset in (None, "strict", "balanced")
    }
    assert found == {
        None: [0.6, 0.65, 0.6, 0.6],
        "strict": [0.55, 0.7, 0.6, 0.6],
        "balanced": [0.75, 0.6, 0.6, 0.6],
    }
    assert guard.thresholds == guard.with_preset("strict").thresholds == (0.6,)


@pytest.mark.parametrize(
    ("preset", "mode", "note"),
    [
        (None, "prompt", ""),
        (None, "windowed", "not calibrated for mode 'windowed': the guard's own threshold is used"),
        ("strict", "answer", ""),
        ("balanced", "answer", "no preset 'balanced' for mode 'answer': the guard's own threshold is used"),
    ],
)
def test_a_verdict_says_when_the_guards_own_threshold_stands_in(guard: Adapter, preset, mode, note: str) -> None:
    verdict = verdict_of(guard.with_preset(preset), (0.3,), mode)
    assert (verdict.mode, verdict.reason, verdict.flagged) == (mode, note, False)


def test_a_guard_without_modes_says_nothing(tiny_base: Base, random_guard: Callable[..., Adapter]) -> None:
    verdict = verdict_of(random_guard(tiny_base), (0.3,), "windowed")
    assert (verdict.reason, verdict.probability) == ("", 0.3)


def test_probabilities_belong_to_a_mode_and_decide_nothing(guard: Adapter) -> None:
    assert verdict_of(guard, (0.8,), "prompt").probability == pytest.approx(0.64 / 0.68)  # odds squared
    assert verdict_of(guard, (0.8,), "answer").probability == 0.8
    level = ProbabilityMap(
        method="isotonic", knots=(0.0, 0.5, 0.9), levels=(0.2, 0.2, 0.2),
        error_before=0.1, error_after=0.1, n_harmless=40, n_harmful=30,
    )  # fmt: skip
    guard.set_mode("prompt", PROMPT.model_copy(update={"maps": (level,)}))
    for score, flagged in ((0.54, False), (0.55, True), (0.95, True)):
        verdict = verdict_of(guard.with_preset("strict"), (score,), "prompt")
        assert (verdict.probability, verdict.flagged, verdict.score) == (0.2, flagged, score)


def test_a_preset_that_cannot_be_promised_says_how_many_rows_it_needs(
    tiny_base: Base, guard: Adapter, random_guard: Callable[..., Adapter], random_aligner: Callable[..., Adapter]
) -> None:
    with pytest.raises(InputError, match=r"rate of 0.1% needs 2,995 harmless rows .* 320 for mode 'prompt', 80 for"):
        guard.with_preset("permissive")
    with pytest.raises(InputError, match=r"rate of 5.0% needs 59 harmless rows of a mode; it was calibrated on none"):
        random_guard(tiny_base).with_preset("strict")
    with pytest.raises(InputError, match="no preset 'lax'; expected one of strict, balanced, permissive"):
        guard.with_preset("lax")
    aligner = random_aligner(tiny_base)
    with pytest.raises(InputError, match="'refuse' is an aligner and flags nothing"):
        aligner.with_preset("strict")
    assert aligner.with_preset(None).name == "refuse"


def test_presets_share_weights_and_leave_the_guard_as_it_was(tiny_base: Base, guard: Adapter) -> None:
    strict = guard.with_preset("strict")
    assert guard.config.preset is None
    assert strict.config.preset == "strict"
    assert strict.head.linear.weight is guard.head.linear.weight
    assert strict.with_preset(None).config == guard.config
    talk = [[Message("user", "the cat sat")]]
    ((plain,),), ((found,),) = judge(tiny_base, [guard], talk), judge(tiny_base, [strict], talk)
    assert plain.score == found.score
    assert (plain.threshold, found.threshold) == (0.6, 0.55)


def test_policies_stand_at_the_presets_threshold(tiny_base: Base, guard: Adapter, random_aligner) -> None:
    strict, balanced = guard.with_preset("strict"), guard.with_preset("balanced")
    assert (step(guard).threshold, step(strict).threshold, step(balanced).threshold) == (0.6, 0.55, 0.75)
    assert (ramp(strict).low, ramp(strict).high) == (0.275, 0.55)
    assert ramp(strict, 0.2, 0.8).high == 0.8
    with attach(tiny_base, [random_aligner(tiny_base)], [balanced], ramp(balanced)):
        answer = tiny_base.chat([Message("user", "how?")], max_new_tokens=3)
    assert [verdict.threshold for verdict in answer.verdicts] == [0.75, 0.6]
    assert "no preset 'balanced'" in answer.verdicts[1].reason


def test_modes_and_preset_come_back_from_disk(tiny_base: Base, guard: Adapter, tmp_path) -> None:
    loaded = load_adapter(save_adapter(guard.with_preset("strict"), tmp_path), tiny_base)
    assert loaded.config == guard.with_preset("strict").config
    assert loaded.thresholds_in("prompt") == (0.55,)
    card = (tmp_path / "README.md").read_text()
    assert "| mode prompt | strict 0.5500 (at most 0.05 of harmless texts flagged); balanced 0.7500" in card
    assert "320 harmless rows; ECE 0.100 before, 0.050 after (platt, on 40 harmless and 30 harmful rows) |" in card


def test_new_scores_drop_what_was_fitted_on_old_ones(guard: Adapter) -> None:
    guard.set_calibration(Calibration(scale=(2.0,), bias=(0.0,), threshold=(0.5,)))
    assert guard.config.modes == {}
    assert guard.config.preset is None


def test_probabilities_of_several_labels_stand_beside_each_other(
    tiny_base: Base, random_guard: Callable[..., Adapter]
) -> None:
    guard = random_guard(tiny_base, labels=("a", "b"))
    other = MAP.model_copy(update={"slope": 1.0})
    guard.set_mode("prompt", ModeCalibration(n_harmless=1, maps=(MAP, other)))
    found = guard.probabilities(np.array([[0.8, 0.8], [0.5, 0.2]]), "prompt")
    assert found == pytest.approx(np.array([[0.64 / 0.68, 0.8], [0.5, 0.2]]))
    with pytest.raises(AssertionError):
        guard.set_mode("prompt", ModeCalibration(n_harmless=1, maps=(MAP,)))
    assert torch.equal(guard.head.scale, torch.ones(2))


def test_a_pooled_encoder_reads_the_weighted_mean_of_its_kept_states() -> None:
    head = GuardHead(8, 1, pooled=True)
    assert head.query is not None
    torch.nn.init.normal_(head.query)
    states = torch.randn(2, 4, 8)
    keep = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1]]).bool()
    found = head(states, Tape(keep, 4, is_causal=False), None, 0).logits
    normed = head.norm(states)
    weights = (normed @ head.query / 8**0.5).masked_fill(~keep, -torch.inf).softmax(-1)
    mean = (weights[..., None] * normed).sum(1, keepdim=True)
    torch.testing.assert_close(found, head.linear(mean).expand(2, 4, 1))
