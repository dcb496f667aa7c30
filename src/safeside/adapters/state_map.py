"""The smallest aligner: a linear, low-rank map of the base's last state, ``delta = U V h``.

``h`` is the last block's output at unit root-mean-square.  Where the base's final norm is a root-mean-square norm, the
mixed logits are those of the base's own head with a low-rank update, in the spirit of SafeSwitch's refusal head: but it
is the shared head that reads the sum, so strengths and several aligners work as for all others.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from safeside.adapters.blocks import normed
from safeside.adapters.config import AdapterConfig
from safeside.base.taps import SideCache, Tape


class StateMap(nn.Module):
    """Token-wise trunk that gives the delta itself; ``config.bottleneck`` is its rank.  U starts at zero."""

    n_cache_layers = 0

    def __init__(self, config: AdapterConfig) -> None:
        super().__init__()
        self.width = config.base.d_model
        self.layer = config.layers[-1]
        self.down = nn.Linear(self.width, config.bottleneck, bias=False)
        self.up = nn.Linear(config.bottleneck, self.width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def read(self, tape: Tape, layer: int, hidden: Float[Tensor, "B T D"]) -> None:
        """Keep the last state's projection, ``bottleneck`` wide."""
        if layer == self.layer:
            tape.hidden[layer] = self.down(normed(hidden))

    def forward(self, tape: Tape, cache: SideCache | None) -> Float[Tensor, "B T D"]:
        """The delta."""
        return self.up(tape.hidden[self.layer])  # type: ignore[no-any-return]
