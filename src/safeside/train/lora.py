"""The guard on the whole base: a LoRA and a read-out, its own forward pass.

The "full-size" reference, and the teacher of distillation.  While one exists its base is changed: nothing can be
attached to it and no states of it are kept.  ``unload`` gives the base back bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraModel
from torch import nn
from transformers.pytorch_utils import Conv1D

from safeside.adapters.adapter import GuardHead
from safeside.adapters.sizing import adapter_matmuls, base_matmuls
from safeside.base.families import has_lora
from safeside.base.model import Base
from safeside.base.taps import Tape
from safeside.errors import AttachmentError, ConfigError
from safeside.train.taps import Batch, Forward


@dataclass(frozen=True, slots=True)
class LoraShape:
    """The dimensions of a LoraGuard."""

    rank: int = 8
    """Of each update."""
    alpha: float = 16.0
    """Updates are multiplied by ``alpha / rank``."""
    targets: tuple[str, ...] = ()
    """Endings of the names of linear layers to update, such as ``q_proj``; all in the blocks unless given."""


class LoraGuard(nn.Module):
    """A trainable LoRA on every block of ``base``, and a read-out of its final state.  It is a ``Source`` itself.

    Its parameters are those of the LoRA and of the read-out only.  Use it as a context manager, or call ``unload``.
    """

    def __init__(self, base: Base, n_labels: int, shape: LoraShape) -> None:
        super().__init__()
        if base.attachment is not None or has_lora(base.model):
            raise AttachmentError(f"{base.name} has an attachment or a LoRA already. Detach it, or unload it, first.")
        self.shape = shape
        self._base = base
        names = linear_layers(base, shape.targets)
        self._n_base = base_matmuls(base) - (0 if base.is_encoder else head_matmuls(base))
        config = LoraConfig(
            r=shape.rank,
            lora_alpha=shape.alpha,  # type: ignore[arg-type]
            target_modules=names,
            fan_in_fan_out=isinstance(base.model.get_submodule(names[0]), Conv1D),
        )
        self._tuner = [LoraModel(base.model, config, "default")]  # in a list: the base is no part of this module
        updates = [parameter for name, parameter in base.model.named_parameters() if "lora_" in name]
        self.updates = nn.ParameterList(updates)
        self.head = GuardHead(base.d_model, n_labels, pooled=False).to(base.device)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.unload()

    def forward(self, batch: Batch) -> Forward:
        """Logits (B, T, K) at every token, of one pass of the updated base."""
        if not self._tuner:
            raise AttachmentError("This LoraGuard was unloaded from its base. Make another one.")
        final = self._base.decoder(input_ids=batch.ids, attention_mask=batch.keep, use_cache=False)[0]
        tape = Tape(batch.keep, batch.ids.shape[1], is_causal=not self._base.is_encoder)
        return Forward(self.head(final, tape, None, 0), None)

    def unload(self) -> None:
        """Take the LoRA off the base again.  Safe to call twice."""
        if self._tuner:
            self._tuner.pop().unload()
            self._base.model.requires_grad_(False)

    @property
    def matmuls(self) -> int:
        """Multiply-adds a token of its own pass: the base's blocks, the updates and the read-out, no vocabulary."""
        return self._n_base + adapter_matmuls(self)


def head_matmuls(base: Base) -> int:
    """Multiply-adds a token of the base's language-model head."""
    return int(base.model.config.get_text_config().vocab_size) * base.d_model


def linear_layers(base: Base, targets: tuple[str, ...]) -> list[str]:
    """Full names of the linear layers in the base's blocks whose names end in one of ``targets``; all without any."""
    inside = {module for block in base.blocks for module in block.modules() if isinstance(module, nn.Linear | Conv1D)}
    names = [name for name, module in base.model.named_modules() if module in inside]
    chosen = [name for name in names if not targets or name.rpartition(".")[2] in targets]
    if not chosen:
        known = ", ".join(sorted({name.rpartition(".")[2] for name in names}))
        raise ConfigError(f"No linear layer in the blocks of {base.name} ends in {', '.join(targets)}; found {known}.")
    return chosen


def create_lora(base: Base, n_labels: int = 1, shape: LoraShape | None = None, seed: int = 0) -> LoraGuard:
    """A fresh LoraGuard on ``base``: it starts as the base with a random read-out."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LoraGuard(base, n_labels, shape or LoraShape())
