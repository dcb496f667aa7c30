"""Scores on their way out of the engine: columns behind the hidden state, then logits of ids that no text uses.

A client that asks for the log-probabilities of those ids gets the scores as differences, through vLLM's public API.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

GAP = 60.0
"""Logits of the slots lie so far under the row's highest: at temperatures up to HOTTEST they are never drawn."""
HOTTEST = 4.0
"""The highest temperature at which a slot is as good as impossible: exp(-60 / 4) is 3e-7 of the likeliest token."""
_NO_SCORE = 3.0  # in place of what is not a number: above every score and strength
_STRONGEST = 2.0
_SLACK = 0.01  # of rounding in differences of log-probabilities near -60


def pack(states: Float[Tensor, "T D"], values: Float[Tensor, "T N"]) -> Tensor:
    """States with float32 ``values`` behind them, bit for bit, whatever the dtype of the states."""
    return torch.cat([states, values.float().contiguous().view(states.dtype)], -1)


def unpack(packed: Tensor, width: int) -> tuple[Float[Tensor, "N D"], Float[Tensor, "N N"]]:
    """States (N, ``width``) and the values behind them."""
    return packed[..., :width].contiguous(), packed[..., width:].contiguous().view(torch.float32)


def write(logits: Float[Tensor, "N V"], values: Float[Tensor, "N K"], places: Int[Tensor, " K1"]) -> Tensor:
    """Logits in float32 that hold a reference and then ``values`` above it at ``places``, out of a sampler's reach.

    Float32 ``logits`` are overwritten: copies of a whole vocabulary are most of what a small adapter would cost.
    """
    logits = logits.float().index_fill_(-1, places, -torch.inf)
    level = logits.amax(-1, keepdim=True) - GAP
    told = torch.where(values.isfinite(), values, _NO_SCORE)
    return logits.index_copy_(-1, places, torch.cat([level, level + told], -1))


def read(logprobs: Sequence[float], *, tells_strength: bool = False) -> list[float]:
    """The scores from the log-probabilities of the slots, and then the strength if it is told.

    NaN for what was no number, was masked, or lies out of range: ids that nobody wrote into read as any other logit.
    """
    reference, *rest = logprobs
    masked = not math.isfinite(reference) or reference <= -9999.0  # what vLLM tells in place of -inf
    values = [math.nan if masked else value - reference for value in rest]
    return in_range(values, tells_strength=tells_strength)


def in_range(values: Sequence[float], *, tells_strength: bool) -> list[float]:
    """Scores, and then the strength if it is told; NaN for what cannot be one."""
    tops = [1.0] * (len(values) - tells_strength) + [_STRONGEST] * tells_strength
    return [_within(value, top) for value, top in zip(values, tops, strict=True)]


def _within(value: float, top: float) -> float:
    """A value of [0, ``top``], but for rounding; NaN for any other."""
    return min(max(value, 0.0), top) if -_SLACK <= value <= top + _SLACK else math.nan
