"""A gene: low-rank updates of some layers of one family, each layer with a coefficient, and what they belong to."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from safeside.base.updates import LowRank
from safeside.errors import InputError
from safeside.genes.recipe import GeneRecipe, check_conflicts

FORMAT: Final = 1
SIZES: Final = (1e-6, 1e6)
"""Of coefficients, without their sign: they are in the weights, where others would be lost or run over."""


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class AttachmentPoint(_Frozen):
    """One linear layer that the gene updates."""

    name: str
    """Of the module in the model, such as ``model.layers.3.mlp.down_proj``."""
    layer: int = Field(ge=1)
    """Number of its transformer block, from 1."""
    rank: int = Field(ge=1)
    """Of its update."""
    n_in: int = Field(ge=1)
    """Width of what it reads."""
    n_out: int = Field(ge=1)
    """Width of what it gives."""

    @property
    def shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Of its update's ``down`` and ``up``."""
        return (self.rank, self.n_in), (self.n_out, self.rank)


class GeneFamily(_Frozen):
    """The models that the gene can be used with: one architecture and one tokenizer."""

    base: str
    """What it was extracted on."""
    architecture: str
    """Hash of what shapes the network (see ``safeside.base.fingerprint``)."""
    tokenizer: str
    """Hash of the tokenizer."""
    settings: dict[str, Any]
    """What shapes the network, setting by setting."""
    n_layers: int = Field(ge=1)
    """Transformer blocks."""
    n_weights: int = Field(ge=1)
    """Weights of the whole model."""


class GeneConfig(_Frozen):
    """What ``gene.json`` holds."""

    format: Literal[1] = FORMAT
    """Of the folder."""
    name: str = Field(min_length=1)
    """The gene's name."""
    layers: tuple[int, ...] = Field(min_length=1)
    """Transformer blocks that are kept, numbered from 1, rising."""
    coefficients: tuple[float, ...]
    """One for each layer; they are in the weights already."""
    modules: tuple[AttachmentPoint, ...] = Field(min_length=1)
    """Every linear layer that is updated."""
    family: GeneFamily
    """What it belongs to."""
    conflicts: tuple[str, ...] = ()
    """Names of genes that it is never used with."""
    recipe: GeneRecipe
    """How it was made."""
    results: dict[str, int | float | str] = {}
    """What was measured while it was made."""
    checksum: str = ""
    """Of the weights, of PEFT's configuration and of the other fields."""

    @model_validator(mode="after")
    def _holds_together(self) -> Self:
        if list(self.layers) != sorted(set(self.layers)) or self.layers[-1] > self.family.n_layers:
            raise ValueError(f"layers must rise and lie in 1..{self.family.n_layers}; got {list(self.layers)}")
        if len(self.coefficients) != len(self.layers) or 0.0 in self.coefficients:
            raise ValueError(f"coefficients must be one for each layer and none 0; got {list(self.coefficients)}")
        if {point.layer for point in self.modules} != set(self.layers):
            raise ValueError("modules must be those of the layers that are kept, and every layer must have one")
        if len({point.name for point in self.modules}) < len(self.modules):
            raise ValueError("modules must have names of their own")
        check_conflicts(self.name, self.conflicts)
        return self


