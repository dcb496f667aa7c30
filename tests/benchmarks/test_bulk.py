"""The bench of bulk scoring: what it gives again, and what ends it."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import bulk
from tidy import Row, figure_row


def test_only_a_ray_that_did_not_start_is_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = CompletedProcess([], 1, "", "safeside: Ray did not start: 30 s are over")
    good = CompletedProcess([], 0, '{"peak_bytes": 7, "n_retried": 0}', "")
    crashed = CompletedProcess([], 1, "", "safeside: A worker failed: a bug")
    ended = [slow, slow, good, crashed, good]
    monkeypatch.setattr(bulk.subprocess, "run", lambda *words, **options: ended.pop(0))
    assert bulk.score(["score"]) == {"peak_bytes": 7, "n_retried": 0, "n_starts": 3}
    with pytest.raises(SystemExit, match="a bug"):
        bulk.score(["score"])
    assert ended == [good]


def test_an_engine_is_measured_beside_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of the other engine and phase stay with their own facts; what is measured again is replaced."""

    def rows_of(name: str) -> Callable[[Namespace, Path], list[list[Row]]]:
        return lambda options, folder: [[figure_row({"engine": options.engine}, name, options.rows)]]

    monkeypatch.setattr(bulk, "PHASES", {"many": rows_of("many"), "timed": rows_of("timed")})
    for engine, rows, *only in (
        ("hf", "1"),
        ("vllm", "2", "--only", "timed"),
        ("vllm", "3"),
        ("hf", "4", "--only", "many"),
    ):
        path = bulk.main(["--engine", engine, "--rows", rows, "--kills", "2", "--output", str(tmp_path), *only])
    found = json.loads(path.read_text())
    assert [(row["engine"], row["metric"], row["value"]) for row in found["rows"]] == [
        ("hf", "timed", 1), ("hf", "many", 4), ("vllm", "timed", 3), ("vllm", "many", 3)
    ]  # fmt: skip
    told = found["notes"]["parts"]
    assert [*told] == ["hf", "hf_many", "vllm", "vllm_many"]
    assert all(part["commit"] and part["machine"] and part["notes"]["kills"] == 2 for part in told.values())


def test_vllm_can_run_the_small_guard_and_needs_no_more_than_its_environment(tmp_path: Path) -> None:
    """vLLM's attention on a CPU knows no head narrower than 32, and takes memory and threads from variables."""
    bulk.small_guard(tmp_path)
    assert json.loads((tmp_path / "base" / "config.json").read_text())["head_dim"] == 32
    assert bulk.ENVIRONMENT["VLLM_CPU_KVCACHE_SPACE"] == "1"
    assert bulk.ENVIRONMENT["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
    words = bulk.words_of(tmp_path / "rows", tmp_path / "out", "probe", 1, "vllm", 250)
    assert words[words.index("--engine") + 1] == "vllm"
    assert words[words.index("--vllm-option") + 1] == "enforce_eager=true"
