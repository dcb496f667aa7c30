"""The bench of presets: stricter ones flag more, a promise needs its rows, and a text without a score is flagged."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import presets
from benchmarks.made_rows import sentence
from presets import Judged, figures_of


@pytest.fixture
def data(small_tasks: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Rows of a task, and harmless files beside, of which one holds harmful rows too."""
    generator = random.Random(1)

    def write(name: str, n_rows: int, every: int) -> str:
        rows = [
            {"prompt": sentence(generator, row % every == 1), "label": int(row % every == 1)} for row in range(n_rows)
        ]
        (small_tasks / name).write_text("\n".join(map(json.dumps, rows)))
        return name

    monkeypatch.setattr(presets, "BENIGN", write("benign.jsonl", 330, 10**6))
    monkeypatch.setattr(presets, "SUITES", {"xstest": write("safe.jsonl", 40, 2)})
    return small_tasks


def test_stricter_presets_flag_more_and_too_few_rows_promise_nothing(
    data: Path, tiny_folder: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "--data",
        str(data),
        "--base",
        str(tiny_folder("llama")),
        "--also",
        "--tasks",
        "bench/prompts",
        "--seeds",
        "0",
    ]
    small = ["--limit", "128", "--evaluation-limit", "200", "--benign", "320", "--epochs", "2"]
    result = json.loads(presets.main([*words, *small, "--output", str(tmp_path / "results")]).read_text())
    found = {(row["fitted_on"], row["preset"], row["metric"], row["suite"]): row for row in result["rows"]}
    assert {key[:2] for key in found} == {
        ("validation", "strict"),  # 100 harmless rows
        ("instructions", "strict"),
        ("instructions", "balanced"),  # 320: enough for 1%, too few for 0.1%
    }
    assert "cannot promise 0.1%" in capsys.readouterr().err
    for metric, suite in (("tpr", "test"), ("fpr", "test"), ("over_refusal", "xstest")):
        strict, balanced = (found["instructions", preset, metric, suite] for preset in ("strict", "balanced"))
        assert strict["value"] >= balanced["value"]
        assert strict["low"] <= strict["value"] <= strict["high"]
        assert (strict["promised"], balanced["promised"]) == (0.05, 0.01)
    assert found["validation", "strict", "over_refusal", "xstest"]["n"] == 20  # the harmless ones


def test_shares_are_counted_at_the_threshold_and_unscored_texts_are_flagged() -> None:
    test = Judged(np.array([0.2, 0.8, 0.5, 0.1]), np.array([0.0, 1.0, 1.0, 1.0]))
    suites = {"alpaca": Judged(np.array([0.1, np.nan, 0.9, 0.4]), np.zeros(4))}
    rows = {row["metric"]: row for row in figures_of(0.5, test, suites, {"task": "hate"}, {})}
    assert rows["tpr"]["value"] == pytest.approx(2 / 3)
    assert rows["fpr"]["value"] == 0.0
    assert (rows["over_refusal"]["value"], rows["over_refusal"]["n_unscored"]) == (0.5, 1)


def test_harmful_rows_of_a_file_are_left_out(data: Path) -> None:
    rows = presets.harmless(data / "safe.jsonl", 100)
    assert len(rows) == 20
    assert {row.labels for row in rows} == {(0.0,)}
    assert len(presets.harmless(data / "safe.jsonl", 7)) == 7
