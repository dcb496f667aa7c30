"""Rows that decode together: one cache, padded on the left, that rows join and leave between two steps.

Masks and positions come from the kept tokens alone, so padding that joining adds on the left changes no row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from safeside.request import RequestLayer


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

    @property
    def positions(self) -> Tensor:
        """(B, 1) index of the newest token among the kept ones of its row."""
        return self.keep.sum(1, keepdim=True) - 1


def joined(first: Rows, second: Rows) -> Rows:
    """The rows of both, the shorter ones padded on the left."""
    longest = max(first.keep.shape[1], second.keep.shape[1])
    keep = torch.cat([_padded(rows.keep[:, None, :, None], longest)[:, 0, :, 0] for rows in (first, second)])
    for own, other in zip(first.cache.layers, second.cache.layers, strict=True):
        assert isinstance(own, DynamicLayer)
        if not own.get_seq_length():  # an adapter without a state of its own
            continue
        own.keys, own.values = (
            torch.cat([_padded(before, longest), _padded(behind, longest)])
            for before, behind in ((own.keys, other.keys), (own.values, other.values))
        )
    _mark_padding(first.cache, keep)
    return Rows(first.cache, keep)


def selected(rows: Rows, indices: Sequence[int]) -> Rows:
    """Only the rows at ``indices``, without the padding that none of them needs; the others' memory is free."""
    keep = rows.keep[list(indices)]
    start = int(keep.any(0).int().argmax())
    for layer in rows.cache.layers:
        if layer.get_seq_length():
            layer.keys = layer.keys[list(indices), :, start:]
            layer.values = layer.values[list(indices), :, start:]
    return Rows(rows.cache, keep[:, start:])


def _padded(values: Tensor, length: int) -> Tensor:
    """``values`` (B, H, S, D) with zeros before it, up to ``length`` slots."""
    return F.pad(values, (0, 0, length - values.shape[2], 0))


def _mark_padding(cache: DynamicCache, keep: Tensor) -> None:
    """In the request's layer a padded slot has no index among the kept ones."""
    layer = cache.layers[-1]
    if isinstance(layer, RequestLayer):
        layer.values[:, 0, :, -1] = torch.where(keep, layer.values[:, 0, :, -1], -1.0)
