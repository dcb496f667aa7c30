"""A start from the base's own weights: structured pruning by importance (LST, Sung et al. 2022, "fisher" start).

What is kept, and how it is carried over:

- *Residual stream.*  One set of ``width`` indices for the whole network, those whose weights have the highest summed
  importance over all blocks: side states are added up across blocks and mixed with projected taps, so an index must
  mean the same everywhere.  Down-projections start as the selection of these indices, norms inherit them.
- *Heads.*  A side group is as many query heads of one of the base's groups as its ``query_group``, with the keys and
  values of that group; which may give several.  Groups are taken whole, most important first; the last one may give
  only its best query heads.  Of a head wider than the side's, queries and keys keep those rotary pairs (i, i + h/2)
  whose frequency is nearest to the side pair's own: the same where both turn by powers of 10,000 and one width divides
  the other, else the nearest that keep their order.  Without rotary positions the most important entries are kept.
  Values keep the most important entries.
- *Feed-forward.*  The hidden units of highest importance over gate, up and down together.

Block l of the ladder starts from block l of the base.  A tap is at unit root-mean-square, so what a block adds is
divided by the mean root-mean-square of the states that it read in the base.

What has no counterpart is left out: biases, the norms of qwen3 on queries and keys, the means that encoders' norms
subtract, sliding windows, gpt-oss's sinks.  A feed-forward without a gate (encoders) or of experts keeps its random
start.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from safeside.adapters.adapter import Adapter
from safeside.adapters.blocks import Attention, SideBlock, TapProjection, rotary_frequencies
from safeside.adapters.lst import Lst
from safeside.base.layouts import BlockWeights, Heads, block_weights, heads_of, layout_of
from safeside.base.model import Base
from safeside.errors import ConfigError
from safeside.train.importance import Importance
from safeside.train.standalone import Standalone, create_standalone
from safeside.train.taps import Batch, record_states

_TOKENS_TOGETHER = 1024


@dataclass(frozen=True, slots=True)
class KeptGroup:
    """What one side group takes of one group of the base."""

    query_heads: tuple[int, ...]
    """Indices of the query heads, rising."""
    group: int
    """Index of its key and value head."""
    matched: Tensor
    """(head_dim,) entries of queries and keys, in the side head's order."""
    values: Tensor
    """(head_dim,) entries of values, rising."""


@dataclass(frozen=True, slots=True)
class KeptBlock:
    """What one side block takes of one block of the base."""

    groups: tuple[KeptGroup, ...]
    """One for each head of keys of the side."""
    feed_forward: Tensor | None
    """Hidden units, rising; None where they cannot be carried over."""


def start_from_base(base: Base, adapter: Adapter, importance: Importance) -> Tensor:
    """Give an ``lst`` adapter the pruned weights of ``base``; returns the kept residual indices, rising.

    An aligner's up-projection stays zero.  What ``check_start`` refuses is a ConfigError.
    """
    trunk = check_start(base, adapter)
    scores = stream_importance(importance)
    stream = top(scores, trunk.width)
    for projection in trunk.taps.values():
        assert isinstance(projection, TapProjection)
        _select(projection, stream, scores)
    for block, layer in zip(trunk.blocks, trunk.rungs or [trunk.first], strict=True):
        assert isinstance(block, SideBlock)
        index = max(layer, 1) - 1
        prune_block(base, index, block, stream, importance)
    return stream


def check_start(base: Base, adapter: Adapter) -> Lst:
    """The trunk, if it can start from ``base``: by shapes alone, before anything is measured.

    Another kind, heads narrower than the adapter's, more side heads than the base has query heads and larger groups
    than the base's, or more of them than it can fill, are ConfigErrors.
    """
    trunk: nn.Module = adapter.trunk
    if not isinstance(trunk, Lst):
        raise ConfigError(f"Only kind 'lst' starts from the base's weights; got {adapter.config.kind!r}.")
    block = trunk.blocks[0]
    assert isinstance(block, SideBlock)
    _check_fit(base, heads_of(base), block.attention)
    return trunk


def create_pruned_standalone(base: Base, adapter: Adapter, importance: Importance, seed: int = 0) -> Standalone:
    """The standalone baseline of ``adapter``, started from the base: its blocks, and what the first reads of a token.

    Kept columns both.  What the base does not have (a read-out, more hidden units than its own) keeps its random start.
    """
    model = create_standalone(base, adapter, seed)
    stream = top(stream_importance(importance), model.shape.width)
    with torch.no_grad():
        model.embedding.weight.copy_(token_states(base, model.shape.n_tokens, stream))
    layers = adapter.config.layers[1:] or adapter.config.layers
    for block, layer in zip(model.blocks, layers, strict=True):
        assert isinstance(block, SideBlock)
        prune_block(base, max(layer, 1) - 1, block, stream, importance, is_normed=False)
    return model


