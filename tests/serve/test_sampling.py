"""The next token of one row, at the edges of what a request may ask for."""

from __future__ import annotations

import pytest
import torch

from safeside.serve.sampling import Sampler, Sampling


@pytest.mark.parametrize("temperature", [5e-324, 1e-40, 1e-6])
def test_a_temperature_near_zero_takes_the_likeliest_token(temperature: float) -> None:
    logits = torch.linspace(-30.0, 30.0, 50)
    assert Sampler(Sampling(max_tokens=1, temperature=temperature, seed=1)).draw(logits).id == 49
