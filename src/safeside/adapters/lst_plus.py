"""LST+: the ladder, and beside it the base's last state.

The paper (DSA) names an LST+ without defining it; this is our reading.  The head gets ``[x ; silu(G x) * P h_L]``: the
ladder's state x, and the base's last state h_L through a projection whose channels x opens and closes.  So what the
base has decided reaches the delta at its side, not only through the last rung.

With ``cross_attention`` each token also attends, with a query made of x, over its own tapped states of all layers: the
ladder's gates are the same for all tokens, this choice is not.  It looks across depth, never across positions, so it
needs no cache.  Keys and values are the ladder's own projections of the taps.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from safeside.adapters.blocks import Norm, TapProjection
from safeside.adapters.config import AdapterConfig
from safeside.adapters.lst import Lst
from safeside.base.taps import SideCache, Tape

_LAST = -1  # of the tape: the last state's own projection, beside the rung's


class DepthAttention(nn.Module):
    """Attention of each token over its own tapped states; adds nothing at the start."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = Norm(width)
        self.queries = nn.Linear(width, width, bias=False)
        self.output = nn.Linear(width, width, bias=False)
        nn.init.zeros_(self.output.weight)

    def forward(self, states: Float[Tensor, "B T d"], taps: Float[Tensor, "B T N d"]) -> Float[Tensor, "B T d"]:
        queries = self.queries(self.norm(states))[:, :, None]
        chosen = F.scaled_dot_product_attention(queries, taps, taps)[:, :, 0]
        return states + self.output(chosen)  # type: ignore[no-any-return]


class LstPlus(nn.Module):
    """Ladder trunk of twice the ladder's width: its state, and the gated last state of the base."""

    def __init__(self, config: AdapterConfig) -> None:
        super().__init__()
        self.width = 2 * config.width
        self.ladder = Lst(config)
        self.layers = config.layers
        self.attention = DepthAttention(config.width) if config.cross_attention else None
        self.last = TapProjection(config.base.d_model, config.width, config.tap_rank)
        self.gate = nn.Linear(config.width, config.width, bias=False)

    @property
    def n_cache_layers(self) -> int:
        return self.ladder.n_cache_layers

    def read(self, tape: Tape, layer: int, hidden: Float[Tensor, "B T D"]) -> None:
        """Keep the projected state; of the last layer a second projection too."""
        self.ladder.read(tape, layer, hidden)
        if layer == self.layers[-1]:
            tape.hidden[_LAST] = self.last(hidden)

    def forward(self, tape: Tape, cache: SideCache | None) -> Float[Tensor, "B T d"]:
        states = self.ladder(tape, cache)
        if self.attention is not None:
            states = self.attention(states, torch.stack([tape.hidden[layer] for layer in self.layers], 2))
        return torch.cat([states, F.silu(self.gate(states)) * tape.hidden[_LAST]], -1)