@torch.no_grad()
def token_states(base: Base, n_tokens: int, stream: Tensor) -> Tensor:
    """(n_tokens, d) the entries ``stream`` (d,) of what the base's first block reads of each token, float32 on the CPU.

    That is a row of the embeddings where the base takes them as they are; others scale or norm them, or add positions:
    here the token's own at the second place, for the first is mostly that of one special token.
    """
    parts = []
    for start in range(0, n_tokens, _TOKENS_TOGETHER):
        ids = torch.arange(start, min(start + _TOKENS_TOGETHER, n_tokens), device=base.device)[:, None].repeat(1, 2)
        batch = Batch(tuple(range(len(ids))), ids, torch.ones_like(ids, dtype=torch.bool))
        parts.append(record_states(base, batch, (0,))[0][:, -1].float().cpu()[:, stream])
    return torch.cat(parts)


def top(scores: Tensor, n_kept: int) -> Tensor:
    """Indices of the highest scores, rising; of equals the first."""
    order = torch.sort(scores, descending=True, stable=True).indices[:n_kept]
    return order.sort().values


def stream_importance(importance: Importance) -> Tensor:
    """(D,) importance of each index of the residual stream: of every weight that reads or writes it."""
    total = torch.zeros(importance.blocks[0].output.shape[0])
    for block in importance.blocks:
        readers = (block.queries, block.keys, block.values, block.gate, block.up)
        writers = (block.output, block.down)
        total += sum(weight.sum(0) for weight in readers if weight is not None)
        total += sum(weight.sum(1) for weight in writers if weight is not None)
    return total


def _select(projection: TapProjection, stream: Tensor, scores: Tensor) -> None:
    """Start a down-projection as the selection of ``stream``; one of low rank selects the most important of them."""
    first, last = projection.project[0], projection.project[-1]
    assert isinstance(first, nn.Linear)
    assert isinstance(last, nn.Linear)
    with torch.no_grad():
        last.bias.zero_()
        last.weight.zero_()
        if first is last:
            last.weight[torch.arange(len(stream)), stream] = 1.0
            return
        places = top(scores[stream], first.out_features)
        ranks = torch.arange(len(places))
        first.weight.zero_()
        first.weight[ranks, stream[places]] = 1.0
        last.weight[places, ranks] = 1.0


def keep_block(squares: BlockWeights, heads: Heads, side: Attention, n_hidden: int) -> KeptBlock:
    """What to keep of one block, by the importance of its weights."""
    hidden = None
    if squares.gate is not None and squares.up is not None and squares.down is not None:
        hidden = top(squares.gate.sum(1) + squares.up.sum(1) + squares.down.sum(0), n_hidden)
    size = side.query_group
    kept = keep_heads(squares, heads, side.n_heads, size)
    chosen = [tuple(kept[start : start + size]) for start in range(0, side.n_heads, size)]
    return KeptBlock(tuple(_keep_group(squares, heads, side.head_dim, members) for members in chosen), hidden)


