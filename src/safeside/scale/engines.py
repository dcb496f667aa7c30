"""What runs the base in a worker of a bulk run: an engine makes the scorer that the worker holds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

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


def require_engine(name: str, setup: Setup) -> None:
    """Raise an InputError unless an engine of this name scores in bulk, or for options that it would not read.

    Without vLLM, or with a release that is not tested, it is the error of ``check_version``.
    """
    if name not in ENGINES:
        raise InputError(
            f"Engine {name!r} does not score in bulk; expected one of {', '.join(ENGINES)}. Choose one of them, or "
            "register an engine in safeside.scale.engines."
        )
    if name == "vllm":
        check_version(installed_version())
    elif setup.spare_tokens or setup.engine_options:
        raise InputError(f"Engine {name!r} reads no --spare-token and no --vllm-option. Leave them out.")
