"""What runs the base in a worker of a bulk run: an engine makes the scorer that the worker holds."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from safeside.artifact import base_of, load_adapter
from safeside.errors import InputError
from safeside.guards.lines import BaseScorer, Scorer
from safeside.registry import Registry
from safeside.types import Preset
from safeside.vllm_plugin.plan import check_version, installed_version


@dataclass(frozen=True, slots=True)
class Setup:
    """Guards, their base and where it runs."""

    guards: tuple[str, ...]
    """Folders, hub names or ``builtin:harm``."""
    base: str | None = None
    """The base; None for the one that the first guard names."""
    preset: Preset | None = None
    """The preset of every guard."""
    allow_mismatch: str | None = None
    """``weights`` lets a guard run on other weights."""
    device: str = "cpu"
    """Where the base runs."""
    spare_tokens: tuple[str, ...] = ()
    """vLLM: control tokens that the base never writes, to carry scores."""
    engine_options: tuple[str, ...] = ()
    """vLLM: arguments of ``vllm.LLM``, each ``name=value``."""


_PLANNED = "it is part of what runs the guards"
OWN_OPTIONS = {
    **dict.fromkeys(("model", "tokenizer", "hf_overrides", "additional_config", "logits_processors"), _PLANNED),
    **dict.fromkeys(("logprobs_mode", "runner", "convert", "pooler_config"), "it would hide the scores"),
    **dict.fromkeys(("speculative_config", "spec_method", "enable_lora"), "guards do not run beside it"),
    **dict.fromkeys(("tensor_parallel_size", "pipeline_parallel_size"), "a worker has one accelerator"),
    "trust_remote_code": "no code of a checkpoint is ever run",
}
"""Arguments of ``vllm.LLM`` that cannot be given, and why not."""
ENGINES: Registry[Callable[[Setup], Scorer]] = Registry("engine")
"""By name, what makes a worker's scorer."""


def base_scorer(setup: Setup) -> BaseScorer:
    """Base and guards in the worker's own process, on one thread: workers, not threads, use a machine's cores."""
    torch.set_num_threads(1)
    base = base_of(setup.guards[0], setup.base, setup.device)
    loaded = [load_adapter(name, base, allow_mismatch=setup.allow_mismatch) for name in setup.guards]
    return BaseScorer(base, [guard.with_preset(setup.preset) for guard in loaded])


def vllm_scorer(setup: Setup) -> Scorer:
    """Base and guards on a vLLM engine in the worker's own process."""
    from safeside.scale.vllm_scorer import make_scorer

    return make_scorer(setup)


ENGINES.register("hf", base_scorer)
ENGINES.register("vllm", vllm_scorer)


def settings_of(name: str, setup: Setup) -> dict[str, object]:
    """What scores depend on beside the guards, by the engine of this name; all of a run are made with the same.

    A name without an engine, options that it would not read, and those that vLLM cannot score with are an InputError;
    without vLLM, or with a release that is not tested, it is the error of ``check_version``.
    """
    if name not in ENGINES:
        raise InputError(
            f"Engine {name!r} does not score in bulk; expected one of {', '.join(ENGINES)}. Choose one of them, or "
            "register an engine in safeside.scale.engines."
        )
    if name == "vllm":
        check_version(installed_version())
        return {"device": setup.device, "engine_options": engine_options(setup.engine_options)}
    if setup.spare_tokens or setup.engine_options:
        raise InputError(f"Engine {name!r} reads no --spare-token and no --vllm-option. Leave them out.")
    return {}


def engine_options(given: Sequence[str]) -> dict[str, Any]:
    """Arguments of ``vllm.LLM`` from ``name=value``, a value being JSON (``true``, not ``True``) or else text.

    What has no ``=``, a name that is given twice, and those of OWN_OPTIONS are an InputError.
    """
    found: dict[str, Any] = {}
    for item in given:
        name, sign, value = item.partition("=")
        name = name.strip().replace("-", "_")
        if not sign or not name.isidentifier():
            raise InputError(f"{item!r} is no option of vLLM; expected name=value, such as max_model_len=4096.")
        if name in OWN_OPTIONS:
            raise InputError(f"{name!r} is not for scoring in bulk: {OWN_OPTIONS[name]}. Leave it out.")
        if name in found:
            raise InputError(f"{name!r} is given twice. Give it once.")
        found[name] = _value(name, value)
    return found


def _value(name: str, text: str) -> Any:
    if text in ("True", "False", "None"):
        raise InputError(
            f"{name}={text} is Python; expected JSON: {name}={ {'None': 'null'}.get(text, text.lower()) }."
        )
    try:
        return json.loads(text)
    except ValueError:
        return text
