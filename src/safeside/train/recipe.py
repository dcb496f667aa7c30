"""A recipe is a run: one TOML file, checked before anything is computed."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from safeside.adapters.config import AdapterConfig, HeadDim
from safeside.adapters.sizing import make_config, sized_config
from safeside.base.model import Base
from safeside.errors import ConfigError


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class BaseSection(_Section):
    """Which base: the arguments of ``load_base``."""

    name: str = "builtin"
    revision: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None


class DataSection(_Section):
    """Which rows.  Paths are relative to the data root (``--data``, else the recipe's folder).

    ``demo:FILE`` names a file of the packaged demo set.  ``limit`` keeps that many training rows, drawn by the seed.
    """

    train: tuple[str, ...] = Field(min_length=1)
    validation: tuple[str, ...] = Field(min_length=1)
    limit: int | None = Field(None, ge=1)


class AdapterSection(_Section):
    """Which adapter: ``size`` (share of the base's compute) or ``reduction`` and single dimensions."""

    kind: str = "lst"
    role: Literal["guard", "align"] = "guard"
    labels: tuple[str, ...] | None = None
    size: float | None = Field(None, gt=0)
    reduction: float | None = Field(None, ge=1)
    layers: tuple[int, ...] | None = None
    width: int | None = Field(None, ge=0)
    feed_forward: int | None = Field(None, ge=1)
    head_dim: HeadDim = 32
    tap_rank: int | None = Field(None, ge=0)
    gate: Literal["layer", "channel"] | None = None
    bottleneck: int | None = Field(None, ge=1)
    readout: Literal["last", "attention"] | None = None

    @model_validator(mode="after")
    def _one_dial(self) -> AdapterSection:
        if self.size is not None and self.reduction is not None:
            raise ValueError("size and reduction both set the width; keep one")
        return self


class TrainingSection(_Section):
    """How to train.  ``soft_weight`` is the share of the loss that goes to soft targets of a bigger guard."""

    epochs: int = Field(6, ge=1)
    batch_size: int = Field(32, ge=1)
    accumulation: int = Field(1, ge=1)
    learning_rate: float = Field(2e-3, gt=0)
    weight_decay: float = Field(0.01, ge=0)
    warmup: float = Field(0.06, ge=0, lt=1)
    max_gradient_norm: float = Field(1.0, gt=0)
    patience: int = Field(3, ge=1)
    precision: Literal["float32", "bfloat16"] = "float32"
    class_weights: Literal["none", "balanced"] = "none"
    soft_weight: float = Field(0.0, ge=0, le=1)
    cache_taps: bool = True
    checkpoint_seconds: float = Field(60.0, ge=0)


class CalibrationSection(_Section):
    """The false-positive rate on validation data at which a guard's threshold is set."""

    false_positive_rate: float = Field(0.05, gt=0, lt=1)


class Recipe(_Section):
    """One run: base, data, adapter, training, seed and where the adapter goes."""

    name: str = Field(min_length=1)
    output: str
    seed: int = 0
    base: BaseSection = BaseSection()
    data: DataSection
    adapter: AdapterSection = AdapterSection()
    training: TrainingSection = TrainingSection()
    calibration: CalibrationSection = CalibrationSection()

    def adapter_config(self, base: Base) -> AdapterConfig:
        """The adapter's configuration on ``base``."""
        section = self.adapter
        options: dict[str, object] = {"name": self.name, "kind": section.kind, "role": section.role}
        options["head_dim"] = section.head_dim
        for field in (
            "labels",
            "layers",
            "width",
            "feed_forward",
            "tap_rank",
            "gate",
            "bottleneck",
            "readout",
        ):
            value = section.model_dump()[field]
            if value is not None:
                options[field] = value
        if section.size is not None and "width" not in options and "layers" not in options:
            return sized_config(base, section.size, **options)
        return make_config(base, reduction=section.reduction or 16, **options)  # type: ignore[arg-type]


def read_recipe(path: str | Path) -> Recipe:
    """The recipe in a TOML file; a missing file, bad TOML or an unknown field is a ConfigError."""
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"There is no recipe {path}; expected a TOML file. Examples are in recipes/.")
    try:
        return Recipe.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not TOML: {error}.") from error
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
        raise ConfigError(f"{path} is not a valid recipe: {problems}. See docs/reference/recipe.md.") from error
