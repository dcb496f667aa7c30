"""The vLLM bench without vLLM: its reference, what it compares, and how goals are judged."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import vllm_bench
import vllm_matrix
from safeside import Message, attach
from safeside.errors import InputError
from tidy import figure_row
from vllm_bench import goals_of, place_of
from vllm_matrix import BLOCK, CASES, STRENGTHS, Case, difference, make_bench, policy_of, prompts_of, reference


@pytest.mark.parametrize("module", ["vllm_bench", "vllm_matrix", "vllm_transcript"])
def test_what_runs_beside_vllm_needs_no_scikit_learn(module: str) -> None:
    """vLLM's environment does not hold it: only guards' calibration fits with it."""
    benchmarks = Path(__file__).parents[2] / "benchmarks"
    code = f"import sys; sys.path.insert(0, {str(benchmarks)!r}); sys.modules['sklearn'] = None; import {module}"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


def test_the_reference_is_what_attach_gives(tmp_path: Path) -> None:
    """Token by token as ``Base.chat`` draws them, where no spare id is the likeliest."""
    bench = make_bench(Case("eager", n_new=6, lengths=(9,) * len(STRENGTHS)), tmp_path)
    encoded = bench.base.encode([Message("user", "Who sat on the mat?")])
    prompt = {"ids": encoded.ids, "strength": STRENGTHS[6], "n_new": 6}
    found = reference(bench, prompt)
    with attach(bench.base, aligners=[bench.aligner], guards=list(bench.guards)):
        wanted = bench.base.chat(
            [Message("user", "Who sat on the mat?")],
            strength=policy_of(STRENGTHS[6]),
            max_new_tokens=6,
            eos_token_id=-1,
        )
    assert bench.base.tokenizer.decode(found["tokens"], skip_special_tokens=True).strip() == wanted.text
    given = torch.tensor([step[-1] for step in found["steps"]])
    torch.testing.assert_close(given, torch.tensor(wanted.strength["refuse"]), atol=1e-5, rtol=0)


def test_a_case_in_bfloat16_is_so_both_ways(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case, jobs = Case("bfloat16", n_new=2, lengths=(5,), dtype="bfloat16"), list[dict[str, Any]]()
    monkeypatch.setattr(vllm_matrix, "execute", lambda job, case, root: jobs.append(job))
    bench = make_bench(case, tmp_path)
    vllm_matrix.run_engine(case, bench.plan.engine_options(), bench.plan.config.slots, prompts_of(case), tmp_path)
    assert (bench.base.dtype, jobs[0]["engine"]["dtype"]) == (torch.bfloat16, "bfloat16")
    assert len(reference(bench, prompts_of(case)[0])["tokens"]) == 2


def test_differences_count_until_answers_part() -> None:
    first = {"tokens": [1, 2, 3], "steps": [[0.5], [0.4], [0.3]]}
    assert difference(first, {"tokens": [1, 9, 9], "steps": [[0.5], [0.3], [9.0]]}) == pytest.approx(0.1)
    assert difference(first, first) == 0.0


def answer(*scores: float) -> dict[str, Any]:
    steps = [[score] for score in scores]
    return {"tokens": [7] * len(scores), "steps": steps, "kept": steps}


def result_with(*answers: dict[str, Any], **counts: int) -> dict[str, Any]:
    return {"runner": "v1", "rounds": [[*answers]], "preemptions": 0, "hits": 0, **counts}


@pytest.mark.parametrize("place", [0, 1])
def test_a_score_that_was_not_read_is_no_small_difference(place: int) -> None:
    wanted = [answer(0.5, 0.4), answer(0.5, 0.4)]
    found = [answer(0.5, 0.3), answer(0.5, 0.3)]
    found[place] = {**answer(0.5, float("nan")), "kept": [[0.5], [0.4]]}
    compared = vllm_matrix.compared(Case("eager"), wanted, result_with(*found))
    assert compared.tokens_equal == 1.0
    assert math.isnan(compared.score_diff)
    assert math.isnan(compared.kept_diff)


@pytest.mark.parametrize(("name", "count"), [("preemption", "preemptions"), ("prefix_cache", "hits")])
def test_a_case_that_did_not_show_what_it_is_for_fails(name: str, count: str) -> None:
    with pytest.raises(RuntimeError, match=f"{name} on llama, runner v1, came to no {name}, so nothing was shown"):
        vllm_matrix.compared(Case(name), [answer(0.5)], result_with(answer(0.5)))
    assert vllm_matrix.compared(Case(name), [answer(0.5)], result_with(answer(0.5), **{count: 3})).score_diff == 0.0


def test_every_case_has_the_same_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_bench, "compare", lambda case, root: vllm_matrix.Compared(1.0, 2e-6, 3e-6, 4, 5))
    rows = vllm_bench.parity_rows([Case("preemption", "qwen2", "v2")])
    assert {(row["case"], row["model"], row["runner"]) for row in rows} == {("preemption", "qwen2", "v2")}
    assert {row["metric"]: row["value"] for row in rows} == {
        "tokens_equal_share": 1.0, "score_diff": 2e-6, "kept_diff": 3e-6, "preemptions": 4, "hits": 5,
    }  # fmt: skip


def test_long_prompts_share_their_first_blocks() -> None:
    long, other, short = prompts_of(Case("prefix", lengths=(260, 300, 20)))
    assert long["ids"][:256] == other["ids"][:256]
    assert [len(prompt["ids"]) for prompt in (long, other, short)] == [260, 300, 20]


def test_goals_are_of_decoding_beside_stock() -> None:
    labels = {"variant": "guard", "phase": "decode", "geometry": "toy"}
    rows = [
        figure_row(labels, "ratio_to_stock", 0.96),
        figure_row({**labels, "phase": "prefill"}, "ratio_to_stock", 0.5),
    ]
    rows += [figure_row({**labels, "variant": "guard_aligner"}, "ratio_to_stock", 0.89)]
    rows += [figure_row({**labels, "variant": "guard_aligner_3_taps"}, "ratio_to_stock", 0.91)]
    met = {"guard": True, "guard_aligner": False, "guard_aligner_3_taps": True}
    assert {goal["variant"]: goal["met"] for goal in goals_of(rows)} == met
    assert len(set(map(place_of, rows))) == 4


def test_gates_are_latched_on_cached_prompts() -> None:
    """The case of the prefix cache has every strength, and a gate that the prompt decides behind two whole blocks."""
    (case,) = [case for case in CASES if case.name == "prefix_cache"]
    prompts = prompts_of(case)
    assert [prompt["strength"] for prompt in prompts] == list(STRENGTHS)
    latched = [
        prompt for prompt in prompts if isinstance(prompt["strength"], dict) and "reads" not in prompt["strength"]
    ]
    assert latched
    assert all(len(prompt["ids"]) > 2 * BLOCK for prompt in latched)


def test_what_is_timed_reads_every_score(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each engine's requests ask for its own slots, those of the base alone for none."""
    small = {"num_hidden_layers": 8, "hidden_size": 64, "intermediate_size": 96, "vocab_size": 512}
    small |= {"num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": True}
    monkeypatch.setitem(vllm_bench.GEOMETRIES, "toy", small)
    monkeypatch.setattr(vllm_bench, "SIZE", 0.2)
    jobs: list[dict[str, Any]] = []
    monkeypatch.setattr(vllm_bench, "execute", lambda job, case, root: jobs.append(job))
    options = SimpleNamespace(batch=2, tokens=4, steps=2, rounds=1, clock="cpu", eager=True)
    vllm_bench.timings(vllm_bench.make_engines("toy", tmp_path), options, tmp_path)
    asked: dict[str, set[tuple[int, ...]]] = {}

    class Engine:
        def __init__(self, **options: Any) -> None:
            planned = options.get("additional_config", {}).get("safeside", {"adapters": ()})
            self.asked = asked.setdefault(f"{len(planned['adapters'])} adapters", set())

        def generate(self, prompts: list[Any], params: list[Any], use_tqdm: bool) -> list[Any]:
            self.asked |= {tuple(each.logprob_token_ids or ()) for each in params}
            answer = SimpleNamespace(logprobs=None, token_ids=())
            return [SimpleNamespace(outputs=[answer], num_cached_tokens=0)] * len(prompts)

    stand_in, params = ModuleType("vllm"), ModuleType("vllm.sampling_params")
    vars(stand_in).update(LLM=Engine, SamplingParams=SimpleNamespace, TokensPrompt=dict)
    vars(params).update(StructuredOutputsParams=None)
    monkeypatch.setitem(sys.modules, "vllm", stand_in)
    monkeypatch.setitem(sys.modules, "vllm.sampling_params", params)
    import_module("vllm_engine").seconds_of(jobs[0])
    del sys.modules["vllm_engine"]  # it holds the stand-in
    assert {name: {len(ids) for ids in found} for name, found in asked.items()} == {
        "0 adapters": {0}, "1 adapters": {2}, "2 adapters": {3},
    }  # fmt: skip


