"""The next token of one row, drawn with a generator of its own."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

_COLDEST = 1e-30  # below it a difference of two logits over the temperature would be no float32


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the tokens of one answer are chosen, and what ends it."""

    max_tokens: int
    """Most tokens of the answer, 1 or more."""
    temperature: float = 1.0
    """0 takes the likeliest token."""
    top_p: float = 1.0
    """Share in (0, 1] of the probability, likeliest tokens first, that is drawn from."""
    seed: int | None = None
    """The same seed gives the same tokens; None: another one each time."""
    n_logprobs: int | None = None
    """Likeliest tokens to report beside each token, 0 for none but itself; None reports no logarithms at all."""
    stop: tuple[str, ...] = ()
    """Texts that end the answer before them."""


@dataclass(frozen=True, slots=True)
class Token:
    """One token of an answer."""

    id: int
    logprob: float = 0.0
    """Logarithm of its probability at temperature 1, base and aligners mixed; 0 where none was asked for."""
    likeliest: tuple[tuple[int, float], ...] = ()
    """The ids asked for with their logarithms, falling."""


class Sampler:
    """Draws the tokens of one row: other rows of the batch never touch its generator."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self._generator = torch.Generator()
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed)

    def draw(self, logits: Float[Tensor, " V"]) -> Token:
        """The next token of this row."""
        logits = logits.float().cpu()
        index = int(logits.argmax()) if self.sampling.temperature == 0 else self._drawn(logits)
        if self.sampling.n_logprobs is None:
            return Token(index)
        logprobs = logits.log_softmax(-1)
        values, ids = logprobs.topk(self.sampling.n_logprobs)
        likeliest = tuple(zip(ids.tolist(), values.tolist(), strict=True))
        return Token(index, float(logprobs[index]), likeliest)

    def _drawn(self, logits: Float[Tensor, " V"]) -> int:
        probabilities = ((logits - logits.max()) / max(self.sampling.temperature, _COLDEST)).softmax(-1)
        if self.sampling.top_p < 1:
            ordered, order = probabilities.sort(descending=True)
            before = ordered.cumsum(-1) - ordered
            probabilities = torch.zeros_like(probabilities).scatter(
                -1, order, torch.where(before < self.sampling.top_p, ordered, 0.0)
            )
        return int(torch.multinomial(probabilities, 1, generator=self._generator))
