"""The loop that genes and their baselines are learnt by: a fixed number of steps over a few hundred rows."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from safeside.errors import NotFiniteError

_WARM_UP = 0.1  # share of the steps
_GRADIENT_NORM = 1.0  # gradients are clipped to it
Report = Callable[[int, int], None]
"""Told how many of how many steps are done."""


def silent(step: int, n_steps: int) -> None:
    """Report nothing."""


@dataclass(frozen=True, slots=True)
class Steps:
    """How long and how fast to learn."""

    n_steps: int
    """Of AdamW, without decay."""
    learning_rate: float
    """Peak: linear warm-up, then cosine to a tenth."""
    report: Report = silent
    """Told of every step."""


def optimise(parameters: Sequence[nn.Parameter], loss_of: Callable[[int], Tensor], steps: Steps) -> float:
    """Lower ``loss_of``, which is asked for each step's loss in turn; returns the mean of the last tenth.

    A loss that is not finite is a NotFiniteError.
    """
    optimizer = torch.optim.AdamW(parameters, lr=steps.learning_rate, weight_decay=0.0)
    losses = []
    for step in range(steps.n_steps):
        for group in optimizer.param_groups:
            group["lr"] = steps.learning_rate * _share_of_rate((step + 1) / steps.n_steps)
        loss = loss_of(step)
        if not loss.isfinite():
            raise NotFiniteError(f"The loss is {float(loss.detach())} at step {step}; lower the learning rate.")
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, _GRADIENT_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
        steps.report(step + 1, steps.n_steps)
    last = losses[-max(1, len(losses) // 10) :]
    return sum(last) / len(last)


def _share_of_rate(progress: float) -> float:
    return progress / _WARM_UP if progress < _WARM_UP else 0.55 + 0.45 * math.cos(math.pi * progress)


def draws(n_rows: int, size: int, seed: int) -> Iterator[list[int]]:
    """Rows of one step after the other, without end: all rows are drawn once before any is drawn again."""
    generator, waiting = random.Random(seed), list[int]()
    while True:
        step: list[int] = []
        while len(step) < min(size, n_rows):
            waiting = waiting or generator.sample(range(n_rows), n_rows)
            step.append(waiting.pop())
        yield step
