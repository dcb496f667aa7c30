"""``Adapter``: a trunk that reads the base and a head that answers, built from one configuration."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, Self, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from safeside.adapters.blocks import Norm
from safeside.adapters.config import AdapterConfig, Calibration
from safeside.base.taps import SideCache, Tape
from safeside.registry import Registry


class Trunk(Protocol):
    """A side network: an ``nn.Module`` built from an AdapterConfig.  Implement these four to add an architecture."""

    width: int
    """Width of the state that it hands to the head, d."""

    @property
    def n_cache_layers(self) -> int:
        """Layers it needs in the request's cache; 0 for token-wise trunks."""
        ...

    def read(self, tape: Tape, layer: int, hidden: Float[Tensor, "B T D"]) -> None:
        """Write on ``tape`` what is needed of one tapped state, as narrow as possible.  Called layer by layer."""
        ...

    def forward(self, tape: Tape, cache: SideCache | None) -> Float[Tensor, "B T d"]:
        """The side state of every new token, once all taps were read."""
        ...


TRUNKS: Registry[type[Trunk]] = Registry("adapter kind")
DIMENSIONS = ("width", "feed_forward", "head_dim", "tap_rank", "gate", "bottleneck")
"""The fields of AdapterConfig that shape a trunk; each kind reads some of them."""
_used: dict[str, frozenset[str]] = {}


def register_adapter(kind: str, trunk: type[Trunk] | str, dimensions: Sequence[str] = DIMENSIONS) -> None:
    """Make a trunk class (or its lazy ``"module:Class"``) known to configurations of this ``kind``.

    A stranger's kind is called ``package/name``.  ``dimensions`` are those of DIMENSIONS that it reads: ``make_config``
    refuses the others instead of ignoring them.  A name that is taken by another trunk is a ConfigError.
    """
    TRUNKS.register(kind, trunk)
    _used[kind] = frozenset(dimensions)


def dimensions_of(kind: str) -> frozenset[str]:
    """The fields among DIMENSIONS that trunks of ``kind`` read."""
    TRUNKS.get(kind)  # a plugin's kind is registered by now
    return _used.get(kind, frozenset(DIMENSIONS))


register_adapter("plr", "safeside.adapters.plr:Plr", ("width", "tap_rank"))
register_adapter("rtb", "safeside.adapters.rtb:Rtb", ("bottleneck",))
register_adapter("lst", "safeside.adapters.lst:Lst", ("width", "feed_forward", "head_dim", "tap_rank", "gate"))


@dataclass(slots=True)
class SideOutput:
    """What one adapter gives for the new tokens of a pass: an aligner's delta, or a guard's logits and scores."""

    delta: Float[Tensor, "B T D"] | None = None
    """What an aligner adds to the base's final normed state at strength 1."""
    logits: Float[Tensor, "B T K"] | None = None
    """A guard's raw outputs, before calibration."""
    scores: Float[Tensor, "B T K"] | None = None
    """Risk in [0, 1]: at position t of everything up to t (for encoders: of the whole text)."""


