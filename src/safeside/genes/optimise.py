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
    rate_name: str = "learning_rate"
    """What messages call the setting of the rate."""


def optimise(parameters: Sequence[nn.Parameter], loss_of: Callable[[int], Tensor], steps: Steps) -> float:
    """Lower ``loss_of``, which is asked for each step's loss in turn; returns the mean of the last tenth.

    Gradients reach ``parameters`` alone, whatever else could have one.  A loss or a parameter that is not finite is a
    NotFiniteError.
    """
    optimizer = torch.optim.AdamW(parameters, lr=steps.learning_rate, weight_decay=0.0)
    losses = []
    for step in range(steps.n_steps):
        for group in optimizer.param_groups:
            group["lr"] = steps.learning_rate * _share_of_rate((step + 1) / steps.n_steps)
        loss = loss_of(step)
        if not loss.isfinite():
            raise diverged(f"the loss is {float(loss.detach())} at step {step}; expected a finite one", steps)
        loss.backward(inputs=parameters)  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, _GRADIENT_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
        steps.report(step + 1, steps.n_steps)
    if not all(parameter.isfinite().all() for parameter in parameters):
        raise diverged("what is learnt holds NaN or infinity at the end; expected finite numbers", steps)
    last = losses[-max(1, len(losses) // 10) :]
    return sum(last) / len(last)


def diverged(what: str, steps: Steps) -> NotFiniteError:
    """The error of steps that went too far: ``what`` was wrong and expected, and the setting to lower."""
    return NotFiniteError(f"Learning diverged: {what}. Lower {steps.rate_name}, which is {steps.learning_rate:g}.")


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
