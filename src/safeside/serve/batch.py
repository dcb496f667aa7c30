"""Rows that decode together: one cache, padded on the left, that rows join and leave between two steps.

Masks and positions come from the kept tokens alone, so padding that joining adds on the left changes no row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from safeside.errors import UnsupportedError
from safeside.request import request_layer

State = tuple[Tensor, Tensor]
"""Keys and values of one layer, each (B, H, S, D)."""


@dataclass(frozen=True, slots=True)
class Rows:
    """The tokens that a batch has read."""

    cache: DynamicCache
    """Of base, adapters and request."""
    keep: Bool[Tensor, "B S"]
    """Which slots hold a token of their row."""

    def grown(self) -> Rows:
        """The same rows with room for one more token each; the cache grows in the pass that feeds it."""
        return replace(self, keep=F.pad(self.keep, (0, 1), value=True))


def joined(first: Rows, second: Rows) -> Rows:
    """The rows of both, the shorter ones padded on the left."""
    requests = [request for rows in (first, second) if (request := request_layer(rows.cache)) is not None]
    assert not any(request.waiting for request in requests), "what waits is judged before rows join"
    length = max(first.keep.shape[1], second.keep.shape[1])
    keep = torch.cat([F.pad(rows.keep, (length - rows.keep.shape[1], 0)) for rows in (first, second)])
    for own, other in zip(first.cache.layers, second.cache.layers, strict=True):
        states = [_state(layer) for layer in (own, other)]
        known = next((state for state in states if state is not None), None)
        if known is None:  # an adapter without a state of its own
            continue
        counts = first.keep.shape[0], second.keep.shape[0]
        padded = [_padded(state, known, n, length) for state, n in zip(states, counts, strict=True)]
        _set_state(own, (torch.cat([part[0] for part in padded]), torch.cat([part[1] for part in padded])))
    own_request = request_layer(first.cache)
    if own_request is not None and own_request.values is not None:  # a padded slot is no token
        own_request.values[:, 0, :, -1] = torch.where(keep, own_request.values[:, 0, :, -1], -1.0)
    return Rows(first.cache, keep)


def selected(rows: Rows, indices: Sequence[int]) -> Rows:
    """Only the rows at ``indices``, without the padding that none of them needs; the others' memory is free."""
    chosen = list(indices)
    keep = rows.keep[chosen]
    start = int(keep.any(0).int().argmax())
    for layer in rows.cache.layers:
        if (state := _state(layer)) is not None:
            _set_state(layer, (state[0][chosen, :, start:], state[1][chosen, :, start:]))
    if (request := request_layer(rows.cache)) is not None:
        request.waiting.select(chosen)
    return Rows(rows.cache, keep[:, start:])


def fill(layer: object, length: int) -> None:
    """Bring a layer that a pass did not write to ``length`` slots: what is missing is not a number."""
    state = _state(layer)
    if state is not None and (missing := length - state[0].shape[2]):
        keys, values = (F.pad(part, (0, 0, 0, missing), value=math.nan) for part in state)
        _set_state(layer, (keys, values))


def _padded(state: State | None, like: State, n_rows: int, length: int) -> State:
    """``state`` with zeros before it, up to ``length`` slots; without one, that of rows that were never read."""
    if state is None:
        keys, values = (part.new_full((n_rows, part.shape[1], length, part.shape[3]), math.nan) for part in like)
    else:
        keys, values = (F.pad(part, (0, 0, length - part.shape[2], 0)) for part in state)
    return keys, values


def _state(layer: object) -> State | None:
    """What a layer holds; None while it holds nothing."""
    if not isinstance(layer, DynamicLayer):
        raise UnsupportedError(f"A cache with a {type(layer).__name__} cannot be batched by rows. Use another base.")
    if layer.keys is None or layer.values is None or not layer.keys.numel():
        return None
    return layer.keys, layer.values


def _set_state(layer: object, state: State) -> None:
    assert isinstance(layer, DynamicLayer)
    layer.keys, layer.values = state
