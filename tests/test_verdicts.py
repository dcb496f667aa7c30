"""From scores to verdicts: the nearest label decides, and what is not a number fails closed."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import DynamicCache

from safeside import Adapter, Base, attach, load_adapter, save_adapter
from safeside.adapters.config import Calibration
from safeside.verdicts import verdict_of
from twin import SAME, pad, positions_of, run_by_hand

THRESHOLDS = (0.3, 0.8)


@pytest.fixture
def guard(tiny_base: Base, random_guard) -> Adapter:
    """Two labels with thresholds of their own."""
    guard = random_guard(tiny_base, labels=("hate", "violence"))
    guard.set_calibration(Calibration(scale=(1.0, 1.0), bias=(0.0, 0.0), threshold=THRESHOLDS))
    return guard


@pytest.mark.parametrize(
    ("scores", "label", "flagged"),
    [
        ((0.1, 0.2), "hate", False),  # 0.2 below against 0.6 below
        ((0.0, 0.79), "violence", False),
        ((0.3, 0.0), "hate", True),  # at the threshold is flagged
        ((0.35, 0.95), "violence", True),  # 0.15 over against 0.05 over
        ((0.9, 0.95), "hate", True),
    ],
)
def test_the_label_farthest_over_its_threshold_decides(guard, scores, label: str, flagged: bool) -> None:
    verdict = verdict_of(guard, scores)
    index = guard.config.labels.index(label)
    assert (verdict.task, verdict.label, verdict.flagged) == ("harm", label, flagged)
    assert (verdict.score, verdict.threshold) == (scores[index], THRESHOLDS[index])
    assert verdict.reason == ""


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_not_a_number_fails_closed(guard: Adapter, broken: float) -> None:
    verdict = verdict_of(guard, (0.0, broken), mode="answer", notes=["a note"])
    assert verdict.flagged
    assert verdict.label == "violence"
    assert math.isnan(verdict.probability)
    assert (verdict.mode, verdict.reason) == ("answer", "the score is not a number: failing closed; a note")


def test_an_uncalibrated_guard_flags_from_one_half(tiny_base: Base, random_guard) -> None:
    guard = random_guard(tiny_base)
    assert [verdict_of(guard, (score,)).flagged for score in (0.49, 0.5)] == [False, True]


def test_every_guard_judges_prompt_and_answer(tiny_base: Base, guard: Adapter, random_guard) -> None:
    """A batch padded left, with answers of different lengths that the batch padded behind."""
    other = random_guard(tiny_base, "leak", seed=9, kind="plr")
    rows, ends, lengths = [[11, 90, 40, 77, 200, 9], [70, 12, 150, 33]], [4, 1], [2, 2]
    ids, keep = pad([rows[0], [*rows[1][:3], 0]], "left")
    with torch.no_grad(), attach(tiny_base, guards=[guard, other]) as attachment:
        cache = DynamicCache()
        with attachment.request(prompt_end=ends):
            tiny_base.model(ids, attention_mask=keep, position_ids=positions_of(keep), past_key_values=cache)
        found = attachment.verdicts(cache, lengths)
    for row, end in enumerate(ends):
        assert [(verdict.task, verdict.mode) for verdict in found[row]] == [
            ("harm", "prompt"), ("leak", "prompt"), ("harm", "answer"), ("leak", "answer"),
        ]  # fmt: skip
        tokens = torch.tensor([rows[row]])
        for index, judge in enumerate((guard, other)):
            scores = run_by_hand(tiny_base, judge, tokens).scores[0]
            for verdict, position in ((found[row][index], end - 1), (found[row][2 + index], end + lengths[row] - 1)):
                assert min(abs(verdict.score - score) for score in scores[position].tolist()) < SAME


def test_a_prompt_alone_gets_one_verdict(tiny_base: Base, guard: Adapter) -> None:
    with torch.no_grad(), attach(tiny_base, guards=[guard]) as attachment, attachment.request(prompt_end=[3]):
        cache = DynamicCache()
        tiny_base.model(torch.tensor([[11, 90, 40]]), past_key_values=cache)
        assert [verdict.mode for verdict in attachment.verdicts(cache)[0]] == ["prompt"]
        tiny_base.model(torch.tensor([[7]]), past_key_values=cache)
        assert [verdict.mode for verdict in attachment.verdicts(cache)[0]] == ["prompt", "answer"]
        assert [verdict.mode for verdict in attachment.verdicts(cache, [0])[0]] == ["prompt"]


def test_a_guard_on_other_weights_says_so(tiny_base: Base, random_guard, tmp_path) -> None:
    guard = random_guard(tiny_base)
    reference = guard.config.base
    other = reference.fingerprint.model_copy(update={"weights": "0" * 16})
    guard.config = guard.config.model_copy(update={"base": reference.model_copy(update={"fingerprint": other})})
    loaded = load_adapter(save_adapter(guard, tmp_path / "guard"), tiny_base, allow_mismatch="weights")
    assert verdict_of(loaded, (0.1,)).reason == (
        "the base's weights or chat template differ from those the guard was trained on"
    )
