"""The tiny models themselves: every family loads, speaks its tokenizer, and gives logits that differ clearly."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from safeside import Base
from tiny import ENCODERS, FAMILY_NAMES, N_TOKENS, SPECIAL, VOCABULARY


@pytest.mark.parametrize("family_name", [*FAMILY_NAMES, "cohere2", *ENCODERS])
def test_a_tiny_model_of_every_family_loads(tiny_family: Callable[[str], Base], family_name: str) -> None:
    base = tiny_family(family_name)
    text = "the cat said: caf\u00e9\n"
    ids = base.tokenizer(text, add_special_tokens=False).input_ids
    assert base.tokenizer.decode(ids) == text
    assert max(ids) < N_TOKENS <= VOCABULARY
    assert [base.tokenizer.convert_tokens_to_ids(token) for token in SPECIAL] == list(range(len(SPECIAL)))
    with torch.no_grad():
        output = base.model(torch.tensor([ids]))
    assert output[0].std(-1).min() > 0.1
