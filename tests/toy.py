"""A toy task for the loop: a small network, rows of numbers, and a rule that it can learn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from safeside.train.loop import Loop, Progress
from safeside.train.recipe import TrainingSection

N_ROWS = 90
SETTINGS = TrainingSection(epochs=3, batch_size=8, learning_rate=0.02, patience=3, checkpoint_seconds=0)


class Toy:
    """A module, its loss on some rows and its accuracy on all; ``losses`` counts how often each row was seen."""

    def __init__(self, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.module = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1))
        generator = torch.Generator().manual_seed(5)
        self.inputs = torch.randn(N_ROWS, 6, generator=generator)
        self.labels = (self.inputs[:, 0] * self.inputs[:, 1] > 0).float()
        self.lengths = torch.randint(1, 30, (N_ROWS,), generator=generator).tolist()
        self.seen: list[list[int]] = []

    def loss_of(self, rows: Sequence[int]) -> Tensor:
        self.seen.append(list(rows))
        chosen = list(rows)
        logits = self.module(self.inputs[chosen])[:, 0]
        return F.binary_cross_entropy_with_logits(logits.float(), self.labels[chosen])

    def metric_of(self) -> float:
        return float(((self.module(self.inputs)[:, 0] > 0) == (self.labels > 0)).float().mean())

    def loop(
        self,
        settings: TrainingSection = SETTINGS,
        folder: Path | None = None,
        report: Callable[[Progress], None] = lambda progress: None,
        **options: object,
    ) -> Loop:
        return Loop(
            self.module,
            self.lengths,
            options.pop("loss_of", self.loss_of),
            options.pop("metric_of", self.metric_of),
            settings,
            folder=folder,
            report=report,
            **options,
        )

    def weights(self) -> Tensor:
        return torch.cat([parameter.detach().flatten() for parameter in self.module.parameters()])
