"""PLR, prediction from the last representation: a head on one state, linear or through a small MLP (DSA)."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from safeside.adapters.blocks import TapProjection, normed
from safeside.adapters.config import AdapterConfig
from safeside.base.taps import SideCache, Tape


class Plr(nn.Module):
    """Token-wise trunk.  ``width`` 0 hands the tapped state itself to the head: a linear probe."""

    n_cache_layers = 0

    def __init__(self, config: AdapterConfig) -> None:
        super().__init__()
        self.width = config.width or config.base.d_model
        self.layer = config.layers[-1]
        self.hidden = TapProjection(config.base.d_model, config.width, config.tap_rank) if config.width else None

    def read(self, tape: Tape, layer: int, hidden: Float[Tensor, "B T D"]) -> None:
        """Keep the state of the one layer that the head reads."""
        if layer == self.layer:
            tape.hidden[layer] = normed(hidden) if self.hidden is None else F.gelu(self.hidden(hidden))

    def forward(self, tape: Tape, cache: SideCache | None) -> Float[Tensor, "B T d"]:
        return tape.hidden[self.layer]
