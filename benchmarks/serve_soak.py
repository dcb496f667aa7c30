"""Mixed load while a server's memory is read: streams and whole answers, clients that leave, and moderations."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import httpx
import numpy as np
import psutil

from safeside.terminal import note
from serve_crowd import Asked, ask, leave
from serve_process import Process, process_of

_CLIENTS = 8
_PARTS = 10  # of the time; the first is for warming up
_GOAL = 0.02
_MOST_WORDS, _MOST_TOKENS = 60, 128
_WORDS = ("egg", "boat", "river", "seven", "green", "letter", "winter", "music")


@dataclass
class Mixed:
    """Clients of which each does one thing after the other, drawn by a seed of its own; counts how each ended."""

    process: Process
    counts: Counter[str] = field(default_factory=Counter)
    is_over: threading.Event = field(default_factory=threading.Event)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Let them begin; after, each has ended its last."""
        threads = [threading.Thread(target=self._run, args=(number,)) for number in range(_CLIENTS)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self.is_over.set()
            for thread in threads:
                thread.join()

    def _run(self, number: int) -> None:
        generator = random.Random(number)
        while not self.is_over.is_set():
            end = self.one(number, generator)
            self.counts[end] += 1  # with the lock of the interpreter
            if end in ("unreachable", "broken"):
                return

    def one(self, number: int, generator: random.Random) -> str:
        """Do one thing; how it ended."""
        text = " ".join(generator.choices(_WORDS, k=generator.randint(1, _MOST_WORDS)))
        kind = generator.choices(("whole", "stream", "left", "moderation"), (3, 3, 2, 2))[0]
        if kind == "moderation":
            return self._moderation(number, [text] * generator.randint(1, 8))
        is_stream = kind == "stream" or generator.random() < 0.5
        more = {"messages": [{"role": "user", "content": text}], "seed": generator.randrange(1 << 30)}
        asked = Asked(number, generator.randint(1, _MOST_TOKENS), is_stream, more=more)
        if kind == "left":
            outcome = leave(self.process, asked, generator.randint(1, 40) if is_stream else generator.uniform(0.01, 1))
        else:
            outcome = ask(self.process, asked)
        if outcome.answer is not None:
            return "stream" if is_stream else "whole"
        return "left" if outcome.is_left else outcome.refusal or "broken"

    def _moderation(self, number: int, texts: list[str]) -> str:
        try:
            found = self.process.post("/v1/moderations", {"input": texts}, Asked(number).tenant)
        except httpx.TransportError:
            return "broken"
        return "moderation" if found.status_code == httpx.codes.OK else f"moderation {found.status_code}"


def soak(minutes: float) -> dict[str, object]:
    """How much the resident memory of a server grew under load, from the second tenth of the time to the last."""
    sizes: list[tuple[float, int]] = []
    with process_of() as process:
        mixed, server = Mixed(process), psutil.Process(process.running.pid)
        with mixed.running():
            started = time.monotonic()
            while (passed := time.monotonic() - started) < 60 * minutes and process.is_up:
                sizes.append((passed / (60 * minutes), server.memory_info().rss))
                time.sleep(min(1.0, minutes))
        is_up = process.is_up
    first, last = (
        float(np.median([size for share, size in sizes if part <= share * _PARTS < part + 1]))
        for part in (1, _PARTS - 1)
    )
    growth = last / first - 1
    counts = dict(mixed.counts)
    n_answers = counts.get("whole", 0) + counts.get("stream", 0)
    n_failed = sum(counts.values()) - n_answers - counts.get("left", 0) - counts.get("moderation", 0)
    note(f"soak: {minutes:g} minutes, {counts}, memory {growth:+.2%}")
    facts = {"minutes": minutes, "clients": _CLIENTS, "answers": n_answers, "failed": n_failed, "counts": counts}
    return {**facts, "growth": growth, "goal": _GOAL, "met": is_up and abs(growth) <= _GOAL, "bytes": last}
