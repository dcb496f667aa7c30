"""Genes as folders that plain PEFT loads: its two files, and beside them ``gene.json`` and where it comes from.

Coefficients are folded into ``lora_B``, so PEFT alone gives the same model.  ``gene.json`` is written last and holds a
checksum of the others and of what it says: a folder that was half written, damaged, edited or put together from two
is refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from peft import LoraConfig
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from safeside.artifact import PROVENANCE_FILE, make_folder
from safeside.base.updates import LowRank
from safeside.base.weights import save_weights
from safeside.errors import FormatError
from safeside.genes.gene import FORMAT, Gene, GeneConfig, changed
from safeside.genes.stored import read_stored
from safeside.lora import CONFIG_FILE, WEIGHTS_FILE
from safeside.provenance import provenance

GENE_FILE = "gene.json"
_PREFIX = "base_model.model."  # what PEFT puts before the names of a model's modules
_ORDER = (WEIGHTS_FILE, CONFIG_FILE, PROVENANCE_FILE, GENE_FILE)


def save_gene(gene: Gene, folder: str | Path, facts: Mapping[str, str] | None = None) -> Path:
    """Write the gene's folder (made if missing), file after whole file; ``facts`` go into its provenance."""
    folder = make_folder(Path(folder))
    with TemporaryDirectory(dir=folder) as new:
        place = Path(new)
        _peft_config(gene.config).save_pretrained(str(place))
        weights = _named(gene.updates)
        save_weights(weights, place / WEIGHTS_FILE, {"format": "pt"}, like=place / CONFIG_FILE)
        checksum = _checksum(place / CONFIG_FILE, weights, gene.config.model_dump(mode="json"))
        config = changed(gene.config, {"checksum": checksum})
        stamp = {**provenance(gene.config.recipe.seed), **(facts or {})}
        (place / PROVENANCE_FILE).write_text(json.dumps(stamp, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        (place / GENE_FILE).write_text(config.model_dump_json(indent=2) + "\n", encoding="utf-8")
        (folder / GENE_FILE).unlink(missing_ok=True)  # an older gene's would not fit the new weights
        for name in _ORDER:
            (place / name).replace(folder / name)
    return folder


def load_gene(folder: str | Path) -> Gene:
    """The gene in ``folder``; whatever is missing, damaged, not finite or does not fit together is a FormatError."""
    folder = Path(folder)
    missing = [name for name in (GENE_FILE, CONFIG_FILE, WEIGHTS_FILE) if not (folder / name).is_file()]
    if missing:
        raise FormatError(
            f"{folder} has no {', '.join(missing)}; expected a gene's folder, whole. Check the path, or get it again."
        )
    config = read_gene_config(folder)
    try:
        weights = load_file(folder / WEIGHTS_FILE)
        peft = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        said = json.loads((folder / GENE_FILE).read_text(encoding="utf-8"))
    except (SafetensorError, ValueError, OSError) as error:
        raise FormatError(f"{folder} cannot be read as a gene: {error}. Get the folder again.") from error
    _check_weights(config, weights, folder)
    if config.checksum != _checksum(folder / CONFIG_FILE, weights, said):
        raise FormatError(
            f"{folder}: weights, {CONFIG_FILE} or {GENE_FILE} differ from the checksum; expected the files that "
            "save_gene wrote together. Get the folder again, or make the gene anew."
        )
    if not isinstance(peft, dict) or set(peft.get("target_modules") or ()) != {point.name for point in config.modules}:
        raise FormatError(f"{folder}: {CONFIG_FILE} names other modules than {GENE_FILE}. Get the folder again.")
    return Gene(config, {point.name: LowRank(*_pair(weights, point.name)) for point in config.modules})


def read_gene_config(folder: Path) -> GeneConfig:
    """What ``gene.json`` in ``folder`` says, alone; a newer format or a broken file is a FormatError."""
    return read_stored(folder / GENE_FILE, GeneConfig, FORMAT, "a gene's description")


def _peft_config(config: GeneConfig) -> LoraConfig:
    """PEFT's configuration: a rank and an equal alpha for each module that is kept, so that it multiplies by 1."""
    ranks = {point.name: point.rank for point in config.modules}
    most = max(ranks.values())
    return LoraConfig(
        r=most,
        lora_alpha=most,
        rank_pattern=ranks,
        alpha_pattern=ranks,
        target_modules=sorted(ranks),
        fan_in_fan_out=bool(config.family.settings.get("model_type") == "gpt2"),
        base_model_name_or_path=config.family.base,
        task_type="CAUSAL_LM",
        inference_mode=True,
    )


def _names(module: str) -> tuple[str, str]:
    return f"{_PREFIX}{module}.lora_A.weight", f"{_PREFIX}{module}.lora_B.weight"


def _named(updates: Mapping[str, LowRank]) -> dict[str, Tensor]:
    """The updates by PEFT's names."""
    pairs = {name: (update.down, update.up) for name, update in updates.items()}
    named = {key: tensor for name, pair in pairs.items() for key, tensor in zip(_names(name), pair, strict=True)}
    return {key: tensor.detach().to("cpu", torch.float32).contiguous() for key, tensor in named.items()}


def _pair(weights: Mapping[str, Tensor], module: str) -> tuple[Tensor, Tensor]:
    down, up = _names(module)
    return weights[down], weights[up]


def _check_weights(config: GeneConfig, weights: Mapping[str, Tensor], folder: Path) -> None:
    """Raise unless ``weights`` are finite floats of exactly the shapes that gene.json lists."""
    expected: dict[str, tuple[int, int]] = {}
    for point in config.modules:
        expected |= zip(_names(point.name), point.shapes, strict=True)
    for name, shape in expected.items():
        found = tuple(weights[name].shape) if name in weights else None
        if found != shape:
            raise FormatError(f"{folder}: tensor {name!r} has shape {found}; {GENE_FILE} expects {shape}.")
    extra = sorted(set(weights) - set(expected))
    if extra:
        raise FormatError(f"{folder}: tensors that {GENE_FILE} does not list: {', '.join(extra[:3])}.")
    broken = [name for name, tensor in weights.items() if tensor.dtype != torch.float32 or not tensor.isfinite().all()]
    if broken:
        raise FormatError(
            f"{folder}: tensors that are not float32 or hold NaN or infinity: {', '.join(broken[:3])}. Make it again."
        )


def _checksum(peft_config: Path, weights: Mapping[str, Tensor], said: Mapping[str, object]) -> str:
    """sha256 of PEFT's configuration as stored, of what gene.json says, and of every tensor, whatever their order."""
    hasher = hashlib.sha256(peft_config.read_bytes())
    hasher.update(
        json.dumps({name: value for name, value in said.items() if name != "checksum"}, sort_keys=True).encode()
    )
    for name, tensor in sorted(weights.items()):
        hasher.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        hasher.update(tensor.numpy().tobytes())
    return hasher.hexdigest()
