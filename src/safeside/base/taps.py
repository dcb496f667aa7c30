"""The tape that a forward pass of the base writes for each adapter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import DynamicCache

_FEW_TOKENS = 32  # up to so many a product costs its fixed part: calling it, and fetching the weights


@dataclass(slots=True)
class Tape:
    """What one adapter read during one forward pass.

    Layer 0 is the embedding, layer l the output of block l (as in transformers' ``hidden_states``, but layer L comes
    *before* the final norm).
    """

    keep: Bool[Tensor, "B S"]
    """The padding mask over cached and new tokens, ``True`` = keep."""
    n_new: int
    """New tokens of this pass, T."""
    is_causal: bool = True
    """Whether a token sees only those before it; False for encoders."""
    hidden: dict[int, Tensor] = field(default_factory=dict)
    """By layer, what the adapter wrote of it."""
    final: Tensor | None = None
    """The decoder's normed output (B, T, D), once the base has run."""
    few: bool | None = None
    """What ``is_short`` says, whatever rows are chosen of the tape; counted unless given."""
    failure: str = ""
    """What went wrong where its adapter read, if anything did; the tape is then of no use."""

    @property
    def n_past(self) -> int:
        """Tokens already in the cache before this pass."""
        return self.keep.shape[1] - self.n_new

    @property
    def is_short(self) -> bool:
        """Whether the pass has a few new tokens only, all rows counted, as in decoding: steps cost more than sums."""
        return self.keep.shape[0] * self.n_new <= _FEW_TOKENS if self.few is None else self.few

    @property
    def keep_new(self) -> Bool[Tensor, "B T"]:
        """The padding mask over new tokens."""
        return self.keep[:, self.n_past :]

    @property
    def is_blank(self) -> Bool[Tensor, " B"]:
        """By row, whether it has no token at all, only padding."""
        return ~self.keep.any(1)

    @property
    def positions(self) -> Int[Tensor, "B T"]:
        """Index of each new token among the kept tokens of its row: padding on either side changes nothing."""
        return (self.keep.long().cumsum(1) - 1).clamp_min(0)[:, self.n_past :]

    @property
    def attend(self) -> Bool[Tensor, "B 1 T S"]:
        """Which slots each new token may attend to.  A padded query sees itself, so that softmax stays finite."""
        slots = torch.arange(self.keep.shape[1], device=self.keep.device)
        queries = slots[self.n_past :, None]
        allowed = self.keep[:, None, :]
        if self.is_causal:
            allowed = allowed & (slots[None, :] <= queries)
        return (allowed | (slots[None, :] == queries))[:, None]

    def fork(self) -> Tape:
        """An empty tape over the same tokens, for another adapter."""
        return Tape(self.keep, self.n_new, self.is_causal, few=self.few)

    def at_rows(self, rows: Sequence[int]) -> Tape:
        """The same tape of some rows, in this order; one may come more than once."""
        chosen = list(rows)
        hidden = {layer: state[chosen] for layer, state in self.hidden.items()}
        return replace(self, keep=self.keep[chosen], hidden=hidden, final=_at(self.final, chosen))

    @classmethod
    def joined(cls, tapes: Sequence[Tape], keep: Bool[Tensor, "B S"]) -> Tape:
        """One tape over the new tokens of passes that followed each other; ``keep`` covers them and all before.

        A failure in one of them is a failure of all.
        """
        first, n_new = tapes[0], sum(tape.n_new for tape in tapes)
        failures = [tape.failure for tape in tapes if tape.failure]
        if failures:
            return cls(keep, n_new, first.is_causal, few=first.few, failure=failures[0])
        hidden = {layer: torch.cat([tape.hidden[layer] for tape in tapes], 1) for layer in first.hidden}
        finals = [tape.final for tape in tapes if tape.final is not None]
        final = torch.cat(finals, 1) if finals else None
        return cls(keep, n_new, first.is_causal, hidden, final, first.few)


def _at(state: Tensor | None, rows: list[int]) -> Tensor | None:
    return None if state is None else state[rows]


@dataclass(frozen=True, slots=True)
class SideCache:
    """An adapter's own layers inside the request's ``past_key_values``, after those of the base."""

    cache: DynamicCache
    """The request's cache."""
    offset: int
    """Index of the adapter's first layer in it."""

    def update(self, keys: Tensor, values: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Append (B, heads, T, head_dim) keys and values to the adapter's ``layer``; returns all S of them."""
        grown: tuple[Tensor, Tensor] = self.cache.update(keys, values, self.offset + layer)
        return grown
