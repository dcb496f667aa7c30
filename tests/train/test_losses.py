"""Losses against twins written out by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import get_type_hints

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from safeside.train.losses import answer_loss, balanced_weight, guard_loss, prefix_weights

SAME = 1e-6  # float32 sums of a few dozen terms


def logit_loss(logit: float, target: float, positive: float = 1.0) -> float:
    score = 1 / (1 + math.exp(-logit))
    return -(positive * target * math.log(score) + (1 - target) * math.log(1 - score))


def mean_loss(logits: Tensor, targets: Tensor, positive: Sequence[float]) -> float:
    losses = [
        logit_loss(logits[row, label].item(), targets[row, label].item(), positive[label])
        for row in range(logits.shape[0])
        for label in range(logits.shape[1])
    ]
    return sum(losses) / len(losses)


@pytest.fixture
def rows() -> tuple[Tensor, Tensor, Tensor]:
    """Logits, labels and soft targets of 8 rows with 3 labels."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(8, 3, generator=generator) * 2
    labels = (torch.rand(8, 3, generator=generator) < 0.4).float()
    return logits, labels, torch.rand(8, 3, generator=generator)


def test_guard_loss_is_cross_entropy_over_all_labels(rows: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, labels, _ = rows
    assert guard_loss(logits, labels).item() == pytest.approx(mean_loss(logits, labels, [1, 1, 1]), abs=SAME)


def test_class_weights_count_harmful_rows_by_label(rows: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, labels, _ = rows
    weight = torch.tensor([2.0, 0.5, 7.0])
    expected = mean_loss(logits, labels, weight.tolist())
    assert guard_loss(logits, labels, positive_weight=weight).item() == pytest.approx(expected, abs=SAME)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_soft_targets_take_their_share(rows: tuple[Tensor, Tensor, Tensor], share: float) -> None:
    logits, labels, soft = rows
    expected = (1 - share) * mean_loss(logits, labels, [3, 1, 1]) + share * mean_loss(logits, soft, [1, 1, 1])
    weight = torch.tensor([3.0, 1.0, 1.0])
    found = guard_loss(logits, labels, positive_weight=weight, soft=soft, soft_weight=share)
    assert found.item() == pytest.approx(expected, abs=SAME)


def test_losses_are_float32_whatever_comes_in(rows: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, labels, _ = rows
    assert guard_loss(logits.bfloat16(), labels).dtype == torch.float32
    ids, mask = torch.tensor([[1, 2, 0]]), torch.tensor([[False, True, True]])
    assert answer_loss(torch.randn(1, 3, 5).bfloat16(), ids, mask).dtype == torch.float32


def test_balanced_weights_give_both_classes_the_same_say() -> None:
    labels = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 1.0], [0.0, 1.0], [0.0, 1.0]])
    weight = balanced_weight(labels)
    assert weight.tolist() == [4.0, pytest.approx(2 / 3)]
    for label in range(2):
        harmful = labels[:, label].sum()
        assert weight[label] * harmful == pytest.approx(len(labels) - harmful)


def test_balanced_weights_of_one_class_stay_finite() -> None:
    assert balanced_weight(torch.zeros(4, 1)).tolist() == [3.0]
    assert balanced_weight(torch.ones(4, 1)).tolist() == [0.25]


def test_unknown_labels_count_for_nothing(rows: tuple[Tensor, Tensor, Tensor]) -> None:
    """The twin adds up the known entries one by one."""
    logits, labels, soft = rows
    labels[torch.rand(8, 3, generator=torch.Generator().manual_seed(3)) < 0.5] = torch.nan
    soft[2:5, 1] = torch.nan
    positive = [3.0, 0.5, 2.0]

    def by_hand(targets: Tensor, weight: Sequence[float]) -> float:
        losses = [
            logit_loss(logits[row, label].item(), targets[row, label].item(), weight[label])
            for row in range(8)
            for label in range(3)
            if not math.isnan(targets[row, label].item())
        ]
        return sum(losses) / len(losses)

    weight = torch.tensor(positive)
    assert guard_loss(logits, labels, positive_weight=weight).item() == pytest.approx(
        by_hand(labels, positive), abs=SAME
    )
    found = guard_loss(logits, labels, positive_weight=weight, soft=soft, soft_weight=0.3)
    expected = 0.7 * by_hand(labels, positive) + 0.3 * by_hand(soft, [1, 1, 1])
    assert found.item() == pytest.approx(expected, abs=SAME)


