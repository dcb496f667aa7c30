"""The adapters that a policy file names."""

from __future__ import annotations

from collections.abc import Mapping

from safeside.adapters.adapter import Adapter
from safeside.artifact import load_adapter
from safeside.base.model import Base
from safeside.errors import ConfigError


def load_adapters(places: Mapping[str, str], base: Base) -> tuple[dict[str, Adapter], dict[str, Adapter]]:
    """Guards and aligners by name; one whose own name is another is a ConfigError, as verdicts would be mixed up."""
    guards: dict[str, Adapter] = {}
    aligners: dict[str, Adapter] = {}
    for name, place in places.items():
        adapter = load_adapter(place, base)
        if adapter.name != name:
            raise ConfigError(f"The adapter at {place} is called {adapter.name!r}, not {name!r}. Use its own name.")
        (guards if adapter.config.role == "guard" else aligners)[name] = adapter
    return guards, aligners
