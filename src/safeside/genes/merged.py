"""The record beside a model that genes were merged into: which are in its weights, and what it was before."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final, Literal

from pydantic import BaseModel, ConfigDict

from safeside.base.model import Base
from safeside.errors import ConfigError, InputError
from safeside.genes.gene import Gene
from safeside.genes.stored import read_stored

MERGED_FILE = "gene_merged.json"
FORMAT: Final = 1


class Merged(BaseModel):
    """What ``gene_merged.json`` beside a merged copy says."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1] = FORMAT
    """Of the record."""
    genes: dict[str, float]
    """By name, how much of each gene is in the weights."""
    conflicts: dict[str, tuple[str, ...]] = {}
    """By name, the genes that each of them is never used with."""
    model: str
    """Hash of the model before."""


def read_merged(folder: Path) -> Merged:
    """Which genes are in a merged copy."""
    path = folder / MERGED_FILE
    if not path.is_file():
        raise InputError(f"{folder} has no {MERGED_FILE}; expected a model that 'safeside gene apply' wrote.")
    return read_stored(path, Merged, FORMAT, "a valid record of merged genes")


def check_beside_merged(base: Base, genes: Sequence[Gene]) -> None:
    """Raise a ConfigError where ``base`` holds one of the genes in its weights, or one that they conflict with."""
    if not (base.folder / MERGED_FILE).is_file():
        return
    merged = read_merged(base.folder)
    inside = {name for name, weight in merged.genes.items() if weight}
    for gene in genes:
        rivals = sorted(
            name for name in inside if name in gene.config.conflicts or gene.name in merged.conflicts.get(name, ())
        )
        if gene.name in inside or rivals:
            why = f"declares a conflict with {', '.join(rivals)}, which is" if rivals else "is"
            raise ConfigError(
                f"Gene {gene.name!r} {why} in the weights of {base.name} already. Use the model as it was before: "
                "safeside gene unapply."
            )
