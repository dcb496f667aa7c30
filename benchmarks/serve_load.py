"""Servers to load, clients that load them, and what the clients measure."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import torch
import uvicorn

from overhead_variants import SIZE, SecondPass, open_base, twin_of
from safeside.adapters.adapter import Adapter
from safeside.adapters.sizing import sized_config
from safeside.base.model import Base, load_base
from safeside.serve.app import create_app
from safeside.serve.audit import AuditLog
from safeside.serve.engine import Engine
from safeside.serve.policy import PolicyBook
from safeside.serve.service import Service, ServiceLimits
from safeside.types import Message

VARIANTS = ("base", "guarded", "second_model")
# The aligner acts in the upper half of the scores; the guard watches every token and, so that all variants write the
# same number of tokens, would stop only at a score of 1.
GUARDED = """
policies:
  house:
    prompt: [{action: steer, guard: harm, low: 0.5, high: 0.9}]
    answer: [{action: block, guard: harm, threshold: 1.0}]
deployment: [house]
"""
PROMPT = "Tell me how a small boat is built, in a few plain sentences. " * 3
ALONE = "{policies: {none: {}}, deployment: [none]}"


@dataclass(slots=True)
class Served:
    """One variant behind HTTP."""

    url: str
    service: Service
    judge: SecondPass | None = None
    """The second model, called before and after an answer."""
    lock: threading.Lock = field(default_factory=threading.Lock)


@dataclass(frozen=True, slots=True)
class Load:
    """How a server is loaded."""

    clients: int
    n_requests: int
    """Of each client, one after the other."""
    n_tokens: int
    """Of each answer."""


@dataclass(slots=True)
class Timing:
    """What the clients of one round saw."""

    seconds: float = 0.0
    n_tokens: int = 0
    ttft: list[float] = field(default_factory=list)
    itl: list[float] = field(default_factory=list)


def adapters_of(base: Base) -> list[Adapter]:
    """A guard and an aligner of the default size, untrained: what they cost does not depend on what they know."""
    configs = [sized_config(base, SIZE, name="harm"), sized_config(base, SIZE, role="align", name="refuse")]
    with torch.device(base.device):
        return [Adapter(config).to(base.dtype).eval().requires_grad_(False) for config in configs]


@contextlib.contextmanager
def served(base: Base, adapters: Sequence[Adapter], policy: str) -> Iterator[Served]:
    """A server of ``base`` on a free port."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "policy.yaml").write_text(policy, encoding="utf-8")
        book = PolicyBook.load(folder / "policy.yaml")
        guards = {adapter.name: adapter for adapter in adapters if adapter.config.role == "guard"}
        book.bind(guards, [adapter.name for adapter in adapters if adapter.config.role == "align"])
        engine = Engine(base, adapters)
        audit = AuditLog(f"sqlite:///{folder}/audit.db")
        service = Service(engine, book, audit, model="base", limits=ServiceLimits(deadline_s=3600))
        server = uvicorn.Server(uvicorn.Config(create_app(service), log_level="critical"))
        with socket.create_server(("127.0.0.1", 0)) as listening:
            thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
            thread.start()
            while not server.started:
                time.sleep(0.01)
            try:
                yield Served(f"http://127.0.0.1:{listening.getsockname()[1]}", service)
            finally:
                server.should_exit = True
                thread.join()


@contextlib.contextmanager
def all_served(geometry: str, device: str) -> Iterator[dict[str, Served]]:
    """Every variant around one set of weights."""
    base = open_base(geometry, device)
    if geometry != "builtin":  # a geometry has no tokenizer; ids that this one does not know spell nothing
        base.tokenizer = load_base("builtin").tokenizer
    with contextlib.ExitStack() as stack:
        made = {
            name: stack.enter_context(
                served(twin := twin_of(base), adapters_of(twin), GUARDED)
                if name == "guarded"
                else served(twin_of(base), [], ALONE)
            )
            for name in VARIANTS
        }
        made["second_model"].judge = SecondPass(twin_of(base))
        yield made


def run_load(server: Served, load: Load) -> Timing:
    """One round."""
    timing = Timing()
    started = time.perf_counter()
    asyncio.run(_clients(server, load, timing))
    timing.seconds = time.perf_counter() - started
    return timing


async def _clients(server: Served, load: Load, timing: Timing) -> None:
    limits = httpx.Limits(max_connections=load.clients)
    async with httpx.AsyncClient(base_url=server.url, timeout=600, limits=limits) as client:

        async def one(number: int) -> None:
            for _ in range(load.n_requests):
                await _ask(server, client, load, number, timing)

        await asyncio.gather(*(one(number) for number in range(load.clients)))


async def _ask(server: Served, client: httpx.AsyncClient, load: Load, number: int, timing: Timing) -> None:
    """One stream: when its first token came, and the time between tokens."""
    text = f"{number}: {PROMPT}"
    body = {
        "model": "base", "stream": True, "max_tokens": load.n_tokens, "temperature": 0,
        "messages": [{"role": "user", "content": text}], "stream_options": {"include_usage": True},
        "logprobs": True,
    }  # fmt: skip
    started = before = time.perf_counter()
    await _judged(server, [Message("user", text)])
    answer, is_first = "", True
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line[6:])
            if "error" in chunk:
                raise RuntimeError(chunk["error"]["message"])
            if usage := chunk.get("usage"):
                timing.n_tokens += usage["completion_tokens"]
            choice = (chunk["choices"] or [{}])[0]
            n_told = len((choice.get("logprobs") or {}).get("content") or ())
            if not n_told:
                continue
            now = time.perf_counter()
            if is_first:
                timing.ttft.append(now - started)
            else:
                timing.itl += [(now - before) / n_told] * n_told
            is_first, before = False, now
            answer += choice["delta"].get("content") or ""
    await _judged(server, [Message("user", text), Message("assistant", answer)])


async def _judged(server: Served, messages: Sequence[Message]) -> None:
    """Let the second model read the conversation, one at a time, as one more model on the same machine."""
    if server.judge is None:
        return
    ids = torch.tensor([server.service.base.encode(messages).ids], device=server.service.base.device)
    await asyncio.to_thread(_judge, server, ids)


@torch.no_grad()
def _judge(server: Served, ids: torch.Tensor) -> None:
    assert server.judge is not None
    with server.lock:
        server.judge.judge(ids)
