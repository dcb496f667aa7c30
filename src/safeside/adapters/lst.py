"""LST, ladder side-tuning: a narrow transformer beside the base (Sung et al. 2022, section 3; used by DSA).

``x_0 = D_0 h_0``; ``m_l = mu_l x_{l-1} + (1 - mu_l) D_l h_l`` with ``mu_l = sigmoid(alpha_l / 0.1)`` and alpha_l = 0 at
the start; ``x_l = Block_l(m_l)``.  Layer 0 is the embedding; when it is not tapped, x_0 is the first tap's projection.
"""

from __future__ import annotations

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
        self.blocks = nn.ModuleList(SideBlock(config.width, config.head_dim, hidden) for _ in range(n_blocks))
        self.rotary = Rotary(config.head_dim)

    @property
    def n_cache_layers(self) -> int:
        return len(self.blocks)

    def read(self, tape: Tape, layer: int, hidden: Float[Tensor, "B T D"]) -> None:
        """Keep the projected state, D / r wide; of a few tokens the state itself, to project all taps in one go."""
        tape.hidden[layer] = hidden if tape.is_short else self.taps[str(layer)](hidden)

    def _projected(self, tape: Tape) -> list[Float[Tensor, "B T d"]]:
        kept = [tape.hidden[layer] for layer in (self.first, *self.rungs)]
        if not tape.is_short:
            return kept
        together = normed(torch.stack(kept)).unbind()
        return [tap.project(state) for tap, state in zip(self.taps.values(), together, strict=True)]  # type: ignore[operator]

    def forward(self, tape: Tape, cache: SideCache | None) -> Float[Tensor, "B T d"]:
        states, *others = self._projected(tape)
        rotary, bias = self.rotary(tape.positions), attention_bias(tape.attend, states.dtype)
        if not self.rungs:
            return self.blocks[0](states, rotary, bias, cache, 0)  # type: ignore[no-any-return]
        mu = torch.sigmoid(torch.stack(tuple(self.gates)).float() / _GATE_TEMPERATURE).to(states.dtype)
        shares = zip(mu, 1 - mu, strict=True)  # of the ladder and of the tap, for all rungs at once
        for index, (tap, (own, tapped), block) in enumerate(zip(others, shares, self.blocks, strict=True)):
            states = block(own * states + tapped * tap, rotary, bias, cache, index)
        return states


def default_feed_forward(width: int) -> int:
    """Hidden width of a side block's feed-forward: about 8/3 of the width, in steps of 32."""
    return max(32, round(width * 8 / 3 / 32) * 32)
