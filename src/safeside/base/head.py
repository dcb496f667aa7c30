"""A base's own language-model head, run without its blocks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput


@dataclass
class _DecoderOutput(ModelOutput):
    """What any architecture's model reads of its decoder's output."""

    last_hidden_state: Tensor | None = None
    past_key_values: None = None
    hidden_states: None = None
    attentions: None = None
    cross_attentions: None = None
    router_logits: None = None


class _Given(nn.Module):
    """In the place of the decoder: answers any call with the states that it was given."""

    def __init__(self, final: Tensor) -> None:
        super().__init__()
        self.final = final

    def __call__(self, *_args: object, **_kwargs: object) -> _DecoderOutput:
        return _DecoderOutput(last_hidden_state=self.final)


def logits_of(model: PreTrainedModel, decoder: nn.Module, final: Tensor) -> Tensor:
    """Logits (B, T, V) of final normed states (B, T, D): ``model`` runs with ``final`` in place of its decoder."""
    place = next(name for name, module in model.named_modules() if module is decoder)
    owner, _, leaf = place.rpartition(".")
    parent = model.get_submodule(owner)
    ids = torch.zeros((final.shape[0], 1), dtype=torch.long, device=final.device)
    parent._modules[leaf] = _Given(final)
    try:
        logits: Tensor = model(input_ids=ids, use_cache=False).logits
    finally:
        parent._modules[leaf] = decoder
    return logits
