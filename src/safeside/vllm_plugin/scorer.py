"""Guards of many texts on vLLM, in this process: what ``safeside score --engine vllm`` runs in each of its workers."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from vllm import LLM, SamplingParams, TokensPrompt

from safeside.adapters.adapter import Adapter
from safeside.artifact import base_named
from safeside.base.model import Base, checkpoint_folder
from safeside.base.shell import load_base_shell
from safeside.errors import InputError
from safeside.guards.score import Conversation, Scores, Scoring, Window, verdicts_of
from safeside.guards.setup import Setup
from safeside.types import Verdict
from safeside.vllm_plugin.options import engine_options
from safeside.vllm_plugin.plan import Plan, check_version, installed_version, plan_engine, shell_of
from safeside.vllm_plugin.slots import read

_BATCH = 1024  # windows that vLLM is given at once: it makes its own batches of them


class VllmScorer:
    """Guards on a vLLM engine: each window is a prompt, and its scores stand behind the one token that is drawn."""

    def __init__(self, base: Base, plan: Plan, guards: Sequence[Adapter], llm: LLM) -> None:
        self.base = base
        """The base without weights: texts are cut by its tokenizer."""
        self.guards = guards
        """Without weights: their thresholds and labels."""
        self._llm = llm
        self._slots = list(plan.config.slots)
        longest = min(base.max_tokens, int(llm.llm_engine.vllm_config.model_config.max_model_len))
        self._limit = longest - 1  # for the token that is drawn
        self._params = SamplingParams(temperature=0.0, max_tokens=1, detokenize=False, logprob_token_ids=self._slots)

    def score(self, conversations: Sequence[Conversation]) -> list[Scores]:
        """Scores in the order given, as ``score_conversations`` gives them, from windows a token shorter."""
        scoring = Scoring(self.base, self.guards, conversations, limit=self._limit)
        for batch in scoring.batches(_BATCH):
            scoring.keep(batch, self._ends(batch))
        return scoring.scores()

    def verdicts(self, scores: Scores) -> tuple[Verdict, ...]:
        """One verdict of each guard on the conversation that ``scores`` belong to."""
        return verdicts_of(self.base, self.guards, scores)

    def _ends(self, batch: Sequence[Window]) -> Mapping[str, torch.Tensor]:
        """By guard, each window's scores at its last token; NaN where they could not be read."""
        prompts = [TokensPrompt(prompt_token_ids=list(window.ids)) for window in batch]
        outputs = self._llm.generate(prompts, self._params, use_tqdm=False)
        found = torch.tensor([read(self._logprobs(output)) for output in outputs])
        parts = torch.split(found, [len(guard.config.labels) for guard in self.guards], 1)
        return {guard.name: part for guard, part in zip(self.guards, parts, strict=True)}

    def _logprobs(self, output: Any) -> list[float]:
        step = (output.outputs[0].logprobs or [{}])[0]
        return [step[slot].logprob if slot in step else float("nan") for slot in self._slots]


def make_scorer(setup: Setup) -> VllmScorer:
    """An engine in this process with the guards of ``setup``.

    On a CPU its weights are float32, as ``load_base`` has them; elsewhere they are the checkpoint's.  What the guards,
    the base or vLLM cannot do together is the error of ``plan_engine``; an engine that does not start is an InputError.
    """
    name, revision = base_named(setup.guards[0], setup.base)
    folder = checkpoint_folder(name, revision)
    plan = plan_engine(folder, setup.guards, allow_mismatch=setup.allow_mismatch, spare_tokens=setup.spare_tokens)
    guards = [shell_of(config).with_preset(setup.preset) for config in plan.config.guards]
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # a worker is a process already
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")  # nothing is told to anybody
    settings = {"dtype": "float32" if setup.device == "cpu" else "auto", **engine_options(setup.engine_options)}
    shell = load_base_shell(name, revision)
    try:
        llm = LLM(**plan.engine_options(), **settings)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"vLLM did not start with {settings}: {error} Check --vllm-option and its memory.") from error
    return VllmScorer(shell, plan, guards, llm)


def settings_of(setup: Setup) -> dict[str, object]:
    """What scores depend on beside guards and base: where the engine runs, and its options.

    An option that cannot be is an InputError, a release of vLLM that is not tested an UnsupportedError.
    """
    check_version(installed_version())
    return {"device": setup.device, "engine_options": engine_options(setup.engine_options)}
