"""``safeside serve`` in a process of its own, with two tenants and an audit log that keeps texts."""

from __future__ import annotations

import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import httpx

from safeside.artifact import load_adapter, save_adapter
from safeside.base.model import load_base
from safeside.serve.keys import make_key

SAFESIDE = (sys.executable, "-c", "from safeside.cli import main; main()")
TENANTS = ("even", "odd")
START_S, ASK_S = 300, 300  # longer than the server's own deadline
# The tenants' own lines, which nothing is done by, tell whose verdict it is; the guard watches every token.
POLICY = """
adapters: {harm: builtin:harm, refuse: builtin:refuse}
deployment: house
tenants: {even: even, odd: odd}
policies:
  house:
    audit_text: true
    prompt: [{action: steer, guard: harm, aligner: refuse, low: 0.5, high: 0.9}]
    answer: [{action: block, guard: harm, threshold: 1.0}]
  even: {prompt: [{action: annotate, guard: harm, threshold: 0.25}]}
  odd: {prompt: [{action: annotate, guard: harm, threshold: 0.75}]}
"""
LINES = {"even": 0.25, "odd": 0.75}
DRAIN_S = 30
Json = dict[str, Any]


class Decision(NamedTuple):
    """One record of the audit log."""

    tenant: str
    stage: str
    action: str
    text: str


Decisions = Mapping[str, list[Decision]]
"""By trace id."""


@dataclass
class Process:
    """A server of the built-in base that can be stopped and started again."""

    folder: Path
    keys: dict[str, str]
    port: int
    running: subprocess.Popen[bytes]
    drain_s: float = DRAIN_S
    """How long answers may go on after SIGTERM."""
    is_ending: bool = False
    """Whether it was sent a signal to end: what it refuses then it does not take later."""

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
        self.is_ending = True
        self.running.send_signal(how)
        self.running.wait(ASK_S)

    def restart(self, drain_s: float = DRAIN_S) -> None:
        """Have it run with this time to drain, at the same port and with the same audit log."""
        if self.is_up and drain_s != self.drain_s:
            self.stop(signal.SIGKILL)
        if not self.is_up:
            self.running, self.drain_s, self.is_ending = _started(self.folder, self.port, drain_s), drain_s, False

    def decisions(self) -> dict[str, list[Decision]]:
        """Every record in the audit log, in order."""
        found: dict[str, list[Decision]] = {}
        with sqlite3.connect(self.folder / "audit.db", timeout=60) as database:
            query = "SELECT trace_id, tenant, stage, action, text FROM safeside_decisions ORDER BY number"
            for trace_id, *rest in database.execute(query):
                found.setdefault(trace_id, []).append(Decision(*rest))
        return found

    def settled(self, known: Decisions, seconds: float = 20.0) -> dict[str, list[Decision]]:
        """The decisions that are not ``known``, once each answer has one, or after so many seconds."""
        end = time.monotonic() + seconds
        while True:
            found = {trace_id: steps for trace_id, steps in self.decisions().items() if trace_id not in known}
            if all(steps[-1].stage == "answer" for steps in found.values()) or time.monotonic() > end:
                return found
            time.sleep(0.2)


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
        process = Process(folder, keys, port, _started(folder, port, DRAIN_S))
        try:
            yield process
        finally:
            process.running.kill()
            process.running.wait()


def _started(folder: Path, port: int, drain_s: float) -> subprocess.Popen[bytes]:
    """The process, once it is ready."""
    options = {"policy": folder / "policy.yaml", "keys": folder / "keys.yaml", "adapter-root": folder / "adapters"}
    options |= {"port": port, "audit": f"sqlite:///{folder}/audit.db", "max-rows": 8, "max-body": 1 << 16}
    options["drain"] = drain_s
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
