"""What an aligner learns: answers, or preferences, and to stay the base on harmless prompts.

The base is frozen, so the model at strength 0 is the reference of DPO and of the divergence: its final state comes from
the very pass that the aligner reads.  There is one pass of the base for each batch, and none where states are stored.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from safeside.base.model import Base
from safeside.base.token_scores import token_divergences, token_log_probs
from safeside.errors import ConfigError
from safeside.train.losses import dpo_losses
from safeside.train.recipe import TrainingSection
from safeside.train.rows import Rows
from safeside.train.taps import Batch, Forward, Source, make_batch

_EVALUATED = 32  # rows of one batch when the loss of a whole set is taken


def answer_starts(rows: Rows, batch: Batch) -> Tensor:
    """(B,), the index of each row's first answer token, where the batch is."""
    return torch.tensor([rows.answer_starts[row] for row in batch.rows], device=batch.ids.device)


def answer_mask(rows: Rows, batch: Batch) -> Tensor:
    """(B, T), True at the tokens of each row's answer."""
    places = torch.arange(batch.ids.shape[1], device=batch.ids.device)
    return batch.keep & (places >= answer_starts(rows, batch)[:, None])


def mixed_states(base: Base, forward: Forward) -> Tensor:
    """Final states (B, T, D) of the base with the aligner at strength 1."""
    assert forward.base_state is not None
    assert forward.output.delta is not None
    return (forward.base_state.float() + forward.output.delta.float()).to(base.dtype)


def answer_logits(base: Base, source: Source, batch: Batch) -> Tensor:
    """Next-token logits (B, T, V) of the base with the source's aligner at strength 1."""
    return base.head_logits(mixed_states(base, source(batch)))


class AlignmentLoss:
    """The loss of training rows (numbers 0 to n - 1) and of benign rows behind them (n to n + m - 1).

    ``sft``: a mean over tokens, of minus the log-probability of the answer's, and on benign rows of ``kl_weight`` times
    ``KL(p_base || p)``.  ``dpo``: a mean over rows, of the pair's loss and ``sft_weight`` times the chosen answer's
    mean over tokens, and on benign rows of ``kl_weight`` times the mean divergence of its tokens.  A benign row's
    tokens are those of its answer, or without one the answer's first.
    """

    def __init__(self, base: Base, source: Source, rows: Rows, training: TrainingSection) -> None:
        self.base, self.source, self.rows, self.training = base, source, rows, training
        self.is_dpo = training.objective == "dpo"
        self._check()
        self.n_learnt = len(rows.ids)
        parts = rows.parts
        self.starts = [start for part in parts for start in part.answer_starts]
        self.texts = rows.texts
        self.first_benign = len(self.texts) - (len(rows.benign.ids) if rows.benign else 0)
        pairs = zip(self.texts, self.starts, strict=True)
        self.n_read = [max(1, len(text) - start) for text, start in pairs]

    def _check(self) -> None:
        rows = self.rows
        for part in (rows, rows.rejected):
            if part and any(start >= length for start, length in zip(part.answer_starts, part.lengths, strict=True)):
                raise ConfigError(
                    "An aligner learns from answers: every row needs 'prompt' and 'response'. Check the data."
                )
        if self.is_dpo and rows.rejected is None:
            raise ConfigError(
                "objective = 'dpo' learns from preferences: every row needs 'prompt', 'chosen' and 'rejected'. Check "
                "the data, or set objective = 'sft'."
            )

    @property
    def name(self) -> str:
        """What ``metric`` measures."""
        plain = "negative DPO loss" if self.is_dpo else "negative answer loss (nats)"
        return plain if self.rows.benign is None else f"{plain}, divergence included"

    @property
    def weights(self) -> list[float]:
        """How much of the mean each row is."""
        benign = self.n_read[self.first_benign :]
        if self.is_dpo:
            return [1.0] * (self.n_learnt + len(benign))
        return [float(count) for count in (*self.n_read[: self.n_learnt], *benign)]

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row; of a pair those of the longer text."""
        own = self.rows.lengths
        if self.is_dpo and self.rows.rejected is not None:
            own = [max(pair) for pair in zip(own, self.rows.rejected.lengths, strict=True)]
        return [*own, *(self.rows.benign.lengths if self.rows.benign else [])]

    def __call__(self, some: Sequence[int]) -> Tensor:
        """The loss of some rows, as their weighted mean; one pass of the base at most."""
        learnt = [row for row in some if row < self.n_learnt]
        benign = [row - self.n_learnt + self.first_benign for row in some if row >= self.n_learnt]
        rejected = [row + self.n_learnt for row in learnt] if self.is_dpo else []
        groups = [len(learnt), len(rejected), len(benign)]
        batch = make_batch(self.base, self.texts, [*learnt, *rejected, *benign])
        forward = self.source(batch)
        assert forward.base_state is not None
        row, place = self._read_at(batch).nonzero(as_tuple=True)
        states, reference = mixed_states(self.base, forward)[row, place], forward.base_state[row, place]
        is_learnt = row < groups[0] + groups[1]
        targets = batch.ids[row[is_learnt], place[is_learnt] + 1]
        found = token_log_probs(self.base, states[is_learnt], targets)
        total = found.new_zeros(())
        if self.is_dpo:
            with torch.no_grad():
                found_by_base = token_log_probs(self.base, reference[is_learnt], targets)
            ratios = found.new_zeros(len(batch.rows)).index_add(0, row[is_learnt], found - found_by_base)
            chosen, worse, _ = torch.split(ratios, groups)
            total = total + dpo_losses(chosen, worse, self.training.beta).sum()
            if self.training.sft_weight:
                total = total - self.training.sft_weight * self._means(batch, row[is_learnt], found)[: groups[0]].sum()
        else:
            total = total - found.sum()
        if benign:
            total = total + self.training.kl_weight * self._divergence(batch, row, states, reference, is_learnt)
        weights = self.weights
        return total / sum(weights[row] for row in some)

    def _divergence(self, batch: Batch, row: Tensor, states: Tensor, reference: Tensor, is_learnt: Tensor) -> Tensor:
        """Summed over the tokens of the benign rows, or in ``dpo`` over the rows' means."""
        divergences = token_divergences(self.base, reference[~is_learnt], states[~is_learnt])
        return self._means(batch, row[~is_learnt], divergences).sum() if self.is_dpo else divergences.sum()

    def _means(self, batch: Batch, row: Tensor, values: Tensor) -> Float[Tensor, " B"]:
        """The mean over its tokens of each row of the batch; ``row`` says which row each value is of."""
        counts = torch.tensor([self.n_read[text] for text in batch.rows], device=row.device)
        return values.new_zeros(len(batch.rows)).index_add(0, row, values / counts[row])

    def _read_at(self, batch: Batch) -> Bool[Tensor, "B T"]:
        """The places whose state predicts a token of the answer; the last one of a row without answer."""
        places = torch.arange(batch.ids.shape[1], device=batch.ids.device)
        starts = torch.tensor([self.starts[text] for text in batch.rows], device=batch.ids.device)[:, None]
        lengths = batch.keep.sum(1, keepdim=True)
        return (places >= starts - 1) & (places < torch.maximum(lengths - 1, starts))

    def metric(self) -> float:
        """Minus the loss of all rows."""
        weights = self.weights
        order = sorted(range(len(weights)), key=self.lengths.__getitem__)
        total = 0.0
        with torch.no_grad():
            for start in range(0, len(order), _EVALUATED):
                some = order[start : start + _EVALUATED]
                total += float(self(some)) * sum(weights[row] for row in some)
        return -total / sum(weights)
