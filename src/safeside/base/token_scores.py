"""Log-probabilities and divergences of single tokens, in chunks: logits of all tokens never exist at once.

A chunk's logits are made again in the backward pass, so the memory of a step does not grow with vocabulary x tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from safeside.base.model import Base

N_LOGITS = 2**25
"""Most logits of one chunk: 128 MB in float32."""


def token_log_probs(
    base: Base, states: Float[Tensor, "N D"], targets: Int[Tensor, " N"], n_logits: int = N_LOGITS
) -> Float[Tensor, " N"]:
    """Log-probability (nats) of each target token by the base's head on its final state, in float32."""

    def of_chunk(some: Tensor, wanted: Tensor) -> Tensor:
        return -F.cross_entropy(base.head_logits(some[None])[0].float(), wanted, reduction="none")

    return _in_chunks(of_chunk, base, n_logits, states, targets)


def token_divergences(
    base: Base,
    base_states: Float[Tensor, "N D"],
    states: Float[Tensor, "N D"],
    n_logits: int = N_LOGITS,
    *,
    teacher: Base | None = None,
) -> Float[Tensor, " N"]:
    """``KL(p_base || p)`` (nats) of the next-token distributions at each pair of final states, over all tokens.

    With a ``teacher`` the first states are read by its head and not by the base's own.
    """
    reader = teacher or base

    def of_chunk(reference: Tensor, some: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = F.log_softmax(reader.head_logits(reference[None])[0].float(), -1)
        found = F.log_softmax(base.head_logits(some[None])[0].float(), -1)
        return F.kl_div(found, wanted, reduction="none", log_target=True).sum(-1)

    return _in_chunks(of_chunk, base, n_logits, base_states.detach(), states)


def _in_chunks(
    function: Callable[[Tensor, Tensor], Tensor], base: Base, n_logits: int, first: Tensor, second: Tensor
) -> Tensor:
    """``function`` of all N entries, some at a time."""
    size = max(1, n_logits // int(base.model.config.get_text_config().vocab_size))
    if not len(first):
        return first.new_zeros(0, dtype=torch.float32)
    if len(first) <= size:
        return function(first, second)
    return torch.cat(
        [
            checkpoint(function, *some, use_reentrant=False, preserve_rng_state=False)
            for some in zip(torch.split(first, size), torch.split(second, size), strict=True)
        ]
    )
