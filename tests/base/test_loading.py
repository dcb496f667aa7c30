"""Checkpoints that cannot be loaded, and devices and dtypes that are not there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from safeside import Base, load_base
from safeside.base.loading import checked_device, checked_dtype
from safeside.errors import InputError


@pytest.fixture
def folder(tiny_base: Base, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_base.folder, tmp_path / "base")


def cut(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:5000])


def without(*names: str) -> Callable[[Path], object]:
    return lambda folder: [(folder / name).unlink() for name in names]


def wider(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "hidden_size": 128}))


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (without("config.json"), "has no config.json; expected a folder made by save_pretrained"),
        (lambda folder: (folder / "config.json").write_text("{broken"), "config.json is not a model's configuration"),
        (lambda folder: (folder / "config.json").write_text("[1]"), "config.json is not a model's configuration"),
        (cut("model.safetensors"), "cannot be loaded"),
        (wider, "cannot be loaded"),
        (without("model.safetensors"), "has no weight files"),
        (without("tokenizer.json"), "has no tokenizer files"),
        (cut("tokenizer.json"), "cannot be loaded"),
    ],
)
def test_a_damaged_checkpoint_is_an_input_error(folder: Path, damage: Callable[[Path], object], problem: str) -> None:
    damage(folder)
    with pytest.raises(InputError, match=problem):
        load_base(folder)


def test_a_device_that_is_not_there_is_an_input_error(folder: Path) -> None:
    assert checked_device("cpu") == torch.device("cpu")
    for device in ("banana", *([] if torch.cuda.is_available() else ["cuda", "cuda:1"])):
        with pytest.raises(InputError, match=f"Device '{device}' cannot be used here: .*Use 'cpu'"):
            load_base(folder, device=device)


@pytest.mark.parametrize("dtype", ["float99", "int8", "Tensor", "nn", torch.int32, 3])
def test_a_dtype_that_weights_cannot_have_is_an_input_error(folder: Path, dtype: object) -> None:
    with pytest.raises(InputError, match="cannot have dtype"):
        load_base(folder, dtype=dtype)


def test_dtypes_are_taken_by_name(folder: Path) -> None:
    assert checked_dtype("bfloat16") == checked_dtype(torch.bfloat16) == torch.bfloat16
    assert checked_dtype("auto") == "auto"
    assert load_base(folder, dtype="bfloat16").dtype == torch.bfloat16
