"""``Adapter``: a trunk that reads the base and a head that answers, built from one configuration."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Protocol, Self, cast

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from safeside.adapters.blocks import Norm
from safeside.adapters.config import (
    PRESET_RATES,
    AdapterConfig,
    Calibration,
    ModeCalibration,
    Promise,
    rows_needed,
)
from safeside.base.taps import SideCache, Tape
from safeside.errors import ConfigError, InputError
from safeside.registry import Registry
from safeside.types import Mode, Preset


class Trunk(Protocol):
    """A side network: an ``nn.Module`` built from an AdapterConfig.  Implement these four to add an architecture."""

    width: int
    """Width of the state that it hands to the head, d."""

    @property
    def n_cache_layers(self) -> int:
        """Layers it needs in the request's cache; 0 for token-wise trunks."""
        ...

    def read(self, tape: Tape, layer: int, hidden: Float[Tensor, "B T D"]) -> None:
        """Write on ``tape.hidden`` what is needed of one tapped state, (B, T, ...) and as narrow as possible.

        Called layer by layer.
        """
        ...

    def forward(self, tape: Tape, cache: SideCache | None) -> Float[Tensor, "B T d"]:
        """The side state of every new token, once all taps were read."""
        ...


TRUNKS: Registry[type[Trunk]] = Registry("adapter kind")
DIMENSIONS = (
    "width", "feed_forward", "head_dim", "query_group", "tap_rank", "gate", "bottleneck", "cross_attention", "depth",
    "lora_rank",
)  # fmt: skip
"""The fields of AdapterConfig that shape a trunk; each kind reads some of them."""
_used: dict[str, frozenset[str]] = {}
_delta_kinds: set[str] = set()


def register_adapter(
    kind: str, trunk: type[Trunk] | str, dimensions: Sequence[str] = DIMENSIONS, *, gives_delta: bool = False
) -> None:
    """Make a trunk class (or its lazy ``"module:Class"``) known to configurations of this ``kind``.

    A stranger's kind is called ``package/name``.  ``dimensions`` are those of DIMENSIONS that it reads: ``make_config``
    refuses the others instead of ignoring them.  With ``gives_delta`` the trunk's output (B, T, D) is the delta itself,
    no head follows, and only aligners can be of this kind.  A name that is taken by another trunk is a ConfigError.
    """
    TRUNKS.register(kind, trunk)
    _used[kind] = frozenset(dimensions)
    if gives_delta:
        _delta_kinds.add(kind)


def dimensions_of(kind: str) -> frozenset[str]:
    """The fields among DIMENSIONS that trunks of ``kind`` read."""
    TRUNKS.get(kind)  # a plugin's kind is registered by now
    return _used.get(kind, frozenset(DIMENSIONS))


def check_role(kind: str, role: str) -> None:
    """Raise a ConfigError where ``kind`` cannot have ``role``."""
    if role == "guard" and kind in _delta_kinds:
        raise ConfigError(f"Kind {kind!r} changes the base's state and gives no scores; expected role 'align'.")


_LADDER = ("width", "feed_forward", "head_dim", "query_group", "tap_rank", "gate")
register_adapter("plr", "safeside.adapters.plr:Plr", ("width", "tap_rank"))
register_adapter("rtb", "safeside.adapters.rtb:Rtb", ("bottleneck",))
register_adapter("lst", "safeside.adapters.lst:Lst", _LADDER)
register_adapter("lst_plus", "safeside.adapters.lst_plus:LstPlus", (*_LADDER, "cross_attention"))
register_adapter("state_map", "safeside.adapters.state_map:StateMap", ("bottleneck",), gives_delta=True)
register_adapter("toplayers", "safeside.adapters.toplayers:TopLayers", ("depth", "lora_rank"), gives_delta=True)


@dataclass(slots=True)
class SideOutput:
    """What one adapter gives for the new tokens of a pass: an aligner's delta, or a guard's logits and scores."""

    delta: Float[Tensor, "B T D"] | None = None
    """What an aligner adds to the base's final normed state at strength 1."""
    logits: Float[Tensor, "B T K"] | None = None
    """A guard's raw outputs, before calibration."""
    scores: Float[Tensor, "B T K"] | None = None
    """Risk in [0, 1]: at position t of everything up to t (for encoders: of the whole text); NaN in rows of padding."""


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
        scores = torch.sigmoid(self.scale.float() * logits + self.bias.float())
        return SideOutput(logits=logits, scores=scores.masked_fill(tape.is_blank[:, None, None], math.nan))

    def _pool(self, states: Tensor, tape: Tape, cache: SideCache | None, layer: int) -> Tensor:
        """Softmax-weighted mean of the states seen so far, with one learned query."""
        assert self.query is not None
        keys = values = states[:, None]  # one head: (B, 1, T, d)
        if not tape.is_causal:  # every token sees the same: once is enough
            once = self.query.expand(len(states), 1, 1, -1)
            mean = F.scaled_dot_product_attention(once, keys, values, attn_mask=tape.keep_new[:, None, None])
            return mean[:, 0].expand(states.shape)
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


class DirectHead(nn.Module):
    """Hands on what a trunk gives that computes the delta itself."""

    def forward(self, states: Float[Tensor, "B T D"]) -> SideOutput:
        return SideOutput(delta=states)


