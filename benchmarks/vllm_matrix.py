"""Cases in which vLLM has to give what ``attach`` gives: the same greedy tokens, and scores to 1e-4.

The reference runs each prompt alone through transformers; vLLM runs all of them in one batch, at mixed strengths.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache

from safeside import (
    Adapter,
    Base,
    attach,
    create_adapter,
    load_adapter,
    load_base,
    make_config,
    ramp,
    save_adapter,
    step,
    timed,
)
from safeside.adapters.config import LADDERS
from safeside.mixing import Policy, fixed
from safeside.request import history_of
from safeside.vllm_plugin.plan import Plan, plan_engine
from safeside.vllm_plugin.slots import GAP
from safeside.vllm_plugin.told import max_or_nan

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from references import randomise
from tiny import N_TOKENS, make_tiny, tiny_tokenizer

# vLLM's CPU kernels know no head narrower than 32.
GEOMETRY = {"max_position_embeddings": 1024, "head_dim": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
_WIDTHS = {"harm": 64, "refuse": 32}  # of ladders: two heads, other than the base's, and one
BLOCK = 128  # tokens of a block of vLLM's cache on a CPU
STRENGTHS: tuple[Any, ...] = (
    0.0,
    0.25,
    0.5,
    1.0,
    {"policy": "ramp", "guard": "harm", "low": 0.1, "high": 0.9},
    {"policy": "step", "guard": "toxic", "threshold": 0.5, "reads": "answer"},
    {"policy": "ramp", "guard": "harm", "low": 0.2, "high": 0.95, "ceiling": 1.5, "reads": "maximum"},
    {"policy": "ramp", "guard": "probe", "low": 0.2, "high": 0.9, "floor": 0.1, "reads": "both"},
)


__all__ = [
    "CASES",
    "GEOMETRY",
    "Case",
    "compare",
    "execute",
    "make_bench",
    "make_tiny",
    "matrix",
    "prompts_of",
    "randomise",
    "run_engine",
    "tiny_tokenizer",
]


@dataclass(frozen=True, slots=True)
class Case:
    """One way of running an engine."""

    name: str
    model: str = "llama"
    runner: str = "v1"
    engine: dict[str, Any] = field(default_factory=dict)
    kinds: tuple[str, ...] = ("lst", "plr", "rtb")
    """Of the guards ``harm``, ``probe`` and ``toxic``."""
    aligner: str = "lst"
    query_group: int = 1
    """Of the guard ``harm``, whose ladder has two heads."""
    lengths: tuple[int, ...] = (5, 17, 40, 9, 130, 64, 12, 33, 150, 7, 21, 90)
    n_new: int = 12
    rounds: int = 1
    dtype: str = "float32"
    """Of both ways.  FlashAttention and FlashInfer refuse float32."""


_MODELS = ("llama", "qwen2", "qwen3", "mistral", "gemma3")
_V2: dict[str, Any] = {"runner": "v2", "n_new": 4, "lengths": (5, 17, 40, 9, 30, 64, 12, 33)}  # interpreted, so slow
_LONG = (260, 300, 280, 270, 290, 310, 265, 150)
_WAYS: dict[str, dict[str, Any]] = {
    "eager": {},
    "compiled": {"engine": {"enforce_eager": False}},
    "prefix_cache": {"lengths": _LONG, "rounds": 2},
    "chunked_prefill": {"engine": {"max_num_batched_tokens": 64, "max_num_seqs": 16, "enable_chunked_prefill": True}},
    "preemption": {
        "engine": {"num_gpu_blocks_override": 12, "max_num_seqs": 8},
        "lengths": (100, 120, 90, 110, 126, 101, 95, 118),
        "n_new": 150,
    },
    "tensor_parallel": {"engine": {"tensor_parallel_size": 2}},
}
_PLUS: dict[str, Any] = {"kinds": ("lst_plus", "plr", "rtb"), "aligner": "lst_plus"}


def case_of(way: str, model: str = "llama", **more: Any) -> Case:
    """A way of running an engine, with ``more`` of its own."""
    return Case(way, model, **{**_WAYS[way], **more})


CASES = (
    case_of("eager"),
    case_of("eager", "qwen2", kinds=("lst", "plr", "lst")),
    case_of("eager", "qwen3"),
    case_of("eager", "mistral"),
    Case("transformers_backend", "gemma3"),  # which is how this model runs in every case
    case_of("prefix_cache"),
    case_of("chunked_prefill"),
    case_of("chunked_prefill", "mistral"),
    case_of("preemption"),
    Case("lst_plus", "qwen3", **_PLUS),
    Case("state_map", "qwen2", aligner="state_map"),
    Case("shared_keys", query_group=2),
    case_of("compiled"),
    case_of("tensor_parallel", "qwen2"),
    case_of("eager", **_V2),
    case_of("preemption", runner="v2", n_new=14, lengths=(120, 121, 122, 123, 124, 125, 126, 127)),  # full blocks soon
)
"""A pairwise selection, which the tests run."""


def matrix() -> tuple[Case, ...]:
    """The selection, then every other way with every model on runner V1, and on V2 every model and every way once.

    Runner V2 has no asynchronous scheduling here: vLLM turns it off on a CPU.
    """
    tight = {"num_gpu_blocks_override": 24, "max_num_seqs": 8}  # two kinds of layers share the blocks of gemma3
    more = [case_of("preemption", "gemma3", engine=tight)]
    more += [case_of(way, model) for way, model in product(_WAYS, _MODELS) if (way, model) != ("preemption", "gemma3")]
    more += [case_of("eager", model, **_V2) for model in _MODELS]
    more += [
        case_of("chunked_prefill", **{**_V2, "lengths": (70, 17, 90, 9)}),
        case_of("prefix_cache", "qwen2", runner="v2", n_new=3),
        case_of("compiled", **_V2),
        case_of("tensor_parallel", "qwen2", **_V2),
        Case("lst_plus", "qwen3", **_V2, **_PLUS),
        Case("state_map", "qwen2", aligner="state_map", **_V2),
    ]
    known = {("eager", "gemma3", "v1"), *((case.name, case.model, case.runner) for case in CASES)}
    return (*CASES, *(case for case in more if (case.name, case.model, case.runner) not in known))


@dataclass(frozen=True, slots=True)
class Bench:
    """A base with adapters on disk, and both ways of loading them."""

    plan: Plan
    base: Base
    guards: tuple[Adapter, ...]
    aligner: Adapter


def make_bench(case: Case, root: Path) -> Bench:
    """The tiny base of a case, three guards and an aligner with random weights, saved and loaded."""
    folder = make_tiny(case.model, root / "base", **GEOMETRY)
    silence_spare_ids(folder)
    base = load_base(folder, dtype=case.dtype)
    kinds = dict(zip(("harm", "probe", "toxic"), case.kinds, strict=True))
    folders = [save_random(base, root / name, kind, "guard", name, case.query_group) for name, kind in kinds.items()]
    aligner = save_random(base, root / "refuse", case.aligner, "align", "refuse")
    plan = plan_engine(folder, folders, aligner)
    return Bench(plan, base, tuple(load_adapter(folder, base) for folder in folders), load_adapter(aligner, base))


def silence_spare_ids(folder: Path) -> None:
    """Ids that no token has are drawn by no trained model; a random one must not either, or the slots would show."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.get_output_embeddings().weight[N_TOKENS:] = 0.0
    model.save_pretrained(folder)


