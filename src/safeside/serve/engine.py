"""The engine: one base in memory, one thread that steps all answers together, and a bounded queue before it."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch

from safeside.adapters.adapter import Adapter
from safeside.base.model import Base
from safeside.errors import DeadlineError, LimitError, ServingError
from safeside.serve.batch import Rows, joined, selected
from safeside.serve.metrics import Metrics
from safeside.serve.passes import Pass, Runner, Scores
from safeside.serve.row import Failed, Job, Row
from safeside.serve.task import Answer, Task
from safeside.serve.watch import Watch, WatchedGuard

_LAST_PASS_S = 10.0  # that a pass may take after the engine's end before its thread is left behind
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """How much the engine takes on."""

    max_rows: int = 32
    """Answers that are written at the same time."""
    max_waiting: int = 64
    """Requests that wait for a place; one more is refused."""
    prefill_tokens: int = 4096
    """Tokens of prompts that one pass reads, padding included, so that answers in progress do not wait for long."""
    judged_tokens: int = 1024
    """Tokens of texts to judge that one call reads between two steps, padding included; one window may be longer."""
    guard_timeout_s: float = 10.0
    """Seconds of one pass from which on a guard's scores are too late."""
    judge_every: int = 1
    """Tokens of an answer that guards judge together."""
    threads: int | None = None
    """Threads that a pass computes with on CPUs; torch's own number unless given.  In a process where other threads
    compute with several as well OpenMP puts idle ones to sleep between operations, and decoding takes twice as long."""


def overdue() -> DeadlineError:
    """What is told of an answer whose time is over."""
    return DeadlineError("The answer was not ready in time. Ask for fewer tokens, or later.")


def stopped() -> ServingError:
    """What is told of an answer that the server's end cut off."""
    return ServingError("The server was stopped before this answer was complete. Ask again.")


