"""Scoring files of any size with a pool of workers: one output row for each input row, however often it is killed.

Ray Data hands shards to the actors that hold the base, starts an actor anew that dies, and gives back what each shard
came to.  Reading and writing belong to the shard (see ``ledger``): a task that Ray runs twice writes the same file.
"""

from __future__ import annotations

import hashlib
import logging
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import ray
from ray.data import ActorPoolStrategy, DataContext
from ray.exceptions import RayError

import safeside.errors
from safeside.artifact import WEIGHTS_FILE, find_adapter, read_adapter
from safeside.base.model import BUILTIN_NAME
from safeside.base.packaged import PACKAGED
from safeside.errors import InputError, SafesideError
from safeside.guards.lines import Scorer, judge_rows
from safeside.guards.setup import Setup
from safeside.scale.engines import ENGINES
from safeside.scale.ledger import QUARANTINE, Claim, begin_shard, keep_shard, open_ledger
from safeside.scale.places import Folder
from safeside.scale.reading import Reader, Shard, Span, open_reader
from safeside.terminal import Advance, note, progress_bar

_STARTS = 3  # attempts: Ray gives a machine 30 s, which a busy one may exceed


@dataclass(frozen=True, slots=True)
class BulkOptions:
    """What is scored, with what, and where to."""

    source: str
    """Files of rows: a path, a folder, a pattern or a URL."""
    output: str
    """A folder, as a path or URL."""
    setup: Setup
    """Guards and base."""
    engine: str = "hf"
    """What runs the base: a name of ENGINES."""
    workers: int = 1
    """Actors, each with a base and one core of its own."""
    shard_rows: int = 1000
    """Rows of each file of the output, which a worker holds in memory."""


class Ran(NamedTuple):
    """What scoring took."""

    peak_bytes: int = 0
    """The most memory of any worker that finished a shard."""
    n_retried: int = 0
    """How often a shard was begun again because its worker had died or was taken away."""


def score_command(options: BulkOptions) -> dict[str, object]:
    """Score all rows that are not scored yet, and say how it went."""
    own = ENGINES.get(options.engine).settings_of(options.setup)
    setup = _absolute(options.setup)
    settings = {
        "guards": [_identified(name) for name in setup.guards],  # in order: verdicts stand in it
        "base": setup.base,
        "preset": setup.preset,
        "allow_mismatch": setup.allow_mismatch,
        "engine": options.engine,
        **own,
    }
    ledger = open_ledger(options.source, options.output, settings, options.shard_rows)
    done = ledger.done()
    left = [shard for shard in ledger.shards if shard.number not in done]
    n_rows, n_left = (sum(shard.span.n_rows for shard in shards) for shards in (ledger.shards, left))
    started, ran = time.perf_counter(), Ran()
    with progress_bar(options.source, n_rows) as advance:
        advance(n_rows - n_left, n_rows)
        if left:
            ran = _run(replace(options, setup=setup), ledger.claim, left, advance)
    seconds = time.perf_counter() - started
    n_bad = ledger.finish()
    return {
        "output": options.output,
        "rows": n_rows,
        "rows_before": n_rows - n_left,
        "n_bad": n_bad,
        "quarantine": f"{options.output.rstrip('/')}/{QUARANTINE}" if n_bad else None,
        "seconds": round(seconds, 2),
        "rows_per_s": round(n_left / seconds, 2),
        "peak_bytes": ran.peak_bytes,
        "n_retried": ran.n_retried,
    }


def _absolute(setup: Setup) -> Setup:
    """The same with paths that do not depend on where a worker runs."""

    def absolute(name: str) -> str:
        is_path = name not in (BUILTIN_NAME, *PACKAGED) and Path(name).is_dir()
        return str(Path(name).absolute()) if is_path else name

    base = absolute(setup.base) if setup.base is not None else None
    return replace(setup, guards=tuple(map(absolute, setup.guards)), base=base)


def _identified(name: str) -> list[str]:
    """A guard's own name, and a hash of its weights and of its configuration, whose checksum stands beside them."""
    folder = find_adapter(name)
    config, _ = read_adapter(folder)
    if config.role != "guard":
        raise InputError(f"{name!r} is an aligner and gives no scores; expected a guard.")
    return [config.name, hashlib.sha256((folder / WEIGHTS_FILE).read_bytes()).hexdigest()[:16]]


def _run(options: BulkOptions, claim: Claim, shards: Sequence[Shard], advance: Advance) -> Ran:
    """Score ``shards``."""
    ran, is_ours = Ran(), not ray.is_initialized()
    try:
        _connect(options.workers, "CPU" if options.setup.device == "cpu" else "GPU")
        for found in _pooled(options, claim, shards):
            if found["error"]:
                raise vars(safeside.errors).get(str(found["kind"]), SafesideError)(found["error"])
            n_rows, peak, attempt = (int(str(found[name])) for name in ("n_rows", "peak_bytes", "attempt"))
            advance(n_rows)
            ran = Ran(max(ran.peak_bytes, peak), ran.n_retried + attempt - 1)
    except RayError as error:
        reason = str(error).strip().splitlines()[-1]
        raise SafesideError(
            f"A worker failed: {reason} What was finished is kept: run the command again to go on, with fewer "
            "--workers if memory ran out."
        ) from error
    finally:
        if is_ours:
            ray.shutdown()
    return ran


