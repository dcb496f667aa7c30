"""The bench of patches: its families and its figures, on few rows."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import patch
from parts import read_parts
from safeside.train.patch import PatchSettings


def write(path: Path, rows: list[dict[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(map(json.dumps, rows)))


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A few short rows in the shape of the data sets."""
    for name in ("ARTIFACTS", "HARMLESS", "ELSEWHERE", "REPLAY"):
        monkeypatch.setattr(patch, name, getattr(patch, name).removesuffix(".gz"))
    for split in ("train", "test"):
        rows = [
            {"prompt": f"{split} goal {goal} ##{method}", "label": goal % 2, "orig": {"method": method}}
            for goal in range(5)
            for method in ("GCG", "GCG", "PAIR")
        ]
        write(tmp_path / f"jailbreakbench_artifacts/{split}.jsonl", rows)
        some = [{"prompt": f"{split} text {index}", "response": "yes", "label": index % 2} for index in range(12)]
        write(tmp_path / f"guardreasoner_prompts5k/{split}.jsonl", some)
    write(tmp_path / "benign_prompts/alpaca_test.jsonl", [{"prompt": f"name {index} cats"} for index in range(12)])
    return tmp_path


def test_a_family_is_its_distinct_prompts_all_harmful(data: Path) -> None:
    prompts = patch.prompts_of(data / patch.ARTIFACTS.format("test"), "GCG")
    assert [row.messages[0].content for row in prompts] == [f"test goal {goal} ##GCG" for goal in range(5)]
    assert {row.labels for row in prompts} == {(1.0,)}


def test_rows_are_drawn_without_their_answers(data: Path) -> None:
    rows = patch.drawn(data / patch.ELSEWHERE, 5)
    assert rows == patch.drawn(data / patch.ELSEWHERE, 5)
    assert {len(row.messages) for row in rows} == {1}
    assert len(patch.drawn(data / patch.ELSEWHERE, 50)) == 12


def test_it_writes_four_figures_for_each_patch(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patch, "PatchSettings", lambda: PatchSettings(steps=8))
    words = [
        "--data",
        str(data),
        "--families",
        "GCG",
        "--examples",
        "4",
        "--seeds",
        "1",
        "--rows",
        "12",
        "--threads",
        "1",
    ]
    result = read_parts(patch.main([*words, "--output", str(tmp_path)]))["patch"]
    assert [row["metric"] for row in result["rows"]] == ["before", "after", "elsewhere_change", "seconds"]
    assert {(row["family"], row["examples"], row["seed"]) for row in result["rows"]} == {("GCG", 4, 0)}
    before, after, change, _ = result["rows"]
    assert 0 <= before["value"] <= 1
    assert after["low"] <= after["value"] <= after["high"]
    assert np.isfinite(change["value"])
    assert result["notes"]["base_unchanged"] is True
