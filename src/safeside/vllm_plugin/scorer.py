"""Guards of many texts on vLLM, in this process: what ``safeside score --engine vllm`` runs in each of its workers."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import torch
from vllm import LLM, TokensPrompt

from safeside.adapters.adapter import Adapter
from safeside.artifact import base_named
from safeside.base.model import Base, checkpoint_folder
from safeside.base.shell import load_base_shell
from safeside.errors import InputError
from safeside.guards.score import Conversation, Scores, Scoring, Window, verdicts_of
from safeside.guards.setup import Setup
from safeside.types import Verdict
from safeside.vllm_plugin.options import engine_options
from safeside.vllm_plugin.plan import Pooled, check_version, installed_version, plan_engine, shell_of

_TASK: Pooled = "classify"  # a window's last token alone, so that vLLM reads the others from its prefix cache
_BATCH = 1024  # windows that vLLM is given at once: it makes its own batches of them


class VllmScorer:
    """Guards on a pooling engine of vLLM that gives the scores at a prompt's last token: each window is a prompt."""

    def __init__(self, base: Base, guards: Sequence[Adapter], llm: LLM) -> None:
        self.base = base
        """The base without weights: texts are cut by its tokenizer."""
        self.guards = guards
        """Without weights: their thresholds and labels."""
        self._llm = llm
        self._limit = min(base.max_tokens, int(llm.llm_engine.vllm_config.model_config.max_model_len))

    def score(self, conversations: Sequence[Conversation]) -> list[Scores]:
        """Scores in the order given, as ``score_conversations`` gives them."""
        scoring = Scoring(self.base, self.guards, conversations, limit=self._limit)
        for batch in scoring.batches(_BATCH):
            scoring.keep(batch, self._ends(batch))
        return scoring.scores()

    def verdicts(self, scores: Scores) -> tuple[Verdict, ...]:
        """One verdict of each guard on the conversation that ``scores`` belong to."""
        return verdicts_of(self.base, self.guards, scores)

    def _ends(self, batch: Sequence[Window]) -> Mapping[str, torch.Tensor]:
        """By guard, each window's scores at its last token; NaN where there are none, or what is no score."""
        prompts = [TokensPrompt(prompt_token_ids=list(window.ids)) for window in batch]
        outputs = self._llm.encode(prompts, pooling_task=_TASK, use_tqdm=False)
        counts = [len(guard.config.labels) for guard in self.guards]
        found = torch.full((len(batch), sum(counts)), torch.nan)
        for row, output in zip(found, outputs, strict=True):
            values = output.outputs.data
            if values.shape == row.shape:
                row.copy_(torch.where((values >= 0) & (values <= 1), values, torch.nan))
        parts = torch.split(found, counts, 1)
        return {guard.name: part for guard, part in zip(self.guards, parts, strict=True)}


def make_scorer(setup: Setup) -> VllmScorer:
    """An engine in this process with the guards of ``setup``.

    On a CPU its weights are float32, as ``load_base`` has them; elsewhere they are the checkpoint's.  What the guards,
    the base or vLLM cannot do together is the error of ``plan_engine``; an engine that does not start is an InputError.
    """
    name, revision = base_named(setup.guards[0], setup.base)
    folder = checkpoint_folder(name, revision)
    plan = plan_engine(folder, setup.guards, allow_mismatch=setup.allow_mismatch, pools=_TASK)
    guards = [shell_of(config).with_preset(setup.preset) for config in plan.config.guards]
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # a worker is a process already
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")  # nothing is told to anybody
    settings = {"dtype": "float32" if setup.device == "cpu" else "auto", **engine_options(setup.engine_options)}
    shell = load_base_shell(name, revision)
    try:
        llm = LLM(**plan.engine_options(), **settings)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"vLLM did not start with {settings}: {error} Check --vllm-option and its memory.") from error
    return VllmScorer(shell, guards, llm)


def settings_of(setup: Setup) -> dict[str, object]:
    """What scores depend on beside guards and base: where the engine runs, and its options.

    An option that cannot be is an InputError, a release of vLLM that is not tested an UnsupportedError.
    """
    check_version(installed_version())
    return {"device": setup.device, "engine_options": engine_options(setup.engine_options)}
