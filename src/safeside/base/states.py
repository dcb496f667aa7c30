"""The base's own states while it runs: full width, with their gradients where there are any."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn
from transformers.utils.generic import ModelOutput

from safeside.base.model import Base


@contextlib.contextmanager
def recorded_states(base: Base, layers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """By layer the states (B, T, D) of the last pass inside the block: 0 the embedding, l the output of block l."""
    recorded: dict[int, Tensor] = {}

    def keep(layer: int, hidden: object) -> None:
        state = hidden[0] if isinstance(hidden, tuple) else hidden
        assert isinstance(state, Tensor)
        recorded[layer] = state

    def after(layer: int) -> Callable[[nn.Module, object, object], None]:
        return lambda module, inputs, output: keep(layer, output)

    handles = [base.blocks[layer - 1].register_forward_hook(after(layer)) for layer in layers if layer > 0]
    if 0 in layers:
        handles.append(
            base.blocks[0].register_forward_pre_hook(
                lambda module, inputs, options: keep(0, inputs[0] if inputs else options["hidden_states"]),
                with_kwargs=True,
            )
        )
    try:
        yield recorded
    finally:
        for handle in handles:
            handle.remove()


def with_final(output: Any, final: Tensor) -> Any:
    """The decoder's output with another final state."""
    if isinstance(output, ModelOutput):
        output["last_hidden_state"] = final
        return output
    return (final, *output[1:])
