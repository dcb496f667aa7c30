"""The training loop: any module, any source of batches, deterministic, resumable.

The order of rows is a function of seed and epoch alone, so a run that was killed goes on from its last checkpoint
to the same weights as one that was not.  Under ``torchrun`` (or ``accelerate launch``) every process takes its share of
each batch and gradients are added up, so the weights are those of one process.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from torch import Tensor, nn

from safeside.errors import ConfigError, NotFiniteError
from safeside.provenance import config_hash
from safeside.train.memory import PeakMemory
from safeside.train.recipe import TrainingSection

CHECKPOINT = "checkpoint.pt"
_BUCKET = 32  # batches sorted by length together: little padding, yet a shuffled order


@dataclass(frozen=True, slots=True)
class Progress:
    """Told after every optimiser step and every evaluation."""

    step: int
    """Optimiser steps so far."""
    n_steps: int
    """Most steps that the run can take."""
    epoch: int
    """Finished epochs."""
    loss: float
    """Loss of the step; NaN after an evaluation."""
    metric: float
    """After an evaluation its figure, else the best so far."""


@dataclass(slots=True)
class Outcome:
    """How a run ended.  The module holds the weights of its best evaluation."""

    best_metric: float
    """The best validation figure, higher is better."""
    epochs: int
    """Epochs that were run."""
    steps: int
    """Optimiser steps that were run."""
    train_seconds: float
    """Wall-clock seconds of the loop; the pass that stores the base's states is not in it."""
    peak_bytes: int
    """Most memory during the loop, base included: see ``safeside.train.memory``."""
    trainable_params: int
    """Parameters that were trained."""
    peak_measure: str = ""
    """What ``peak_bytes`` counts on this machine."""
    history: list[float] = field(default_factory=list)
    """The validation figure after every epoch."""


@dataclass(slots=True)
class _State:
    epoch: int = 0
    step_in_epoch: int = 0
    step: int = 0
    best_metric: float = -math.inf
    best_epoch: int = 0
    seconds: float = 0.0
    history: list[float] = field(default_factory=list)


