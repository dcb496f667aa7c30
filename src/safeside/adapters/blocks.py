"""Building blocks of side networks: norm, rotary attention, gated feed-forward, low-rank tap."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from safeside.base.taps import SideCache

_ROPE_BASE = 10000.0
_EPSILON = 1e-6  # of every norm
_QUERIES_TOGETHER = 128  # in attention by products


class Norm(nn.RMSNorm):
    """Root-mean-square norm in the dtype of its weight: under autocast its input comes in another one."""

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=_EPSILON)

    def forward(self, states: Float[Tensor, "*B d"]) -> Float[Tensor, "*B d"]:
        return super().forward(states.to(self.weight.dtype))


class Rotary(nn.Module):
    """Cosines and sines for rotary positions, computed in float32 whatever the dtype of the network."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim

    def forward(self, positions: Int[Tensor, "B T"]) -> tuple[Float[Tensor, "B 1 T h"], Float[Tensor, "B 1 T h"]]:
        """(B, 1, T, head_dim) cosines and sines."""
        angles = positions[..., None].float() * rotary_frequencies(self.head_dim, positions.device)
        both = torch.cat([angles, angles], dim=-1)[:, None]
        return both.cos(), both.sin()


def rotary_frequencies(head_dim: int, device: torch.device | None = None) -> Float[Tensor, " pairs"]:
    """Angle (radians) a token by which each pair of a head's entries, (i, i + head_dim / 2), is turned."""
    exponents = torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim
    return _ROPE_BASE**-exponents