class Engine:
    """Answers jobs until it is closed.  Every method may be called from any thread."""

    def __init__(
        self,
        base: Base,
        adapters: Sequence[Adapter] = (),
        *,
        limits: EngineLimits = EngineLimits(),
        metrics: Metrics | None = None,
    ) -> None:
        self.base = base
        self.limits = limits
        self.metrics = metrics or Metrics()
        self._runner = self._made(adapters)
        self._stop_ids = base.stop_ids()
        self._wake = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._tasks: deque[Task[object]] = deque()
        self._n_held = 0  # places in the queue of work that is called in parts
        self._running: list[Row] = []
        self._rows: Rows | None = None
        self._ends_at = math.inf  # no answer goes on after this
        self._tasks_from = -math.inf  # while answers are written, the next task waits until then
        self._turn_began: float | None = None
        self._thread = threading.Thread(target=self._run, name="safeside-engine", daemon=True)
        self._thread.start()

    @property
    def adapters(self) -> dict[str, Adapter]:
        """The adapters in force by name."""
        return {adapter.name: adapter for adapter in (*self._runner.guards, *self._runner.aligners)}

    @property
    def n_running(self) -> int:
        """Answers that are being written."""
        return len(self._running)

    @property
    def n_waiting(self) -> int:
        """Requests that wait for a place, or hold one while they are worked on in parts."""
        return len(self._waiting) + self._n_held

    @property
    def n_cached_tokens(self) -> int:
        """Slots of the cache, padding included; 0 when no answer is being written."""
        rows = self._rows
        return rows.keep.numel() if rows is not None else 0

    @property
    def is_alive(self) -> bool:
        """Whether its thread runs, be it to end what was begun."""
        return self._thread.is_alive()

    @property
    def is_ready(self) -> bool:
        """Whether it takes jobs."""
        return self._thread.is_alive() and math.isinf(self._ends_at)

    @property
    def has_ended(self) -> bool:
        """Whether the time that answers had to end in is over, be its thread still in a pass."""
        return time.monotonic() > self._ends_at

    @property
    def turn_s(self) -> float:
        """Seconds since its thread began what it does now, which is at most one pass of each kind; 0 while idle."""
        began = self._turn_began
        return time.monotonic() - began if began is not None else 0.0

    def submit(self, job: Job) -> None:
        """Queue ``job``.  A full queue is a LimitError that says when to come back, a closed engine a ServingError."""
        with self._wake:
            self._refuse_full()
            self._waiting.append(job)
            self._wake.notify()

    @contextmanager
    def place(self) -> Iterator[None]:
        """Hold a place in the queue for work that is done by ``call`` in parts.  Errors as in ``submit``."""
        with self._wake:
            self._refuse_full()
            self._n_held += 1
        try:
            yield
        finally:
            with self._wake:
                self._n_held -= 1

    def call(self, run: Callable[[Runner], Answer], *, exclusive: bool = False) -> Future[Answer]:
        """Run a function of the runner between two passes, with ``exclusive`` once no answer is being written."""
        task = Task(lambda: run(self._runner), exclusive)
        with self._wake:
            self._refuse_closed()
            self._tasks.append(task)  # type: ignore[arg-type]
            self._wake.notify()
        return task.answer

    def change(self, adapters: Sequence[Adapter]) -> Future[None]:
        """Exchange all adapters, once the answers in progress have ended under those that they began with."""

        def swap(runner: Runner) -> None:
            runner.detach()
            try:
                self._runner = self._made(adapters)
            except Exception:  # whatever it was, the base is not left without its guards
                self._runner = Runner(self.base, runner.guards, runner.aligners, runner.judge_every)
                raise

        return self.call(swap, exclusive=True)

    def stop(self, drain_s: float) -> None:
        """Take no more jobs, and let the others go on for at most ``drain_s`` seconds from now."""
        with self._wake:
            self._ends_at = min(self._ends_at, time.monotonic() + drain_s)
            self._wake.notify()

    def close(self, drain_s: float = 0.0) -> None:
        """Stop, wait for the end and detach; a pass that goes on long after it is left behind, and logged."""
        self.stop(drain_s)
        self._thread.join(max(0.0, self._ends_at - time.monotonic()) + _LAST_PASS_S)
        if self._thread.is_alive():
            _log.error("a pass has taken %.0f s and is left behind", self.turn_s)

    def _made(self, adapters: Sequence[Adapter]) -> Runner:
        watch = Watch(
            self.limits.guard_timeout_s,
            lambda guard, seconds: self.metrics.guard_seconds.labels(guard).observe(seconds),
            lambda guard, failure: self.metrics.guard_failures.labels(guard, failure).inc(),
        )
        guards = [WatchedGuard(adapter, watch) for adapter in adapters if adapter.config.role == "guard"]
        aligners = [adapter for adapter in adapters if adapter.config.role == "align"]
        return Runner(self.base, guards, aligners, self.limits.judge_every)

    def _refuse_closed(self) -> None:
        if not self.is_ready:
            raise ServingError("The server is shutting down and takes no more requests. Ask another one.")

    def _refuse_full(self) -> None:
        self._refuse_closed()
        if self.n_waiting >= self.limits.max_waiting:
            wait_s = 1.0 + self.n_waiting / self.limits.max_rows
            raise LimitError(f"{self.n_waiting} requests wait already, the most there can be.", wait_s)

    @torch.no_grad()
    def _run(self) -> None:
        if self.limits.threads is not None:
            torch.set_num_threads(self.limits.threads)
        try:
            while self._wait():
                self._turn()
        finally:
            try:
                self._judge_running()
            finally:
                self._runner.detach()
                self._refuse_rest()

    def _turn(self) -> None:
        self._turn_began = time.monotonic()
        try:
            self._run_task()
            self._drop_gone()
            self._admit()
            self._step()
        except Exception as error:  # the edge of the server: whatever it was, the thread goes on
            self._fail_running(error)
        finally:
            self._turn_began = None

    def _wait(self) -> bool:
        """Sleep until there is something to do; whether the engine goes on."""
        with self._wake:
            while not (self._waiting or self._tasks or self._running):
                if not math.isinf(self._ends_at):
                    return False
                self._wake.wait()
        return time.monotonic() < self._ends_at

    def _run_task(self) -> None:
        """Run the next task, where it may; while answers are written they get as much time as tasks."""
        began = time.monotonic()
        with self._wake:
            if not self._tasks or (self._running and (self._tasks[0].is_exclusive or began < self._tasks_from)):
                return
            task = self._tasks.popleft()
        task.do()
        ended = time.monotonic()
        self._tasks_from = ended + (ended - began)

    def _drop_gone(self) -> None:
        """Let go of rows and waiting jobs that nobody listens to any more, or whose time is over."""
        over = [row for row in self._running if row.job.is_over]
        if over:  # harm that was sent before it was judged is found first
            self._judge_running()
            self._keep([row not in over or self._is_wanted(row.job) for row in self._running])
        with self._wake:
            self._waiting = deque(job for job in self._waiting if self._is_wanted(job))

    def _is_wanted(self, job: Job) -> bool:
        if job.cancelled.is_set():
            return False
        if job.is_overdue:
            job.listen(Failed(overdue()))
            return False
        return True

    def _is_served(self, job: Job) -> bool:
        """Whether the adapters that the job's policy was made for are still those in force; if not it is told."""
        heads = {guard.name: guard.head for guard in self._runner.guards}
        guards = job.policy.adapters
        is_same = all(name in guards and heads.get(name) is guards[name].head for name in job.policy.guards)
        if is_same and set(job.policy.aligners) <= {aligner.name for aligner in self._runner.aligners}:
            return True
        job.listen(Failed(ServingError("An adapter was exchanged while this request waited for it. Ask again.")))
        return False

    def _keep(self, stays: Sequence[bool]) -> None:
        """Go on with the rows for which ``stays`` is true."""
        if all(stays):
            return
        kept = [index for index, stay in enumerate(stays) if stay]
        self._running = [self._running[index] for index in kept]
        self._rows = selected(self._rows, kept) if kept and self._rows is not None else None

    def _admit(self) -> None:
        jobs = self._next_jobs()
        if jobs and not self._begin(jobs) and len(jobs) > 1:  # one of them must not fail the others
            for job in jobs:
                self._begin([job])

    def _next_jobs(self) -> list[Job]:
        """The jobs that one pass can begin with; none while an exclusive task waits."""
        jobs: list[Job] = []
        with self._wake:
            is_held = any(task.is_exclusive for task in self._tasks)
            while self._waiting and not is_held and len(self._running) + len(jobs) < self.limits.max_rows:
                longest = max(len(job.ids) for job in (*jobs, self._waiting[0]))
                if jobs and longest * (len(jobs) + 1) > self.limits.prefill_tokens:
                    break
                job = self._waiting.popleft()
                if self._is_served(job):
                    jobs.append(job)
            self.metrics.queue_depth.set(self.n_waiting)
        return jobs

    def _begin(self, jobs: Sequence[Job]) -> bool:
        """Read the prompts of ``jobs``; False where that failed and another try, each alone, may help."""
        try:
            self._judge_running()
            rows = [Row(job, self.base.tokenizer, self._stop_ids, self.limits.judge_every) for job in jobs]
            found = self._runner.prefill([job.ids for job in jobs], [row.setting for row in rows])
        except Exception as error:  # the edge of the server: no request may end the thread
            if len(jobs) == 1:
                self._fail(jobs, error)
            return False
        stays = [self._advance(row, row.begin, found, index) for index, row in enumerate(rows)]
        kept = [index for index, stay in enumerate(stays) if stay]
        if kept:
            self._running += [rows[index] for index in kept]  # from here on an error is theirs too
            begun = found.rows if all(stays) else selected(found.rows, kept)
            self._rows = begun if self._rows is None else joined(self._rows, begun)
        self.metrics.running.set(len(self._running))
        return True

    def _judge_running(self) -> None:
        """Let no token of the answers in progress wait any longer: before rows join, or are let go of."""
        if self._rows is None:
            return
        try:
            found = self._runner.judge(self._rows)
        except Exception as error:  # as above, and theirs alone: whoever joins has not been with them
            self._fail_running(error)
            return
        pairs = zip(self._running, found, strict=True)
        self._keep([self._tried(row, partial(row.hear, scores)) for row, scores in pairs])

    def _advance(self, row: Row, take: Callable[[Sequence[Scores]], bool], found: Pass, index: int) -> bool:
        """Give a row its part of a pass and draw its next token; whether it needs another pass."""
        strength = max(found.strengths[index].values(), default=0.0)

        def go_on() -> bool:
            if not take(found.scores[index]):
                return False
            self.metrics.strength.observe(strength)
            return row.draw(found.logits[index], strength)

        return self._tried(row, go_on)

    def _tried(self, row: Row, go_on: Callable[[], bool]) -> bool:
        """Whether a row goes on; where that fails it alone does."""
        try:
            return go_on()
        except Exception as error:  # as above: the other rows go on
            self._fail([row.job], error)
            return False

    def _step(self) -> None:
        if self._rows is None:
            return
        rows = self._running
        tokens, settings = [row.newest for row in rows], [row.setting for row in rows]
        try:
            found = self._runner.step(self._rows, tokens, settings, judges_now=any(row.is_complete for row in rows))
        except Exception as error:  # as above
            self._fail_running(error)
            return
        self._rows = found.rows
        self._keep([self._advance(row, row.hear, found, index) for index, row in enumerate(rows)])
        self.metrics.running.set(len(self._running))

    def _fail_running(self, error: Exception) -> None:
        """End all answers in progress: nothing on their cache can be trusted."""
        rows, self._running, self._rows = self._running, [], None
        self.metrics.running.set(0)
        self._fail([row.job for row in rows], error)

    def _fail(self, jobs: Sequence[Job], error: Exception) -> None:
        _log.error("a pass failed: %s", type(error).__name__, exc_info=error)
        told = ServingError("The model could not give this answer, and nothing unjudged is sent. Try again.")
        for job in jobs:
            job.listen(Failed(told))

    def _refuse_rest(self) -> None:
        """Tell everybody who still waits."""
        error = stopped()
        with self._wake:
            self._ends_at = min(self._ends_at, time.monotonic())
            jobs = [*(row.job for row in self._running), *self._waiting]
            tasks = list(self._tasks)
            self._running, self._rows = [], None
            self._waiting.clear()
            self._tasks.clear()
        for job in jobs:
            job.listen(Failed(error))
        for task in tasks:
            if task.answer.set_running_or_notify_cancel():
                task.answer.set_exception(error)
