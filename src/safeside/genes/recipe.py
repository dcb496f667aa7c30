"""How a gene is made: one TOML file for extraction, selection and fit, checked before anything is computed."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from safeside.errors import ConfigError, problems_of

Selection = Literal["shift", "random", "all"]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class GeneData(_Section):
    """Which rows.  Paths are relative to the data root (``--data``, else the recipe's folder)."""

    harmful: tuple[str, ...] = Field(min_length=1)
    """Files of harmful prompts, answered or not; where not, the aligned model's own answers are taken."""
    benign: tuple[str, ...] = Field(min_length=1)
    """Files of harmless prompts, answered or not; where not, the degraded model's own answers are taken."""


class ExtractSection(_Section):
    """How the updates are distilled."""

    rank: int = Field(4, ge=1)
    """Of each update."""
    targets: tuple[str, ...] = ()
    """Endings of the names of linear layers to update, such as ``o_proj``; all in the blocks unless given."""
    steps: int = Field(150, ge=1)
    """Of the optimiser."""
    batch_size: int = Field(16, ge=1)
    """Harmful rows of a step, and as many harmless ones."""
    learning_rate: float = Field(2e-3, gt=0)
    """Peak of AdamW's rate: linear warm-up, then cosine to a tenth."""
    benign_weight: float = Field(1.0, ge=0)
    """Weight of the divergence from the degraded model on harmless rows: what keeps the gene to safety alone."""
    max_new_tokens: int = Field(48, ge=1)
    """Longest answer to a prompt that has none."""


class SelectSection(_Section):
    """Which layers are kept."""

    method: Selection = "shift"
    """By activation shift, by chance, or all."""
    keep: int = Field(4, ge=1)
    """Layers that are kept."""
    n_prompts: int = Field(64, ge=1)
    """Prompts of each kind that shifts are measured on, the first of the files."""


class FitSection(_Section):
    """How the scalars are fitted on a task model."""

    steps: int = Field(60, ge=1)
    """Of the optimiser."""
    batch_size: int = Field(16, ge=1)
    """Refusals of a step, and as many task rows."""
    learning_rate: float = Field(0.2, gt=0)
    """Of the scalars, which start at 1."""
    refusal_tokens: int = Field(8, ge=0)
    """First tokens of each refusal that count, for they decide that it is one; 0 counts all of them."""
    task_weight: float = Field(1.0, ge=0)
    """Weight of the task's answers beside the refusals."""


class GeneRecipe(_Section):
    """How one gene is made."""

    name: str = Field(min_length=1)
    """The gene's name."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Of first weights, the order of rows and layers drawn by chance."""
    aligned: str = "aligned"
    """The aligned model: ``builtin``, a folder or a hub name.  Empty in a ported gene, which had none."""
    degraded: str = "degraded"
    """Its mildly degraded copy, of the same architecture."""
    conflicts: tuple[str, ...] = ()
    """Names of genes that this one is never used with."""
    data: GeneData
    """Harmful and harmless rows."""
    extract: ExtractSection = ExtractSection()
    """The distillation."""
    select: SelectSection = SelectSection()
    """The choice of layers."""
    fit: FitSection = FitSection()
    """The fit of the scalars."""

    @model_validator(mode="after")
    def _holds_together(self) -> Self:
        check_conflicts(self.name, self.conflicts)
        return self


def check_conflicts(name: str, conflicts: Sequence[str]) -> None:
    """Raise a ValueError, for a validator, where a gene conflicts with itself: it could never be used."""
    if name in conflicts:
        raise ValueError(f"conflicts must name other genes; got {name!r}, which is the gene itself: take it out")


def read_gene_recipe(path: str | Path) -> GeneRecipe:
    """The recipe in a TOML file; a missing file, bad TOML or an unknown field is a ConfigError."""
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"There is no recipe {path}; expected a TOML file. An example is recipes/genes/gene.toml.")
    try:
        return GeneRecipe.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not TOML: {error}.") from error
    except ValidationError as error:
        raise ConfigError(
            f"{path} is not a valid gene recipe: {problems_of(error)}. See docs/concepts/genes.md."
        ) from error
