"""A guard that can fail without taking the pass with it: its scores are then not a number, which fails closed."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from safeside.adapters.adapter import Adapter, SideOutput
from safeside.base.taps import SideCache, Tape
from safeside.serve.batch import fill

Failure = Literal["error", "nan", "timeout"]
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Watch:
    """What is told of every pass of every guard."""

    timeout_s: float
    """Seconds of one pass from which on a guard's scores are too late."""
    spent: Callable[[str, float], None] = lambda guard, seconds: None
    """Told the guard and its seconds in one pass."""
    failed: Callable[[str, Failure], None] = lambda guard, failure: None
    """Told the guard, and why its scores cannot be used."""


class WatchedGuard(Adapter):
    """A guard with the weights of another; one that raises or is late has NaN for every score of the pass."""

    def __init__(self, guard: Adapter, watch: Watch) -> None:
        super().__init__(guard.config)
        self.trunk, self.head = guard.trunk, guard.head
        self.watch = watch
        self.eval()

    def read(self, tape: Tape, layer: int, hidden: Tensor) -> None:
        """Take what the trunk needs; an error is kept on the tape for when it is judged."""
        try:
            super().read(tape, layer, hidden)
        except Exception as error:  # whatever a guard does wrong, the pass goes on without it
            tape.failure = type(error).__name__

    def forward(self, tape: Tape, cache: SideCache | None = None) -> SideOutput:
        """The guard's scores (B, T, K), or NaN."""
        started = time.perf_counter()
        problem = tape.failure
        failure: Failure | None = None
        if not problem:
            try:
                output = super().forward(tape, cache)
            except Exception as error:  # as above
                problem = type(error).__name__
        if problem:
            _log.error("guard %s failed: %s", self.name, problem)
            failure, output = "error", self._unscored(tape)
        if cache is not None and failure is not None:
            self._fill(cache, tape.keep.shape[1])
        scores = output.scores if failure is None else None
        # Asking waits for an accelerator, whose time would not be counted otherwise.
        is_finite = scores is None or bool(scores[tape.keep_new].isfinite().all())
        seconds = time.perf_counter() - started
        self.watch.spent(self.name, seconds)
        if failure is None and seconds > self.watch.timeout_s:
            failure, output = "timeout", self._unscored(tape)
        elif not is_finite:
            failure = "nan"
        if failure is not None:
            self.watch.failed(self.name, failure)
        return output

    def _unscored(self, tape: Tape) -> SideOutput:
        missing = torch.full((*tape.keep_new.shape, len(self.config.labels)), torch.nan, device=tape.keep.device)
        return SideOutput(logits=missing, scores=missing)

    def _fill(self, cache: SideCache, length: int) -> None:
        """Bring layers that the failed pass did not write to the others' length, so that later passes can run."""
        for layer in cache.cache.layers[cache.offset : cache.offset + self.n_cache_layers]:
            fill(layer, length)
