"""The base's top k blocks once more, fed from the state before them, and trained: our stand-in for the paper's LLD.

DSA's larger aligner, the one that comes near to LoRA-DPO, has no public definition.  This one has what is known of it:
larger than LST and LST+, no second full pass of the base, and not a LoRA inside the base, whose own top blocks go on.

``delta = top(h_{L-k}) - h``, with h the base's final normed state.  The blocks start with the base's weights, so the
delta starts at zero: exactly where both run in one dtype.  With ``lora_rank`` they stay the base's own, held once in
memory, and only low-rank updates of their linear layers are trained and stored (of experts of a mixture: none).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from safeside.adapters.config import AdapterConfig
from safeside.base.model import Base
from safeside.base.taps import SideCache, Tape
from safeside.base.top import Top
from safeside.errors import AttachmentError


class LowRankUpdate(nn.Module):
    """``B A x`` beside a linear layer; B starts at zero (LoRA)."""

    def __init__(self, n_in: int, n_out: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Linear(n_in, rank, bias=False)
        self.up = nn.Linear(rank, n_out, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, states: Tensor) -> Tensor:
        return self.up(self.down(states))  # type: ignore[no-any-return]


class _Add:
    """A hook of a linear layer that adds its update; an object, so that a deep copy gets the copied update."""

    def __init__(self, update: LowRankUpdate) -> None:
        self.update = update

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        states = args[0].to(self.update.down.weight.dtype)
        added: Tensor = self.update(states).to(output.dtype)
        return output + added


class TopLayers(nn.Module):
    """Trunk that gives the delta itself.  ``start`` it (or ``bind`` it) with its base before it is run."""

    def __init__(self, config: AdapterConfig) -> None:
        super().__init__()
        self.width = config.base.d_model
        self.layer = config.layers[0]
        self.is_bound = not config.lora_rank
        self.updates = nn.ModuleList()
        if not config.lora_rank:
            self.top = Top(config.blocks, config.depth)
            return
        with torch.device("meta"):
            top = Top(config.blocks, config.depth)
        self._frozen = [top]  # in a list: its weights are the base's, and neither stored, cast nor trained
        for block in top.blocks:
            for layer in block.modules():
                if isinstance(layer, nn.Linear | Conv1D):
                    n_in, n_out = layer.weight.shape if isinstance(layer, Conv1D) else layer.weight.shape[::-1]
                    update = LowRankUpdate(n_in, n_out, config.lora_rank)
                    self.updates.append(update)
                    layer.register_forward_hook(_Add(update))

    @property
    def n_cache_layers(self) -> int:
        return self.own_top.depth

    @property
    def own_top(self) -> Top:
        """The blocks: its own, or with ``lora_rank`` those that it shares with the base."""
        return self.top if not len(self.updates) else self._frozen[0]

    def start(self, base: Base) -> None:
        """Begin as the base: take its weights, and check that the blocks alone compute what they do inside it."""
        self.own_top.copy_from(base, shares=bool(len(self.updates)))
        self.is_bound = True
        self.own_top.check_same(base)

    def bind(self, base: Base) -> None:
        """Share the base's weights where only updates are stored."""
        if len(self.updates):
            self.own_top.copy_from(base, shares=True)
            self.is_bound = True

    def read(self, tape: Tape, layer: int, hidden: Float[Tensor, "B T D"]) -> None:
        """Keep the state before the duplicated blocks."""
        if layer == self.layer:
            tape.hidden[layer] = hidden

    def forward(self, tape: Tape, cache: SideCache | None) -> Float[Tensor, "B T D"]:
        """The delta, in float32."""
        if not self.is_bound:
            raise AttachmentError(
                "A toplayers adapter with lora_rank has no base yet. Make it with create_adapter or load_adapter."
            )
        assert tape.final is not None, "aligners run after the base"
        hidden = tape.hidden[self.layer]
        states: Tensor = self.own_top(hidden.to(next(self.own_top.parameters()).dtype), tape, cache)
        return states.float() - tape.final.detach().float()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move with the module but keep the dtype of buffers: rotary frequencies in bfloat16 are other positions."""
        before = dict(self.named_buffers())
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in before.items():
            owner, _, leaf = name.rpartition(".")
            module = self.get_submodule(owner)
            module.register_buffer(leaf, buffer.to(module.get_buffer(leaf).device), persistent=False)
        return self
