"""LST, ladder side-tuning: a narrow transformer beside the base (Sung et al. 2022, section 3; used by DSA).

``x_0 = D_0 h_0``; ``m_l = mu_l x_{l-1} + (1 - mu_l) D_l h_l`` with ``mu_l = sigmoid(alpha_l / 0.1)`` and alpha_l = 0 at
the start; ``x_l = Block_l(m_l)``.  Layer 0 is the embedding; when it is not tapped, x_0 is the first tap's projection.
"""

from __future__ import annotations

from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from safeside.adapters.blocks import Rotary, SideBlock, TapProjection, attention_bias, normed
from safeside.adapters.config import AdapterConfig
from safeside.base.taps import SideCache, Tape

_GATE_TEMPERATURE = 0.1


class Lst(nn.Module):
    """Ladder trunk: one projection for each tapped layer, one block for each tap after the first."""

    def __init__(self, config: AdapterConfig) -> None:
        super().__init__()
        self.width = config.width
        self.first, *self.rungs = config.layers
        hidden = config.feed_forward or default_feed_forward(config.width)
        self.taps = nn.ModuleDict(
            {str(layer): TapProjection(config.base.d_model, config.width, config.tap_rank) for layer in config.layers}
        )
        n_blocks = max(1, len(self.rungs))
        gate_size = config.width if config.gate == "channel" else 1
        self.gates = nn.ParameterList(nn.Parameter(torch.zeros(gate_size)) for _ in self.rungs)
        self.blocks = nn.ModuleList(
            SideBlock(config.width, config.head_dim, hidden, config.query_group) for _ in range(n_blocks)
        )
        self.rotary = Rotary(config.head_dim)

    @property
    def n_cache_layers(self) -> int:
        return len(self.blocks)

    def read(self, tape: Tape, layer: int, hidden: Float[Tensor, "B T D"]) -> None:
        """Keep the projected state, D / r wide; of a few tokens the state itself, to project all taps in one go."""
        tape.hidden[layer] = hidden if tape.is_short else self.taps[str(layer)](hidden)

    def _project_kept(self, tape: Tape) -> None:
        layers = (self.first, *self.rungs)
        together = normed(torch.stack([tape.hidden[layer] for layer in layers])).unbind()
        for layer, state in zip(layers, together, strict=True):
            tape.hidden[layer] = cast(TapProjection, self.taps[str(layer)]).project(state)

    def forward(self, tape: Tape, cache: SideCache | None) -> Float[Tensor, "B T d"]:
        if tape.is_short:
            self._project_kept(tape)
        states = tape.hidden[self.first]
        rotary, bias = self.rotary(tape.positions), attention_bias(tape.attend, states.dtype)
        if not self.rungs:
            return self.blocks[0](states, rotary, bias, cache, 0)  # type: ignore[no-any-return]
        mu = torch.sigmoid(torch.stack(tuple(self.gates)).float() / _GATE_TEMPERATURE).to(states.dtype)
        shares = zip(mu, 1 - mu, strict=True)  # of the ladder and of the tap, for all rungs at once
        for index, (layer, (own, tapped), block) in enumerate(zip(self.rungs, shares, self.blocks, strict=True)):
            states = block(own * states + tapped * tape.hidden[layer], rotary, bias, cache, index)
        return states


def default_feed_forward(width: int) -> int:
    """Hidden width of a side block's feed-forward: about 8/3 of the width, in steps of 32."""
    return max(32, round(width * 8 / 3 / 32) * 32)
