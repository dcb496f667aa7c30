"""What engines and servers of vLLM give beside ``attach``: for the tests on a CPU, and those on a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from safeside import Adapter, Base, Message, attach, load_adapter, load_base
from safeside.mixing import fixed
from safeside.types import Completion
from safeside.vllm_plugin.plan import Plan, Pooled, plan_engine
from vllm_matrix import (
    GEOMETRY,
    Case,
    execute,
    make_bench,
    make_tiny,
    policy_of,
    prompts_of,
    run_engine,
    save_random,
)

CHOICE = ["the cat sat on the mat", "that other hat"]
KINDS = {"harm": "lst", "probe": "plr", "toxic": "rtb"}  # of pooling guards; harm has two labels


def held_steps(case: Case, root: Path) -> tuple[list[list[float]], list[list[float]]]:
    """Scores and strength behind each token that a grammar holds to CHOICE: the worker's, and those of a slow twin.

    The twin reads the slots, where no grammar masks them, behind every beginning of each answer.
    """
    bench = make_bench(case, root)
    plan, prompts = bench.plan, [{**prompt, "strength": 0.5} for prompt in prompts_of(case)]
    held = [{**prompt, "choice": CHOICE} for prompt in prompts]
    answers = run_engine(case, plan.engine_options(), (), held, root)["rounds"][0]
    for answer in answers:
        text = bench.base.tokenizer.decode(answer["tokens"])
        assert any(whole.startswith(text) for whole in CHOICE), text
    beginnings = [
        {**prompt, "ids": [*prompt["ids"], *answer["tokens"][:n_read]], "n_new": 1}
        for prompt, answer in zip(prompts, answers, strict=True)
        for n_read in range(len(answer["tokens"]))
    ]
    twins = run_engine(case, plan.engine_options(), plan.config.slots, beginnings, root)["rounds"][0]
    return [step for answer in answers for step in answer["kept"]], [twin["steps"][0] for twin in twins]


def planned_pools(case: Case, pools: Pooled | None, root: Path) -> tuple[Plan, Base, list[Adapter]]:
    """An engine of a tiny base with three guards of random weights, and the same for ``attach``."""
    base = load_base(make_tiny(case.model, root / "base", **GEOMETRY))
    folders = [save_random(base, root / name, kind, "guard", name) for name, kind in KINDS.items()]
    return plan_engine(base.folder, folders, pools=pools), base, [load_adapter(folder, base) for folder in folders]


def run_pools(case: Case, plan: Plan, pools: str, root: Path) -> dict[str, Any]:
    """What a pooling engine of this case gives."""
    usual = {"max_model_len": 512, "enforce_eager": True, "max_num_seqs": 16, "dtype": "float32"}
    engine = {**usual, **plan.engine_options(), **case.engine}
    job = {"engine": engine, "pools": pools, "prompts": prompts_of(case), "rounds": case.rounds}
    found: dict[str, Any] = execute(job, case, root)
    return found


@torch.no_grad()
def attached_scores(base: Base, guards: list[Adapter], ids: list[int]) -> torch.Tensor:
    """The slow twin of a pooling engine: every token's scores of one prompt alone."""
    with attach(base, guards=guards) as attached:
        base.decoder(input_ids=torch.tensor([ids]), use_cache=False)
        return torch.cat([attached.record.scores[guard.name][0] for guard in guards], -1)


def attached_chats(asked: list[dict[str, Any]], n_new: int) -> list[Completion]:
    """What ``attach`` gives for chats with the built-in guard and aligner."""
    base = load_base("builtin")
    guard, aligner = load_adapter("builtin:harm", base), load_adapter("builtin:refuse", base)
    threshold, results = min(guard.thresholds_in("prompt")), []
    with attach(base, aligners=[aligner], guards=[guard]):
        for each in asked:
            strength = 1.0 if each["strength"] is None else each["strength"]
            if isinstance(strength, dict) and strength["policy"] == "step":
                strength = {**strength, "threshold": threshold}
            policy = policy_of(strength) if isinstance(strength, dict) else fixed(strength)
            results.append(base.chat([Message("user", each["question"])], strength=policy, max_new_tokens=n_new))
    return results
