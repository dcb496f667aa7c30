"""What runs the base in a worker of a bulk run: an engine makes the scorer that the worker holds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from safeside.artifact import base_of, load_adapter
from safeside.errors import InputError
from safeside.guards.lines import BaseScorer, Scorer
from safeside.guards.setup import Setup
from safeside.registry import Registry


@dataclass(frozen=True, slots=True)
class ScoringEngine:
    """Functions of modules, for a worker finds ``make`` by its name."""

    make: Callable[[Setup], Scorer]
    """Makes a worker's scorer."""
    settings_of: Callable[[Setup], dict[str, object]]
    """What scores depend on beside guards and base; raises what is wrong with a setup before any worker starts."""


ENGINES: Registry[ScoringEngine] = Registry("engine")
"""By the name that ``--engine`` takes."""


def base_scorer(setup: Setup) -> BaseScorer:
    """Base and guards in the worker's own process, on one thread: workers, not threads, use a machine's cores."""
    torch.set_num_threads(1)
    base = base_of(setup.guards[0], setup.base, setup.device)
    loaded = [load_adapter(name, base, allow_mismatch=setup.allow_mismatch) for name in setup.guards]
    return BaseScorer(base, [guard.with_preset(setup.preset) for guard in loaded])


def base_settings(setup: Setup) -> dict[str, object]:
    """None; options for vLLM are an InputError."""
    if setup.engine_options:
        raise InputError("Engine 'hf' reads no --vllm-option. Leave it out.")
    return {}


ENGINES.register("hf", ScoringEngine(base_scorer, base_settings))
