"""Scores on their way out: bit for bit beside the states, and through logits to 1e-5."""

from __future__ import annotations

import math

import pytest
import torch

from safeside.vllm_plugin.slots import pack, read, unpack, write


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_travel_bit_for_bit(dtype: torch.dtype) -> None:
    states, values = torch.randn(5, 8).to(dtype), torch.rand(5, 3)
    values[2, 1] = math.nan
    found_states, found_values = unpack(pack(states, values)[[4, 0, 2]], 8)
    assert torch.equal(found_states, states[[4, 0, 2]])
    assert torch.equal(found_values.nan_to_num(9.0), values[[4, 0, 2]].nan_to_num(9.0))


def test_scores_are_differences_of_log_probabilities() -> None:
    logits, values = torch.randn(6, 40) * 8, torch.rand(6, 3) * torch.tensor([1.0, 1.0, 2.0])
    values[1, 0] = math.nan
    places = torch.tensor([39, 3, 20, 38])
    before = logits.clone()
    logprobs = write(logits, values, places).log_softmax(-1)
    assert torch.equal(write(before.bfloat16(), values, places), write(before.bfloat16().float(), values, places))
    found = torch.tensor([read(row, tells_strength=True) for row in logprobs[:, places].tolist()])
    assert math.isnan(found[1, 0])
    found[1, 0] = values[1, 0] = 0.0
    torch.testing.assert_close(found, values, atol=2e-5, rtol=0)
    others = [index for index in range(40) if index not in places.tolist()]
    torch.testing.assert_close(logprobs[:, others], before[:, others].log_softmax(-1), atol=1e-5, rtol=0)


def test_what_was_masked_is_no_score() -> None:
    """A grammar, or vLLM's -9999 in its place."""
    assert all(
        math.isnan(value) for value in [*read([-math.inf, -60.0]), *read([-9999.0, -9999.0]), *read([-60.0, math.nan])]
    )


def test_what_nobody_wrote_is_no_score() -> None:
    """Log-probabilities of unused ids in a base without adapters; what rounding adds is cut off."""
    assert all(math.isnan(value) for value in [*read([-9.1, -9.4, -7.9]), *read([-60.0, -57.0])])
    assert read([-60.0, -60.001, -58.999]) == [0.0, 1.0]
    assert read([-60.0, -59.5, -58.5], tells_strength=True) == [0.5, 1.5]