class Loop:
    """Trains ``module`` on ``n_rows`` rows.

    ``loss_of(rows)`` gives the loss of some rows and ``metric_of()`` a figure to maximise on validation data, asked
    after every epoch; training stops when it has not risen for ``patience`` epochs.  Where a loss is a mean over more
    than rows, ``weights`` says how much of it each row is (its answer's tokens): then the gradient of a step is the
    same however it is split into batches and processes.  ``identity`` names the data: a checkpoint of another run is
    refused.
    """

    def __init__(
        self,
        module: nn.Module,
        lengths: Sequence[int],
        loss_of: Callable[[Sequence[int]], Tensor],
        metric_of: Callable[[], float],
        settings: TrainingSection,
        *,
        weights: Sequence[float] | None = None,
        seed: int = 0,
        identity: str = "",
        folder: Path | None = None,
        report: Callable[[Progress], None] = lambda progress: None,
    ) -> None:
        self.module, self.lengths = module, lengths
        self.loss_of, self.metric_of = loss_of, metric_of
        self.weights = [1.0] * len(lengths) if weights is None else weights
        self.settings, self.seed, self.folder, self.report = settings, seed, folder, report
        self.parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self.device = self.parameters[0].device
        self.processes = processes_on(self.device)
        shapes = [tuple(parameter.shape) for parameter in self.parameters]
        same = settings.model_dump(exclude={"checkpoint_seconds"})
        self.identity = config_hash([same, seed, identity, list(lengths), shapes])
        decayed = [parameter for parameter in self.parameters if parameter.ndim >= 2]
        other = [parameter for parameter in self.parameters if parameter.ndim < 2]
        groups = [
            {"params": decayed, "weight_decay": settings.weight_decay},
            {"params": other, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.98))
        self.state = _State()
        self.best = self._weights()
        self.last_saved = 0.0

    @property
    def rows_per_step(self) -> int:
        return self.settings.batch_size * self.settings.accumulation

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(len(self.lengths) / self.rows_per_step)

    def run(self, resume: bool = False) -> Outcome:
        """Train to the end, or go on from the folder's checkpoint with ``resume``."""
        if resume:
            self._load_checkpoint()
        started, before = time.perf_counter(), self.state.seconds
        self.last_saved = started
        with PeakMemory(self.device) as memory:
            while self.state.epoch < self.settings.epochs and not self._has_stalled():
                self._run_epoch(started, before)
        self.state.seconds = before + time.perf_counter() - started
        self.module.load_state_dict(self.best)
        return Outcome(
            best_metric=self.state.best_metric,
            epochs=self.state.epoch,
            steps=self.state.step,
            train_seconds=self.state.seconds,
            peak_bytes=memory.n_bytes,
            trainable_params=sum(parameter.numel() for parameter in self.parameters),
            peak_measure=memory.measure,
            history=self.state.history,
        )

    def _run_epoch(self, started: float, before: float) -> None:
        state = self.state
        self.module.train()
        for index, rows in enumerate(self._steps(state.epoch)):
            if index < state.step_in_epoch:
                continue
            loss = self._step(rows)
            state.step += 1
            state.step_in_epoch = index + 1
            state.seconds = before + time.perf_counter() - started
            self.report(Progress(state.step, self._n_steps, state.epoch, loss, state.best_metric))
            if time.perf_counter() - self.last_saved >= self.settings.checkpoint_seconds:
                self._save_checkpoint()
        self.module.eval()
        with torch.no_grad():
            metric = self.metric_of()
        if not math.isfinite(metric):
            raise NotFiniteError(
                f"The validation figure is {metric} after epoch {state.epoch}; lower the learning rate."
            )
        state.history.append(metric)
        state.epoch, state.step_in_epoch = state.epoch + 1, 0
        if metric > state.best_metric:
            state.best_metric, state.best_epoch = metric, state.epoch
            self.best = self._weights()
        self._save_checkpoint()
        self.report(Progress(state.step, self._n_steps, state.epoch, float("nan"), metric))

    def _step(self, rows: Sequence[int]) -> float:
        """One optimiser step over ``rows``; returns their mean loss."""
        size, total = self.settings.batch_size, torch.zeros((), device=self.device)
        self._set_learning_rate()
        weight = sum(self.weights[row] for row in rows)
        for start in range(0, len(rows), size):
            mine = rows[start : start + size][self.processes.process_index :: self.processes.num_processes]
            if not mine:
                continue
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.precision == "bfloat16"):
                loss = self.loss_of(mine)
            if not loss.isfinite():
                found = float(loss.detach())
                raise NotFiniteError(f"The loss is {found} at step {self.state.step}; lower the learning rate.")
            share = loss * (sum(self.weights[row] for row in mine) / weight)
            share.backward()  # type: ignore[no-untyped-call]
            total += share.detach()
        if self.processes.num_processes > 1:
            total = self._add_up(total)
        torch.nn.utils.clip_grad_norm_(self.parameters, self.settings.max_gradient_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(total)

    def _add_up(self, total: Tensor) -> Tensor:
        """Sum of the loss over all processes, and of every gradient in place, in one message."""
        gradients = [
            torch.zeros_like(parameter) if parameter.grad is None else parameter.grad for parameter in self.parameters
        ]
        flat = reduce(torch.cat([total[None], *(gradient.flatten() for gradient in gradients)]), "sum")
        sums: tuple[Tensor, ...] = flat.split([1, *(gradient.numel() for gradient in gradients)])
        for parameter, gradient in zip(self.parameters, sums[1:], strict=True):
            parameter.grad = gradient.view_as(parameter)
        return sums[0][0]

    def _steps(self, epoch: int) -> Iterator[list[int]]:
        """The rows of each optimiser step of an epoch: shuffled by seed and epoch, rows of like length together."""
        generator = torch.Generator().manual_seed(self.seed * 100_003 + epoch)
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        span = self.rows_per_step * _BUCKET
        sorted_rows = [
            row
            for start in range(0, len(order), span)
            for row in sorted(order[start : start + span], key=lambda row: self.lengths[row])
        ]
        steps = [sorted_rows[start : start + self.rows_per_step] for start in range(0, len(order), self.rows_per_step)]
        for index in torch.randperm(len(steps), generator=generator).tolist():
            yield steps[index]

    @property
    def _n_steps(self) -> int:
        return self.settings.epochs * self.steps_per_epoch

    def _set_learning_rate(self) -> None:
        """Linear warm-up, then cosine to a tenth."""
        progress = (self.state.step + 1) / self._n_steps
        warmup = self.settings.warmup
        scale = progress / warmup if progress < warmup else 0.55 + 0.45 * math.cos(math.pi * progress)
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.learning_rate * scale

    def _has_stalled(self) -> bool:
        return self.state.epoch - self.state.best_epoch >= self.settings.patience and self.state.epoch > 0

    def _weights(self) -> dict[str, Tensor]:
        return {name: tensor.detach().clone() for name, tensor in self.module.state_dict().items()}

    def _save_checkpoint(self) -> None:
        self.last_saved = time.perf_counter()
        if self.folder is None or not self.processes.is_main_process:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        content = {
            "module": self._weights(),
            "best": self.best,
            "optimizer": self.optimizer.state_dict(),
            "state": asdict(self.state),
            "identity": self.identity,
        }
        temporary = self.folder / (CHECKPOINT + ".new")
        torch.save(content, temporary)
        temporary.replace(self.folder / CHECKPOINT)  # a kill leaves the old one or the new one, never half of one

    def _load_checkpoint(self) -> None:
        if self.folder is None or not (self.folder / CHECKPOINT).is_file():
            return
        content = torch.load(self.folder / CHECKPOINT, map_location=self.device, weights_only=True)
        if content["identity"] != self.identity:
            raise ConfigError(
                f"{self.folder / CHECKPOINT} was made by another run: other settings, rows, adapter or seed. Resume "
                "with the same recipe and data, or start anew without --resume."
            )
        self.module.load_state_dict(content["module"])
        self.best = content["best"]
        self.optimizer.load_state_dict(content["optimizer"])
        self.state = _State(**content["state"])


def processes_on(device: torch.device) -> PartialState:
    """The processes of this run: one, or those that ``torchrun`` or ``accelerate launch`` started."""
    return PartialState(cpu=device.type == "cpu")
