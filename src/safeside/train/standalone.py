"""The baseline without a base: a transformer of its own that costs as many multiply-adds as an adapter.

The same blocks, read-out and loop as an LST guard, but its states start from embeddings that it learns from scratch.
It has the adapter's depth and width; what the adapter spends on projections from the base goes to its feed-forward.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from safeside.adapters.adapter import Adapter, GuardHead
from safeside.adapters.blocks import Rotary, SideBlock, attention_bias
from safeside.adapters.sizing import adapter_matmuls
from safeside.base.model import Base
from safeside.base.taps import Tape
from safeside.errors import ConfigError
from safeside.train.taps import Batch, Forward


@dataclass(frozen=True, slots=True)
class StandaloneShape:
    """Every dimension of a Standalone."""

    n_tokens: int
    depth: int
    width: int
    feed_forward: int
    head_dim: int = 32
    query_group: int = 1
    n_labels: int = 1
    is_causal: bool = True
    pooled: bool = False


class Standalone(nn.Module):
    """A guard that reads ids and nothing of the base.  It is a ``Source`` itself: a batch in, logits out."""

    def __init__(self, shape: StandaloneShape) -> None:
        super().__init__()
        self.shape = shape
        self.embedding = nn.Embedding(shape.n_tokens, shape.width)
        nn.init.normal_(self.embedding.weight, std=0.02)  # learns faster than from torch's 1.0
        self.blocks = nn.ModuleList(
            SideBlock(shape.width, shape.head_dim, shape.feed_forward, shape.query_group) for _ in range(shape.depth)
        )
        self.rotary = Rotary(shape.head_dim)
        self.head = GuardHead(shape.width, shape.n_labels, pooled=shape.pooled)

    def forward(self, batch: Batch) -> Forward:
        """Logits (B, T, K) at every token; padding on either side changes nothing."""
        tape = Tape(batch.keep, batch.ids.shape[1], is_causal=self.shape.is_causal)
        states = self.embedding(batch.ids)
        rotary, bias = self.rotary(tape.positions), attention_bias(tape.attend, states.dtype)
        for index, block in enumerate(self.blocks):
            states = block(states, rotary, bias, None, index)
        return Forward(self.head(states, tape, None, 0), None)


def create_standalone(base: Base, adapter: Adapter, seed: int = 0) -> Standalone:
    """A fresh Standalone with the base's vocabulary that costs what the LST guard ``adapter`` costs."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Standalone(matched_shape(adapter, base.model.config.get_text_config().vocab_size))
    return model.to(base.device)


def matched_shape(adapter: Adapter, n_tokens: int) -> StandaloneShape:
    """The adapter's depth and width, and the feed-forward that brings the multiply-adds closest to the adapter's."""
    config = adapter.config
    if config.kind != "lst" or config.role != "guard":
        raise ConfigError(
            "A standalone baseline is matched to a guard of kind 'lst'; got "
            f"{config.kind!r} with role {config.role!r}. Pass an LST guard."
        )
    depth = max(1, len(config.layers) - 1)  # as Lst builds it
    attention = 2 * config.width**2 + 2 * config.width**2 // config.query_group  # queries, output; keys, values
    left = adapter_matmuls(adapter) - config.width * len(config.labels) - depth * attention
    return StandaloneShape(
        n_tokens=n_tokens,
        depth=depth,
        width=config.width,
        feed_forward=round(left / (depth * 3 * config.width)),
        head_dim=config.head_dim,
        query_group=config.query_group,
        n_labels=len(config.labels),
        is_causal=not config.base.is_encoder,
        pooled=config.readout == "attention",
    )


def standalone_matmuls(model: Standalone) -> int:
    """Multiply-adds a token: embeddings are looked up, so they cost none."""
    return adapter_matmuls(model) - model.embedding.weight.numel()
