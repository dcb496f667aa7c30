"""Low-rank updates of single layers, of both kinds of linear layer."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from safeside.base.updates import (
    LiveUpdates,
    LowRank,
    add_to_weight,
    has_live_updates,
    linear_layer,
    widths_of,
)
from twin import close

TOLERANCE = 1e-5


def model() -> nn.Module:
    return nn.ModuleDict({"plain": nn.Linear(3, 5), "other": Conv1D(5, 3), "norm": nn.LayerNorm(3)})


def update() -> LowRank:
    generator = torch.Generator().manual_seed(0)
    return LowRank(torch.randn(2, 3, generator=generator), torch.randn(5, 2, generator=generator))


@pytest.mark.parametrize("name", ["plain", "other"])
def test_live_is_added_to_the_weight(name: str) -> None:
    whole, given = model(), torch.randn(4, 3)
    layer = linear_layer(whole, name)
    assert widths_of(layer) == (3, 5)
    with torch.no_grad():
        before = layer(given)
        with LiveUpdates(whole, {name: update()}, {name: 0.5}) as live:
            assert has_live_updates(whole)
            found = layer(given)
        live.remove()
        assert torch.equal(layer(given), before)
        assert not has_live_updates(whole)
        add_to_weight(layer, 0.5 * update().matrix)
        close(found, layer(given), TOLERANCE)


def test_a_scale_can_be_learnt() -> None:
    whole, scale = model(), nn.Parameter(torch.ones(()))
    with LiveUpdates(whole, {"plain": update()}, {"plain": scale}):
        whole["plain"](torch.ones(1, 3)).sum().backward()
    assert float(scale.grad) == pytest.approx(float((update().matrix @ torch.ones(3)).sum()), rel=1e-4)


def test_half_precision_is_summed_in_float32_and_rounded_once() -> None:
    layer, given = nn.Linear(3, 5).bfloat16(), torch.randn(4, 3).bfloat16()
    whole = nn.ModuleDict({"plain": layer})
    with torch.no_grad():
        expected = (layer(given).float() + given.float() @ update().matrix.T).bfloat16()
        with LiveUpdates(whole, {"plain": update()}, {"plain": 1.0}):
            assert torch.equal(layer(given), expected)


def test_what_is_no_linear_layer_hooks_nothing() -> None:
    whole = model()
    for name, error in (("norm", TypeError), ("missing", AttributeError)):
        with pytest.raises(error):
            LiveUpdates(whole, {"plain": update(), name: update()}, {"plain": 1.0, name: 1.0})
    assert not has_live_updates(whole)


def test_a_scaled_update() -> None:
    close(update().scaled(-2.0).matrix, -2.0 * update().matrix, TOLERANCE)
    assert update().rank == 2
