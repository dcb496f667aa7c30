"""The bench of ports, on two tiny bases and a few rows."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import port
from parts import read_parts
from safeside.errors import InputError, MissingExtraError


def test_every_pair_and_method_gets_its_figures(tmp_path: Path, tiny_folder: Callable[[str], Path]) -> None:
    bases = ["--bases", str(tiny_folder("llama")), "--also", str(tiny_folder("gpt2"))]
    small = ["--rows", "24", "--test-rows", "40", "--threads", "1"]
    result = read_parts(port.main([*bases, *small, "--output", str(tmp_path)]))["port"]
    kept = [row for row in result["rows"] if row["metric"] == "kept_auroc"]
    assert [(row["source"], row["target"], row["method"]) for row in kept] == [
        (*pair, method)
        for pair in (("llama", "gpt2"), ("gpt2", "llama"))
        for method in ("map", "distill", "both", "scratch")
    ]
    figures = {(row["source"], row["method"], row["metric"]): row["value"] for row in result["rows"]}
    for row in kept:
        key = row["source"], row["method"]
        assert row["value"] == pytest.approx(figures[*key, "auroc"] / figures[*key, "source_auroc"])
        assert row["low"] <= row["value"] <= row["high"]
    assert result["notes"]["bases"]["gpt2"].startswith("3 layers of width 64")


def test_a_base_whose_package_is_missing_is_left_out(
    tiny_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    load = port.load_base

    def without_minilm(name: str) -> object:
        if name == "minilm":
            raise MissingExtraError("minilm needs its package")
        return load(name)

    monkeypatch.setattr(port, "load_base", without_minilm)
    both = [str(tiny_folder(name)) for name in ("llama", "gpt2")]
    assert [port.name_of(base) for base in port.found_bases([both[0], "minilm", both[1]])] == ["llama", "gpt2"]
    assert "minilm is left out: minilm needs its package" in capsys.readouterr().err
    with pytest.raises(InputError, match="needs two bases; found llama"):
        port.found_bases([both[0], "minilm"])
