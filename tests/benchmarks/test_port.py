"""The bench of ports, on two tiny bases and a few rows."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import guard_rows
import port
from parts import read_parts
from safeside.errors import InputError, MissingExtraError
from safeside.types import Example


def test_sources_text_and_test_rows_are_apart(small_tasks: Path) -> None:
    options = Namespace(data=small_tasks, labelled=100, rows=60, test_rows=50)
    bench = port.Bench.read("bench/prompts", options)
    parts = [bench.labelled, bench.text, bench.validation, bench.test]
    assert [len(part) for part in parts] == [100, 60, 50, 50]
    assert len({row.messages[0].content for part in parts for row in part}) == 260
    assert {row.labels for row in bench.text} == {(0.0,), (1.0,)}


def test_every_pair_and_method_gets_its_figures(
    small_tasks: Path, tmp_path: Path, tiny_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[Example] = []
    ported = port.port_adapter

    def spied(source: object, target: object, text: list[Example], settings: object) -> object:
        shown.extend(text)
        return ported(source, target, text, settings)  # type: ignore[arg-type]

    monkeypatch.setattr(port, "port_adapter", spied)
    monkeypatch.setattr(port, "PortSettings", partial(port.PortSettings, epochs=1))
    bases = ["--bases", str(tiny_folder("llama")), "--also", str(tiny_folder("gpt2"))]
    bases += ["--data", str(small_tasks), "--task", "bench/prompts"]
    small = ["--rows", "100", "--labelled", "24", "--test-rows", "40", "--threads", "1", "--seeds", "0"]
    result = read_parts(port.main([*bases, *small, "--output", str(tmp_path)]))["port"]
    kept = [row for row in result["rows"] if row["metric"] == "kept_auroc"]
    assert [(row["source"], row["target"], row["method"]) for row in kept] == [
        (*pair, method)
        for pair in (("llama", "gpt2"), ("gpt2", "llama"))
        for method in ("map", "distill", "both", "distill_sized", "scratch")
    ]
    figures = {(row["source"], row["method"], row["metric"]): row["value"] for row in result["rows"]}
    for row in kept:
        key = row["source"], row["method"]
        assert row["value"] == pytest.approx(figures[*key, "auroc"] / figures[*key, "source_auroc"])
        assert row["low"] <= row["value"] <= row["high"]
    assert len(shown) == 100 * 8  # two pairs, four ports
    assert {row.labels for row in shown} == {()}
    assert result["notes"]["bases"]["gpt2"].startswith("3 layers of width 64")


def test_a_base_whose_package_is_missing_is_left_out(
    tiny_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    load = guard_rows.load_base

    def without_minilm(name: str) -> object:
        if name == "minilm":
            raise MissingExtraError("minilm needs its package")
        return load(name)

    monkeypatch.setattr(guard_rows, "load_base", without_minilm)
    both = [str(tiny_folder(name)) for name in ("llama", "gpt2")]
    assert [port.name_of(base) for base in port.two_bases([both[0], "minilm", both[1]])] == ["llama", "gpt2"]
    assert "minilm is left out: minilm needs its package" in capsys.readouterr().err
    with pytest.raises(InputError, match="needs two bases; found llama"):
        port.two_bases([both[0], "minilm"])
