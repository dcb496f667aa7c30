"""What a geometry is said to cost is what a base of it does."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from geometry import SERVED_BYTES, cache_bytes, side_cache_bytes
from safeside import Adapter, Base, attach


@pytest.mark.parametrize(
    ("kind", "options"),
    [("lst", {}), ("lst", {"layers": (1, 3)}), ("lst", {"width": 64, "query_group": 2}), ("rtb", {}), ("plr", {})],
)
def test_a_token_takes_the_cache_that_is_told(
    tiny_base: Base, random_guard: Callable[..., Adapter], kind: str, options: dict[str, object]
) -> None:
    guard, cache, n_tokens = random_guard(tiny_base, kind=kind, **options), DynamicCache(), 40
    with attach(tiny_base, guards=[guard]), torch.no_grad():
        tiny_base.decoder(input_ids=torch.ones(1, n_tokens, dtype=torch.long), past_key_values=cache, use_cache=True)
    found = [layer.keys.nbytes + layer.values.nbytes for layer in cache.layers]
    unit = tiny_base.dtype.itemsize / SERVED_BYTES * n_tokens
    assert sum(found[: tiny_base.n_layers]) == cache_bytes(tiny_base) * unit
    side = found[tiny_base.n_layers : tiny_base.n_layers + guard.n_cache_layers]  # then the scores themselves
    assert sum(side) == side_cache_bytes(guard) * unit
