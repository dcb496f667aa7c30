"""A side network: the running sum of narrow projections of every tapped layer."""

import torch
from torch import Tensor, nn

from safeside.adapters.blocks import TapProjection
from safeside.adapters.config import AdapterConfig
from safeside.base.taps import SideCache, Tape


class Middle(nn.Module):
    """Token-wise trunk of width 32."""

    n_cache_layers = 0
    width = 32

    def __init__(self, config: AdapterConfig) -> None:
        super().__init__()
        self.projections = nn.ModuleDict(
            {str(layer): TapProjection(config.base.d_model, self.width, config.tap_rank) for layer in config.layers}
        )

    def read(self, tape: Tape, layer: int, hidden: Tensor) -> None:
        """Add one tapped layer to the sum."""
        part = torch.tanh(self.projections[str(layer)](hidden))
        tape.hidden[0] = tape.hidden.get(0, 0.0) + part

    def forward(self, tape: Tape, cache: SideCache | None) -> Tensor:
        """The sum, at every new token."""
        return tape.hidden[0]
