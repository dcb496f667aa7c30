"""``AdapterConfig``: every dimension of a side network, as stored in ``safeside_config.json``."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from safeside.base.fingerprint import Fingerprint
from safeside.base.model import Base
from safeside.errors import ConfigError

FORMAT = 1
_MOST = 1 << 20  # of any dimension: a damaged file must not ask for terabytes
Finite = Annotated[float, Field(allow_inf_nan=False)]
HeadDim = Literal[32, 64, 128]


class BaseReference(BaseModel):
    """The base that an adapter was made for, and the geometry that it relies on."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    """What the base was loaded by: ``builtin``, a folder or a hub name."""
    revision: str | None = None
    """Revision on the model hub, where one was given."""
    model_type: str
    """Architecture, as config.json names it."""
    fingerprint: Fingerprint
    """Hashes of architecture, tokenizer, chat template and weights; compared when the adapter is loaded."""
    n_layers: int = Field(ge=1, le=_MOST)
    """Transformer blocks, L."""
    d_model: int = Field(ge=1, le=_MOST)
    """Width of the hidden states, D."""
    is_encoder: bool = False
    """Whether the base reads both ways and takes guards only."""


class Calibration(BaseModel):
    """How a guard's raw logit becomes a score, and where it flags: ``score = sigmoid(scale * logit + bias)``.

    One entry for each label.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    scale: tuple[Annotated[Finite, Field(gt=0)], ...]
    """Factor of the logit; positive, so that calibration never changes a ranking."""
    bias: tuple[Finite, ...]
    """Added after the factor."""
    threshold: tuple[Annotated[Finite, Field(ge=0, le=1)], ...]
    """The label flags from this score on."""
    false_positive_rate: float = Field(0.05, gt=0, lt=1)
    """The threshold was set to flag at most this share of the harmless validation rows."""

    @model_validator(mode="after")
    def _check(self) -> Calibration:
        if not len(self.scale) == len(self.bias) == len(self.threshold):
            raise ValueError("scale, bias and threshold need one entry for each label")
        return self


class AdapterConfig(BaseModel):
    """Everything needed to rebuild a side network around its weights."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: int = FORMAT
    """Version of this file; older ones load forever, a newer one is refused."""
    kind: str
    """Architecture of the side network: a registered adapter kind."""
    role: Literal["guard", "align"]
    """``guard`` gives scores, ``align`` gives a delta to the base's final state."""
    name: str = Field(min_length=1)
    """What verdicts, strengths and policies call the adapter; unique within an attachment."""
    layers: tuple[int, ...]
    """Tapped layers, rising: 0 is the embedding, l the output of block l, L the last block before the final norm."""
    width: int = Field(0, ge=0, le=_MOST)
    """Side width d; 0 for kinds without one (``rtb``) and for a linear probe (``plr``)."""
    feed_forward: int = Field(0, ge=0, le=_MOST)
    """Hidden width of an ``lst`` block's feed-forward; 0 means about 8/3 of ``width``."""
    head_dim: HeadDim = 32
    """Width of one attention head of ``lst``; it divides ``width``."""
    tap_rank: int = Field(0, ge=0, le=_MOST)
    """Rank of the down-projections of tapped states; 0 means full rank."""
    gate: Literal["layer", "channel"] = "layer"
    """Whether ``lst`` learns one gate for each tapped layer, or one for each of its channels."""
    bottleneck: int = Field(32, ge=1, le=_MOST)
    """Hidden width of ``rtb``'s token-wise networks."""
    readout: Literal["last", "attention"] = "last"
    """A guard reads the newest token's side state, or an attention-weighted mean of all so far."""
    labels: tuple[str, ...] = ()
    """Names of a guard's K outputs, each a risk of its own; none for an aligner."""
    windows: Literal["max", "min"] = "max"
    """Of a guard: whether the highest score of a long text's windows counts, or the lowest (grounding)."""
    base: BaseReference
    """The base that it reads."""
    calibration: Calibration | None = None
    """How logits become scores; none until a guard is calibrated (then sigmoid, and thresholds of 0.5)."""
    allow_mismatch: bool = False
    """Set on loading: the base has other weights or another chat template than the adapter was trained with."""

    @model_validator(mode="after")
    def _check(self) -> AdapterConfig:
        if self.role == "guard" and not self.labels:
            raise ValueError("a guard needs at least one label; add labels = ['harm']")
        if self.role == "align" and self.labels:
            raise ValueError("an aligner has no labels; remove them")
        if self.role == "align" and self.base.is_encoder:
            raise ValueError("an encoder has no next-token distribution to align; use a causal language model")
        if not self.layers or list(self.layers) != sorted(set(self.layers)):
            raise ValueError(f"layers must be rising and not empty; got {self.layers}")
        if self.layers[0] < 0 or self.layers[-1] > self.base.n_layers:
            raise ValueError(f"layers must lie in 0..{self.base.n_layers}; got {self.layers}")
        if self.kind == "lst" and (self.width == 0 or self.width % self.head_dim):
            raise ValueError(f"width must be a multiple of head_dim {self.head_dim}; got {self.width}")
        if self.calibration is not None and len(self.calibration.scale) != len(self.labels):
            raise ValueError(f"calibration has {len(self.calibration.scale)} entries for {len(self.labels)} labels")
        return self


def reference_of(base: Base) -> BaseReference:
    """The reference that ties an adapter to ``base``."""
    return BaseReference(
        name=base.name,
        revision=base.revision,
        model_type=base.model.config.model_type,
        fingerprint=base.fingerprint,
        n_layers=base.n_layers,
        d_model=base.d_model,
        is_encoder=base.is_encoder,
    )


def require_valid(values: dict[str, object]) -> AdapterConfig:
    """An AdapterConfig from plain values; whatever is wrong becomes one ConfigError."""
    try:
        return AdapterConfig.model_validate(values)
    except ValueError as error:
        raise ConfigError(f"Not a valid adapter configuration: {error}") from error