def save_random(base: Base, folder: Path, kind: str, role: str, name: str, query_group: int = 1) -> Path:
    """An adapter whose scores spread over (0, 1), or whose delta is as large as the state."""
    options: dict[str, Any] = {"labels": ("harm", "hate")} if name == "harm" else {}
    if kind in LADDERS:
        options["width"] = _WIDTHS.get(name, 32)
        options["query_group"] = query_group if options["width"] > 32 else 1
    adapter = create_adapter(base, make_config(base, kind=kind, role=role, name=name, **options))  # type: ignore[arg-type]
    randomise(adapter, seed=len(name))
    return save_adapter(adapter, folder)


def policy_of(strength: Any) -> Policy:
    """The library's policy for what a request asks for."""
    if not isinstance(strength, dict):
        return fixed(strength)
    values = {key: value for key, value in strength.items() if key not in ("policy", "reads")}
    make = step if strength["policy"] == "step" else ramp
    reads = strength.get("reads", "prompt")
    if reads == "maximum":
        return timed(make(**values, latched=False), reads="answer", margin=1.0)
    return timed(make(**values, latched=reads == "prompt"), reads=reads)


def prompts_of(case: Case) -> list[dict[str, Any]]:
    """Random prompts, each at the next of the strengths; the first two blocks of long ones are the same."""
    generator = torch.Generator().manual_seed(7)
    shared = torch.randint(7, N_TOKENS, (2 * BLOCK,), generator=generator).tolist()
    prompts = []
    for index, length in enumerate(case.lengths):
        ids = torch.randint(7, N_TOKENS, (length,), generator=generator).tolist()
        ids = [*shared, *ids[2 * BLOCK :]] if length > 2 * BLOCK else ids
        prompts.append({"ids": ids, "strength": STRENGTHS[index % len(STRENGTHS)], "n_new": case.n_new})
    return prompts


@torch.no_grad()
def reference(bench: Bench, prompt: dict[str, Any]) -> dict[str, Any]:
    """Greedy tokens by ``attach``, and behind each the scores and the strength that it was drawn with."""
    base, n_prompt = bench.base, len(prompt["ids"])
    slots = list(bench.plan.config.slots)
    policy, cache, ids, tokens = policy_of(prompt["strength"]), DynamicCache(), prompt["ids"], []
    with attach(base, aligners=[bench.aligner], guards=list(bench.guards)) as attached:
        for _ in range(prompt["n_new"]):
            with attached.request(strength=policy, prompt_end=[n_prompt]):
                logits = base.model(torch.tensor([ids]), past_key_values=cache, use_cache=True).logits[0, -1].float()
            logits[slots] = logits.max() - GAP
            tokens.append(int(logits.argmax()))
            ids = tokens[-1:]
        history = history_of(cache)
    values = torch.cat([history.scores, history.strengths], -1)[0, n_prompt - 1 :]
    return {"tokens": tokens, "steps": values.tolist()}