def rotate(states: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Apply rotary positions to (..., B, heads, T, head_dim) states, in float32, returned in their dtype."""
    wide = states.float()
    first, second = wide.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return (wide * cosines + turned * sines).to(states.dtype)


def attention_bias(attend: Bool[Tensor, "B 1 T S"], dtype: torch.dtype) -> Float[Tensor, "B 1 T S"]:
    """0 where a token may attend and -inf elsewhere: made once, where every block would make it of a bool mask."""
    return torch.zeros(attend.shape, dtype=dtype, device=attend.device).masked_fill_(~attend, -torch.inf)


def attention_of(
    queries: Float[Tensor, "B H T h"],
    keys: Float[Tensor, "B K S h"],
    values: Float[Tensor, "B K S h"],
    bias: Float[Tensor, "B 1 T S"],
) -> Float[Tensor, "B H T h"]:
    """Softmax of the scaled products of queries and keys plus ``bias``, over the values.

    H is a multiple of K: the first H / K heads of queries share the first of keys and values, and so on.

    In bfloat16 on a CPU, fused attention mostly takes 1.2 to 3 times as long as products do (6.0 and 3.4 ms for 8 rows
    of 512 tokens in 3 heads, 0.45 and 0.16 ms for one token each behind as many).  Those of one token a row are in
    float32, which costs nothing and loses nothing; those of more go by blocks, so that what is between stays small, and
    are rounded before the softmax.  Where gradients are wanted, which keep all that is between, attention is fused.
    """
    is_learnt = queries.requires_grad or keys.requires_grad or values.requires_grad
    if is_learnt or queries.dtype != torch.bfloat16 or queries.device.type != "cpu":
        return _fused_attention(queries, keys, values, bias)
    scale = queries.shape[-1] ** -0.5
    if queries.shape[-2] == 1:
        return _attention_by_products(queries.float() * scale, bias, keys, values).to(values.dtype)
    parts = zip(*(torch.split(whole, _QUERIES_TOGETHER, -2) for whole in (queries * scale, bias)), strict=True)
    return torch.cat([_attention_by_products(own, own_bias, keys, values) for own, own_bias in parts], -2)


def _fused_attention(queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor) -> Tensor:
    """Of heads that share keys and values too.

    Fused kernels that take a bias know shared heads on a CPU alone; elsewhere torch would write the products out, which
    take more than a head of keys and values for each.
    """
    n_sharing = queries.shape[1] // keys.shape[1]
    if n_sharing > 1 and queries.device.type != "cpu":
        keys, values = (for_each_query(part, n_sharing) for part in (keys, values))
    is_shared = keys.shape[1] < queries.shape[1]
    return F.scaled_dot_product_attention(queries, keys, values, attn_mask=bias, enable_gqa=is_shared)


def for_each_query(part: Float[Tensor, "B K S h"], n_sharing: int) -> Float[Tensor, "B H S h"]:
    """Keys or values so often that every head of queries has one of its own."""
    return part.repeat_interleave(n_sharing, 1)


def _attention_by_products(queries: Tensor, bias: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """In the dtype of the queries, to which keys and values are brought one after the other.

    Queries that share a head of keys lie one behind the other, as more tokens of it would.
    """
    n_rows, n_heads, n_tokens, _ = queries.shape
    n_shared, n_slots = keys.shape[1:3]
    products = queries.reshape(n_rows, n_shared, -1, queries.shape[-1]) @ keys.to(queries.dtype).mT
    weights = torch.softmax(products.view(n_rows, n_heads, n_tokens, n_slots).add_(bias), dim=-1)
    mixed = weights.view(n_rows, n_shared, -1, n_slots) @ values.to(queries.dtype)
    return mixed.view(n_rows, n_heads, n_tokens, -1)


class Attention(nn.Module):
    """Multi-head attention over the side states, with its own keys and values in the request's cache.

    So many heads of queries as a ``query_group`` has share one of keys and values (grouped-query attention, Ainslie et
    al. 2023), which makes the cache so many times smaller.
    """

    def __init__(self, width: int, head_dim: int, query_group: int = 1) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.query_group = query_group
        self.n_heads = width // head_dim
        self.n_shared = self.n_heads // query_group
        """Heads of keys, and as many of values."""
        self.queries_keys_values = nn.Linear(width, (self.n_heads + 2 * self.n_shared) * head_dim, bias=False)
        self.output = nn.Linear(width, width, bias=False)

    def forward(
        self,
        states: Float[Tensor, "B T d"],
        rotary: tuple[Tensor, Tensor],
        bias: Float[Tensor, "B 1 T S"],
        cache: SideCache | None,
        layer: int,
    ) -> Float[Tensor, "B T d"]:
        queries, keys, values = self.heads(states, rotary)
        if cache is not None:
            keys, values = cache.update(keys, values, layer)
        mixed = attention_of(queries, keys, values, bias)
        return self.output(mixed.transpose(1, 2).reshape(states.shape))  # type: ignore[no-any-return]

    def heads(self, states: Float[Tensor, "B T d"], rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys, both turned by their positions, and values: (B, heads, T, head_dim) each."""
        batch, length, _ = states.shape
        heads = self.queries_keys_values(states).view(batch, length, -1, self.head_dim).transpose(1, 2)
        turned, values = torch.split(heads, [self.n_heads + self.n_shared, self.n_shared], 1)
        queries, keys = torch.split(rotate(turned, *rotary), [self.n_heads, self.n_shared], 1)
        return queries, keys, values


class GatedFeedForward(nn.Module):
    """SwiGLU feed-forward."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_and_up = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, states: Float[Tensor, "B T d"]) -> Float[Tensor, "B T d"]:
        gate, up = self.gate_and_up(states).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)  # type: ignore[no-any-return]


class SideBlock(nn.Module):
    """A pre-norm transformer block of the side width (LST, section 3: the base's block divided by r)."""

    def __init__(self, width: int, head_dim: int, hidden: int, query_group: int = 1) -> None:
        super().__init__()
        self.attention_norm = Norm(width)
        self.attention = Attention(width, head_dim, query_group)
        self.feed_forward_norm = Norm(width)
        self.feed_forward = GatedFeedForward(width, hidden)

    def forward(
        self,
        states: Float[Tensor, "B T d"],
        rotary: tuple[Tensor, Tensor],
        bias: Float[Tensor, "B 1 T S"],
        cache: SideCache | None,
        layer: int,
    ) -> Float[Tensor, "B T d"]:
        """The next side states; ``layer`` counts this adapter's own layers of the cache, from 0."""
        states = states + self.attention(self.attention_norm(states), rotary, bias, cache, layer)
        return states + self.feed_forward(self.feed_forward_norm(states))  # type: ignore[no-any-return]


def normed(hidden: Float[Tensor, "*K B T D"]) -> Float[Tensor, "*K B T D"]:
    """``hidden`` at unit root-mean-square: blocks of different bases and depths differ in scale a thousandfold.

    In bfloat16 the scale alone is computed in float32: a copy of the states in float32 costs more than projecting them.
    The range of float16 is too small for that.
    """
    if hidden.dtype != torch.bfloat16:
        return F.rms_norm(hidden.float(), hidden.shape[-1:], eps=_EPSILON).to(hidden.dtype)
    return hidden * _scale_of(hidden)


def _scale_of(hidden: Tensor) -> Tensor:
    """What brings bfloat16 states to unit root-mean-square, (..., 1)."""
    length: Tensor = torch.linalg.vector_norm(hidden, dim=-1, keepdim=True, dtype=torch.float32)
    return (length.square() / hidden.shape[-1] + _EPSILON).rsqrt().to(hidden.dtype)


class TapProjection(nn.Module):
    """Down-projection D -> d of a tapped state, full rank or of rank ``rank`` (QST uses 16)."""

    def __init__(self, d_model: int, width: int, rank: int) -> None:
        super().__init__()
        layers = [nn.Linear(d_model, rank, bias=False), nn.Linear(rank, width)] if rank else [nn.Linear(d_model, width)]
        self.project = nn.Sequential(*layers)

    def forward(self, hidden: Float[Tensor, "B T D"]) -> Float[Tensor, "B T d"]:
        """The state at unit root-mean-square, projected.

        In bfloat16, whose range allows it, the product is scaled in place of the state: for 8 prompts of 512 tokens,
        896 wide, writing states of unit size takes 3.1 ms where projecting them takes 0.7.
        """
        if hidden.dtype != torch.bfloat16:
            return self.project(normed(hidden))  # type: ignore[no-any-return]
        down, *up = cast(Iterable[nn.Linear], self.project)
        product, scale = F.linear(hidden, down.weight), _scale_of(hidden)
        states = product * scale if down.bias is None else torch.addcmul(down.bias.to(product.dtype), product, scale)
        for layer in up:
            states = layer(states)
        return states
