"""What is refused before it can go wrong: bases, adapters, and ways of calling a base under an attachment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from safeside.adapters.adapter import Adapter
from safeside.base.families import refused_reason
from safeside.base.model import Base
from safeside.errors import InputError, UnsupportedError


def check_adapters(base: Base, aligners: Sequence[Adapter], guards: Sequence[Adapter]) -> None:
    """Raise unless ``base`` can take hooks and every adapter fits it and its place."""
    for place, given in (("aligners", aligners), ("guards", guards)):
        if not isinstance(given, Sequence) or not all(isinstance(adapter, Adapter) for adapter in given):
            raise InputError(
                f"attach() takes lists of adapters; {place} is {type(given).__name__}. Write {place}=[...]."
            )
    if not aligners and not guards:
        raise InputError("attach() needs at least one aligner or guard; got none.")
    reason = refused_reason(base.model)
    if reason is not None:
        raise UnsupportedError(f"Cannot attach to {base.name}: {reason}")
    if aligners and base.is_encoder:
        raise UnsupportedError(f"{base.name} is an encoder: it has no next-token distribution, so guards only.")
    names = [adapter.name for adapter in (*aligners, *guards)]
    if len(set(names)) != len(names):
        raise InputError(f"Adapter names must differ within an attachment; got {', '.join(names)}. Rename one.")
    for expected, adapters in (("align", aligners), ("guard", guards)):
        for adapter in adapters:
            _check_adapter(base, adapter, expected)


def check_intercept(base: Base, guard: object) -> None:
    """Raise unless ``guard`` can judge prompts of ``base`` before an answer."""
    if not isinstance(guard, Adapter):
        raise InputError(f"intercept is one guard; got a {type(guard).__name__}. Write intercept=guard.")
    if guard.config.role != "guard":
        raise InputError(f"{guard.name!r} has role {guard.config.role!r} and cannot intercept; expected a guard.")
    if base.is_encoder:
        raise UnsupportedError(f"{base.name} is an encoder: it gives no answer that could be intercepted. Use guards.")


def _check_adapter(base: Base, adapter: Adapter, expected: str) -> None:
    config = adapter.config
    if config.role != expected:
        raise InputError(f"{adapter.name!r} has role {config.role!r} but was passed as {expected!r}. Swap the lists.")
    if (config.base.d_model, config.base.n_layers) != (base.d_model, base.n_layers):
        raise InputError(
            f"{adapter.name!r} reads {config.base.n_layers} layers of width {config.base.d_model}, but {base.name} has "
            f"{base.n_layers} of width {base.d_model}. Load the base that it was made for."
        )


def cache_of(base: Base, bound: Mapping[str, Any], kwargs: dict[str, Any]) -> DynamicCache | None:
    """The request's cache, from the decoder's arguments (``bound``: by name); one that cannot grow is refused.

    The one that the base would make for itself is made here and put in ``kwargs``, so that it can be shared.
    """
    if base.is_encoder:
        return None
    cache = bound.get("past_key_values")
    if cache is None:
        use_cache = bound.get("use_cache")
        wanted = base.model.config.get_text_config().use_cache if use_cache is None else use_cache
        if not wanted or ("past_key_values" in bound and "past_key_values" not in kwargs):
            return None
        kwargs["past_key_values"] = cache = DynamicCache(config=base.model.config)
    if not isinstance(cache, DynamicCache) or cache.offloading:
        name = "An offloaded DynamicCache" if isinstance(cache, DynamicCache) else f"A {type(cache).__name__}"
        raise UnsupportedError(
            f"{name} is refused: adapters grow their own layers behind those of the base. "
            "Pass past_key_values=DynamicCache(), or leave cache_implementation unset."
        )
    return cache


def refuse_compiled() -> None:
    """Raise in compiled code: it keeps or forgets hooks as they were when it was compiled."""
    if torch.compiler.is_compiling():
        _raise_compiled()


@torch.compiler.disable  # type: ignore[untyped-decorator]  # so it runs for real when a hook is being compiled
def _raise_compiled() -> None:
    raise UnsupportedError(
        "torch.compile of an attached base is refused: compiled code may skip hooks. Run the uncompiled model."
    )


def refuse_packed(arguments: Mapping[str, object], n_new: int) -> None:
    """Raise when several texts share one row: adapters would read across their borders."""
    positions = arguments.get("position_ids")
    restarts = (
        arguments.get("attention_mask") is None
        and isinstance(positions, Tensor)
        and n_new > 1
        and bool((positions.diff(dim=-1) != 1).any())
    )
    if restarts or arguments.get("cu_seq_lens_q") is not None:
        raise UnsupportedError(
            "Packed sequences (position_ids that restart, continuous batching) are refused: adapters would read "
            "across texts. Use one row for each text, with an attention_mask."
        )


def keep_mask(mask: object, n_rows: int, n_new: int, n_past: int, device: torch.device) -> Tensor:
    """(B, S) bool from the base's own attention mask; anything else is an error, never a guess."""
    length = n_past + n_new
    if mask is None:
        return torch.ones((n_rows, length), dtype=torch.bool, device=device)
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        found = f"shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise UnsupportedError(f"Adapters need an attention_mask of shape (batch, tokens); got {found}.")
    if tuple(mask.shape) != (n_rows, length):
        raise InputError(f"attention_mask has shape {tuple(mask.shape)}; expected {(n_rows, length)} (cached and new).")
    return mask.bool()
