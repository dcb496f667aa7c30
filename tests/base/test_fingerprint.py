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

PARTS = ("architecture", "tokenizer", "template", "weights")

PADDING = {"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0}
PADDING["pad_token"] = "<pad>"
TRUNCATION = {"max_length": 9, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}


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


def edit_whole(path: Path, content: object) -> None:
    path.write_text(json.dumps(content))


def test_a_fingerprint_is_four_short_hashes(folder: Path) -> None:
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


def test_the_tokenizers_rules_change_the_tokenizer_only(folder: Path) -> None:
    before = take_fingerprint(folder)
    edit(folder / "tokenizer.json", normalizer={"type": "NFKC"})
    assert changed(before, take_fingerprint(folder)) == {"tokenizer"}


def test_another_word_in_the_vocabulary_changes_the_tokenizer_only(folder: Path) -> None:
    before = take_fingerprint(folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["neverseen"] = vocabulary.pop(max(vocabulary, key=vocabulary.__getitem__))
    merges = [pair for pair in content["model"]["merges"] if "".join(pair) in vocabulary]
    edit(folder / "tokenizer.json", model={**content["model"], "merges": merges})
    assert changed(before, take_fingerprint(folder)) == {"tokenizer"}


def test_another_chat_template_is_seen(folder: Path) -> None:
    before = take_fingerprint(folder)
    (folder / "chat_template.jinja").write_text("### {{ messages[0]['content'] }}")
    assert changed(before, take_fingerprint(folder)) == {"template"}


def test_a_checkpoint_written_by_an_older_transformers_keeps_its_fingerprint(folder: Path, tmp_path: Path) -> None:
    """Its config and merges were spelled otherwise; loaded and saved again, as a fine-tune does, they are the same."""
    content = json.loads((folder / "config.json").read_text())
    rope = content.pop("rope_parameters")
    edit_whole(folder / "config.json", {**content, "rope_theta": rope["rope_theta"], "rope_scaling": None})
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]
    edit_whole(folder / "tokenizer.json", content)
    old = load_base(folder)
    old.model.save_pretrained(tmp_path / "new")
    old.tokenizer.save_pretrained(tmp_path / "new")
    assert "rope_theta" not in json.loads((tmp_path / "new" / "config.json").read_text())
    assert take_fingerprint(tmp_path / "new") == old.fingerprint


@pytest.mark.parametrize(
    "values",
    [
        {"padding": PADDING, "truncation": TRUNCATION},  # left there by the last call
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


def test_an_old_tokenizer_of_two_files_is_read(folder: Path) -> None:
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "tokenizer.json").unlink()
    edit_whole(folder / "tokenizer_config.json", {"tokenizer_class": "GPT2Tokenizer"})
    edit_whole(folder / "vocab.json", model["vocab"])
    merges = [" ".join(pair) for pair in model["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    before = take_fingerprint(folder)
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges[::-1]]))
    assert changed(before, take_fingerprint(folder)) == {"tokenizer"}


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
