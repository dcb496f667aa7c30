"""``safeside serve`` as a process: signals, broken files, and what is left after a kill."""

from __future__ import annotations

import json
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
from pathlib import Path

import httpx
import pytest
import uvicorn

from command_line import Ran
from safeside import Base
from safeside.errors import ConfigError, InputError
from safeside.serve.app import create_app
from safeside.serve.audit import AuditLog
from safeside.serve.command import ServeOptions, make_service, reload, serve_command
from safeside.serve.engine import Engine
from safeside.serve.keys import make_key
from safeside.serve.policy import PolicyBook
from safeside.serve.service import Service

POLICY = """
adapters: {harm: "builtin:harm", refuse: "builtin:refuse"}
policies:
  house:
    prompt: [{action: steer, guard: harm, low: 0.3, high: 0.8}]
    answer: [{action: annotate, guard: harm}]
deployment: [house]
"""


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    (tmp_path / "policy.yaml").write_text(POLICY)
    return tmp_path / "policy.yaml"


@pytest.fixture
def process(policy: Path, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A server in its own process, ready, and its address."""
    with served(policy, tmp_path) as found:
        yield found


@contextmanager
def served(policy: Path, folder: Path, *options: str) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A server of the policy in its own process, ready, and its address; ``folder`` holds its log and audit log."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = "from safeside.cli import main; main()"
    arguments = ["serve", "--policy", str(policy), "--port", str(port), "--audit", f"sqlite:///{folder}/audit.db"]
    with (folder / "log").open("wb") as log:
        started = subprocess.Popen(
            [sys.executable, "-c", command, *arguments, *options],
            stdout=log,
            stderr=log,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until_ready(started, url, folder / "log")
        yield started, url
    finally:
        started.kill()
        started.wait()


def wait_until_ready(started: subprocess.Popen[bytes], url: str, log: Path) -> None:
    end = time.monotonic() + 120
    while time.monotonic() < end:
        assert started.poll() is None, log.read_text()
        try:
            if httpx.get(f"{url}/readyz").status_code == 200:
                return
        except httpx.ConnectError:
            time.sleep(0.1)
    pytest.fail(log.read_text())


def chat(url: str, text: str, max_tokens: int = 8) -> httpx.Response:
    body = {"model": "builtin", "messages": [{"role": "user", "content": text}], "max_tokens": max_tokens}
    return httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60)


def test_signals_under_load(process: tuple[subprocess.Popen[bytes], str], policy: Path, tmp_path: Path) -> None:
    """A broken policy changes nothing; after SIGKILL every decision that a client was told of is in the log."""
    started, url = process
    version = httpx.get(f"{url}/readyz").json()["policy_version"]
    told: list[str] = []
    others: list[str] = []

    def ask(number: int) -> None:
        while True:
            try:
                answer = chat(url, f"How do I boil {number} eggs?").json()
            except httpx.HTTPError:
                return
            told.append(answer["safety"]["trace_id"])
            others.extend(verdict["guard"] for verdict in answer["safety"]["verdicts"] if verdict["guard"] != "harm")

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    policy.write_text("policies: [broken")
    started.send_signal(signal.SIGHUP)
    wait_for(tmp_path / "log", "reload refused")
    assert httpx.get(f"{url}/readyz").json()["policy_version"] == version
    policy.write_text(POLICY + "\n# another version\n")
    started.send_signal(signal.SIGHUP)
    wait_for(tmp_path / "log", "policies reloaded")
    assert httpx.get(f"{url}/readyz").json()["policy_version"] != version
    n_before = len(told)
    while len(told) < n_before + 4:
        time.sleep(0.01)
    started.kill()
    started.wait()
    for thread in threads:
        thread.join()
    with sqlite3.connect(tmp_path / "audit.db") as database:
        kept = {row[0] for row in database.execute("SELECT trace_id FROM safeside_decisions WHERE stage = 'answer'")}
    assert told
    assert set(told) <= kept
    assert others == []


def test_answers_that_outlast_the_drain_end_with_an_error_in_openais_shape(policy: Path, tmp_path: Path) -> None:
    """Whole ones and streams, each with a record; nothing is torn, and the log has no traceback."""
    bodies: dict[bool, list[str]] = {False: [], True: []}

    def ask(url: str, is_stream: bool, seed: int) -> None:
        talk = [{"role": "user", "content": "Tell me a story about a cat."}]
        body = {"model": "builtin", "messages": talk, "max_tokens": 400, "temperature": 2, "seed": seed}
        answer = httpx.post(f"{url}/v1/chat/completions", json={**body, "stream": is_stream}, timeout=60)
        bodies[is_stream].append(f"{answer.status_code} {answer.text}")

    with served(policy, tmp_path, "--drain", "0.2") as (started, url):
        threads = [threading.Thread(target=ask, args=(url, number % 2 == 0, number)) for number in range(12)]
        for thread in threads:
            thread.start()
        end = time.monotonic() + 60
        while "safeside_time_to_first_token_seconds_count 12.0" not in httpx.get(f"{url}/metrics").text:
            assert time.monotonic() < end, (tmp_path / "log").read_text()
            time.sleep(0.01)
        started.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join()
        assert started.wait(60) == -signal.SIGTERM
    message = "The server was stopped before this answer was complete. Ask again."
    told = {"message": message, "type": "server_error", "param": None, "code": "unavailable"}
    cut = [body for body in bodies[False] if body != f"503 {json.dumps({'error': told}, separators=(',', ':'))}"]
    assert all(body.startswith("200 {") for body in cut), cut
    assert all(body.endswith((f"{json.dumps({'error': told})}\n\n", "data: [DONE]\n\n")) for body in bodies[True])
    n_failed = sum(message in body for own in bodies.values() for body in own)
    assert n_failed
    log = (tmp_path / "log").read_text()
    assert "Traceback" not in log
    assert "Cancel" not in log
    with sqlite3.connect(tmp_path / "audit.db") as database:
        kept = dict(
            database.execute("SELECT action, count(*) FROM safeside_decisions WHERE stage = 'answer' GROUP BY 1")
        )
    assert sum(kept.values()) == 12
    assert (kept["failed"], "abandoned" in kept) == (n_failed, False)


def wait_for(log: Path, text: str) -> None:
    end = time.monotonic() + 60
    while text not in log.read_text():
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.02)


def test_a_server_told_to_stop_lets_answers_end(session_base: Base, policy: Path, tmp_path: Path) -> None:
    """As SIGTERM does, which uvicorn turns into this flag."""
    policy.write_text("{policies: {none: {}}, deployment: [none]}")
    book = PolicyBook.load(policy)
    service = Service(Engine(session_base), book, AuditLog(f"sqlite:///{tmp_path}/audit.db"), model="builtin")
    server = uvicorn.Server(uvicorn.Config(create_app(service), log_level="error"))
    found: list[httpx.Response] = []
    with socket.create_server(("127.0.0.1", 0)) as listening:
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        serving = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        serving.start()
        while not server.started:
            time.sleep(0.01)
        assert httpx.post(f"{url}/v1/moderations", json={"input": "?"}).status_code == 503, "nothing passes unjudged"
        for host in ("evil.example", "127.0.0.1.evil.example", "10.0.0.1:80", "[::2]", "[::1", ""):
            assert httpx.get(f"{url}/healthz", headers={"Host": host}).status_code == 400, host
        for host in ("localhost", "LOCALHOST:8000", "127.0.0.2", "127.0.0.2:80", "[::1]", "[::1]:8000"):
            assert httpx.get(f"{url}/healthz", headers={"Host": host}).status_code == 200, host
        asking = threading.Thread(target=lambda: found.append(chat(url, "?", 60)))
        asking.start()
        while not service.engine.n_running:
            time.sleep(0.001)
        server.should_exit = True
        asking.join()
        serving.join()
    assert found[0].json()["choices"][0]["finish_reason"] in ("stop", "length")
    assert not service.engine.is_ready
    assert session_base.attachment is None


def test_what_cannot_be_served_is_told_before_anything_is_loaded(
    policy: Path, tmp_path: Path, run: Callable[..., Ran]
) -> None:
    with pytest.raises(ConfigError, match="everybody who reaches"):
        serve_command(ServeOptions("builtin", policy, host="0.0.0.0"))
    with pytest.raises(InputError, match="is no folder"):
        serve_command(ServeOptions("builtin", policy, adapter_roots=(tmp_path / "none",)))
    missing = run("serve", "--policy", str(tmp_path / "none.yaml"))
    assert missing.code == 2
    assert "cannot be read" in missing.err


def test_a_port_that_is_taken_is_told(policy: Path, run: Callable[..., Ran], tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port, audit = str(taken.getsockname()[1]), f"sqlite:///{tmp_path}/audit.db"
        found = run("serve", "--policy", str(policy), "--port", port, "--audit", audit)
    assert (found.code, found.out) == (2, "")
    assert found.err.startswith(f"safeside: Cannot listen at 127.0.0.1, port {port}: Address already in use. Stop")
    nowhere = run("serve", "--policy", str(policy), "--host", "127.0.0.1.invalid", "--keys", str(tmp_path / "keys"))
    assert (nowhere.code, "Cannot listen at 127.0.0.1.invalid" in nowhere.err) == (2, True)
    assert not (tmp_path / "audit.db").exists(), "nothing was loaded"


def test_a_reload_loads_no_adapter_and_says_so(policy: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    options = ServeOptions("builtin", policy, audit=f"sqlite:///{tmp_path}/audit.db")
    service = make_service(options)
    try:
        before = service.fingerprints
        reload(service, options)
        assert "adapters stay" not in caplog.text
        policy.write_text(POLICY.replace("builtin:harm", "elsewhere"))
        reload(service, options)
        assert "adapters stay as loaded; POST /v1/adapters/load or a restart changes harm" in caplog.text
        assert service.fingerprints == before
    finally:
        service.close(0.0)


def test_keys_of_tenants_that_the_policy_file_does_not_name_are_told(
    policy: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A misspelled tenant has the deployment's policies alone."""
    for name, tenant in (("web", "shcool"), ("app", "school")):
        make_key(keys := tmp_path / "keys.yaml", name, {"tenant": tenant})
    options = ServeOptions("builtin", policy, keys, audit=f"sqlite:///{tmp_path}/audit.db")
    service = make_service(options)
    try:
        assert "does not name" not in caplog.text, "a file without tenants means everybody"
        policy.write_text(POLICY + "tenants: {school: house}")
        reload(service, options)
        assert "does not name the tenants of these keys" in caplog.text
        assert "web (shcool)" in caplog.text
        assert "app (school)" not in caplog.text
    finally:
        service.close(0.0)


@pytest.mark.parametrize("broken", ["policy", "keys"])
def test_a_reload_that_fails_keeps_policies_and_keys(policy: Path, tmp_path: Path, broken: str) -> None:
    make_key(keys := tmp_path / "keys.yaml", "shop", {"tenant": "shop"})
    options = ServeOptions("builtin", policy, keys, audit=f"sqlite:///{tmp_path}/audit.db")
    service = make_service(options)
    try:
        version, known = service.book.version, service.keys
        changed = ("guard: harm", "guard: gone") if broken == "policy" else ("0.8", "0.9")
        policy.write_text(POLICY.replace(*changed))
        if broken == "keys":
            keys.write_text("keys: {")
        reload(service, options)
        assert policy.read_text() != POLICY
        assert (service.book.version, service.keys) == (version, known)
        assert b'safeside_policy_reloads_total{result="refused"} 1.0' in service.metrics.exposition()
    finally:
        service.close(0.0)
