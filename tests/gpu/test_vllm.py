"""What nobody has run yet: the plugin on CUDA.  ``make test-gpu`` on a machine with a GPU and ``safeside[vllm]``.

The cases are those of the CPU with the engine left at its defaults: runner V2, compiled, with graphs of kernels.  In
float32 vLLM picks other attention than FlashAttention and FlashInfer, which refuse it; bfloat16 has a case of its own.
"""

from __future__ import annotations

import asyncio
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("vllm", reason="needs vllm: install safeside[vllm]")

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from vllm_for_tests import attached_chats, attached_scores, held_steps, planned_pools, run_pools
from vllm_matrix import CASES, Case, compare, make_bench, prompts_of, run_engine
from vllm_transcript import OPTIONS, SCHEMA, chats, in_json, serving

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.vllm,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SAME = 1e-3  # kernels of a GPU sum in yet another order, some in TF32
ROUGH = 0.1  # of scores in bfloat16, of which two kernels round each step in their own way
MODELS = ("llama", "qwen2", "qwen3", "mistral", "gemma3")
GRAPHS = {"enforce_eager": False}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("graphs", [False, True])
def test_the_engine_gives_what_attach_gives(model: str, graphs: bool, tmp_path: Path) -> None:
    case = Case("cuda", model, "gpu", engine=GRAPHS if graphs else {})
    compared = compare(case, tmp_path)
    assert compared.tokens_equal == 1.0
    assert compared.score_diff < SAME


def test_bfloat16_scores_are_those_of_attach_but_for_rounding(tmp_path: Path) -> None:
    """Up to the first token that differs, which is no error here; no step gates, for they jump."""
    case = Case("bfloat16", runner="gpu", engine=GRAPHS, lengths=(5, 17, 40, 130, 64), dtype="bfloat16")
    compared = compare(case, tmp_path)
    assert compared.score_diff < ROUGH


@pytest.mark.parametrize("name", ["prefix_cache", "chunked_prefill"])
def test_prompts_in_pieces_give_what_whole_ones_give(name: str, tmp_path: Path) -> None:
    case = next(case for case in CASES if case.name == name)
    compared = compare(replace(case, runner="gpu", engine={**case.engine, **GRAPHS}), tmp_path)
    assert compared.tokens_equal == 1.0
    assert compared.score_diff < SAME


def test_preempted_requests_keep_their_gates(tmp_path: Path) -> None:
    tight = {**GRAPHS, "num_gpu_blocks_override": 100, "max_num_seqs": 8, "block_size": 16}
    case = Case("preemption", runner="gpu", engine=tight, lengths=(100, 120, 90, 110, 126, 101, 95, 118), n_new=150)
    compared = compare(case, tmp_path)
    assert compared.tokens_equal == 1.0
    assert compared.score_diff < SAME


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_devices_give_what_one_gives(tmp_path: Path) -> None:
    compared = compare(Case("tensor_parallel", "qwen2", "gpu", engine={**GRAPHS, "tensor_parallel_size": 2}), tmp_path)
    assert compared.tokens_equal == 1.0
    assert compared.score_diff < SAME


def test_at_strength_0_tokens_are_those_of_the_base_alone(tmp_path: Path) -> None:
    case = Case("stock", runner="gpu", engine=GRAPHS)
    bench = make_bench(case, tmp_path)
    prompts = [{**prompt, "strength": 0.0} for prompt in prompts_of(case)]
    mine = run_engine(case, bench.plan.engine_options(), bench.plan.config.slots, prompts, tmp_path)
    alone = replace(case, name="alone")
    stock = run_engine(
        alone, {"model": str(bench.plan.folder)}, (), [{**each, "strength": None} for each in prompts], tmp_path
    )
    assert [answer["tokens"] for answer in mine["rounds"][0]] == [answer["tokens"] for answer in stock["rounds"][0]]


def test_a_pooling_engine_gives_the_scores_of_every_token(tmp_path: Path) -> None:
    case = Case("pooling", runner="gpu", engine=GRAPHS, lengths=(5, 17, 130))
    plan, base, guards = planned_pools(case, "token_classify", tmp_path)
    (answers,) = run_pools(case, plan, "token_classify", tmp_path)["rounds"]
    for prompt, answer in zip(prompts_of(case), answers, strict=True):
        wanted = attached_scores(base, guards, prompt["ids"])
        torch.testing.assert_close(torch.tensor(answer["scores"]), wanted, atol=SAME, rtol=0)


def test_tokens_that_a_grammar_holds_have_their_scores(tmp_path: Path) -> None:
    case = Case("grammar", runner="gpu", engine=GRAPHS, lengths=(5, 40), n_new=4)
    for found, wanted in zip(*held_steps(case, tmp_path), strict=True):
        assert found == pytest.approx(wanted, abs=SAME)


def test_a_server_answers_with_verdicts(tmp_path: Path) -> None:
    """Eight chats at once, each at a strength or policy of its own, and one that a grammar holds, as a stream."""
    options = replace(OPTIONS, more=["--max-model-len", "512", "--dtype", "float32"])
    with serving(options, tmp_path / "log", start_s=900.0, runner="gpu") as address:
        answered = asyncio.run(chats(address, n_chats=8, n_new=12))
        held = asyncio.run(in_json(address, stream=True))
    for (asked, got), wanted in zip(answered, attached_chats([each for each, _ in answered], 12), strict=True):
        assert got["text"].strip() == wanted.text, asked
        assert got["safety"]["verdicts"][0]["score"] == pytest.approx(wanted.verdicts[0].score, abs=SAME)
    assert json.loads(held["text"]) in SCHEMA["enum"]
    (safety,) = held["told"]
    assert all(token["risk"]["harm"] is not None for token in safety["tokens"][:-1])
