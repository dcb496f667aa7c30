"""Runs jobs in this process or in a pool of processes, each with its own number of threads."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Self, TypeVar

import torch

Job = TypeVar("Job")
Outcome = TypeVar("Outcome")


class Workers:
    """``with Workers(2, 1) as workers`` has two processes of one thread; one worker is this process itself."""

    def __init__(self, n_workers: int, n_threads: int) -> None:
        self.n_workers, self.n_threads = n_workers, n_threads
        self.pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Self:
        torch.set_num_threads(self.n_threads)
        if self.n_workers > 1:
            os.environ["OMP_NUM_THREADS"] = str(self.n_threads)  # read by libraries as the processes start
            self.pool = ProcessPoolExecutor(
                self.n_workers, multiprocessing.get_context("spawn"), _start, (os.getpid(), self.n_threads)
            )
        return self

    def __exit__(self, *error: object) -> None:
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)

    def run(self, function: Callable[[Job], Outcome], jobs: Sequence[Job]) -> Iterator[tuple[Job, Outcome]]:
        """Each job with its outcome, in the order in which they finish."""
        if self.pool is None:
            for job in jobs:
                yield job, function(job)
            return
        futures = {self.pool.submit(function, job): job for job in jobs}
        for future in as_completed(futures):
            yield futures[future], future.result()


def numbers_alone(script: Path, job: Mapping[str, object]) -> list[int]:
    """What ``script --peak JOB`` prints in a process of its own, such as the most memory that it held."""
    command = [sys.executable, str(script), "--peak", json.dumps(job)]
    return [int(line) for line in subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()]


def _start(parent: int, n_threads: int) -> None:
    torch.set_num_threads(n_threads)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    """A killed parent would leave its workers waiting for ever."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
