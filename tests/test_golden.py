"""Every format that was ever released still loads, and gives what it gave."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from golden.make import measure
from safeside import load_adapter, load_base

GOLDEN = Path(__file__).parent / "golden"
TOLERANCE = 1e-5  # float32 sums in another order, on another processor


@pytest.mark.parametrize("folder", sorted(GOLDEN.glob("v*")), ids=lambda folder: folder.name)
def test_golden_artifacts_load_and_give_the_same(folder: Path) -> None:
    base = load_base(folder / "base")
    guard, aligner = (load_adapter(folder / name, base) for name in ("harm", "refuse"))
    assert guard.thresholds == (0.625,)
    expected = json.loads((folder / "expected.json").read_text(encoding="utf-8"))
    found = measure(base, guard, aligner)
    assert [list(row["ids"]) for row in found] == [row["ids"] for row in expected]
    for row, wanted in zip(found, expected, strict=True):
        for part in ("scores", "logits"):
            torch.testing.assert_close(
                torch.tensor(row[part]), torch.tensor(wanted[part]), rtol=TOLERANCE, atol=TOLERANCE
            )


def test_there_is_a_golden_artifact_of_every_format() -> None:
    from safeside.adapters.config import FORMAT

    assert [folder.name for folder in sorted(GOLDEN.glob("v*"))] == [f"v{number + 1}" for number in range(FORMAT)]


def test_golden_artifacts_stay_small() -> None:
    size = sum(file.stat().st_size for file in GOLDEN.rglob("*") if file.is_file() and file.suffix != ".pyc")
    assert size < 300_000
