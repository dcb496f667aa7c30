"""What a recipe will take of the accelerator's memory, by formula and before anything is loaded.

With B rows of T tokens a step (twice as many for ``dpo``), N = B T, b bytes a number of the base, a = 4 bytes a number
of the adapter's activations (2 under bfloat16), D the base's width and P trainable parameters:

====================  ==================================================================================================
``weights``           b times the base's parameters, 4 P
``gradients``         4 P
``optimiser``         8 P, AdamW's two moments
``base_pass``         N b (4 D + 3 F): one frozen block at work, F the width of its feed-forward; nothing of it is kept
``taps``              a N D for every linear layer of the adapter that reads the base's width: its input waits for the
                      gradient
``activations``       a N (inputs + outputs) of the adapter's other linear layers, a N outputs of the former
``head``              3 chunks of float32 logits, and for aligners 4 states of 4 N D bytes: base, delta, mix, gradient
====================  ==================================================================================================

A ``lora`` sits inside the base, so that every linear layer from the lowest one on counts among the ``activations``.
What the allocator wastes, the runtime's own kernels (about 1 GB) and stored taps, which lie on disk, are not in it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from safeside.adapters.adapter import Adapter
from safeside.adapters.toplayers import TopLayers
from safeside.base.model import Base
from safeside.base.token_scores import N_LOGITS
from safeside.train.recipe import Recipe

_FLOAT32 = 4  # bytes
_CHUNKS = 3  # logits in the head's dtype and in float32, and their gradient
_STATES = 4  # of the base, delta, mix, gradient of the mix


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes by what takes them; the module's docstring has the formulas."""

    weights: int
    gradients: int
    optimiser: int
    base_pass: int
    taps: int
    activations: int
    head: int

    @property
    def total(self) -> int:
        """All of them."""
        return sum(asdict(self).values())

    def in_gigabytes(self) -> dict[str, float]:
        """Each part and the total, in GB (10^9 bytes)."""
        parts = {**asdict(self), "total": self.total}
        return {f"{name}_gb": round(n_bytes / 1e9, 3) for name, n_bytes in parts.items()}


def adapter_memory(base: Base, adapter: Adapter, recipe: Recipe) -> Memory:
    """What training ``adapter`` takes; neither needs weights."""
    trained = [parameter for parameter in adapter.parameters() if parameter.requires_grad]
    run: nn.Module = adapter
    if isinstance(adapter.trunk, TopLayers):
        run = nn.ModuleList([adapter.trunk.own_top, adapter.trunk.updates])
    return _memory(base, recipe, sum(map(torch.Tensor.numel, trained)), linear_layers_of(run))


def lora_memory(base: Base, inside: Iterable[str], n_trained: int, recipe: Recipe) -> Memory:
    """What training a LoRA takes that updates the layers of the base named in ``inside``."""
    modules = dict(base.model.named_modules())
    lowest = min(next(n for n, block in enumerate(base.blocks) if modules[name] in block.modules()) for name in inside)
    passed = [layer for block in list(base.blocks)[lowest:] for layer in linear_layers_of(block)]
    return _memory(base, recipe, n_trained, passed)


def linear_layers_of(module: nn.Module) -> list[tuple[int, int]]:
    """Numbers that enter and leave each linear layer inside ``module``, for one token."""
    found = []
    for layer in module.modules():
        if isinstance(layer, nn.Linear | Conv1D):
            n_in, n_out = layer.weight.shape if isinstance(layer, Conv1D) else layer.weight.shape[::-1]
            found.append((int(n_in), int(n_out)))
    return found


def tokens_of(base: Base, recipe: Recipe) -> int:
    """Most tokens of one forward pass in training, N."""
    longest = min(base.max_tokens, recipe.data.max_tokens or base.max_tokens)
    pairs = 2 if recipe.training.objective == "dpo" else 1
    return recipe.training.batch_size * pairs * longest


def _memory(base: Base, recipe: Recipe, n_trained: int, layers: Iterable[tuple[int, int]]) -> Memory:
    layers, width = list(layers), base.d_model
    tokens, wide = (
        tokens_of(base, recipe),
        max([n_out for block in base.blocks for _, n_out in linear_layers_of(block)]),
    )
    kept = 2 if recipe.training.precision == "bfloat16" else _FLOAT32
    taps = sum(n_in for n_in, _ in layers if n_in == width)
    others = sum(n_out + (n_in if n_in != width else 0) for n_in, n_out in layers)
    is_aligner = recipe.adapter.role == "align"
    n_logits = min(N_LOGITS, tokens * int(base.model.config.get_text_config().vocab_size))
    return Memory(
        weights=sum(parameter.numel() for parameter in base.model.parameters()) * base.dtype.itemsize
        + n_trained * _FLOAT32,
        gradients=n_trained * _FLOAT32,
        optimiser=n_trained * _FLOAT32 * 2,
        base_pass=tokens * base.dtype.itemsize * (4 * width + 3 * wide),
        taps=tokens * kept * taps,
        activations=tokens * kept * others,
        head=(_CHUNKS * n_logits + _STATES * tokens * width) * _FLOAT32 if is_aligner else 0,
    )
