"""A copy of a model with genes merged into its weights, and the originals beside them.

``unmerge`` puts the originals back and compares a hash of every tensor with the one taken before: bit for bit.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from safeside.artifact import require_new
from safeside.base.families import is_updated
from safeside.base.model import Base, load_base, quiet_files
from safeside.base.updates import add_to_weight, linear_layer
from safeside.errors import FormatError, InputError, UnsupportedError
from safeside.genes.apply import Weights, checked_weights
from safeside.genes.checks import check_fits, check_model
from safeside.genes.gene import Gene

ORIGINALS_FILE, MERGED_FILE = "gene_originals.safetensors", "gene_merged.json"


class Merged(BaseModel):
    """What ``gene_merged.json`` beside a merged copy says."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: int
    """1."""
    genes: dict[str, float]
    """By name, how much of each gene is in the weights."""
    model: str
    """Hash of the model before."""


def merge_genes(base: Base, genes: Sequence[Gene], folder: str | Path, weights: Weights | None = None) -> Path:
    """Write a copy of ``base`` with the genes in its weights to a new folder; the base stays as it is.

    The copy is a checkpoint like any other.  A base that holds a live LoRA or gene is refused: its files do not.
    """
    folder = require_new(Path(folder))
    used = checked_weights(genes, weights)
    check_model(base)
    for gene in genes:
        check_fits(gene, base)
    if is_updated(base.model):
        raise UnsupportedError(
            f"{base.name} holds a LoRA or a gene that its files do not. Merge and save the LoRA, unapply the gene."
        )
    copy = load_base(base.folder, dtype="auto")
    before = model_hash(copy)
    names = sorted({point.name for gene in genes for point in gene.config.modules})
    layers = {name: linear_layer(copy.model, name) for name in names}
    originals = {name: layer.get_parameter("weight").detach().clone() for name, layer in layers.items()}
    for name, layer in layers.items():
        parts = [used[gene.name] * gene.updates[name].matrix for gene in genes if name in gene.updates]
        add_to_weight(layer, torch.stack(parts).sum(0))
    merged = Merged(format=1, genes=used, model=before)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent) as new:
        place = Path(new) / "model"
        save_checkpoint(copy, place)
        save_file(originals, place / ORIGINALS_FILE, {"format": "pt"})
        (place / MERGED_FILE).write_text(merged.model_dump_json(indent=2) + "\n", encoding="utf-8")
        place.rename(folder)  # whole, or not at all
    return folder


def unmerge_genes(folder: str | Path, output: str | Path) -> Path:
    """Write the model as it was before ``merge_genes`` to a new folder; its tensors are the same bit for bit.

    A folder that no genes were merged into is an InputError; originals that are damaged are a FormatError.
    """
    folder, output = Path(folder), require_new(Path(output))
    merged = read_merged(folder)
    copy = load_base(folder, dtype="auto")
    try:
        originals = load_file(folder / ORIGINALS_FILE)
        with torch.no_grad():
            for name, tensor in originals.items():
                weight = linear_layer(copy.model, name).get_parameter("weight")
                if weight.shape != tensor.shape or weight.dtype != tensor.dtype:
                    raise ValueError(f"{name} has another shape or dtype")
                weight.copy_(tensor)
    except (SafetensorError, OSError, ValueError, AttributeError, TypeError) as error:
        raise FormatError(f"{folder / ORIGINALS_FILE} cannot be put back: {error}. Get the original model.") from error
    if model_hash(copy) != merged.model:
        raise FormatError(
            f"{folder}: with its originals back the model is not the one that genes were merged into; its files were "
            "changed since. Get the original model."
        )
    output.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=output.parent) as new:
        place = Path(new) / "model"
        save_checkpoint(copy, place)
        place.rename(output)
    return output


def read_merged(folder: Path) -> Merged:
    """Which genes are in a merged copy."""
    path = folder / MERGED_FILE
    if not path.is_file():
        raise InputError(f"{folder} has no {MERGED_FILE}; expected a model that 'safeside gene apply' wrote.")
    try:
        return Merged.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, ValidationError) as error:
        raise FormatError(f"{path} is not a valid record of merged genes: {error}") from error


def model_hash(base: Base) -> str:
    """sha256 of every tensor of the model, names, dtypes and shapes included."""
    return tensors_hash(base.model.state_dict())


def tensors_hash(tensors: Mapping[str, Tensor]) -> str:
    """sha256 of tensors by name, whatever their order."""
    hasher = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        hasher.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        hasher.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return hasher.hexdigest()


def save_checkpoint(base: Base, place: Path) -> None:
    """Write model and tokenizer as ``load_base`` reads them."""
    with quiet_files():
        base.model.save_pretrained(place)
        base.tokenizer.save_pretrained(place)