def test_a_part_is_measured_again_and_the_others_keep_their_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_bench, "installed_version", lambda: "0.32.0")
    monkeypatch.setattr(
        vllm_bench, "cost_rows", lambda geometry, options: [figure_row({"geometry": geometry}, "x", options.rounds)]
    )
    for words in (["--rounds", "3"], ["--rounds", "5", "--geometries", "toy"]):
        path = vllm_bench.main(["--only", "cost", "--output", str(tmp_path), *words])
    found = json.loads(path.read_text())
    assert {row["geometry"]: row["value"] for row in found["rows"]} == {"Qwen2.5-0.5B": 3, "toy": 5}
    settings = found["notes"]["settings"]
    assert {name: part["rounds"] for name, part in settings.items()} == {"Qwen2.5-0.5B": 3, "toy": 5}
    assert all(part["reads_scores"] and part["commit"] for part in settings.values())


def test_the_matrix_holds_the_selection_and_every_way_with_every_model() -> None:
    titles = [vllm_bench.title(case) for case in vllm_matrix.matrix()]
    assert titles[: len(CASES)] == [vllm_bench.title(case) for case in CASES]
    assert len({*titles}) == len(titles)
    ways = ("compiled", "prefix_cache", "chunked_prefill", "preemption", "tensor_parallel")
    models = ("llama", "qwen2", "qwen3", "mistral", "gemma3")
    assert {f"{way}-{model}-v1" for way in ways for model in models} <= {*titles}
    assert {f"eager-{model}-v2" for model in models} <= {*titles}
    on_v2 = {case.name for case in vllm_matrix.matrix() if case.runner == "v2"}
    assert {*ways, "lst_plus", "state_map"} <= on_v2
    assert "preemption-llama-v2" in [vllm_bench.title(case) for case in CASES]
    assert vllm_bench.chosen_cases(None) == vllm_bench.chosen_cases(titles)
    with pytest.raises(InputError, match="There is no case eager-gpt9-v1; expected some of eager-llama-v1"):
        vllm_bench.chosen_cases(["eager-gpt9-v1"])


def test_a_case_that_fails_costs_no_other_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def compare(case: Case, root: Path) -> vllm_matrix.Compared:
        if case.model == "qwen3":
            raise RuntimeError("no preemption")
        return vllm_matrix.Compared(1.0, 2e-6, 3e-6, 4, 5)

    monkeypatch.setattr(vllm_bench, "installed_version", lambda: "0.32.0")
    monkeypatch.setattr(vllm_bench, "compare", compare)
    words = ["--only", "parity", "--output", str(tmp_path), "--cases", "eager-llama-v1", "eager-qwen3-v1"]
    with pytest.raises(RuntimeError, match="no preemption"):
        vllm_bench.main(words)
    found = json.loads((tmp_path / "vllm.json").read_text())
    assert {row["model"] for row in found["rows"]} == {"llama"}
    assert set(found["notes"]["settings"]) == {"eager-llama-v1"}
