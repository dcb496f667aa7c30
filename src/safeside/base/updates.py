"""Low-rank updates of linear layers while a model runs.

They are hooks on its layers: no weight is ever touched, so what is removed leaves the model bit for bit as it was.  A
layer inside a PEFT wrapper is updated under it, so either may come first and go first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle
from transformers.pytorch_utils import Conv1D


@dataclass(frozen=True, slots=True)
class LowRank:
    """An update of one linear layer: ``up @ down`` is added to its weight."""

    down: Float[Tensor, "r n_in"]
    """PEFT's ``lora_A``."""
    up: Float[Tensor, "n_out r"]
    """PEFT's ``lora_B``."""

    @property
    def rank(self) -> int:
        """Rows of ``down``."""
        return int(self.down.shape[0])

    @property
    def matrix(self) -> Float[Tensor, "n_out n_in"]:
        """The update in full, in float32."""
        return self.up.float() @ self.down.float()

    def scaled(self, scale: float) -> LowRank:
        """``scale`` times the update; the factor goes into ``up``."""
        return LowRank(self.down, self.up * scale)

    def to(self, device: torch.device) -> LowRank:
        """The same update on ``device``."""
        return LowRank(self.down.to(device), self.up.to(device))


class UpdateHook:
    """What a layer's output is passed through: ``scale`` times the update of its input is added to it."""

    def __init__(self, update: LowRank, scale: float | Tensor) -> None:
        self.update, self.scale = update, scale

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """The sum, in the dtype of the layer's output."""
        given = inputs[0].to(self.update.down.dtype)
        added = F.linear(F.linear(given, self.update.down), self.update.up)
        return (output + added * self.scale).to(output.dtype)


class LiveUpdates:
    """Updates of the layers of ``model``, by full name, each at its scale, which may be a tensor that is learnt.

    Use it as a context manager, or call ``remove``.
    """

    def __init__(self, model: nn.Module, updates: Mapping[str, LowRank], scales: Mapping[str, float | Tensor]) -> None:
        layers = {name: linear_layer(model, name) for name in updates}  # all are looked up before any is hooked
        self.hooks = {name: UpdateHook(update, scales[name]) for name, update in updates.items()}
        self._handles: list[RemovableHandle] = [
            layer.register_forward_hook(self.hooks[name]) for name, layer in layers.items()
        ]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def remove(self) -> None:
        """Take every hook off.  Safe to call twice."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def linear_layer(model: nn.Module, name: str) -> nn.Module:
    """The linear layer called ``name``, inside its PEFT wrapper if it has one.

    An AttributeError where there is none of that name, a TypeError where it is no plain linear layer.
    """
    layer = model.get_submodule(name)
    while "base_layer" in layer._modules:
        layer = layer.get_submodule("base_layer")
    if type(layer) not in (nn.Linear, Conv1D):
        raise TypeError(f"{name} is a {type(layer).__name__}")
    return layer


def widths_of(layer: nn.Module) -> tuple[int, int]:
    """Width of what the linear layer reads and of what it gives."""
    weight = layer.get_parameter("weight")
    return tuple(weight.shape) if isinstance(layer, Conv1D) else tuple(weight.shape[::-1])  # type: ignore[return-value]


@torch.no_grad()
def add_to_weight(layer: nn.Module, matrix: Float[Tensor, "n_out n_in"]) -> None:
    """Add ``matrix`` to the layer's weight, summed in float32 and rounded once."""
    weight = layer.get_parameter("weight")
    added = matrix.T if isinstance(layer, Conv1D) else matrix
    weight.copy_(weight.float() + added.to(weight.device))


def has_live_updates(model: nn.Module) -> bool:
    """Whether any layer of the model is updated by hooks."""
    return any(isinstance(hook, UpdateHook) for module in model.modules() for hook in module._forward_hooks.values())
