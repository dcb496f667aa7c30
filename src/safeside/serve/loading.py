"""What a policy file names: adapters, and genes in the base that they are attached to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

from safeside.adapters.adapter import Adapter
from safeside.artifact import load_adapter
from safeside.base.families import is_updated
from safeside.base.model import Base
from safeside.errors import AccessError, ConfigError, InputError, UnsupportedError
from safeside.serve.policy import PolicyBook

AddGenes = Callable[[Base, Mapping[str, Path]], dict[str, str]]
"""Makes the genes in folders live in a base, and gives a fingerprint for each."""


def no_genes(base: Base, folders: Mapping[str, Path]) -> dict[str, str]:
    """Nothing for no genes; any are an UnsupportedError."""
    if folders:
        raise UnsupportedError("This server was made without genes. Use safeside serve, or pass add_genes.")
    return {}


def load_adapters(book: PolicyBook, base: Base) -> tuple[dict[str, Adapter], dict[str, Adapter]]:
    """Guards and aligners by name; one whose own name is another is a ConfigError, as verdicts would be mixed up."""
    if book.adapters and is_updated(base.model) and book.allow_mismatch is None:
        raise ConfigError(
            "Genes or a LoRA change what the adapters read, and they were not calibrated on that. Say allow_mismatch: "
            "weights in the policy file and check their figures, or leave the genes out."
        )
    guards: dict[str, Adapter] = {}
    aligners: dict[str, Adapter] = {}
    for name, place in book.adapters.items():
        adapter = load_for(place, base, book.allow_mismatch)
        if adapter.name != name:
            raise ConfigError(f"The adapter at {place} is called {adapter.name!r}, not {name!r}. Use its own name.")
        (guards if adapter.config.role == "guard" else aligners)[name] = adapter
    return guards, aligners


def load_for(place: str | Path, base: Base, allow_mismatch: Literal["weights"] | None) -> Adapter:
    """The adapter for a base that may hold genes; there its verdicts say that the weights are others."""
    adapter = load_adapter(place, base, allow_mismatch=allow_mismatch)
    if is_updated(base.model):
        adapter.config = adapter.config.model_copy(update={"allow_mismatch": True})
    return adapter


def allowed_folder(path: str, roots: Sequence[Path]) -> Path:
    """The folder, if it and all that is in it lies under an allowed root; nothing else is ever opened."""
    refused = AccessError("What is loaded comes from allowed folders only; this is in none. See --adapter-root.")
    try:
        folder = Path(path).resolve()
    except (OSError, ValueError, RuntimeError) as error:
        raise refused from error
    if not any(folder.is_relative_to(root) for root in roots):
        raise refused
    if not folder.is_dir():
        raise InputError("There is no such folder under the allowed ones.")
    if not all(inner.resolve().is_relative_to(folder) for inner in folder.rglob("*")):
        raise refused
    return folder
