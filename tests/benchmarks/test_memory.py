"""The bench of the memory model on a tiny geometry: its figures are the model's and the process's own."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import memory
import tables
import training
from overhead_variants import random_base
from tiny import tiny_config
from training import Settings


def test_both_figures_of_every_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A tiny base is lost in what libraries hold, so only how figures are made is looked at."""

    def in_this_process(settings: Settings) -> list[int]:
        capsys.readouterr()
        memory.print_held({"settings": asdict(settings)})
        held, *parts = map(int, capsys.readouterr().out.split())
        return [max(held, 1), *parts]

    monkeypatch.setattr(
        training,
        "open_base",
        lambda name, device, dtype: random_base(tiny_config("llama"), name, device, torch.bfloat16),
    )
    monkeypatch.setattr(memory, "held_alone", in_this_process)
    options = ("--geometry", "tiny", "--batches", "1", "4", "--tokens", "8", "--threads", "1")
    path = memory.main([*options, "--output", str(tmp_path)])
    rows = json.loads(path.read_text())["rows"]
    found = {(row["batch"], row["metric"]): row["value"] for row in rows}
    for batch in (1, 4):
        parts = [value for (rows_, name), value in found.items() if rows_ == batch and name.endswith("_bytes")]
        assert sum(parts) == found[batch, "held_bytes"] + 2 * found[batch, "predicted_bytes"]
        ratio = found[batch, "predicted_bytes"] / found[batch, "held_bytes"]
        assert found[batch, "predicted_to_held"] == pytest.approx(ratio)
    assert found[4, "base_pass_bytes"] == 4 * found[1, "base_pass_bytes"] > 0
    assert found[4, "weights_bytes"] == found[1, "weights_bytes"]
    table = tables.memory_table(path)
    assert "| batch | weights |" in table
    assert tables.memory_table(tmp_path / "none.json").startswith("*No figures yet")


def test_the_goal_is_ten_percent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for held, is_met in ((100, True), (108, True), (115, False), (80, False)):
        monkeypatch.setattr(memory, "held_alone", lambda settings, held=held: [held, 40, 10, 20, 10, 10, 10, 0])
        path = memory.main(["--batches", "2", "--output", str(tmp_path)])
        assert json.loads(path.read_text())["notes"]["met"] is is_met
