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
    revision: str | None = None
    model_type: str
    fingerprint: Fingerprint
    n_layers: int = Field(ge=1, le=_MOST)
    d_model: int = Field(ge=1, le=_MOST)
    is_encoder: bool = False


class Calibration(BaseModel):
    """How a guard's raw logit becomes a score, and where it flags: ``score = sigmoid(scale * logit + bias)``.

    One entry for each label.  ``threshold`` was chosen on validation data so that ``false_positive_rate`` of the
    harmless rows are flagged.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    scale: tuple[Annotated[Finite, Field(gt=0)], ...]
    bias: tuple[Finite, ...]
    threshold: tuple[Annotated[Finite, Field(ge=0, le=1)], ...]
    false_positive_rate: float = Field(0.05, gt=0, lt=1)


class AdapterConfig(BaseModel):
    """Everything needed to rebuild a side network around its weights.

    ``layers`` are tapped layers: 0 is the embedding, l the output of block l.  ``width`` is the side width d = D / r;
    ``head_dim`` divides it.  ``tap_rank`` 0 means full-rank down-projections, else low-rank ones.  ``bottleneck`` is
    RTB's.  ``labels`` name a guard's K outputs; the first K-1 or all of them mean risk.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: int = FORMAT
    kind: str
    role: Literal["guard", "align"]
    name: str = Field(min_length=1)
    layers: tuple[int, ...]
    width: int = Field(0, ge=0, le=_MOST)
    feed_forward: int = Field(0, ge=0, le=_MOST)
    head_dim: HeadDim = 32
    tap_rank: int = Field(0, ge=0, le=_MOST)
    gate: Literal["layer", "channel"] = "layer"
    bottleneck: int = Field(32, ge=1, le=_MOST)
    readout: Literal["last", "attention"] = "last"
    labels: tuple[str, ...] = ()
    base: BaseReference
    calibration: Calibration | None = None
    allow_mismatch: bool = False

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
