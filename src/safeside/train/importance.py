"""Which weights of a base matter: sums of squared gradients (the "fisher" start of LST, Sung et al. 2022).

``sum over rows of (d loss / d weight)^2``, one row a backward pass.  The loss is the base's own on the row, next token
by next token; an encoder has none, so it gets a linear probe of its last token's final state, fitted to the rows'
labels, and the probe's cross-entropy.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from safeside.base.layouts import BlockWeights, block_weights
from safeside.base.model import Base
from safeside.errors import ConfigError, NotFiniteError
from safeside.train.losses import answer_loss, guard_loss
from safeside.train.taps import FINAL, make_batch, record_states


@dataclass(frozen=True, slots=True)
class Sample:
    """The rows that gradients are taken on, drawn by the seed from those that are at hand."""

    ids: Sequence[tuple[int, ...]]
    """Token ids of each row at hand."""
    labels: Tensor
    """(n, K) of them, 0, 1 or NaN; used for encoders only."""
    n_rows: int = 1024
    """Most rows to draw."""
    seed: int = 0
    """Of the drawing."""

    def drawn(self) -> tuple[list[tuple[int, ...]], Tensor]:
        """Ids and labels of the rows that were drawn, in the order at hand."""
        places = sorted(random.Random(self.seed).sample(range(len(self.ids)), min(self.n_rows, len(self.ids))))
        return [self.ids[place] for place in places], self.labels[places]


@dataclass(frozen=True, slots=True)
class Importance:
    """What was measured of a base."""

    blocks: tuple[BlockWeights, ...]
    """By block, the sum of squared gradients of each weight, in float32 on the CPU."""
    scales: tuple[float, ...]
    """By block, the mean root-mean-square of the states that it reads."""
    n_rows: int
    """Rows behind it."""


def measure_importance(base: Base, sample: Sample, advance: Callable[[int], None] = lambda count: None) -> Importance:
    """Importance of every weight of the base's blocks; the base is left as it was, bit for bit.

    An architecture without a layout, an encoder without both kinds of rows, and no row of two tokens are ConfigErrors.
    """
    ids, labels = sample.drawn()
    ids, labels = _with_targets(ids, labels)
    scales, final = _read_states(base, ids)
    loss_of = _probe_loss(base, final, labels) if base.is_encoder else _language_loss(base)
    weights: list[nn.Parameter] = []

    def collect(parameter: nn.Parameter) -> Tensor:
        weights.append(parameter)
        return parameter

    for block in base.blocks:
        block_weights(base, block, collect)
    weights = list(dict.fromkeys(weights))
    sums = [torch.zeros(weight.shape) for weight in weights]
    try:
        base.model.requires_grad_(False)
        for weight in weights:
            weight.requires_grad_(True)
        for row in range(len(ids)):
            with torch.enable_grad():
                gradients = torch.autograd.grad(loss_of(ids[row], labels[row]), weights)
            for total, gradient in zip(sums, gradients, strict=True):
                total += gradient.float().square().cpu()
            advance(1)
    finally:
        base.model.requires_grad_(False)
    if not all(bool(total.isfinite().all()) for total in sums):
        raise NotFiniteError(f"Gradients of {base.name} are not finite; load it in float32 to prune it.")
    found = dict(zip(weights, sums, strict=True))
    return Importance(tuple(block_weights(base, block, found.__getitem__) for block in base.blocks), scales, len(ids))


def _with_targets(ids: list[tuple[int, ...]], labels: Tensor) -> tuple[list[tuple[int, ...]], Tensor]:
    places = [place for place, row in enumerate(ids) if len(row) > 1]
    if not places:
        raise ConfigError("Importance needs rows of at least two tokens; got none. Add training rows.")
    return [ids[place] for place in places], labels[places]


@torch.no_grad()
def _read_states(base: Base, ids: Sequence[tuple[int, ...]], batch_size: int = 16) -> tuple[tuple[float, ...], Tensor]:
    """The mean root-mean-square of every block's input, and the last token's final state (n, D) of every row."""
    totals, n_tokens = torch.zeros(base.n_layers, dtype=torch.float64), 0
    final: list[Tensor] = []
    for start in range(0, len(ids), batch_size):
        batch = make_batch(base, ids, range(start, min(start + batch_size, len(ids))))
        states = record_states(base, batch, range(base.n_layers))
        for layer in range(base.n_layers):
            totals[layer] += states[layer][batch.keep].float().square().mean(-1).sqrt().sum().cpu()
        n_tokens += int(batch.keep.sum())
        final.append(states[FINAL][torch.arange(len(batch.rows)), batch.keep.sum(1) - 1].float())
    return tuple((totals / n_tokens).tolist()), torch.cat(final)


def _language_loss(base: Base) -> Callable[[tuple[int, ...], Tensor], Tensor]:
    def loss_of(ids: tuple[int, ...], labels: Tensor) -> Tensor:
        row = torch.tensor([ids], device=base.device)
        return answer_loss(base.model(input_ids=row, use_cache=False).logits, row, torch.ones_like(row).bool())

    return loss_of


def _probe_loss(base: Base, final: Tensor, labels: Tensor) -> Callable[[tuple[int, ...], Tensor], Tensor]:
    """Cross-entropy of one logistic regression for each label on the last token's final state."""
    weights, biases = [], []
    for label in labels.T:
        known = ~label.isnan()
        if len(set(label[known].tolist())) < 2:
            raise ConfigError("To prune an encoder both harmful and harmless rows are needed. Add rows.")
        model = LogisticRegression(max_iter=1000).fit(final[known.to(final.device)].cpu().numpy(), label[known].numpy())
        weights.append(model.coef_[0])
        biases.append(model.intercept_[0])
    weight = torch.from_numpy(np.array(weights)).float().to(base.device)
    bias = torch.tensor(np.array(biases), dtype=torch.float32, device=base.device)

    def loss_of(ids: tuple[int, ...], label: Tensor) -> Tensor:
        state = base.decoder(input_ids=torch.tensor([ids], device=base.device))[0][:, -1].float()
        return guard_loss(state @ weight.T + bias, label[None].to(base.device))

    return loss_of