def test_unknown_labels_send_no_gradient(rows: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, labels, _ = rows
    labels[:, 1] = torch.nan
    logits.requires_grad_(True)
    guard_loss(logits, labels).backward()
    assert (logits.grad.abs().sum(0) > 0).tolist() == [True, False, True]
    nothing = guard_loss(logits, torch.full_like(labels, torch.nan))
    assert nothing.item() == 0.0
    assert nothing.requires_grad


def test_with_every_label_known_the_loss_is_pytorchs_to_the_bit(rows: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, labels, _ = rows
    assert torch.equal(guard_loss(logits, labels), F.binary_cross_entropy_with_logits(logits, labels))


def test_balanced_weights_leave_unknown_labels_out() -> None:
    labels = torch.tensor([[1.0, 0.0], [0.0, math.nan], [0.0, 1.0], [math.nan, 1.0]])
    assert balanced_weight(labels).tolist() == [2.0, 0.5]


def test_a_temperature_softens_both_sides(rows: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, labels, soft = rows
    expected = 0.0
    for logit, target in zip(logits.flatten().tolist(), soft.flatten().tolist(), strict=True):
        cooled = 1 / (1 + math.exp(-math.log(target / (1 - target)) / 2))
        expected += 4 * logit_loss(logit / 2, cooled) / soft.numel()
    found = guard_loss(logits, labels, soft=soft, soft_weight=1.0, temperature=2.0)
    assert found.item() == pytest.approx(expected, abs=10 * SAME)
    certain = guard_loss(logits, labels, soft=labels, soft_weight=1.0, temperature=2.0)
    assert certain.isfinite()


def test_answer_loss_predicts_each_answer_token_from_the_one_before() -> None:
    generator = torch.Generator().manual_seed(1)
    logits, ids = torch.randn(2, 6, 9, generator=generator), torch.randint(0, 9, (2, 6), generator=generator)
    is_answer = torch.tensor([[False, False, True, True, True, False], [False, False, False, False, True, True]])
    losses = [
        -logits[row, place - 1].log_softmax(-1)[ids[row, place]].item()
        for row in range(2)
        for place in range(6)
        if is_answer[row, place]
    ]
    assert answer_loss(logits, ids, is_answer).item() == pytest.approx(sum(losses) / len(losses), abs=SAME)


def test_answer_loss_sees_no_prompt_and_no_padding() -> None:
    generator = torch.Generator().manual_seed(2)
    logits, ids = torch.randn(1, 6, 9, generator=generator), torch.randint(0, 9, (1, 6), generator=generator)
    is_answer = torch.tensor([[False, False, True, True, False, False]])
    before = answer_loss(logits, ids, is_answer)
    logits[0, 0] = 50.0  # predicts a prompt token
    logits[0, 3:] = -50.0  # predict padding
    ids[0, :2], ids[0, 4:] = 8, 8
    assert torch.equal(answer_loss(logits, ids, is_answer), before)


def test_answer_loss_reaches_exactly_the_places_before_answers() -> None:
    logits = torch.randn(1, 6, 9, requires_grad=True)
    is_answer = torch.tensor([[False, False, True, True, False, False]])
    answer_loss(logits, torch.zeros(1, 6, dtype=torch.long), is_answer).backward()
    assert (logits.grad[0].abs().sum(-1) > 0).tolist() == [False, True, True, False, False, False]


def test_weighted_rows_are_a_weighted_mean(rows: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, labels, soft = rows
    weights = torch.tensor([0.5, 0.0, 2.0, 1.0, 0.1, 0.3, 0.0, 1.0])
    expected = 0.0
    for row, weight in enumerate(weights.tolist()):
        one = guard_loss(logits[row : row + 1], labels[row : row + 1], soft=soft[row : row + 1], soft_weight=0.3)
        expected += weight * one.item() / weights.sum().item()
    found = guard_loss(logits, labels, soft=soft, soft_weight=0.3, row_weight=weights)
    assert found.item() == pytest.approx(expected, abs=SAME)


def test_weighted_rows_leave_out_what_is_not_known(rows: tuple[Tensor, Tensor, Tensor]) -> None:
    """Against loops: hard and soft part are each a weighted mean over their own known entries."""
    logits, labels, soft = rows
    labels, soft = labels.clone(), soft.clone()
    labels[0], labels[2, 0], soft[3], soft[4, -1] = torch.nan, torch.nan, torch.nan, torch.nan
    weights, positive = [0.5, 0.0, 2.0, 1.0, 0.1, 0.3, 0.0, 1.0], [3.0] * labels.shape[1]

    def mean_of(targets: Tensor, positive: list[float]) -> float:
        total = weight_sum = 0.0
        for row, weight in enumerate(weights):
            for label in range(targets.shape[1]):
                target, score = targets[row, label].item(), logits[row, label].sigmoid().item()
                if not math.isnan(target):
                    total -= weight * (positive[label] * target * math.log(score) + (1 - target) * math.log(1 - score))
                    weight_sum += weight
        return total / weight_sum

    expected = 0.7 * mean_of(labels, positive) + 0.3 * mean_of(soft, [1.0] * labels.shape[1])
    options = {"positive_weight": torch.tensor(positive), "soft": soft, "soft_weight": 0.3}
    found = guard_loss(logits, labels, **options, row_weight=torch.tensor(weights))
    assert found.item() == pytest.approx(expected, abs=SAME)
    equal = guard_loss(logits, labels, **options, row_weight=torch.full((len(weights),), 0.7))
    assert equal.item() == pytest.approx(guard_loss(logits, labels, **options).item(), abs=SAME)


@pytest.mark.parametrize("nothing", ["labels", "weights"])
def test_where_nothing_counts_the_loss_is_0_with_a_gradient(nothing: str) -> None:
    logits = torch.randn(3, 2, requires_grad=True)
    labels = torch.full((3, 2), torch.nan if nothing == "labels" else 1.0)
    loss = guard_loss(logits, labels, row_weight=torch.full((3,), 1.0 if nothing == "labels" else 0.0))
    loss.backward()
    assert loss.item() == 0.0
    assert logits.grad is not None
    assert not logits.grad.any()


def prefix_weights_by_hand(length: int, start: int, width: int) -> list[float]:
    """Half on the last token, half rising 1, 2, 3, ... over the answer; all on the last one without an answer."""
    weights = [0.0] * width
    answer = list(range(start, length))
    for count, place in enumerate(answer, 1):
        weights[place] = 0.5 * count / sum(range(1, len(answer) + 1))
    weights[length - 1] += 0.5 if answer else 1.0
    return weights


def test_prefixes_weigh_as_by_hand() -> None:
    lengths, starts = [7, 4, 5, 3, 1], [2, 3, 5, 1, 1]  # rows 2 and 4 are prompts without an answer
    keep = torch.arange(7) < torch.tensor(lengths)[:, None]
    found = prefix_weights(keep, torch.tensor(starts))
    for row, (length, start) in enumerate(zip(lengths, starts, strict=True)):
        assert found[row].tolist() == pytest.approx(prefix_weights_by_hand(length, start, 7), abs=SAME)
        assert found[row].sum() == pytest.approx(1.0, abs=SAME)


@pytest.mark.parametrize("function", [guard_loss, balanced_weight, answer_loss, prefix_weights])
def test_shapes_in_annotations_can_be_read(function: object) -> None:
    """An unquoted axis such as ``Float[Tensor, K]`` is a name that does not exist."""
    assert get_type_hints(function)["return"]