class GuardHead(nn.Module):
    """Norm, optional causal attention pooling, and one logit for each label; calibration turns logits into scores."""

    def __init__(self, width: int, n_labels: int, pooled: bool) -> None:
        super().__init__()
        self.norm = Norm(width)
        self.query = nn.Parameter(torch.zeros(width)) if pooled else None
        self.linear = nn.Linear(width, n_labels)
        self.register_buffer("scale", torch.ones(n_labels), persistent=False)
        self.register_buffer("bias", torch.zeros(n_labels), persistent=False)

    def calibrate(self, calibration: Calibration) -> None:
        """Use ``calibration`` from now on."""
        device = self.linear.weight.device
        self.scale = torch.tensor(calibration.scale, dtype=torch.float32, device=device)
        self.bias = torch.tensor(calibration.bias, dtype=torch.float32, device=device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move with the module but stay float32: a cast of the calibration would shift every score."""
        scale, bias = self.scale, self.bias
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        device = self.linear.weight.device
        self.scale, self.bias = scale.to(device), bias.to(device)
        return self

    def forward(self, states: Float[Tensor, "B T d"], tape: Tape, cache: SideCache | None, layer: int) -> SideOutput:
        states = self.norm(states)
        if self.query is not None:
            states = self._pool(states, tape, cache, layer)
        logits = self.linear(states).float()
        return SideOutput(logits=logits, scores=torch.sigmoid(self.scale.float() * logits + self.bias.float()))

    def _pool(self, states: Tensor, tape: Tape, cache: SideCache | None, layer: int) -> Tensor:
        """Softmax-weighted mean of the states seen so far, with one learned query."""
        assert self.query is not None
        keys = values = states[:, None]  # one head: (B, 1, T, d)
        if cache is not None:
            keys, values = cache.update(keys, values, layer)
        queries = self.query.expand(states.shape)[:, None]
        return F.scaled_dot_product_attention(queries, keys, values, attn_mask=tape.attend)[:, 0]


class DeltaHead(nn.Module):
    """Norm and up-projection to the base's width, zero at the start: an untrained aligner *is* the base."""

    def __init__(self, width: int, d_model: int) -> None:
        super().__init__()
        self.norm = Norm(width)
        self.up = nn.Linear(width, d_model, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, states: Float[Tensor, "B T d"]) -> SideOutput:
        return SideOutput(delta=self.up(self.norm(states)))


class Adapter(nn.Module):
    """One guard or aligner: an ``nn.Module``.  ``config.role`` decides the head, ``config.kind`` the trunk.

    Made by ``create_adapter`` or ``load_adapter``.  Its gradients stop at the tapped states.
    """

    def __init__(self, config: AdapterConfig) -> None:
        super().__init__()
        self.config = config
        trunk = TRUNKS.get(config.kind)(config)  # type: ignore[call-arg]
        assert isinstance(trunk, nn.Module)
        self.trunk = trunk
        width = self._trunk.width
        self.head: GuardHead | DeltaHead
        if config.role == "guard":
            self.head = GuardHead(width, len(config.labels), config.readout == "attention")
        else:
            self.head = DeltaHead(width, config.base.d_model)
        if config.calibration is not None:
            self.set_calibration(config.calibration)

    @property
    def _trunk(self) -> Trunk:
        return cast(Trunk, self.trunk)

    @property
    def name(self) -> str:
        """What verdicts, strengths and policies call it."""
        return self.config.name

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights; tapped states are cast to it."""
        return next(self.parameters()).dtype

    @property
    def n_cache_layers(self) -> int:
        """Layers this adapter takes in the request's cache."""
        return self._trunk.n_cache_layers + (self.config.readout == "attention" and self.config.role == "guard")

    @property
    def thresholds(self) -> tuple[float, ...]:
        """By label, the score in [0, 1] from which on it flags: 0.5 until a guard is calibrated; none for aligners."""
        return self.config.calibration.threshold if self.config.calibration else (0.5,) * len(self.config.labels)

    def set_calibration(self, calibration: Calibration) -> None:
        """Store and use ``calibration``; guards only."""
        assert isinstance(self.head, GuardHead), "only guards are calibrated"
        self.config = self.config.model_copy(update={"calibration": calibration})
        self.head.calibrate(calibration)

    def read(self, tape: Tape, layer: int, hidden: Float[Tensor, "B T D"]) -> None:
        """Take what the trunk needs of one tapped state.  Nothing flows back into the base."""
        self._trunk.read(tape, layer, hidden.detach().to(self.dtype))

    def forward(self, tape: Tape, cache: SideCache | None = None) -> SideOutput:
        """Delta (B, T, D) or scores (B, T, K) for the new tokens of the pass on ``tape``."""
        states = self.trunk(tape, cache)
        if isinstance(self.head, GuardHead):
            output: SideOutput = self.head(states, tape, cache, self._trunk.n_cache_layers)
        else:
            output = self.head(states)
        return output
