"""Faults, one after the other, beside ordinary requests: is any of these lost, does anybody get what is not his?

``injected`` counts faults; ``lost`` ordinary requests without their own whole answer or without its decisions in the
audit log; ``leaked`` answers that hold another client's text or verdict.
"""

from __future__ import annotations

import json
import socket
import sqlite3
import threading
import time
from collections.abc import Callable
from urllib.parse import urlparse

import httpx

from safeside.artifact import load_adapter, save_adapter
from safeside.base.model import load_base
from safeside.errors import AuditError, SafesideError
from serve_load import GUARDED, Served, served
from tidy import Row, figure_row

N_TOKENS = 16
_HEADERS = {"Content-Type": "application/json"}


def fault_rows(n_requests: int) -> list[Row]:
    """Rows ``fault, metric`` of every fault on the built-in base."""
    base = load_base("builtin")
    guard, aligner = load_adapter("builtin:harm", base), load_adapter("builtin:refuse", base)
    rows: list[Row] = []
    with served(base, [guard, aligner], GUARDED, max_rows=8) as server:
        save_adapter(aligner, server.folder / "refuse")
        expected = {number: _ask(server, number) for number in range(n_requests)}
        for name, inject in FAULTS.items():
            found: dict[int, dict[str, object] | None] = {}
            threads = [threading.Thread(target=_keep, args=(server, number, found)) for number in range(n_requests)]
            for thread in threads:
                thread.start()
            injected = inject(server)
            for thread in threads:
                thread.join()
            counts = {"injected": injected, "lost": 0, "leaked": 0}
            for number, answer in found.items():
                counts["lost"] += answer is None or not _is_audited(server, answer)
                counts["leaked"] += answer is not None and _is_foreign(answer, number, expected)
            if name == "audit_disk_full":  # refused is right here: what may not happen is an answer without a record
                counts["lost"] = sum(
                    answer is not None and not _is_audited(server, answer) for answer in found.values()
                )
            rows += [figure_row({"fault": name}, metric, count, n=n_requests) for metric, count in counts.items()]
    return rows


def _body(number: int, **more: object) -> dict[str, object]:
    messages = [{"role": "user", "content": f"What is {number} and {number + 1}, and how are {number} eggs boiled?"}]
    return {"model": "base", "messages": messages, "max_tokens": N_TOKENS, "temperature": 0, **more}


def _ask(server: Served, number: int) -> dict[str, object]:
    while True:
        found = httpx.post(f"{server.url}/v1/chat/completions", json=_body(number), timeout=120)
        if found.status_code != 429:
            found.raise_for_status()
            answer: dict[str, object] = found.json()
            return answer
        time.sleep(0.1)


def _try(server: Served, number: int) -> dict[str, object] | None:
    try:
        return _ask(server, number)
    except httpx.HTTPError:
        return None


def _keep(server: Served, number: int, found: dict[int, dict[str, object] | None]) -> None:
    found[number] = _try(server, number)


def _scores(answer: dict[str, object]) -> list[float]:
    return [verdict["score"] for verdict in answer["safety"]["verdicts"] if verdict["stage"] == "prompt"]  # type: ignore[index]


def _is_foreign(answer: dict[str, object], number: int, expected: dict[int, dict[str, object]]) -> bool:
    """Whether its verdict is nearer to another client's than rounding of its own can explain."""
    own = _scores(expected[number])
    return any(abs(one - other) > 1e-4 for one, other in zip(_scores(answer), own, strict=True))


def _is_audited(server: Served, answer: dict[str, object]) -> bool:
    with sqlite3.connect(server.folder / "audit.db") as database:
        query = "SELECT count(*) FROM safeside_decisions WHERE trace_id = ?"
        (count,) = database.execute(query, (answer["safety"]["trace_id"],)).fetchone()  # type: ignore[index]
    return count == 2


def _disconnects(server: Served) -> int:
    """Streams that are left after their first bytes."""
    for number in range(10):
        body = _body(number, stream=True)
        with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body, timeout=120) as response:
            next(response.iter_raw(), b"")
    return 10


def _malformed(server: Served) -> int:
    for body in (b"", b"{", b"[" * 10_000, b"\xff\xfe", b'{"model": 1}', b"null") * 3:
        found = httpx.post(f"{server.url}/v1/chat/completions", content=body, headers=_HEADERS, timeout=120)
        assert found.status_code == 400, found.status_code
    return 18


def _oversized(server: Served) -> int:
    for _ in range(10):
        found = httpx.post(f"{server.url}/v1/chat/completions", content=b"x" * (1 << 17), headers=_HEADERS, timeout=120)
        assert found.status_code == 413, found.status_code
    return 10


def _slow_readers(server: Served) -> int:
    """Streams that nobody reads for a while, and then somebody does."""
    place = urlparse(server.url)
    connections = []
    for number in range(10):
        connection = socket.create_connection((place.hostname, place.port))
        body = json.dumps(_body(number, stream=True)).encode()
        lines = ("POST /v1/chat/completions HTTP/1.1", "Host: x", f"Content-Length: {len(body)}", "Connection: close")
        head = "\r\n".join([*lines, "Content-Type: application/json", "", ""])
        connection.sendall(head.encode() + body)
        connections.append(connection)
    time.sleep(1.0)
    for connection in connections:
        with connection, connection.makefile("rb") as reader:
            assert b"[DONE]" in reader.read()
    return 10


def _unload(server: Served) -> int:
    """An aligner that is exchanged while answers are written."""
    for _ in range(3):
        adapters = list(server.service.engine.adapters.values())
        server.service.engine.change(adapters).result(timeout=120)
    return 3


def _broken_policy(server: Served) -> int:
    before = server.service.book.version
    for text in ("policies: [", "{}", "policies: {x: {floor: 9}}\ndeployment: [x]"):
        (server.folder / "policy.yaml").write_text(text, encoding="utf-8")
        try:
            server.service.book.reload()
        except SafesideError:
            assert server.service.book.version == before
        else:
            raise AssertionError("a broken policy was taken")
    (server.folder / "policy.yaml").write_text(GUARDED, encoding="utf-8")
    return 3


def _disk_full(server: Served) -> int:
    """The audit log refuses for a second."""
    real = server.service.audit.append
    n_refused = 0

    def full(record: object) -> int:
        nonlocal n_refused
        n_refused += 1
        raise AuditError("The disk is full.")

    server.service.audit.append = full  # type: ignore[method-assign]
    time.sleep(1.0)
    server.service.audit.append = real  # type: ignore[method-assign]
    return n_refused


FAULTS: dict[str, Callable[[Served], int]] = {
    "disconnect": _disconnects,
    "malformed_json": _malformed,
    "oversized_body": _oversized,
    "slow_reader": _slow_readers,
    "adapter_exchange": _unload,
    "broken_policy": _broken_policy,
    "audit_disk_full": _disk_full,
}
