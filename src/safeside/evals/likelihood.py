"""How likely known answers are: what is left of a base's usefulness when something steers it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from safeside.base.model import Base
from safeside.chat import pad_batch
from safeside.errors import InputError
from safeside.evals.metrics import N_RESAMPLES, Figure
from safeside.types import Message

_TOKENS_AT_ONCE = 256  # logits of so many tokens are held at once

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Likelihood:
    """Of one answer."""

    nll: float
    """Negative log-likelihood in nats, summed over the answer's tokens and what the template puts after them."""
    n_tokens: int
    """How many those are."""


@dataclass(frozen=True, slots=True)
class Known:
    """One known answer: its tokens, and the states that predict them."""

    states: Float[Tensor, "N D"]
    """Final normed state before each token."""
    targets: Int[Tensor, " N"]
    """The answer's tokens and what the template puts after them."""


def likelihoods(base: Base, conversations: Sequence[Sequence[Message]]) -> list[Likelihood]:
    """Of the answers that end each conversation, under whatever is attached; one batch.

    A latched gate reads the prompt's end, as when the base answers.  A conversation without an answer, or longer than
    the base's context, is an InputError.
    """
    return [_likelihood(base, known) for known in known_answers(base, conversations)]


@torch.no_grad()
def known_answers(base: Base, conversations: Sequence[Sequence[Message]]) -> list[Known]:
    """The states behind ``likelihoods``: one pass of the base over all conversations, under whatever is attached."""
    encoded = [base.encode(messages) for messages in conversations]
    for item in encoded:
        if item.answer_start >= len(item.ids):
            raise InputError("A conversation ends with no answer; expected the one whose likelihood is taken.")
        if len(item.ids) > base.max_tokens:
            raise InputError(
                f"Prompt and answer have {len(item.ids)} tokens, but {base.name} holds {base.max_tokens}; expected no "
                "more. Nothing is cut."
            )
    ids, keep = pad_batch([item.ids for item in encoded], 0, side="right")
    ids, keep = ids.to(base.device), keep.to(base.device)
    starts = [item.answer_start for item in encoded]
    with base.attachment.request(prompt_end=starts) if base.attachment else nullcontext():
        states = base.decoder(input_ids=ids, attention_mask=keep, use_cache=False).last_hidden_state  # (B, T, D)
    return [
        Known(states[row, start - 1 : len(item.ids) - 1], ids[row, start : len(item.ids)])
        for row, (item, start) in enumerate(zip(encoded, starts, strict=True))
    ]


@torch.no_grad()
def _likelihood(base: Base, known: Known) -> Likelihood:
    total = 0.0
    for start in range(0, len(known.targets), _TOKENS_AT_ONCE):
        part = slice(start, start + _TOKENS_AT_ONCE)
        logits = base.head_logits(known.states[None, part])[0].float()
        total -= float(logits.log_softmax(-1).gather(-1, known.targets[part, None]).double().sum())
    return Likelihood(total, len(known.targets))


def utility(base: Sequence[Likelihood], method: Sequence[Likelihood]) -> Figure:
    """``exp(NLL of the base - NLL of the method)`` per token of the same answers, in order; 1 is the base.

    The interval resamples answers, of both sides together.
    """
    if not base or [item.n_tokens for item in base] != [item.n_tokens for item in method]:
        raise InputError(
            f"{len(base)} and {len(method)} likelihoods that are not of the same answers; expected one each, in order."
        )
    gains = np.array([one.nll - other.nll for one, other in zip(base, method, strict=True)])
    tokens = np.array([item.n_tokens for item in base], dtype=np.float64)
    drawn = np.random.default_rng(0).multinomial(len(base), np.full(len(base), 1 / len(base)), size=N_RESAMPLES)
    resampled = np.exp((drawn @ gains) / (drawn @ tokens))
    low, high = np.quantile(resampled, (0.025, 0.975))
    return Figure(float(np.exp(gains.sum() / tokens.sum())), float(low), float(high))
