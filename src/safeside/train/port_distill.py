"""Distillation onto another base: an old adapter's outputs on unlabelled text are what a new one learns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from safeside.adapters.adapter import GuardHead
from safeside.train.alignment import answer_logits, answer_mask
from safeside.train.loop import Loop, Progress
from safeside.train.losses import guard_loss
from safeside.train.port_text import PortSettings, PortText, Side
from safeside.train.recipe import TrainingSection
from safeside.train.taps import StoredTaps

Report = Callable[[Progress], None]
_CHUNK = 64


@dataclass(frozen=True, slots=True)
class _Objective:
    """What the loop minimises on some rows and maximises on others, and how much of a mean each row is."""

    loss_of: Callable[[Sequence[int]], Tensor]
    metric_of: Callable[[], float]
    weights: Sequence[float] | None = None


def distill_guard(old: Side, new: Side, text: PortText, settings: PortSettings, report: Report) -> None:
    """Train the new guard in place on the old one's raw scores and, where both are as wide, its read-out.

    The read-out is the normed side state that the head's linear layer reads.
    """
    with torch.no_grad():
        parts = [guard_outputs(old, some) for some in chunks(range(text.choosing.stop))]
    soft = torch.sigmoid(torch.cat([logits for logits, _ in parts]))
    readouts = torch.cat([readout for _, readout in parts])

    def loss_of(some: Sequence[int]) -> Tensor:
        logits, readout = guard_outputs(new, some)
        loss = guard_loss(logits, soft[list(some)])
        if readout.shape[1] == readouts.shape[1]:
            loss = loss + settings.readout_weight * F.mse_loss(readout, readouts[list(some)])
        return loss

    def metric_of() -> float:
        logits = torch.cat([guard_outputs(new, some)[0] for some in chunks(text.choosing)])
        return -float(guard_loss(logits, soft[text.n_learnt :]))

    _train(new, text, _Objective(loss_of, metric_of), settings, report)


def guard_outputs(side: Side, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Raw logits (B, K) of a side's guard at the last tokens, and the read-out (B, d) behind them."""
    assert isinstance(side.adapter.head, GuardHead)
    read: list[Tensor] = []

    def keep(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        read.append(inputs[0])

    batch = side.batch(rows)
    handle = side.adapter.head.linear.register_forward_pre_hook(keep)
    try:
        output = StoredTaps(side.store, side.adapter)(batch).output
    finally:
        handle.remove()
    assert output.logits is not None
    last = torch.arange(len(rows)), batch.keep.sum(1).cpu() - 1
    return output.logits.cpu()[last], read[0].float().cpu()[last]


def distill_aligner(old: Side, new: Side, text: PortText, settings: PortSettings, report: Report) -> None:
    """Train the new aligner in place on the old one's next-token distribution over the answers, both at strength 1."""

    def loss_of(some: Sequence[int]) -> Tensor:
        total, n_tokens = _divergence(old, new, text, some)
        return total / n_tokens

    def metric_of() -> float:
        return -mean_divergence(old, new, text, text.choosing)

    answers = [float(len(ids) - start) for ids, start in zip(text.new.ids, text.new.answer_starts, strict=True)]
    _train(new, text, _Objective(loss_of, metric_of, answers[: text.n_learnt]), settings, report)


@torch.no_grad()
def mean_divergence(old: Side, new: Side, text: PortText, rows: range) -> float:
    """KL(old || new) in nats a token, mean over the answers of some rows."""
    parts = [_divergence(old, new, text, some) for some in chunks(rows)]
    return float(sum(total for total, _ in parts)) / sum(n_tokens for _, n_tokens in parts)


def _divergence(old: Side, new: Side, text: PortText, some: Sequence[int]) -> tuple[Tensor, int]:
    """KL(old || new), summed over the answers of some rows, and their number of tokens."""
    mask = answer_mask(text.old, old.batch(some))[:, 1:]
    with torch.no_grad():
        wanted = _log_distribution(old, some)[mask]
    return F.kl_div(_log_distribution(new, some)[mask], wanted, log_target=True, reduction="sum"), len(wanted)


def _log_distribution(side: Side, rows: Sequence[int]) -> Tensor:
    """Log-probabilities (B, T - 1, V) of every token but the first, with the side's aligner at strength 1."""
    source = StoredTaps(side.store, side.adapter)
    return F.log_softmax(answer_logits(side.base, source, side.batch(rows))[:, :-1].float(), dim=-1)


def _train(side: Side, text: PortText, objective: _Objective, settings: PortSettings, report: Report) -> None:
    """Train a side's adapter; it ends with the weights of its best epoch."""
    training = TrainingSection(
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        checkpoint_seconds=1e9,
    )
    loop = Loop(
        side.adapter,
        text.new.lengths[: text.n_learnt],
        objective.loss_of,
        objective.metric_of,
        training,
        weights=objective.weights,
        seed=settings.seed,
        report=report,
    )
    loop.run()


def chunks(rows: range) -> Iterator[range]:
    """Consecutive runs of rows that fit one forward pass."""
    for start in range(rows.start, rows.stop, _CHUNK):
        yield range(start, min(start + _CHUNK, rows.stop))
