"""Each part of a fingerprint changes with what it stands for, and with nothing else."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from safeside import load_base
from safeside.base.fingerprint import Fingerprint, take_fingerprint
from safeside.errors import InputError

PARTS = ("architecture", "tokenizer", "weights")


@pytest.fixture
def folder(tiny_folder: Callable[[str], Path], tmp_path: Path) -> Path:
    """A saved tiny llama to change."""
    return Path(shutil.copytree(tiny_folder("llama"), tmp_path / "llama"))


def changed(before: Fingerprint, after: Fingerprint) -> set[str]:
    return {part for part in PARTS if before.model_dump()[part] != after.model_dump()[part]}


def edit(path: Path, **values: object) -> None:
    content = json.loads(path.read_text())
    kept = {key: value for key, value in {**content, **values}.items() if value is not None or key in content}
    path.write_text(json.dumps(kept, indent=3))


def test_a_fingerprint_is_three_short_hashes(folder: Path) -> None:
    found = take_fingerprint(folder)
    assert all(len(value) == 16 and int(value, 16) >= 0 for value in found.model_dump().values())
    assert str(found) == "-".join(value[:6] for value in found.model_dump().values())
    assert take_fingerprint(folder) == found


def test_dtype_and_device_in_memory_change_nothing(folder: Path) -> None:
    whole, half = load_base(folder), load_base(folder, dtype=torch.bfloat16)
    assert (whole.dtype, half.dtype) == (torch.float32, torch.bfloat16)
    assert whole.fingerprint == half.fingerprint == take_fingerprint(folder)


def test_one_weight_changes_the_weights_only(folder: Path) -> None:
    before = take_fingerprint(folder)
    path = folder / "model.safetensors"
    weights = load_file(path)
    next(iter(weights.values())).view(-1)[0] += 1e-3
    save_file(weights, path, metadata={"format": "pt"})
    assert changed(before, take_fingerprint(folder)) == {"weights"}


@pytest.mark.parametrize("values", [{"normalizer": {"type": "NFKC"}}, {"added_tokens": []}])
def test_the_tokenizers_rules_change_the_tokenizer_only(folder: Path, values: dict[str, object]) -> None:
    before = take_fingerprint(folder)
    edit(folder / "tokenizer.json", **values)
    assert changed(before, take_fingerprint(folder)) == {"tokenizer"}


@pytest.mark.parametrize(
    "values",
    [
        {"padding": {"strategy": {"Fixed": 9}}, "truncation": {"max_length": 9}},  # left there by the last call
        {},  # only laid out anew
    ],
)
def test_how_a_tokenizer_was_last_used_changes_nothing(folder: Path, values: dict[str, object]) -> None:
    before = take_fingerprint(folder)
    edit(folder / "tokenizer.json", **values)
    assert changed(before, take_fingerprint(folder)) == set()


@pytest.mark.parametrize(
    "values",
    [
        {"_name_or_path": "elsewhere"},
        {"torch_dtype": "float16", "dtype": "float16"},
        {"transformers_version": "9.9"},
        {"use_cache": False},
        {"quantization_config": {"bits": 4}},
        {"eos_token_id": [1, 2], "pad_token_id": 5, "bos_token_id": 7},
        {"architectures": ["Other"], "initializer_range": 0.5, "attention_dropout": 0.1},
    ],
)
def test_cosmetic_settings_change_nothing(folder: Path, values: dict[str, object]) -> None:
    before = take_fingerprint(folder)
    edit(folder / "config.json", **values)
    assert changed(before, take_fingerprint(folder)) == set()


@pytest.mark.parametrize("values", [{"rms_norm_eps": 0.5}, {"num_hidden_layers": 2}, {"model_type": "mistral"}])
def test_settings_of_the_network_change_the_architecture_only(folder: Path, values: dict[str, object]) -> None:
    before = take_fingerprint(folder)
    edit(folder / "config.json", **values)
    assert changed(before, take_fingerprint(folder)) == {"architecture"}


def test_other_files_beside_the_model_change_nothing(folder: Path) -> None:
    """An adapter saved into the base's folder, a second weight format, the original vendor's copy."""
    before = take_fingerprint(folder)
    for name in (
        "adapter.safetensors",
        "consolidated.safetensors",
        "pytorch_model.bin",
        "tokenizer.model",
        "README.md",
    ):
        (folder / name).write_bytes(b"something else")
    assert take_fingerprint(folder) == before


def test_every_shard_of_a_checkpoint_counts(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="100KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    before = take_fingerprint(folder)
    assert len(shards) > 2
    for shard in (shards[0], shards[-1]):
        kept = shard.read_bytes()
        shard.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
        assert changed(before, take_fingerprint(folder)) == {"weights"}
        shard.write_bytes(kept)
    assert load_base(folder).fingerprint == before


def test_an_old_tokenizer_counts_all_its_files(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    for name in ("vocab.json", "merges.txt"):
        (folder / name).write_text("first")
    before = take_fingerprint(folder)
    for name in ("vocab.json", "merges.txt"):
        (folder / name).write_text("second")
        assert changed(before, take_fingerprint(folder)) == {"tokenizer"}
        (folder / name).write_text("first")


def test_blobs_of_the_hub_are_known_by_name(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's cache names large files by their sha256: a fingerprint of 100 GB then takes no time."""
    expected = take_fingerprint(folder)
    weights = folder / "model.safetensors"
    blob = tmp_path / "blobs" / hashlib.sha256(weights.read_bytes()).hexdigest()
    blob.parent.mkdir()
    weights.rename(blob)
    weights.symlink_to(blob)

    def unused(*arguments: object) -> None:
        raise AssertionError("the blob was read")

    monkeypatch.setattr(hashlib, "file_digest", unused)
    assert take_fingerprint(folder) == expected
    plain = folder / "copy.safetensors"
    shutil.copyfile(blob, plain)
    plain.rename(weights)
    with pytest.raises(AssertionError, match="was read"):
        take_fingerprint(folder)


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("config.json", "has no config.json"),
        ("model.safetensors", "has no weight files"),
        ("tokenizer.json", "has no tokenizer files"),
    ],
)
def test_missing_files_are_input_errors(folder: Path, file: str, words: str) -> None:
    (folder / file).unlink()
    with pytest.raises(InputError, match=words):
        take_fingerprint(folder)