def _connect(workers: int, resource_name: str) -> None:
    """Use the cluster that Ray finds by its own rules, else one on this machine.

    Fewer of the resource (``CPU``, ``GPU``) than workers are an InputError, for Ray would wait for them for ever.
    What goes wrong in starting Ray is a SafesideError: Ray raises bare Exceptions.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is told to anybody
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # errors are raised; what is printed is of no use
    for n_left in reversed(range(_STARTS)):
        try:
            ray.init(
                ignore_reinit_error=True, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR
            )
            break
        except Exception as error:
            ray.shutdown()
            if not n_left:
                raise SafesideError(f"Ray did not start: {error} Check RAY_ADDRESS, and how busy this is.") from error
            note(f"Ray did not start and is started again: {error}")
    n_there = int(ray.cluster_resources().get(resource_name, 0))  # type: ignore[no-untyped-call]
    if workers > n_there:
        raise InputError(
            f"{workers} workers need a {resource_name} each; Ray has {n_there}. Lower --workers, or choose another "
            "--device."
        )


def _pooled(options: BulkOptions, claim: Claim, shards: Sequence[Shard]) -> Iterator[dict[str, object]]:
    """What each shard came to, as it is done.  Ray begins one again when its worker is gone, not after an exception."""
    context = DataContext.get_current()
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context.enable_progress_bars = context.print_on_execution_start = False
    waiting = ray.data.from_items([asdict(shard) for shard in shards], override_num_blocks=len(shards))
    yield from waiting.map(
        Worker,  # type: ignore[arg-type]
        fn_constructor_args=(options, claim, ENGINES.get(options.engine).make),
        compute=ActorPoolStrategy(size=options.workers, max_tasks_in_flight_per_actor=2),
        num_cpus=1,
        num_gpus=0 if options.setup.device == "cpu" else 1,
    ).iter_rows()


class Worker:
    """An actor: it holds a scorer, and scores one shard after the other."""

    def __init__(self, options: BulkOptions, claim: Claim, make: Callable[[Setup], Scorer]) -> None:
        self.options, self.make = options, make
        self.folder = Folder(claim.output, claim.writer)
        self.file = ""
        self.reader: Reader | None = None
        self.scorer: Scorer | None = None

    def __call__(self, values: dict[str, object]) -> dict[str, object]:
        """What one shard came to; an error of ours comes back as data, for Ray would wrap it beyond recognition."""
        shard = Shard(int(str(values["number"])), str(values["file"]), Span(**values["span"]))  # type: ignore[arg-type]
        found: dict[str, object] = {"kind": "", "error": "", "n_rows": shard.span.n_rows, "peak_bytes": 0}
        try:
            attempt = begin_shard(self.folder, shard)
            if self.scorer is None:
                self.scorer = self.make(self.options.setup)
            self._score(self.scorer, shard)
        except SafesideError as error:
            return {**found, "kind": type(error).__name__, "error": str(error)}
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return {**found, "peak_bytes": peak if sys.platform == "darwin" else peak * 1024, "attempt": attempt}

    def _score(self, scorer: Scorer, shard: Shard) -> None:
        """Score one shard; an error of others becomes an InputError that says where it was."""
        try:
            if self.reader is None or self.file != shard.file:
                self.file, self.reader = shard.file, open_reader(shard.file)
            score_shard(scorer, self.reader, shard, self.folder)
        except SafesideError:
            raise
        except Exception as error:
            logging.getLogger(__name__).exception("Scoring %s failed", shard.lines)
            raise InputError(
                f"Scoring {shard.lines} failed: {type(error).__name__}: {error}. Expected rows that every step can "
                "read. What was finished is kept: look at these rows, or report the error."
            ) from error


def score_shard(scorer: Scorer, reader: Reader, shard: Shard, folder: Folder) -> None:
    """Score one shard and keep it; one whose rows are no longer what was planned is an InputError."""
    part = reader.read(shard.span)
    if len(part.rows) != shard.span.n_rows:
        raise InputError(
            f"{shard.file} has {len(part.rows)} rows from line {shard.span.first} on where it had {shard.span.n_rows}: "
            "it was changed. Choose another output folder and start anew."
        )
    judged = list(judge_rows(scorer, part.rows))
    bad = [
        {"file": shard.file, "line": line["line"], "problem": problem, "row": part.original(index)}
        for index, (line, problem) in enumerate(judged)
        if problem is not None
    ]
    keep_shard(folder, shard, part.scored([line for line, _ in judged], shard.file), bad)
