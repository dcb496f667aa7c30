"""References to bases that do not exist, and tapes without a base: enough to build and run a side network."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from safeside.adapters.config import BaseReference
from safeside.base.fingerprint import Fingerprint
from safeside.base.taps import Tape


def reference(n_layers: int = 3, d_model: int = 64, *, is_encoder: bool = False) -> BaseReference:
    """A reference to a base of this shape."""
    return BaseReference(
        name="nowhere",
        model_type="llama",
        fingerprint=Fingerprint(architecture="a", tokenizer="t", template="c", weights="w"),
        n_layers=n_layers,
        d_model=d_model,
        is_encoder=is_encoder,
    )


def whole_tape(n_rows: int, n_tokens: int) -> Tape:
    """A tape over a whole text without padding."""
    return Tape(torch.ones((n_rows, n_tokens), dtype=torch.bool), n_tokens)


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter away from its start: zeros and ones would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            scale = parameter.shape[-1] ** -0.5 if parameter.ndim >= 2 else 0.3
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
    return module


def random_states(n_layers: int, *shape: int, seed: int = 1) -> list[Tensor]:
    """States of layers 0..n_layers, of a size that grows with depth as in real bases."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) * 3.0**layer for layer in range(n_layers + 1)]
