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


ENGINES: Registry[Callable[[Setup], Scorer]] = Registry("engine")
"""By name, what makes a worker's scorer."""


def base_scorer(setup: Setup) -> BaseScorer:
    """Base and guards in the worker's own process, on one thread: workers, not threads, use a machine's cores."""
    torch.set_num_threads(1)
    base = base_of(setup.guards[0], setup.base, setup.device)
    loaded = [load_adapter(name, base, allow_mismatch=setup.allow_mismatch) for name in setup.guards]
    return BaseScorer(base, [guard.with_preset(setup.preset) for guard in loaded])


ENGINES.register("hf", base_scorer)


def require_engine(name: str) -> None:
    """Raise an InputError unless an engine of this name scores in bulk."""
    if name not in ENGINES:
        raise InputError(
            f"Engine {name!r} does not score in bulk yet; expected one of {', '.join(ENGINES)}. Choose --engine hf, or "
            "register an engine in safeside.scale.engines."
        )
