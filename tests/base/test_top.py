"""A base's top blocks, built anew from its configuration: what the checks of a copy catch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from safeside import Base, load_base
from safeside.base.taps import Tape
from safeside.base.top import Top, described
from safeside.errors import ConfigError, UnknownNameError, UnsupportedError
from tiny import FAMILY_NAMES, make_tiny


def test_a_description_names_shapes_only(tiny_base: Base) -> None:
    values = described(tiny_base)
    assert (values["model_type"], values["hidden_size"], values["num_hidden_layers"]) == ("llama", 64, 3)
    assert not [name for name in values if "dtype" in name or "implementation" in name or name.startswith("_")]


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_it_holds_blocks_and_norm_alone(tiny_family: Callable[[str], Base], family: str) -> None:
    base = tiny_family(family)
    top = Top(described(base), 2)
    blocks = sum(parameter.numel() for block in base.blocks[1:] for parameter in block.parameters())
    assert sum(parameter.numel() for parameter in top.parameters()) - blocks <= 2 * base.d_model
    assert all(parameter.dtype == torch.float32 for parameter in top.parameters())


def test_code_in_a_description_is_left_alone(tiny_base: Base) -> None:
    values = {**described(tiny_base), "attn_implementation": "stranger/kernels", "_attn_implementation": "x/y"}
    top = Top(values | {"dtype": "bfloat16", "auto_map": {"AutoModel": "x--y.Z"}}, 1)
    assert top.config._attn_implementation == "sdpa"
    assert next(top.parameters()).dtype == torch.float32


def test_blocks_that_know_their_place_are_refused(tmp_path: Path) -> None:
    """gpt2 can divide its attention by the number of the block: alone, the second block would be the first."""
    base = load_base(make_tiny("gpt2", tmp_path, scale_attn_by_inverse_layer_idx=True))
    top = Top(described(base), 2)
    top.copy_from(base, shares=False)
    with pytest.raises(UnsupportedError, match=r"their place in the stack counts\. Use another kind"):
        top.check_same(base)
    whole = Top(described(base), 3)
    whole.copy_from(base, shares=False)
    whole.check_same(base)


def test_blocks_of_another_shape_are_refused(tiny_family: Callable[[str], Base], tiny_base: Base) -> None:
    with pytest.raises(UnsupportedError, match="cannot be built anew"):
        Top(described(tiny_base), 2).copy_from(tiny_family("gpt2"), shares=False)


def test_a_description_that_is_none(tiny_base: Base) -> None:
    with pytest.raises(ConfigError, match="blocks say num_hidden_layers = 3; expected a number from depth 4 on"):
        Top(described(tiny_base), 4)
    with pytest.raises((UnsupportedError, UnknownNameError)):
        Top({}, 1)


def test_the_state_is_handed_on_as_it_is(tiny_family: Callable[[str], Base]) -> None:
    """gemma multiplies what enters its decoder by 8: that is for embeddings, not for states."""
    base = tiny_family("gemma")
    top = Top(described(base), 1)
    top.copy_from(base, shares=True)
    hidden = torch.randn(1, 4, 64)
    tape = Tape(torch.ones(1, 4, dtype=torch.bool), 4)
    with torch.no_grad():
        expected = top.norm(
            base.blocks[-1](
                hidden,
                attention_mask=None,
                position_embeddings=base.decoder.rotary_emb(hidden, torch.arange(4)[None]),
            )
        )
        torch.testing.assert_close(top(hidden, tape, None), expected, rtol=1e-4, atol=1e-4)
