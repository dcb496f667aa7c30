"""Files of weights: who may read them, and what becomes of a file that is in use."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from safeside.base.weights import save_weights


def test_they_may_be_read_by_whom_the_file_beside_them_may(tmp_path: Path) -> None:
    path, beside = tmp_path / "model.safetensors", tmp_path / "config.json"
    beside.write_text("{}")
    for mode in (0o644, 0o640):
        beside.chmod(mode)
        save_weights({"a": torch.ones(3)}, path, {"of": "a test"}, like=beside)
        assert path.stat().st_mode == beside.stat().st_mode
        path.chmod(0o600)  # as an older version left it


def test_a_file_in_use_keeps_its_values_when_another_takes_its_place(tmp_path: Path) -> None:
    path, beside = tmp_path / "model.safetensors", tmp_path / "config.json"
    beside.write_text("{}")
    save_weights({"a": torch.zeros(1000)}, path, {}, like=beside)
    used = load_file(path)["a"]
    save_weights({"a": torch.ones(1000)}, path, {}, like=beside)
    assert not used.any()
    assert load_file(path)["a"].all()
