"""A copy of a model with genes merged into its weights, and the originals beside them.

``unmerge`` puts the originals back and compares a hash of every tensor with the one taken before: bit for bit.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from safeside.artifact import require_new
from safeside.base.families import is_updated
from safeside.base.model import Base, load_base, quiet_files
from safeside.base.updates import add_to_weight, linear_layer
from safeside.base.weights import save_weights
from safeside.errors import FormatError, InputError, UnsupportedError
from safeside.genes.apply import Weights, checked_weights
from safeside.genes.checks import check_fits, check_model
from safeside.genes.gene import Gene
from safeside.genes.merged import MERGED_FILE, Merged, read_merged

ORIGINALS_FILE = "gene_originals.safetensors"


def merge_genes(base: Base, genes: Sequence[Gene], folder: str | Path, weights: Weights | None = None) -> Path:
    """Write a copy of ``base`` with the genes in its weights to a new folder; the base stays as it is.

    The copy is a checkpoint like any other.  A base that is not what its files hold (a live LoRA or gene, weights
    changed in memory) is refused, and so is one that genes were merged into: their record would be lost.
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
    if (base.folder / MERGED_FILE).is_file():
        raise UnsupportedError(f"{base.name} has genes merged into it already. Unapply them, and merge all at once.")
    copy = load_base(base.folder, dtype="auto")
    _check_same(base, copy)
    before, originals = model_hash(copy), _add(copy, genes, used)
    conflicts = {gene.name: gene.config.conflicts for gene in genes}
    merged = Merged(genes=used, conflicts=conflicts, model=before)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent) as new:
        place = Path(new) / "model"
        save_checkpoint(copy, place)
        (place / MERGED_FILE).write_text(merged.model_dump_json(indent=2) + "\n", encoding="utf-8")
        save_weights(originals, place / ORIGINALS_FILE, {"format": "pt"}, like=place / MERGED_FILE)
        place.rename(folder)  # whole, or not at all
    return folder


def _check_same(base: Base, copy: Base) -> None:
    """Raise unless the base holds the weights of its files, of which ``copy`` was loaded; only the dtype may differ."""
    stored = copy.model.state_dict()
    for name, tensor in base.model.state_dict().items():
        if name not in stored or not torch.equal(tensor, stored[name].to(tensor)):
            raise UnsupportedError(
                f"{base.name} was changed in memory: {name} is not what its files hold. Save the model, load it, merge."
            )


def _add(copy: Base, genes: Sequence[Gene], weights: Weights) -> dict[str, Tensor]:
    """Add the genes to the copy's weights; returns the originals of those that were changed."""
    names = sorted({point.name for gene in genes for point in gene.config.modules})
    layers = {name: linear_layer(copy.model, name) for name in names}
    originals = {name: layer.get_parameter("weight").detach().clone() for name, layer in layers.items()}
    for name, layer in layers.items():
        parts = [weights[gene.name] * gene.updates[name].matrix for gene in genes if name in gene.updates]
        add_to_weight(layer, torch.stack(parts).sum(0))
        if not layer.get_parameter("weight").isfinite().all():
            raise InputError(
                f"With the genes in it {name} would be beyond {originals[name].dtype}; expected finite sums. Weigh the "
                "genes less."
            )
    return originals


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
