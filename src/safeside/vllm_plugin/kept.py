"""Scores that stay in the worker until they are asked for, by a tag that their request carries.

Structured output masks the ids that carry scores to a client, so scores of requests that ask for it are read from here.
Before each pass a runner tells which row of the batch draws which token of which tag; the model leaves the scores of
these rows, on its own device.  This module needs no vLLM.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

TAG = "safeside_tag"
"""The key of ``extra_args``: a name that no other request has."""
READ = "take_safeside_scores"
"""The method of the workers that gives the scores of a tag, for vLLM's ``collective_rpc``."""
EXTENSION = f"{__name__}.WorkerExtension"
"""What adds it to them: vLLM's ``worker_extension_cls``."""
_BLOCK = 64  # tokens of a request whose scores lie in one tensor
_PER_ROW = 4  # times as many tags as rows of the batch: of requests that left it, to come back, to be read, or never
_stores: dict[str, Kept] = {}


class Drawn(NamedTuple):
    """The token that a pass draws for a request with a tag."""

    row: int
    """Of the batch."""
    tag: str
    step: int
    """How many tokens were drawn before it."""


class Kept:
    """By tag, the scores behind each token that was drawn; NaN for those that are not known."""

    def __init__(self, most: int) -> None:
        self.most = most
        """Tags that are remembered beside those of the batch; those that left it first go first."""
        self.running: dict[str, list[Tensor] | None] = {}
        """Of requests in the batch, blocks (64, K) by tag; None where two had the same: their scores are nobody's."""
        self.left: OrderedDict[str, list[Tensor] | None] = OrderedDict()
        """The same of requests that ended, or wait for memory."""
        self.drawn: Sequence[Drawn] = ()

    def begin(self, tag: str, *, is_back: bool) -> None:
        """A request with ``tag`` comes into the batch, or comes back and goes on with the scores that it has."""
        is_known = tag in self.running or tag in self.left
        blocks = self._forget(tag)
        self.running[tag] = (blocks if is_back else None) if is_known else []

    def leave(self, tag: str) -> None:
        """A request with ``tag`` left the batch; only now others that left it before can be pushed out."""
        if tag in self.running:
            self.left[tag] = self.running.pop(tag)
        while len(self.left) > self.most:
            self.left.popitem(last=False)

    def expect(self, drawn: Sequence[Drawn]) -> None:
        """Before a pass: the rows whose scores are to be kept.  The last pass that draws a token stands."""
        self.drawn = drawn

    def keep(self, values: Float[Tensor, "N K"]) -> None:
        """After a pass: the scores of all its rows.  What was taken or pushed out is not begun again."""
        drawn, self.drawn = self.drawn, ()
        for row, tag, step in drawn:
            blocks = self.running.get(tag)
            if blocks is not None:
                while len(blocks) * _BLOCK <= step:
                    blocks.append(values.new_full((_BLOCK, values.shape[1]), math.nan))
                blocks[step // _BLOCK][step % _BLOCK] = values[row]

    def take(self, tag: str) -> list[list[float]]:
        """The scores of ``tag`` by token, and rows of NaN behind them; afterwards they are forgotten."""
        blocks = self._forget(tag)
        return torch.cat(blocks).tolist() if blocks else []

    def _forget(self, tag: str) -> list[Tensor] | None:
        return self.running.pop(tag, self.left.pop(tag, None))


def kept_of(vllm_config: Any) -> Kept:
    """The scores of this engine in this process: one object for its runner, its model and its worker."""
    if vllm_config.instance_id not in _stores:
        _stores[vllm_config.instance_id] = Kept(_PER_ROW * vllm_config.scheduler_config.max_num_seqs)
    return _stores[vllm_config.instance_id]


def tag_of(extra: Mapping[str, Any] | None) -> str | None:
    """The tag among a request's ``extra_args``."""
    return (extra or {}).get(TAG)


class WorkerExtension:
    """What vLLM adds to its class of workers; the names here must be none of its own."""

    vllm_config: Any

    def take_safeside_scores(self, tag: str) -> list[list[float]]:
        """By token of the answer the scores of all guards, then the strength if it is told; they are forgotten here."""
        return kept_of(self.vllm_config).take(tag)
