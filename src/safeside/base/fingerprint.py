"""Fingerprints of a base, taken from its checkpoint's files and never from loaded tensors.

So dtype, sharding over devices or quantisation in memory change nothing.  Three parts: the architecture (the fields of
config.json that shape the network), the tokenizer, and the weights.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from safeside.errors import InputError

# Settings of a run or of a file's making, not of the network.
_NOT_ARCHITECTURE = {
    "_name_or_path", "dtype", "torch_dtype", "transformers_version", "use_cache", "quantization_config",
    "pad_token_id", "bos_token_id", "eos_token_id", "architectures", "attention_dropout", "initializer_range",
    "pretraining_tp", "id2label", "label2id",
}  # fmt: skip
_WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")  # the first found is loaded, or what its index lists
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "vocab.txt")
_BLOB_NAME = re.compile(r"[0-9a-f]{64}")


class Fingerprint(BaseModel):
    """Hashes (sha256, first 16 hex digits) of the three parts of a base that an adapter depends on."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    architecture: str
    """Hash of the fields of config.json that shape the network."""
    tokenizer: str
    """Hash of what turns text into ids; padding and truncation settings are left out."""
    weights: str
    """Hash of the weight files."""

    def __str__(self) -> str:
        return f"{self.architecture[:6]}-{self.tokenizer[:6]}-{self.weights[:6]}"


def _digest(*parts: bytes) -> str:
    hasher = hashlib.sha256()
    for part in parts:
        hasher.update(len(part).to_bytes(8, "little") + part)
    return hasher.hexdigest()[:16]


def _file_hash(path: Path) -> bytes:
    """sha256 of a file; the hub's cache names large blobs by it, so those are not read again."""
    resolved = path.resolve()
    if _BLOB_NAME.fullmatch(resolved.name):
        return resolved.name.encode()
    with resolved.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest().encode()


def take_fingerprint(folder: Path) -> Fingerprint:
    """Fingerprint of the checkpoint in ``folder``; files that are missing are an InputError."""
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise InputError(f"{folder} has no config.json; expected a saved model. Save it with save_pretrained.")
    config = json.loads(config_file.read_text(encoding="utf-8"))
    weights = _weight_files(folder)
    if not weights:
        raise InputError(f"{folder} has no weight files (*.safetensors). Save the model with save_pretrained.")
    tokenizer = [folder / name for name in _TOKENIZER_FILES if (folder / name).is_file()]
    if not tokenizer:
        raise InputError(f"{folder} has no tokenizer files. Save the tokenizer beside the model.")
    if tokenizer[0].name == "tokenizer.json":  # it holds all that the others do
        tokenizer = tokenizer[:1]
    architecture = {key: value for key, value in config.items() if key not in _NOT_ARCHITECTURE}
    return Fingerprint(
        architecture=_digest(json.dumps(architecture, sort_keys=True).encode()),
        tokenizer=_digest(*(part for path in tokenizer for part in (path.name.encode(), _tokenizer_bytes(path)))),
        weights=_digest(*(part for path in weights for part in (path.name.encode(), _file_hash(path)))),
    )


def _weight_files(folder: Path) -> list[Path]:
    """The files that transformers loads, so that others beside them (an adapter, a second format) change nothing."""
    for name in _WEIGHT_FILES:
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return [folder / name]
        if index.is_file():
            return [folder / shard for shard in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    return []


def _tokenizer_bytes(path: Path) -> bytes:
    """What decides the ids: for tokenizer.json everything but the padding and truncation of its last use."""
    if path.name != "tokenizer.json":
        return path.read_bytes()
    content = json.loads(path.read_text(encoding="utf-8"))
    return json.dumps({**content, "padding": None, "truncation": None}, sort_keys=True).encode()
