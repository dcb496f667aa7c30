"""Clients that load a server, in a process of their own without torch, and what they measure.

A job comes as JSON at standard input and its Timing goes as JSON to standard output: ``run_clients`` is how to ask.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import asdict, dataclass, field
from itertools import pairwise

import httpx

QUESTION = "How is a boat built?"


@dataclass(frozen=True, slots=True)
class Load:
    """How a server is loaded."""

    url: str
    judge: str
    """Where the second model is called, before and after an answer; empty without one."""
    clients: int
    n_requests: int
    """Of each client, one after the other."""
    n_tokens: int
    """Of each answer: another number is an error."""


@dataclass(slots=True)
class Timing:
    """What the clients of one round saw, in seconds."""

    seconds: float = 0.0
    n_tokens: int = 0
    """Of all answers, by the server's own count."""
    n_judged: int = 0
    """Tokens that the second model read."""
    ttft: list[float] = field(default_factory=list)
    """One for each answer."""
    itl: list[float] = field(default_factory=list)
    """Between two chunks with text, nearly all of which hold one token."""


def run_clients(load: Load) -> Timing:
    """Load a server from a process of its own; what went wrong there is a RuntimeError."""
    command = [sys.executable, __file__]
    found = subprocess.run(command, input=json.dumps(asdict(load)), capture_output=True, text=True, check=False)
    if found.returncode:
        raise RuntimeError(found.stderr)
    return Timing(**json.loads(found.stdout))


async def load_server(load: Load) -> Timing:
    """One round of every client."""
    timing = Timing()
    limits = httpx.Limits(max_connections=2 * load.clients)
    async with httpx.AsyncClient(timeout=3600, limits=limits) as client:

        async def one(number: int) -> None:
            for _ in range(load.n_requests):
                await _ask(client, load, f"{number}: {QUESTION}", timing)

        started = time.perf_counter()
        await asyncio.gather(*(one(number) for number in range(load.clients)))
        timing.seconds = time.perf_counter() - started
    return timing


async def _ask(client: httpx.AsyncClient, load: Load, text: str, timing: Timing) -> None:
    """One stream, with the second model's look at its prompt and at the whole where there is one."""
    started = time.perf_counter()
    await _judged(client, load, text, 0, timing)
    body = {
        "model": "base", "stream": True, "max_tokens": load.n_tokens, "temperature": 0,
        "messages": [{"role": "user", "content": text}], "stream_options": {"include_usage": True},
    }  # fmt: skip
    arrivals: list[float] = []
    n_tokens = 0
    async with client.stream("POST", f"{load.url}/v1/chat/completions", json=body) as response:
        response.raise_for_status()
        async for chunk in _chunks(response):
            if usage := chunk.get("usage"):
                n_tokens = usage["completion_tokens"]
            if any(choice["delta"].get("content") for choice in chunk["choices"]):
                arrivals.append(time.perf_counter())
    if n_tokens != load.n_tokens or not arrivals:
        raise RuntimeError(
            f"An answer had {n_tokens} tokens in {len(arrivals)} chunks with text; expected {load.n_tokens} and some."
        )
    timing.n_tokens += n_tokens
    timing.ttft.append(arrivals[0] - started)
    timing.itl += [after - before for before, after in pairwise(arrivals)]
    await _judged(client, load, text, n_tokens, timing)


async def _chunks(response: httpx.Response) -> AsyncIterator[dict[str, list[dict[str, dict[str, str]]]]]:
    """The objects of a stream; an error that it ends with is raised."""
    async for line in response.aiter_lines():
        if line.startswith("data: {"):
            chunk = json.loads(line.removeprefix("data: "))
            if "error" in chunk:
                raise RuntimeError(chunk["error"]["message"])
            yield chunk


async def _judged(client: httpx.AsyncClient, load: Load, text: str, n_answer: int, timing: Timing) -> None:
    """Let the second model read the prompt and so many tokens of an answer."""
    if load.judge:
        found = await client.post(load.judge, json={"text": text, "n_answer": n_answer})
        read: Mapping[str, int] = found.raise_for_status().json()
        timing.n_judged += read["n_tokens"]


if __name__ == "__main__":
    print(json.dumps(asdict(asyncio.run(load_server(Load(**json.load(sys.stdin)))))))
