"""Losses in nats: per token, weighted for training, averaged over a validation file."""

import math
from typing import NamedTuple

import torch
from rows import Batch, Rows, stack
from torch import Tensor
from transformers import LlamaForCausalLM


class Validation(NamedTuple):
    """Means over one file: all tokens, and those that the assistant says (0 where it says none)."""

    nats: float
    assistant_nats: float


def token_losses(model: LlamaForCausalLM, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Cross entropy and log-partition of each token, (rows, context), in float32."""
    positions = torch.arange(inputs.shape[1], device=inputs.device)[None]
    logits = model(input_ids=inputs, position_ids=positions, use_cache=False).logits.float()
    log_partition = torch.logsumexp(logits, -1)
    return log_partition - logits.gather(-1, targets[..., None])[..., 0], log_partition


def weighted_losses(model: LlamaForCausalLM, batch: Batch) -> tuple[Tensor, Tensor]:
    """Weighted sums of the cross entropy and of the squared log-partition (the z-loss)."""
    cross_entropy, log_partition = token_losses(model, batch.inputs, batch.targets)
    return (cross_entropy * batch.weights).sum(), (log_partition.square() * batch.weights).sum()


@torch.no_grad()
def validate(model: LlamaForCausalLM, rows: Rows, rows_per_batch: int) -> Validation:
    """The mean losses over all rows of a validation file."""
    total = n_tokens = assistant_total = n_assistant_tokens = 0.0
    device = model.device
    for start in range(0, rows.count, rows_per_batch):
        indices = range(start, min(start + rows_per_batch, rows.count))
        batch = stack([rows.row(index) for index in indices], device)
        with torch.autocast(device.type, torch.bfloat16):
            cross_entropy, _ = token_losses(model, batch.inputs, batch.targets)
        total += float(cross_entropy.sum())
        n_tokens += cross_entropy.numel()
        assistant_total += float((cross_entropy * batch.weights).sum())
        n_assistant_tokens += float(batch.weights.sum())
    return Validation(total / n_tokens, assistant_total / max(n_assistant_tokens, 1.0))


def bits_per_byte(nats_per_token: float, bytes_per_token: float) -> float:
    """The loss in a unit that does not depend on the tokenizer."""
    return nats_per_token / math.log(2) / bytes_per_token
