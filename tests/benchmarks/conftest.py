"""The benches are scripts beside the package: their folder is importable, and small data sets stand in for the real."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.made_rows import sentence

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from safeside.tasks.sources import Fields, Part, Source
from safeside.tasks.task import TASKS, Task, register_task


@pytest.fixture
def small_tasks(tmp_path: Path) -> Iterator[Path]:
    """A folder with rows of the tasks ``bench/answers`` and ``bench/prompts``, 240 for each split, one not answered."""
    generator = random.Random(0)
    for split in ("train", "validation", "test"):
        lines = []
        for row in range(240):
            prompt = f"{split} {row} {sentence(generator, False)}"
            harmful = row % 2 == 1
            response = "" if row == 6 else sentence(generator, harmful)
            lines.append({"prompt": prompt, "response": response, "label": int(harmful)})
        (tmp_path / f"answers_{split}.jsonl").write_text("\n".join(map(json.dumps, lines)))
        prompts = [{"prompt": f"{row['prompt']} {row['response']}", "label": row["label"]} for row in lines]
        (tmp_path / f"prompts_{split}.jsonl").write_text("\n".join(map(json.dumps, prompts)))
    for kind, texts in (("answers", {"prompt": "prompt", "response": "response"}), ("prompts", {"prompt": "prompt"})):
        parts = [Part(f"{kind}_{split}.jsonl") for split in ("train", "validation", "test")]
        register_task(
            f"bench/{kind}", Task(f"bench/{kind}", ("harm",), (Source("made", *parts, fields=Fields(texts)),))
        )
    yield tmp_path
    for kind in ("answers", "prompts"):
        TASKS.unregister(f"bench/{kind}")
