"""``safeside serve`` in a process of its own, and clients of two tenants that ask it."""

from __future__ import annotations

import os
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx

from safeside.artifact import load_adapter, save_adapter
from safeside.base.model import load_base
from safeside.serve.keys import make_key

SAFESIDE = (sys.executable, "-c", "from safeside.cli import main; main()")
TENANTS = ("even", "odd")
N_TOKENS = 16
START_S, ASK_S = 300, 120
# The tenants' own lines, which nothing is done by, tell whose verdict it is; the guard watches every token.
POLICY = """
adapters: {harm: builtin:harm, refuse: builtin:refuse}
deployment: house
tenants: {even: even, odd: odd}
policies:
  house:
    prompt: [{action: steer, guard: harm, aligner: refuse, low: 0.5, high: 0.9}]
    answer: [{action: block, guard: harm, threshold: 1.0}]
  even: {prompt: [{action: annotate, guard: harm, threshold: 0.25}]}
  odd: {prompt: [{action: annotate, guard: harm, threshold: 0.75}]}
"""
LINES = {"even": 0.25, "odd": 0.75}
Json = dict[str, Any]


@dataclass
class Process:
    """A server of the built-in base that can be stopped and started again."""

    folder: Path
    keys: dict[str, str]
    port: int
    running: subprocess.Popen[bytes]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def policy(self) -> Path:
        return self.folder / "policy.yaml"

    @property
    def is_up(self) -> bool:
        return self.running.poll() is None

    def headers(self, who: str) -> dict[str, str]:
        """What a tenant, or the administrator, sends with a request."""
        return {"Authorization": f"Bearer {self.keys[who]}", "Content-Type": "application/json"}

    def post(self, path: str, body: object, who: str) -> httpx.Response:
        """One request of a tenant or of the administrator."""
        return httpx.post(f"{self.url}{path}", json=body, headers=self.headers(who), timeout=ASK_S)

    def version(self) -> str:
        """That of the policies in force."""
        found: str = httpx.get(f"{self.url}/readyz", timeout=ASK_S).json()["policy_version"]
        return found

    def stop(self, how: signal.Signals) -> None:
        """Send a signal and wait for the process to end."""
        self.running.send_signal(how)
        self.running.wait(ASK_S)

    def restart(self) -> None:
        """Start it again at the same port, with the same audit log, if it is down."""
        if not self.is_up:
            self.running = _started(self.folder, self.port)

    def decisions(self) -> dict[str, list[tuple[str, str, str]]]:
        """By trace id the tenant, stage and action of every record in the audit log."""
        found: dict[str, list[tuple[str, str, str]]] = {}
        with sqlite3.connect(self.folder / "audit.db", timeout=60) as database:
            query = "SELECT trace_id, tenant, stage, action FROM safeside_decisions ORDER BY number"
            for trace_id, *rest in database.execute(query):
                found.setdefault(trace_id, []).append(tuple(rest))
        return found


@contextmanager
def process_of() -> Iterator[Process]:
    """A server that is ready; a second aligner, ``calm``, lies in a folder that it may load."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "policy.yaml").write_text(POLICY, encoding="utf-8")
        keys = {who: make_key(folder / "keys.yaml", who, {"tenant": who}) for who in TENANTS}
        keys["admin"] = make_key(folder / "keys.yaml", "admin", {"tenant": "ops", "is_admin": True})
        calm = load_adapter("builtin:refuse", load_base("builtin"))
        calm.config = calm.config.model_copy(update={"name": "calm"})
        save_adapter(calm, folder / "adapters" / "calm")
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        process = Process(folder, keys, port, _started(folder, port))
        try:
            yield process
        finally:
            process.running.kill()
            process.running.wait()


def _started(folder: Path, port: int) -> subprocess.Popen[bytes]:
    """The process, once it is ready."""
    options = {"policy": folder / "policy.yaml", "keys": folder / "keys.yaml", "adapter-root": folder / "adapters"}
    options |= {"port": port, "audit": f"sqlite:///{folder}/audit.db", "max-rows": 8, "max-body": 1 << 16}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    with (folder / "log").open("ab") as log:
        running = subprocess.Popen([*SAFESIDE, "serve", *words], stdout=log, stderr=log, env=os.environ)
    end = time.monotonic() + START_S
    while time.monotonic() < end and running.poll() is None:
        try:
            if httpx.get(f"http://127.0.0.1:{port}/readyz", timeout=5).status_code == httpx.codes.OK:
                return running
        except httpx.TransportError:
            time.sleep(0.1)
    running.kill()
    raise RuntimeError((folder / "log").read_text(encoding="utf-8"))


def tenant_of(number: int) -> str:
    """Whose the request of this number is."""
    return TENANTS[number % 2]


def body_of(number: int, **more: object) -> Json:
    """The chat of this number: no other asks the same."""
    messages = [{"role": "user", "content": f"What is {number} and {number + 1}, and how are {number} eggs boiled?"}]
    return {"model": "builtin", "messages": messages, "max_tokens": N_TOKENS, "temperature": 0, **more}


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one request."""

    number: int
    answer: Json | None = None
    """The whole answer."""
    refusal: str = ""
    """The code of the error that it was refused with, ``unreachable`` where nobody listened."""

    @property
    def is_broken(self) -> bool:
        """Whether neither an answer nor a refusal came."""
        return self.answer is None and not self.refusal


def ask(process: Process, number: int) -> Outcome:
    """Ask until it is answered, as long as the server says to come back."""
    while True:
        try:
            found = process.post("/v1/chat/completions", body_of(number), tenant_of(number))
        except httpx.ConnectError:
            return Outcome(number, refusal="unreachable")
        except httpx.TransportError:
            return Outcome(number)
        if found.status_code == httpx.codes.OK:
            return Outcome(number, found.json())
        code = found.json()["error"]["code"]
        if code not in ("rate_limit_exceeded", "unavailable") or not process.is_up:
            return Outcome(number, refusal=str(code))
        time.sleep(0.05)


@dataclass
class Crowd:
    """Clients that ask one thing after the other, each the same, until they are told to stop or nobody listens."""

    process: Process
    n_clients: int
    outcomes: list[Outcome] = field(default_factory=list)
    is_over: threading.Event = field(default_factory=threading.Event)

    @contextmanager
    def asking(self) -> Iterator[None]:
        """Let them ask; each has begun before, and has its last answer after."""
        threads = [threading.Thread(target=self._ask, args=(number,)) for number in range(self.n_clients)]
        for thread in threads:
            thread.start()
        try:
            self.wait(lambda: len(self.outcomes) >= self.n_clients)
            yield
        finally:
            self.is_over.set()
            for thread in threads:
                thread.join()

    def wait(self, condition: Callable[[], bool]) -> None:
        """Return once ``condition`` holds, or the server is down."""
        end = time.monotonic() + ASK_S
        while not condition() and self.process.is_up and time.monotonic() < end:
            time.sleep(0.01)

    def _ask(self, number: int) -> None:
        while not self.is_over.is_set():
            outcome = ask(self.process, number)
            self.outcomes.append(outcome)
            if outcome.refusal == "unreachable" or outcome.is_broken:
                return
