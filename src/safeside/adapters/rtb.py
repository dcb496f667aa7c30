"""RTB, the Res-Tuning bypass: ``b_l = A_lat(h_l) + A_vert(b_{l-1})`` (Jiang et al. 2023; used by DSA).

Token-wise: it mixes depth, never positions.  The bypass keeps the full width, so only its running value is stored.
"""

from __future__ import annotations

from itertools import pairwise

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from safeside.adapters.blocks import normed
from safeside.adapters.config import AdapterConfig
from safeside.base.taps import SideCache, Tape


class ResTuner(nn.Module):
    """``A(x) = x + W2 GELU(W1 x)`` with a bottleneck; W2 starts at zero, so A starts as the identity."""

    def __init__(self, width: int, bottleneck: int) -> None:
        super().__init__()
        self.down = nn.Linear(width, bottleneck)
        self.up = nn.Linear(bottleneck, width)
        nn.init.xavier_uniform_(self.down.weight)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, states: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        return states + self.up(F.gelu(self.down(states)))  # type: ignore[no-any-return]


class Rtb(nn.Module):
    """Token-wise trunk over all tapped layers, as wide as the base."""

    n_cache_layers = 0

    def __init__(self, config: AdapterConfig) -> None:
        super().__init__()
        self.width = config.base.d_model
        self.previous = dict(pairwise(config.layers[::-1]))
        self.last = config.layers[-1]
        self.lateral = nn.ModuleDict({str(layer): ResTuner(self.width, config.bottleneck) for layer in config.layers})
        self.vertical = nn.ModuleDict(
            {str(layer): ResTuner(self.width, config.bottleneck) for layer in config.layers[1:]}
        )

    def read(self, tape: Tape, layer: int, hidden: Float[Tensor, "B T D"]) -> None:
        """Move the bypass one tap further; the value before it is let go."""
        bypass = self.lateral[str(layer)](normed(hidden))
        if layer in self.previous:
            bypass = bypass + self.vertical[str(layer)](tape.hidden.pop(self.previous[layer]))
        tape.hidden[layer] = bypass

    def forward(self, tape: Tape, cache: SideCache | None) -> Float[Tensor, "B T D"]:
        return tape.hidden[self.last]