@dataclass(frozen=True, slots=True)
class Gene:
    """A gene in memory.  Updates that are missing, not finite, or not those that ``config`` lists are an InputError."""

    config: GeneConfig
    """What it is and belongs to."""
    updates: Mapping[str, LowRank]
    """By module, with the coefficients in them."""

    def __post_init__(self) -> None:
        shapes = {point.name: point.shapes for point in self.config.modules}
        for name in sorted(shapes.keys() | self.updates.keys()):
            problem = _problem(self.updates.get(name), shapes.get(name))
            if problem:
                raise InputError(f"Gene {self.name!r}: the update of {name} {problem}. Make the gene anew.")

    @property
    def name(self) -> str:
        """Its name."""
        return self.config.name

    def kept(self, layers: Sequence[int]) -> Gene:
        """The gene with some of its layers only; one that it does not have is an InputError."""
        unknown = sorted(set(layers) - set(self.config.layers))
        if unknown or not layers:
            known = ", ".join(map(str, self.config.layers))
            raise InputError(f"{self.name} has layers {known}; got {sorted(layers)}. Choose at least one of them.")
        pairs = [pair for pair in zip(self.config.layers, self.config.coefficients, strict=True) if pair[0] in layers]
        points = tuple(point for point in self.config.modules if point.layer in layers)
        changes = {
            "layers": tuple(layer for layer, _ in pairs),
            "coefficients": tuple(coefficient for _, coefficient in pairs),
            "modules": points,
        }
        return Gene(changed(self.config, changes), {point.name: self.updates[point.name] for point in points})

    def with_coefficients(self, coefficients: Sequence[float]) -> Gene:
        """The gene with other coefficients, one for each layer; 0 and what is out of SIZES are an InputError."""
        layers, (least, most) = self.config.layers, SIZES
        if len(coefficients) != len(layers) or not all(least <= abs(value) <= most for value in coefficients):
            raise InputError(
                f"{self.name} needs {len(layers)} coefficients of a size between {least:g} and {most:g}; got "
                f"{list(coefficients)}. To leave a layer out, keep the others."
            )
        pairs = zip(coefficients, self.config.coefficients, strict=True)
        factors = dict(zip(layers, (new / old for new, old in pairs), strict=True))
        updates = {point.name: self.updates[point.name].scaled(factors[point.layer]) for point in self.config.modules}
        return Gene(changed(self.config, {"coefficients": tuple(map(float, coefficients))}), updates)

    def with_results(self, results: Mapping[str, int | float | str]) -> Gene:
        """The gene with further results."""
        return Gene(changed(self.config, {"results": {**self.config.results, **results}}), self.updates)

    @property
    def n_weights_touched(self) -> int:
        """Weights of the model that the updates add to."""
        return sum(point.n_in * point.n_out for point in self.config.modules)

    def norm(self, layer: int) -> float:
        """Frobenius norm of a layer's updates, coefficients included."""
        matrices = [self.updates[point.name].matrix for point in self.config.modules if point.layer == layer]
        return math.sqrt(sum(float(matrix.square().sum()) for matrix in matrices))


def _problem(update: LowRank | None, shapes: tuple[tuple[int, int], tuple[int, int]] | None) -> str | None:
    """What is wrong with an update for which the configuration says ``shapes``."""
    if update is None:
        return "is missing; expected one for each of its modules"
    if shapes is None:
        return "is of no module that it lists; expected those alone"
    pair = (update.down, update.up)
    found = tuple(tuple(tensor.shape) for tensor in pair)
    if found != shapes:
        return f"has the shapes {found}; expected {shapes}"
    if not all(tensor.float().isfinite().all() for tensor in pair):
        return "holds NaN or infinity; expected numbers that are finite in float32"
    return None


def changed(config: GeneConfig, changes: Mapping[str, object]) -> GeneConfig:
    """The configuration with other fields, checked anew."""
    return GeneConfig.model_validate({**config.model_dump(), **changes})


def gene_facts(gene: Gene) -> list[dict[str, object]]:
    """What ``safeside gene inspect`` prints: a row for each layer, and one for all of them."""
    config = gene.config
    rows: list[dict[str, object]] = []
    for layer, coefficient in zip(config.layers, config.coefficients, strict=True):
        points = [point for point in config.modules if point.layer == layer]
        touched = sum(point.n_in * point.n_out for point in points)
        rows.append(_row(str(layer), points, gene.norm(layer), coefficient, touched / config.family.n_weights))
    norm = math.sqrt(sum(gene.norm(layer) ** 2 for layer in config.layers))
    share = gene.n_weights_touched / config.family.n_weights
    mean = sum(config.coefficients) / len(config.coefficients)
    return [*rows, _row("all", list(config.modules), norm, mean, share)]


def _row(
    layer: str, points: Sequence[AttachmentPoint], norm: float, coefficient: float, share: float
) -> dict[str, object]:
    ranks = sorted({point.rank for point in points})
    return {
        "layer": layer,
        "modules": len(points),
        "ranks": ",".join(map(str, ranks)),
        "norm": norm,
        "coefficient": coefficient,
        "share_of_weights_touched": share,
    }
