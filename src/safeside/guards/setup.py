"""What a scorer is made of, before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass

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
    engine_options: tuple[str, ...] = ()
    """vLLM: arguments of ``vllm.LLM``, each ``name=value``."""
