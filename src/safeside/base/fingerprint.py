"""Fingerprints of a base, taken from its checkpoint's files and never from loaded tensors.

So dtype, sharding over devices or quantisation in memory change nothing.  Four parts: the architecture (what shapes the
network), the tokenizer, the chat template, and the weights.  The first three are hashed as transformers reads them, so
a checkpoint that another version of it wrote anew (other key names, merges as pairs) keeps them.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel, ConfigDict
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from safeside.errors import InputError

# Settings of a run or of a file's making, not of the network.
_NOT_ARCHITECTURE = {
    "_name_or_path", "dtype", "torch_dtype", "transformers_version", "use_cache", "quantization_config",
    "pad_token_id", "bos_token_id", "eos_token_id", "architectures", "attention_dropout", "initializer_range",
    "pretraining_tp", "id2label", "label2id", "tokenizer_class", "output_hidden_states", "output_attentions",
}  # fmt: skip
_WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")  # the first found is loaded, or what its index lists
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "vocab.txt")
_BLOB_NAME = re.compile(r"[0-9a-f]{64}")
# Text whose ids tell tokenizers of one vocabulary apart: normalisation, spaces, digits, scripts.
_PROBE = (
    "The quick brown fox can't jump over 13 lazy dogs; it's 1,234,567.89 metres away!  Two spaces, a\ttab,\n\n"
    "    def indented(x): return x**2  # code\nIt\u2019s na\u00efve caf\u00e9 cafe\u0301 \ufb01ne \uff21\uff22 \u00bd "
    "stra\u00dfe \u0130stanbul. \u041f\u0440\u0438\u0432\u0435\u0442 \u4f60\u597d\u4e16\u754c \u3053\u3093 "
    "\uc548\ub155 \u0645\u0631\u062d\u0628\u0627 \u0928\u092e\u0938\u094d\u0924\u0947 "
    "\U0001f600\U0001f44d\U0001f3fd \u200b\u00a0 end "
)


class Fingerprint(BaseModel):
    """Hashes (sha256, first 16 hex digits) of the four parts of a base that an adapter depends on."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    architecture: str
    """Hash of the settings that shape the network."""
    tokenizer: str
    """Hash of what turns text into ids: vocabulary, added tokens, and the ids of a fixed text in many scripts."""
    template: str
    """Hash of the chat template and of the tokens that begin and end a text."""
    weights: str
    """Hash of the weight files."""

    def __str__(self) -> str:
        return "-".join(part[:6] for part in (self.architecture, self.tokenizer, self.template, self.weights))


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
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} has no config.json; expected a saved model. Save it with save_pretrained.")
    weights = weight_files(folder)
    check_tokenizer(folder)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    return Fingerprint(
        architecture=_digest(_canonical(config.to_diff_dict())),
        tokenizer=_digest(*_tokenizer_parts(tokenizer)),
        template=_digest(_canonical([tokenizer.chat_template, tokenizer.bos_token, tokenizer.eos_token])),
        weights=_digest(*(part for path in weights for part in (path.name.encode(), _file_hash(path)))),
    )


def architecture_settings(folder: Path) -> dict[str, object]:
    """What the hash of the architecture is taken of: the settings that shape the network, as plain values."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    return dict(json.loads(_canonical(config.to_diff_dict())))


def _canonical(values: object) -> bytes:
    """One spelling of equal settings: sorted keys, 10000.0 as 10000, nothing that does not shape the network."""
    return json.dumps(_settled(values), sort_keys=True).encode()


def _settled(values: object) -> object:
    if isinstance(values, dict):
        return {str(key): _settled(value) for key, value in values.items() if key not in _NOT_ARCHITECTURE}
    if isinstance(values, (list, tuple)):
        return [_settled(value) for value in values]
    if isinstance(values, float) and values.is_integer():
        return int(values)
    return values if isinstance(values, (str, int, float, bool)) or values is None else str(values)


def _tokenizer_parts(tokenizer: PreTrainedTokenizerBase) -> Iterator[bytes]:
    """Vocabulary, merges or scores where they can be had, added tokens with their flags, and the ids of the probe."""
    yield json.dumps(sorted(tokenizer.get_vocab().items())).encode()
    if tokenizer.is_fast:
        model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
        scored = model["vocab"] if isinstance(model["vocab"], list) else []  # a unigram model's
        merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model.get("merges", [])]
        yield json.dumps([scored, merges]).encode()
    for index, token in sorted(tokenizer.added_tokens_decoder.items()):
        yield f"{index} {token.content!r} {token.special} {token.lstrip} {token.rstrip} {token.single_word}".encode()
    yield json.dumps(tokenizer(_PROBE, add_special_tokens=False, verbose=False)["input_ids"]).encode()


def weight_files(folder: Path) -> list[Path]:
    """The files that transformers loads, so that others beside them (an adapter, a second format) change nothing.

    None at all is an InputError.
    """
    for name in _WEIGHT_FILES:
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return [folder / name]
        if index.is_file():
            return [folder / shard for shard in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    raise InputError(f"{folder} has no weight files (*.safetensors). Save the model with save_pretrained.")


def check_tokenizer(folder: Path) -> None:
    """Raise an InputError unless ``folder`` holds a tokenizer's files: transformers would make up an empty one."""
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise InputError(f"{folder} has no tokenizer files. Save the tokenizer beside the model.")