class Adapter(nn.Module):
    """One guard or aligner: an ``nn.Module``.  ``config.role`` decides the head, ``config.kind`` the trunk.

    Made by ``create_adapter`` or ``load_adapter``.  Its gradients stop at the tapped states.
    """

    def __init__(self, config: AdapterConfig) -> None:
        super().__init__()
        self.config = config
        check_role(config.kind, config.role)
        trunk = TRUNKS.get(config.kind)(config)  # type: ignore[call-arg]
        assert isinstance(trunk, nn.Module)
        self.trunk: nn.Module = trunk
        width = self._trunk.width
        self.head: GuardHead | DeltaHead | DirectHead
        if config.role == "guard":
            self.head = GuardHead(width, len(config.labels), config.readout == "attention")
        else:
            self.head = DirectHead() if config.kind in _delta_kinds else DeltaHead(width, config.base.d_model)
        if config.calibration is not None:
            self._guard_head.calibrate(config.calibration)

    @property
    def _trunk(self) -> Trunk:
        return cast(Trunk, self.trunk)

    @property
    def _guard_head(self) -> GuardHead:
        assert isinstance(self.head, GuardHead), "only guards are calibrated"
        return self.head

    @property
    def name(self) -> str:
        """What verdicts, strengths and policies call it."""
        return self.config.name

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights; tapped states are cast to it."""
        if isinstance(self.head, DirectHead):
            return next(self.parameters()).dtype
        return self.head.norm.weight.dtype  # walking parameters() for one would cost more than a tap

    @property
    def n_cache_layers(self) -> int:
        """Layers this adapter takes in the request's cache."""
        return self._trunk.n_cache_layers + (self.config.readout == "attention" and self.config.role == "guard")

    @property
    def thresholds(self) -> tuple[float, ...]:
        """By label, the score in [0, 1] from which on it flags: 0.5 until a guard is calibrated; none for aligners.

        These are the guard's own; ``thresholds_in`` gives those that hold in a reading mode, at the preset chosen.
        """
        return self.config.calibration.threshold if self.config.calibration else (0.5,) * len(self.config.labels)

    def thresholds_in(self, mode: Mode) -> tuple[float, ...]:
        """By label, the score from which on a text read in ``mode`` is flagged.

        The preset's if one is chosen, else the mode's own; where the mode has none, those that a patch or a port held
        for it, else the guard's ``thresholds``.
        """
        promise = self._promise_in(mode)
        return promise.threshold if promise is not None else self._held_in(mode) or self.thresholds

    def fallback_note(self, mode: Mode) -> str:
        """What a verdict says when ``mode`` lacks what was asked for and ``thresholds`` stand in; else empty."""
        config = self.config
        if self._promise_in(mode) is not None:
            return ""
        if self._held_in(mode):
            return f"what was promised for mode {mode!r} was of the scores before a patch or a port"
        if config.preset is not None:
            return f"no preset {config.preset!r} for mode {mode!r}: the guard's own threshold is used"
        is_missing = bool(config.modes) and (mode == "windowed" or mode not in config.modes)  # own: of texts that fit
        return f"not calibrated for mode {mode!r}: the guard's own threshold is used" if is_missing else ""

    def _promise_in(self, mode: Mode) -> Promise | None:
        found = self.config.modes.get(mode)
        return found.of_preset(self.config.preset) if found is not None else None

    def _held_in(self, mode: Mode) -> tuple[float, ...]:
        found = self.config.modes.get(mode)
        return found.held if found is not None else ()

    def probabilities(self, scores: NDArray[np.float64], mode: Mode) -> NDArray[np.float64]:
        """Calibrated probabilities (n, K) of scores (n, K) in ``mode``: the scores, where the mode has no map."""
        found = self.config.modes.get(mode)
        if found is None or not found.maps:
            return scores
        columns = [fit.probabilities(column) for fit, column in zip(found.maps, scores.T, strict=True)]
        return np.stack(columns, -1)

    def with_preset(self, preset: Preset | None) -> Adapter:
        """This guard at a preset: ``strict``, ``balanced``, ``permissive``, or None for none.

        The two share their weights, so it costs nothing: choose one for each attachment.  A preset that no mode has is
        an InputError that says how many harmless rows it needs; a mode without it uses the guard's own thresholds, and
        its verdicts say so.
        """
        if preset is not None:
            self._check_preset(preset)
        chosen = copy(self)
        chosen.config = self.config.model_copy(update={"preset": preset})
        return chosen

    def _check_preset(self, preset: Preset) -> None:
        if self.config.role != "guard":
            raise InputError(f"{self.name!r} is an aligner and flags nothing; presets are for guards.")
        if preset not in PRESET_RATES:
            raise InputError(f"There is no preset {preset!r}; expected one of {', '.join(PRESET_RATES)}.")
        modes = self.config.modes
        if any(preset in found.presets for found in modes.values()):
            return
        rate = PRESET_RATES[preset]
        rows = ", ".join(f"{found.n_harmless:,} for mode {mode!r}" for mode, found in modes.items()) or "none"
        raise InputError(
            f"{self.name!r} has no preset {preset!r}. Promising a false-positive rate of {rate:.1%} needs "
            f"{rows_needed(rate):,} harmless rows of a mode; it was calibrated on {rows}. Run safeside calibrate with "
            "a file of that many, or choose another preset."
        )

    def set_mode(self, mode: Mode, calibration: ModeCalibration) -> None:
        """Store ``calibration`` (of ``fit_mode``) for a reading mode; scores stay as they are."""
        assert not calibration.n_labels - {len(self.config.labels)}, "one entry for each label"
        self.config = self.config.model_copy(update={"modes": {**self.config.modes, mode: calibration}})

    def set_calibration(self, calibration: Calibration) -> None:
        """Store and use ``calibration``; guards only.  It changes every score, so modes calibrated before are dropped.

        Other views of this guard (``with_preset``) share the weights and would go on with thresholds of old scores.
        """
        self._guard_head.calibrate(calibration)
        self.config = self.config.model_copy(update={"calibration": calibration, "modes": {}, "preset": None})

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
