"""The bench of training costs on a tiny geometry: each method trains what it says, and nothing else."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import training
from overhead_variants import DTYPES, random_base
from tiny import tiny_config
from training import METHODS, Bench, Settings

SMALL = Settings("tiny", n_rows=2, n_tokens=8, rounds=2, threads=1)


@pytest.fixture
def geometry(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny llama as a geometry."""
    monkeypatch.setattr(
        training,
        "open_base",
        lambda name, device, dtype: random_base(tiny_config("llama"), name, device, DTYPES[dtype]),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", METHODS)
def test_a_step_changes_what_is_trained_and_not_the_shared_base(
    geometry: None, method: str, dtype: str, tmp_path: Path
) -> None:
    bench = Bench.open(replace(SMALL, dtype=dtype), tmp_path)
    assert bench.base.dtype is DTYPES[dtype]
    before = {name: tensor.clone() for name, tensor in bench.base.model.state_dict().items()}
    student = bench.student(method)
    trained = [tensor for group in student.optimizer.param_groups for tensor in group["params"]]
    old = [tensor.detach().clone() for tensor in trained]
    assert student.step(bench.batch, bench.labels, bench.settings.dtype) > 0
    assert student.n_params == sum(tensor.numel() for tensor in trained)
    assert any(not torch.equal(tensor, start) for tensor, start in zip(trained, old, strict=True))
    assert all(torch.equal(tensor, before[name]) for name, tensor in bench.base.model.state_dict().items())


def test_full_tuning_trains_every_weight_of_the_blocks(geometry: None, tmp_path: Path) -> None:
    bench = Bench.open(SMALL, tmp_path)
    counts = {method: bench.student(method).n_params for method in METHODS}
    blocks = sum(tensor.numel() for tensor in bench.base.decoder.layers.parameters())
    assert counts["full"] >= blocks > counts["lora_full"]
    assert counts["lst_stored"] == counts["lst"] < blocks


def test_the_bench_writes_every_figure_of_every_method(
    geometry: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def in_this_process(settings: Settings, method: str, folder: Path) -> int:
        capsys.readouterr()
        training.print_peak({"method": method, "folder": str(folder), "settings": asdict(settings)})
        return int(capsys.readouterr().out)

    monkeypatch.setattr(training, "peak_of", in_this_process)
    options = ("--geometry", "tiny", "--rows", "2", "--tokens", "8", "--rounds", "2", "--threads", "1")
    path = training.main([*options, "--output", str(tmp_path)])
    rows = json.loads(path.read_text())["rows"]
    metrics = ("step_seconds", "ratio_to_full", "peak_bytes", "trainable_params")
    found = {(row["method"], row["metric"]): row for row in rows}
    assert set(found) == {(method, metric) for method in METHODS for metric in metrics} | {
        ("lst_stored", "storing_seconds")
    }
    assert found["full", "ratio_to_full"]["value"] == 1.0
    assert all(row["value"] > 0 and row["geometry"] == "tiny" and row["config_hash"] for row in rows)
