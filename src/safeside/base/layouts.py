"""Where the blocks of an architecture keep their weights, as data: what a pruned start copies.

Only blocks that the side networks' own block can imitate are listed: attention, then a feed-forward, each added to the
residual stream.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from safeside.base.model import Base
from safeside.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Layout:
    """Paths of the matrices and norms inside one block; several in one name means that they are stacked in one."""

    model_types: tuple[str, ...]
    """``model_type`` of each architecture that is laid out so."""
    queries_keys_values: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    """Three matrices, or one that holds them all."""
    output: str = "self_attn.o_proj"
    """From the heads back to the residual stream."""
    gate_and_up: tuple[str, ...] = ()
    """Of a gated feed-forward: two matrices, or one that holds both; none where it has no gate, or experts."""
    down: str = ""
    """Of a gated feed-forward: back to the residual stream."""
    attention_norm: str = "input_layernorm"
    """Before the attention; empty where the block reads the stream as it is (post-norm encoders)."""
    feed_forward_norm: str = "post_attention_layernorm"
    """Before the feed-forward."""
    norm_offset: float = 0.0
    """Added to a norm's weight when it is used (gemma: 1)."""
    frequencies: str = "rotary_emb.inv_freq"
    """Buffer of the decoder with the rotary frequencies; empty for learned positions."""


_GATED = {"gate_and_up": ("mlp.gate_proj", "mlp.up_proj"), "down": "mlp.down_proj"}
_ENCODER = ("attention.self.query", "attention.self.key", "attention.self.value")
LAYOUTS = (
    Layout(("llama", "mistral", "qwen2", "qwen3", "smollm3", "granite"), **_GATED),  # type: ignore[arg-type]
    Layout(("gemma",), norm_offset=1.0, **_GATED),  # type: ignore[arg-type]
    Layout(("phi3",), ("self_attn.qkv_proj",), gate_and_up=("mlp.gate_up_proj",), down="mlp.down_proj"),
    Layout(("mixtral", "qwen3_moe", "gpt_oss")),
    Layout(
        ("bert", "electra", "roberta"),
        _ENCODER,
        output="attention.output.dense",
        attention_norm="",
        feed_forward_norm="attention.output.LayerNorm",
        frequencies="",
    ),
    Layout(
        ("distilbert",),
        ("attention.q_lin", "attention.k_lin", "attention.v_lin"),
        output="attention.out_lin",
        attention_norm="",
        feed_forward_norm="sa_layer_norm",
        frequencies="",
    ),
)


@dataclass(slots=True)
class BlockWeights:
    """The matrices of one block, or anything of their shapes; rows are outputs."""

    queries: Tensor
    """(query heads * h, D)"""
    keys: Tensor
    """(key heads * h, D)"""
    values: Tensor
    """(key heads * h, D)"""
    output: Tensor
    """(D, query heads * h)"""
    attention_norm: Tensor | None
    """(D,); None where there is no norm before the attention."""
    feed_forward_norm: Tensor
    """(D,)"""
    gate: Tensor | None = None
    """(f, D); None, as the two below, where the feed-forward has no gate."""
    up: Tensor | None = None
    """(f, D)"""
    down: Tensor | None = None
    """(D, f)"""


@dataclass(frozen=True, slots=True)
class Heads:
    """The attention heads of a base."""

    n_queries: int
    """Query heads."""
    n_groups: int
    """Key and value heads: each serves ``n_queries / n_groups`` query heads."""
    width: int
    """Of one head, h."""
    scale: float
    """Factor of the products of queries and keys."""
    frequencies: Tensor | None
    """(h / 2,) rotary angles (radians) a token of the pairs (i, i + h/2); None for learned positions."""
    residual: float
    """Factor of what a block adds to the residual stream."""


def layout_of(base: Base) -> Layout:
    """The layout of the base's architecture; one without is a ConfigError that lists those with one."""
    model_type = base.model.config.get_text_config().model_type
    for layout in LAYOUTS:
        if model_type in layout.model_types:
            return layout
    known = ", ".join(sorted(name for layout in LAYOUTS for name in layout.model_types))
    raise ConfigError(
        f"A side network cannot start from the weights of a {model_type!r} base: its blocks are built otherwise. "
        f"Expected one of {known}. Use start = 'random'."
    )


def heads_of(base: Base) -> Heads:
    """How many attention heads the base has, their width, scale and rotary frequencies."""
    config = base.model.config.get_text_config()
    fields = config.to_dict()
    n_queries = int(config.num_attention_heads)
    width = int(fields.get("head_dim") or base.d_model // n_queries)
    path = layout_of(base).frequencies
    frequencies = base.decoder.get_buffer(path) if path else None
    if frequencies is not None and not frequencies.is_meta:
        frequencies = frequencies.float().cpu()
    if frequencies is not None and 2 * len(frequencies) != width:
        raise ConfigError(
            f"{base.name} turns {2 * len(frequencies)} of the {width} entries of a head by position; expected all. "
            "Use start = 'random'."
        )
    return Heads(
        n_queries=n_queries,
        n_groups=int(fields.get("num_key_value_heads") or n_queries),
        width=width,
        scale=float(fields.get("attention_multiplier") or width**-0.5),
        frequencies=frequencies,
        residual=float(fields.get("residual_multiplier") or 1.0),
    )


def block_weights(base: Base, block: nn.Module, tensor_of: Callable[[nn.Parameter], Tensor]) -> BlockWeights:
    """The block's weights, each seen through ``tensor_of``: itself, or what was measured of it."""
    layout, heads = layout_of(base), heads_of(base)

    def read(path: str) -> Tensor:
        return tensor_of(block.get_submodule(path).get_parameter("weight"))

    def stacked(paths: tuple[str, ...], sizes: list[int]) -> tuple[Tensor, ...]:
        return torch.split(torch.cat([read(path) for path in paths]), sizes)

    queried, grouped = heads.n_queries * heads.width, heads.n_groups * heads.width
    queries, keys, values = stacked(layout.queries_keys_values, [queried, grouped, grouped])
    result = BlockWeights(
        queries,
        keys,
        values,
        output=read(layout.output),
        attention_norm=read(layout.attention_norm) if layout.attention_norm else None,
        feed_forward_norm=read(layout.feed_forward_norm),
    )
    if layout.down:
        result.down = read(layout.down)
        result.gate, result.up = stacked(layout.gate_and_up, [result.down.shape[1]] * 2)
    return result
