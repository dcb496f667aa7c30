"""The guard on the whole base: a LoRA and a read-out, its own forward pass.

The "full-size" reference, and the teacher of distillation.  While one exists its base is changed: nothing can be
attached to it and no states of it are kept.  ``unload`` gives the base back bit for bit.
"""

from __future__ import annotations

from typing import Self

import torch
from torch import nn

from safeside.adapters.adapter import GuardHead
from safeside.adapters.sizing import adapter_matmuls
from safeside.base.model import Base
from safeside.base.taps import Tape
from safeside.lora import Lora, LoraShape, lora_config
from safeside.train.taps import Batch, Forward


class LoraGuard(nn.Module):
    """A trainable LoRA on every block of ``base``, and a read-out of its final state.  It is a ``Source`` itself.

    Its parameters are those of the LoRA and of the read-out only.  Use it as a context manager, or call ``unload``.
    """

    def __init__(self, base: Base, n_labels: int, shape: LoraShape) -> None:
        super().__init__()
        self.shape = shape
        self._base = base
        self._lora = [Lora(base, lora_config(base, shape))]  # in a list: its updates are this module's own
        self.updates = self._lora[0].updates
        self.head = GuardHead(base.d_model, n_labels, pooled=False).to(base.device)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.unload()

    def forward(self, batch: Batch) -> Forward:
        """Logits (B, T, K) at every token, of one pass of the updated base."""
        final = self._lora[0].final_states(batch.ids, batch.keep)
        tape = Tape(batch.keep, batch.ids.shape[1], is_causal=not self._base.is_encoder)
        return Forward(self.head(final, tape, None, 0), None)

    def unload(self) -> None:
        """Take the LoRA off the base again.  Safe to call twice."""
        self._lora[0].unload()

    @property
    def matmuls(self) -> int:
        """Multiply-adds a token of its own pass: the base's blocks, the updates and the read-out, no vocabulary."""
        return self._lora[0].matmuls + adapter_matmuls(self.head)


def create_lora(base: Base, n_labels: int = 1, shape: LoraShape | None = None, seed: int = 0) -> LoraGuard:
    """A fresh LoraGuard on ``base``: it starts as the base with a random read-out."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LoraGuard(base, n_labels, shape or LoraShape())
