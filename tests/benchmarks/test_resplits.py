"""The bench of promises: the bound keeps its promise more often than the plain threshold, and flags less."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest

import resplits
from benchmarks.made_rows import sentence


def test_the_bound_is_kept_more_often_and_flags_less() -> None:
    rows = list(resplits.rows_of("made", np.random.default_rng(1).uniform(size=2000), 200))
    found = {(row["fit"], row["promised"], row["metric"]): row["value"] for row in rows}
    assert len(found) == len(rows) == 8
    for rate in resplits.RATES:
        assert found["plain", rate, "kept_share"] < 0.75 < found["bound", rate, "kept_share"]
        assert found["bound", rate, "fpr"] < found["plain", rate, "fpr"] == pytest.approx(rate, rel=0.15)
    assert {row["fitted_rows"] for row in rows} == {1000}


def test_each_text_counts_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = random.Random(0)
    texts = [f"{row} {sentence(generator, False)}" for row in range(620)]
    lines = [json.dumps({"prompt": text, "label": 0}) for text in [*texts, *texts[:50]]]
    (tmp_path / "made.jsonl").write_text("\n".join([*lines, json.dumps({"prompt": "harm", "label": 1})]))
    monkeypatch.setattr(resplits, "SETS", ("made.jsonl",))
    path = resplits.main(["--data", str(tmp_path), "--splits", "20", "--output", str(tmp_path / "results")])
    rows = json.loads(path.read_text())["rows"]
    assert {row["fitted_rows"] for row in rows} == {310}
    assert {row["part"] for row in rows} == {"resplits"}
