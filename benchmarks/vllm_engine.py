"""One vLLM engine in a process of its own: reads a job (JSON) from a file, writes what came out.

    python benchmarks/vllm_engine.py job.json result.json

A job holds ``engine`` (arguments of ``vllm.LLM``), ``slots``, whether the last of them tells the strength, and
``prompts``: ids, strength, how many tokens to draw, and perhaps the ``choice`` of texts that a grammar leaves; with
``tags`` what the worker kept is read beside the slots.
``rounds`` of it are run one after the other, so that later ones can meet the prefix cache.  With ``pools``, the task of
a pooling engine, an answer is the scores of its prompt.  With ``engines``, each with ``slots`` of its own that are read
as a client's request has them read, the result is seconds by engine: of reading all prompts, and of drawing one token
of each.
"""

from __future__ import annotations

import json
import os
import secrets
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

from vllm import LLM, SamplingParams, TokensPrompt
from vllm.sampling_params import StructuredOutputsParams

from safeside.vllm_plugin.kept import READ, TAG
from safeside.vllm_plugin.slots import read
from safeside.vllm_plugin.strengths import KEY

_PREEMPTIONS, _HITS = "vllm:num_preemptions", "vllm:prefix_cache_hits"


def params_of(prompt: dict[str, Any], slots: list[int]) -> SamplingParams:
    """Greedy, of exactly ``n_new`` tokens, with the strength, the tag and the slots of an engine that has them."""
    asked = {KEY: prompt.get("strength"), TAG: prompt.get("tag")}
    return SamplingParams(
        temperature=0.0,
        max_tokens=prompt["n_new"],
        ignore_eos=True,
        detokenize=False,
        extra_args={key: value for key, value in asked.items() if value is not None},
        logprob_token_ids=slots or None,
        structured_outputs=StructuredOutputsParams(choice=prompt["choice"]) if "choice" in prompt else None,
    )


def answers_of(llm: LLM, job: dict[str, Any]) -> list[dict[str, Any]]:
    """Tokens and values of the slots behind each, for all prompts in one batch."""
    slots = job["slots"]
    asked = [{**prompt, "tag": secrets.token_hex(8)} if job.get("tags") else prompt for prompt in job["prompts"]]
    prompts = [TokensPrompt(prompt_token_ids=prompt["ids"]) for prompt in job["prompts"]]
    outputs = llm.generate(prompts, [params_of(prompt, slots) for prompt in asked], use_tqdm=False)
    answers = []
    for prompt, output in zip(asked, outputs, strict=True):
        answer = output.outputs[0]
        found = [[step[slot].logprob for slot in slots] for step in answer.logprobs or []] if slots else []
        steps = [read(step, tells_strength=job["tells_strength"]) for step in found]
        kept = llm.collective_rpc(READ, args=(prompt["tag"],))[0] if job.get("tags") else []
        answers.append({"tokens": list(answer.token_ids), "steps": steps, "kept": kept[: len(answer.token_ids)]})
    return answers


def pooled_of(llm: LLM, job: dict[str, Any]) -> list[dict[str, Any]]:
    """What a pooling engine gives of each prompt, for all prompts in one batch."""
    prompts = [TokensPrompt(prompt_token_ids=prompt["ids"]) for prompt in job["prompts"]]
    outputs = llm.encode(prompts, pooling_task=job["pools"], use_tqdm=False)
    return [{"scores": output.outputs.data.tolist(), "n_cached": output.num_cached_tokens} for output in outputs]


def seconds_of(job: dict[str, Any]) -> dict[str, list[dict[str, float]]]:
    """By variant and round, seconds of a prefill and of a step of decoding; one round before is thrown away.

    All engines of ``engines`` run in this process, one at a time, in an order that rotates; so CPU time can be taken
    instead of the clock's, on a machine that is shared.
    """
    now = time.process_time if job["clock"] == "cpu" else time.perf_counter
    engines = {name: LLM(**engine["options"]) for name, engine in job["engines"].items()}
    names, seconds = list(engines), {name: [] for name in engines}
    for round_ in range(-1, job["rounds"]):
        shift = round_ % len(names)
        for name in [*names[shift:], *names[:shift]]:
            taken = []
            for n_new in (1, 1 + job["n_steps"]):
                prompts = [
                    {"ids": [(token + round_) % 250 for token in prompt["ids"]], "n_new": n_new}
                    for prompt in job["prompts"]
                ]
                started = now()
                answers_of(engines[name], {**job["engines"][name], "prompts": prompts})
                taken.append(now() - started)
            if round_ >= 0:
                seconds[name].append({"prefill": taken[0], "decode": (taken[1] - taken[0]) / job["n_steps"]})
        print(f"round {round_ + 1} of {job['rounds']}", flush=True)
    return seconds


def main(job_file: str, result_file: str) -> None:
    """Run the job."""
    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    if "engines" in job:
        Path(result_file).write_text(json.dumps(seconds_of(job)), encoding="utf-8")
        return
    if "TRITON_INTERPRET" in os.environ:
        import_module("interpreted.mended").mend()
    llm = LLM(**job["engine"], disable_log_stats=False)
    read_prompts = pooled_of if "pools" in job else answers_of
    rounds = [read_prompts(llm, job) for _ in range(job.get("rounds", 1))]
    counters = {metric.name: metric.value for metric in llm.get_metrics() if metric.name in (_PREEMPTIONS, _HITS)}
    runner = "v2" if llm.llm_engine.vllm_config.use_v2_model_runner else "v1"
    result = {
        "runner": runner,
        "rounds": rounds,
        "preemptions": counters.get(_PREEMPTIONS, 0),
        "hits": counters.get(_HITS, 0),
    }
    Path(result_file).write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:3])
