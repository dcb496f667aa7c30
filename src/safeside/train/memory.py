"""How much memory a run takes."""

from __future__ import annotations

import resource
import sys
import threading
from pathlib import Path
from typing import Self

import torch

_STATUS = Path("/proc/self/status")
_SECONDS = 0.02  # between two samples


class PeakMemory:
    """Most memory inside a ``with`` block, what was held at its start (the base, say) included.

    On CUDA it is what torch had allocated on ``device``.  On Linux it is the process's anonymous resident memory,
    sampled every 20 ms: files that are only mapped, such as stored taps, do not count, and what was freed before the
    block does not either.  Other systems tell only the most that was ever resident, mapped files included.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.n_bytes = 0
        """Most bytes seen so far."""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample_until_stopped, daemon=True)

    @property
    def measure(self) -> str:
        """What ``n_bytes`` counts."""
        if self.device.type == "cuda":
            return "allocated on the accelerator"
        return "anonymous memory" if _STATUS.is_file() else "most ever resident, mapped files included"

    def __enter__(self) -> Self:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            self.sample()
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._thread.is_alive():
            self._stop.set()
            self._thread.join()
        self.sample()

    def sample(self) -> None:
        """Look once more."""
        self.n_bytes = max(self.n_bytes, self._now())

    def _now(self) -> int:
        if self.device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self.device))
        if _STATUS.is_file():
            return anonymous_bytes()
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else most * 1024

    def _sample_until_stopped(self) -> None:
        while not self._stop.wait(_SECONDS):
            self.sample()


def anonymous_bytes() -> int:
    """Resident memory of this process that no file is behind; Linux only."""
    lines = _STATUS.read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:")) * 1024