def keep_heads(squares: BlockWeights, heads: Heads, n_heads: int, size: int = 1) -> list[int]:
    """Query heads, group by group: the most important groups, of the last one the most important heads; rising.

    Of each group a multiple of ``size``, so that so many next to each other are of one group.
    """
    queries = squares.queries.sum(1) + squares.output.sum(0)
    by_head = queries.view(heads.n_queries, heads.width).sum(1)
    shared = (squares.keys.sum(1) + squares.values.sum(1)).view(heads.n_groups, heads.width).sum(1)
    in_group = heads.n_queries // heads.n_groups
    by_group = by_head.view(heads.n_groups, in_group).sum(1) + shared
    kept: list[int] = []
    for group in torch.sort(by_group, descending=True, stable=True).indices.tolist():
        members = by_head[group * in_group : (group + 1) * in_group]
        n_taken = min(in_group // size * size, n_heads - len(kept))
        kept += [group * in_group + int(place) for place in top(members, n_taken)]
        if len(kept) == n_heads:
            break
    return sorted(kept)


def _keep_group(squares: BlockWeights, heads: Heads, head_dim: int, query_heads: tuple[int, ...]) -> KeptGroup:
    group = query_heads[0] * heads.n_groups // heads.n_queries
    queried = _columns(query_heads, heads.width)
    grouped = slice(group * heads.width, (group + 1) * heads.width)
    if heads.frequencies is None:
        asked = squares.queries[queried].sum(1).view(-1, heads.width).sum(0)
        matched = top(asked + squares.keys[grouped].sum(1), head_dim)
    else:
        pairs = keep_pairs(heads.frequencies, rotary_frequencies(head_dim))
        matched = torch.cat([pairs, pairs + heads.width // 2])
    read = squares.output[:, queried].sum(0).view(-1, heads.width).sum(0)
    values = top(squares.values[grouped].sum(1) + read, head_dim)
    return KeptGroup(query_heads, group, matched, values)


def _columns(query_heads: Sequence[int], width: int) -> Tensor:
    """The entries of these heads, one head behind the other."""
    return torch.cat([torch.arange(head * width, (head + 1) * width) for head in query_heads])


def keep_pairs(frequencies: Tensor, wanted: Tensor) -> Tensor:
    """For each wanted frequency (falling), the index of the nearest one by ratio; each once and in order."""
    kept: list[int] = []
    for place, frequency in enumerate(wanted):
        first = kept[-1] + 1 if kept else 0
        beyond = len(frequencies) - (len(wanted) - place - 1)
        ratios = (frequencies[first:beyond].log() - frequency.log()).abs()
        kept.append(first + int(ratios.argmin()))
    return torch.tensor(kept)


def prune_block(
    base: Base, index: int, side: SideBlock, stream: Tensor, importance: Importance, *, is_normed: bool = True
) -> None:
    """Copy what is kept of the base's block ``index`` into ``side``.

    With ``is_normed`` side states are the base's at unit root-mean-square; otherwise they are as in the base.
    """
    heads, scale = heads_of(base), importance.scales[index]
    _check_fit(base, heads, side.attention)
    n_hidden = side.feed_forward.down.in_features
    kept = keep_block(importance.blocks[index], heads, side.attention, n_hidden)
    weights = block_weights(base, base.blocks[index], lambda parameter: parameter.detach().float().cpu())
    written = heads.residual / scale if is_normed else heads.residual
    with torch.no_grad():
        _copy_attention(side, weights, kept.groups, heads, stream)
        side.attention.output.weight.mul_(written)
        offset = layout_of(base).norm_offset
        if weights.attention_norm is None:
            side.attention_norm.weight.fill_(scale)
        else:
            side.attention_norm.weight.copy_(weights.attention_norm[stream] + offset)
        side.feed_forward_norm.weight.copy_(weights.feed_forward_norm[stream] + offset)
        if kept.feed_forward is not None:
            _copy_feed_forward(side, weights, kept.feed_forward, stream, written)


def _check_fit(base: Base, heads: Heads, side: Attention) -> None:
    if side.head_dim > heads.width:
        raise ConfigError(
            f"The heads of {base.name} are {heads.width} wide; a pruned head cannot be {side.head_dim} wide. Use a "
            "smaller head_dim, or start = 'random'."
        )
    if side.n_heads > heads.n_queries:
        raise ConfigError(
            f"{base.name} has {heads.n_queries} heads; {side.n_heads} cannot be kept of them. Use a smaller width, a "
            "larger head_dim, or start = 'random'."
        )
    size, in_group = side.query_group, heads.n_queries // heads.n_groups
    if heads.n_groups * (in_group // size) < side.n_shared:
        raise ConfigError(
            f"The heads of {base.name} share their keys in {heads.n_groups} groups of {in_group}; {side.n_shared} "
            f"groups of {size} cannot be kept of them. Use a smaller query_group or width, or start = 'random'."
        )


def _copy_attention(
    side: SideBlock, weights: BlockWeights, kept: Sequence[KeptGroup], heads: Heads, stream: Tensor
) -> None:
    """Queries take up the base's scale: the side divides by the root of its own head_dim."""
    head_dim = side.attention.head_dim
    parts: list[list[Tensor]] = [[], [], []]
    outputs = []
    for own in kept:
        grouped = own.group * heads.width
        parts[1].append(weights.keys[grouped + own.matched])
        parts[2].append(weights.values[grouped + own.values])
        for query_head in own.query_heads:
            queried = query_head * heads.width
            parts[0].append(weights.queries[queried + own.matched] * (heads.scale * head_dim**0.5))
            outputs.append(weights.output[:, queried + own.values])
    stacked = torch.cat([torch.cat(rows) for rows in parts])
    side.attention.queries_keys_values.weight.copy_(stacked[:, stream])
    side.attention.output.weight.copy_(torch.cat(outputs, 1)[stream])


def _copy_feed_forward(side: SideBlock, weights: BlockWeights, hidden: Tensor, stream: Tensor, written: float) -> None:
    """Units beyond those of the base keep their random start."""
    assert weights.gate is not None
    assert weights.up is not None
    assert weights.down is not None
    gate, up = side.feed_forward.gate_and_up.weight.chunk(2)
    gate[: len(hidden)].copy_(weights.gate[hidden][:, stream])
    up[: len(hidden)].copy_(weights.up[hidden][:, stream])
    side.feed_forward.down.weight[:, : len(hidden)].copy_(weights.down[stream][:, hidden] * written)
