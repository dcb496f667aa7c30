"""What a recipe will take of the accelerator's memory, before anything is loaded.

With B rows of T tokens a step (twice as many for ``dpo``), N = B T, b bytes a number of the base, D the base's width
and P trainable parameters:

====================  ==================================================================================================
``weights``           b times the base's parameters, 4 P
``gradients``         4 P
``optimiser``         8 P, AdamW's two moments
``base_pass``         N b (4 D + 3 F): one frozen block at work, F the width of its feed-forward; nothing of it is kept
``taps``              states of the base's width that wait for the gradient
``activations``       everything else that waits for the gradient
``head``              3 chunks of float32 logits, and for aligners 4 states of 4 N D bytes: base, delta, mix, gradient
====================  ==================================================================================================

What waits for the gradient is counted, not estimated: the adapter's own forward pass runs on tensors that have shapes
and no content, and autograd tells what it keeps.  A ``lora`` sits inside the base, whose pass is not run: there
``taps`` are 4 N D bytes (2 N D under bfloat16) for each linear layer from the lowest one on that reads the base's
width, and ``activations`` the inputs and outputs of the others.  What the allocator wastes, the runtime's own kernels
(about 1 GB) and stored taps, which lie on disk, are not in it; nor are the keys and values that an accelerator keeps
for each head of a ``query_group`` by itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from transformers.pytorch_utils import Conv1D

from safeside.adapters.adapter import Adapter
from safeside.adapters.config import AdapterConfig
from safeside.adapters.toplayers import TopLayers
from safeside.base.model import Base
from safeside.base.taps import Tape
from safeside.base.token_scores import N_LOGITS
from safeside.base.top import Top
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
    trained = sum(parameter.numel() for parameter in adapter.parameters() if parameter.requires_grad)
    return _memory(base, recipe, trained, kept_in_training(base, adapter.config, recipe))


def kept_in_training(base: Base, config: AdapterConfig, recipe: Recipe) -> tuple[int, int]:
    """Bytes that wait for the gradient of one training pass: of states of the base's width, and of all others.

    Parameters are left out; several views of one storage count once.
    """
    n_tokens = _longest(base, recipe)
    n_rows = tokens_of(base, recipe) // n_tokens
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage
        return tensor

    is_half = recipe.training.precision == "bfloat16"
    with FakeTensorMode(), torch.autocast("cpu", torch.bfloat16, enabled=is_half):
        adapter = _without_content(config)
        tape = Tape(torch.ones(n_rows, n_tokens, dtype=torch.bool), n_tokens, is_causal=not base.is_encoder)
        tape.final = torch.empty(n_rows, n_tokens, base.d_model, dtype=base.dtype)
        with saved_tensors_hooks(keep, lambda tensor: tensor):
            for layer in config.layers:
                adapter.read(tape, layer, torch.empty_like(tape.final))
            output = adapter(tape)
        own = {parameter.untyped_storage()._cdata for parameter in _parameters(adapter)}
        sizes = [storage.nbytes() for key, storage in kept.items() if key not in own]
    del output
    wide = n_rows * n_tokens * base.d_model
    taps = sum(size for size in sizes if size in (wide * _FLOAT32, wide * _FLOAT32 // 2))
    return taps, sum(sizes) - taps


def _without_content(config: AdapterConfig) -> Adapter:
    """An adapter on the CPU in a FakeTensorMode; blocks that it shares with its base are there as well."""
    adapter = Adapter(config)
    if isinstance(adapter.trunk, TopLayers) and not adapter.trunk.is_bound:
        own, theirs = adapter.trunk.own_top, Top(config.blocks, config.depth)
        own.load_state_dict(theirs.state_dict(), assign=True)
        own.requires_grad_(False)
        for name, buffer in theirs.named_buffers():
            owner, _, leaf = name.rpartition(".")
            own.get_submodule(owner).register_buffer(leaf, buffer, persistent=False)
        adapter.trunk.is_bound = True
    return adapter


def _parameters(adapter: Adapter) -> Iterator[nn.Parameter]:
    """The adapter's parameters, and those of blocks that it shares with its base."""
    yield from adapter.parameters()
    if isinstance(adapter.trunk, TopLayers):
        yield from adapter.trunk.own_top.parameters()


def lora_memory(base: Base, inside: Iterable[str], n_trained: int, recipe: Recipe) -> Memory:
    """What training a LoRA takes that updates the layers of the base named in ``inside``."""
    modules = dict(base.model.named_modules())
    lowest = min(next(n for n, block in enumerate(base.blocks) if modules[name] in block.modules()) for name in inside)
    passed = [layer for block in list(base.blocks)[lowest:] for layer in linear_layers_of(block)]
    width, unit = base.d_model, tokens_of(base, recipe) * (2 if recipe.training.precision == "bfloat16" else _FLOAT32)
    taps = sum(n_in for n_in, _ in passed if n_in == width)
    others = sum(n_out + (n_in if n_in != width else 0) for n_in, n_out in passed)
    return _memory(base, recipe, n_trained, (unit * taps, unit * others))


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
    pairs = 2 if recipe.training.objective == "dpo" else 1
    return recipe.training.batch_size * pairs * _longest(base, recipe)


def _longest(base: Base, recipe: Recipe) -> int:
    """Tokens of the longest row, T."""
    return min(base.max_tokens, recipe.data.max_tokens or base.max_tokens)


def _memory(base: Base, recipe: Recipe, n_trained: int, kept: tuple[int, int]) -> Memory:
    """All parts; ``kept`` are the bytes of taps and activations."""
    tokens, width = tokens_of(base, recipe), base.d_model
    wide = max(n_out for block in base.blocks for _, n_out in linear_layers_of(block))
    is_aligner = recipe.adapter.role == "align"
    n_logits = min(N_LOGITS, tokens * int(base.model.config.get_text_config().vocab_size))
    n_weights = sum(parameter.numel() for parameter in base.model.parameters())
    return Memory(
        weights=n_weights * base.dtype.itemsize + n_trained * _FLOAT32,
        gradients=n_trained * _FLOAT32,
        optimiser=n_trained * _FLOAT32 * 2,
        base_pass=tokens * base.dtype.itemsize * (4 * width + 3 * wide),
        taps=kept[0],
        activations=kept[1],
        head=(_CHUNKS * n_logits + _STATES * tokens * width) * _FLOAT32 if is_aligner else 0,
    )