def run_engine(
    case: Case, options: dict[str, Any], slots: Sequence[int], prompts: Sequence[dict[str, Any]], root: Path
) -> dict[str, Any]:
    """What an engine of this case gives."""
    usual = {"dtype": case.dtype, "max_model_len": 512, "enforce_eager": True, "max_num_seqs": 16}
    job = {
        "engine": {**usual, **options, **case.engine},
        "slots": list(slots),
        "tags": "worker_extension_cls" in options,
        "tells_strength": True,  # every engine of the matrix has an aligner, and ids enough
        "prompts": prompts,
        "rounds": case.rounds,
    }
    found: dict[str, Any] = execute(job, case, root)
    return found


def execute(job: dict[str, Any], case: Case, root: Path) -> Any:
    """The result of a job, run in a process of its own; its log is in ``root``."""
    given, result, log = root / "job.json", root / "result.json", root / "engine.log"
    given.write_text(json.dumps(job), encoding="utf-8")
    with log.open("wb") as output:
        command = [sys.executable, str(Path(__file__).with_name("vllm_engine.py")), str(given), str(result)]
        own = {**environment(case), "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}  # one process less
        ended = subprocess.run(command, stdout=output, stderr=output, env=own, check=False)
    if ended.returncode:
        raise RuntimeError(f"{case.name} on {case.model} failed:\n{log.read_text(errors='replace')[-12000:]}")
    return json.loads(result.read_text(encoding="utf-8"))


def environment(case: Case) -> dict[str, str]:
    """Of an engine on a shared CPU: little memory, no network, one thread.  On a GPU its own defaults."""
    if case.runner == "gpu":
        return {**os.environ, "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
    n_ranks = case.engine.get("tensor_parallel_size", 1)
    own = {
        "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "0|1" if n_ranks == 2 else "nobind", "VLLM_LOGGING_LEVEL": "WARNING",
    }  # fmt: skip
    if case.runner == "v2":
        paths = [str(Path(__file__).with_name("triton_interpreter")), os.environ.get("PYTHONPATH", "")]
        own |= {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(path for path in paths if path)}
    return {**os.environ, **own}


@dataclass(frozen=True, slots=True)
class Compared:
    """What a case showed."""

    tokens_equal: float
    """Share of the prompts whose tokens are all the reference's."""
    score_diff: float
    """The largest difference of any score or strength, over the tokens until the first that differs; NaN where one
    was not read."""
    kept_diff: float
    """The largest difference of what the worker kept of a request to what its client got."""
    preemptions: float
    hits: float


def compare(case: Case, root: Path) -> Compared:
    """Run a case both ways."""
    bench, prompts = make_bench(case, root), prompts_of(case)
    expected = [reference(bench, prompt) for prompt in prompts]
    return compared(
        case, expected, run_engine(case, bench.plan.engine_options(), bench.plan.config.slots, prompts, root)
    )


def compared(case: Case, expected: Sequence[dict[str, Any]], result: dict[str, Any]) -> Compared:
    """What an engine gave beside what was expected; a case that did not show what it is for is a RuntimeError."""
    if case.runner not in ("gpu", result["runner"]):
        raise RuntimeError(f"{case.name} is for runner {case.runner}, but vLLM took {result['runner']}.")
    counts = {"preemption": result["preemptions"], "prefix_cache": result["hits"]}
    if counts.get(case.name) == 0:
        raise RuntimeError(
            f"{case.name} on {case.model}, runner {case.runner}, came to no {case.name}, so nothing was shown. "
            "Expected at least one: give it fewer blocks or longer prompts."
        )
    pairs = [pair for found in result["rounds"] for pair in zip(expected, found, strict=True)]
    equal = sum(wanted["tokens"] == found["tokens"] for wanted, found in pairs) / len(pairs)
    kept = [torch.tensor(found["kept"]) - torch.tensor(found["steps"]) for _, found in pairs]
    return Compared(
        tokens_equal=equal,
        score_diff=max_or_nan([difference(*pair) for pair in pairs]),
        kept_diff=float(torch.cat(kept).abs().max()),  # NaN where a score was not kept
        preemptions=result["preemptions"],
        hits=result["hits"],
    )


def difference(wanted: dict[str, Any], found: dict[str, Any]) -> float:
    """The largest difference of the values behind two answers, as far as they read the same tokens."""
    n_same = next(
        (index for index, pair in enumerate(zip(wanted["tokens"], found["tokens"], strict=True)) if pair[0] != pair[1]),
        len(wanted["tokens"]) - 1,
    )
    first, second = (torch.tensor(answer["steps"][: n_same + 1]) for answer in (wanted, found))
    return float((first - second).abs().max())
