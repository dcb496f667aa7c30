"""The bench of bulk scoring: what it gives again, and what ends it."""

from __future__ import annotations

import sys
from pathlib import Path
from subprocess import CompletedProcess

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import bulk


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
