"""Faults, one after the other, beside ordinary requests of two tenants: is any lost, does anybody get what is not his?

``injected`` counts faults.  ``lost`` counts ordinary requests without a whole answer, or whose decisions are not in the
audit log.  Where the fault is right to refuse (a full disk, a server that stops), a clean refusal is not lost; where it
kills, lost are decisions that a client was told of.  ``leaked`` counts answers with another client's text, verdict or
audit record.
"""

from __future__ import annotations

import json
import resource
import signal
import socket
import time
from collections.abc import Callable, Mapping
from urllib.parse import urlparse

import httpx

from serve_process import LINES, N_TOKENS, POLICY, Crowd, Json, Outcome, Process, ask, body_of, process_of, tenant_of
from tidy import Row, figure_row

_COMPLETE = ("prompt", "answer")
_TIMES = 10


def fault_rows(n_clients: int) -> list[Row]:
    """Rows ``fault, metric`` of every fault on the built-in base."""
    rows: list[Row] = []
    with process_of() as process:
        expected = {number: _answer(ask(process, number)) for number in range(n_clients)}
        for name, inject in FAULTS.items():
            process.restart()
            before = set(process.decisions())
            crowd = Crowd(process, n_clients)
            with crowd.asking():
                injected = inject(process, crowd)
            process.restart()
            decisions = {key: value for key, value in process.decisions().items() if key not in before}
            counts = {
                "injected": injected,
                "lost": lost(name, crowd.outcomes, decisions),
                "leaked": sum(is_foreign(outcome, expected, decisions) for outcome in crowd.outcomes),
            }
            rows += [
                figure_row({"fault": name}, metric, count, n=len(crowd.outcomes)) for metric, count in counts.items()
            ]
    return rows


def lost(fault: str, outcomes: list[Outcome], decisions: Mapping[str, list[tuple[str, str, str]]]) -> int:
    """How many requests a fault cost."""
    told = [outcome for outcome in outcomes if outcome.answer is not None]
    n_missing = sum(not _is_audited(_answer(outcome), decisions) for outcome in told)
    if fault == "sigkill":
        return n_missing
    if fault == "sigterm":  # of what was begun, nothing is left undone
        return n_missing + len(set(decisions) - {_answer(outcome)["safety"]["trace_id"] for outcome in told})
    refused = [outcome for outcome in outcomes if outcome.refusal]
    if fault == "audit_disk_full":
        refused = [outcome for outcome in refused if outcome.refusal != "audit_unavailable"]
    return n_missing + len(refused) + sum(outcome.is_broken for outcome in outcomes)


def is_foreign(
    outcome: Outcome, expected: Mapping[int, Json], decisions: Mapping[str, list[tuple[str, str, str]]]
) -> bool:
    """Whether an answer holds another client's text or verdict, or stands in the log as another tenant's."""
    if outcome.answer is None:
        return False
    safety, own = outcome.answer["safety"], expected[outcome.number]
    tenant = tenant_of(outcome.number)
    verdicts, owns = (
        [each for each in some["verdicts"] if each["stage"] == "prompt"] for some in (safety, own["safety"])
    )
    is_other_verdict = any(
        abs(one["score"] - other["score"]) > 1e-4 or one["threshold"] != LINES[tenant]
        for one, other in zip(verdicts, owns, strict=True)
    )
    others = {text_of(answer) for number, answer in expected.items() if number != outcome.number}
    is_other_text = text_of(outcome.answer) != text_of(own) and text_of(outcome.answer) in others
    is_other_tenant = any(name != tenant for name, *_ in decisions.get(safety["trace_id"], []))
    return is_other_verdict or is_other_text or is_other_tenant or safety["policy"] != f"house+{tenant}"


def text_of(answer: Json) -> str:
    """What the model wrote."""
    return str(answer["choices"][0]["message"]["content"])


def _answer(outcome: Outcome) -> Json:
    assert outcome.answer is not None, outcome.refusal
    return outcome.answer


def _is_audited(answer: Json, decisions: Mapping[str, list[tuple[str, str, str]]]) -> bool:
    found = decisions.get(answer["safety"]["trace_id"], [])
    return tuple(stage for _, stage, _ in found) == _COMPLETE


def _disconnects(process: Process, crowd: Crowd) -> int:
    """Streams that are left after their first bytes."""
    url = f"{process.url}/v1/chat/completions"
    for number in range(_TIMES):
        options = {"json": body_of(number, stream=True), "headers": process.headers(tenant_of(number)), "timeout": 120}
        with httpx.stream("POST", url, **options) as response:
            next(response.iter_raw(), b"")
    return _TIMES


def _malformed(process: Process, crowd: Crowd) -> int:
    bodies = (b"", b"{", b"[" * 10_000, b"\xff\xfe", b'{"model": 1}', b"null") * 3
    for body in bodies:
        _expect(process, body, 400)
    return len(bodies)


def _oversized(process: Process, crowd: Crowd) -> int:
    for _ in range(_TIMES):
        _expect(process, b"x" * (1 << 17), 413)
    return _TIMES


def _expect(process: Process, body: bytes, status: int) -> None:
    url = f"{process.url}/v1/chat/completions"
    found = httpx.post(url, content=body, headers=process.headers("even"), timeout=120)
    assert found.status_code == status, found.status_code


def _slow_readers(process: Process, crowd: Crowd) -> int:
    """Streams that nobody reads for a while, and then somebody does: each has its own text and verdicts."""
    place = urlparse(process.url)
    connections = []
    for number in range(crowd.n_clients):
        connection = socket.create_connection((place.hostname, place.port))
        body = json.dumps(body_of(number, stream=True)).encode()
        fields = {**process.headers(tenant_of(number)), "Host": "x", "Content-Length": len(body), "Connection": "close"}
        head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
        connection.sendall(f"POST /v1/chat/completions HTTP/1.1\r\n{head}\r\n".encode() + body)
        connections.append(connection)
    time.sleep(1.0)
    for number, connection in enumerate(connections):
        with connection, connection.makefile("rb") as reader:
            crowd.outcomes.append(Outcome(number, _joined(reader.read())))
    return len(connections)


def _joined(content: bytes) -> Json | None:
    """The whole answer of a stream's bytes; None where it was cut short."""
    if b"data: [DONE]" not in content:
        return None
    lines = [line for line in content.decode().splitlines() if line.startswith("data: {")]
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines]
    text = "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])
    safety = next(chunk["safety"] for chunk in reversed(chunks) if "verdicts" in chunk.get("safety", {}))
    return {"choices": [{"message": {"content": text}}], "safety": safety}


def _unload(process: Process, crowd: Crowd) -> int:
    """An aligner that is loaded, and unloaded while a stream that began with it is being written."""
    folder = str(process.folder / "adapters" / "calm")
    for number in (turn % crowd.n_clients for turn in range(3)):
        loaded = process.post("/v1/adapters/load", {"name": "calm", "path": folder}, "admin")
        body = body_of(number, stream=True, max_tokens=4 * N_TOKENS)
        options = {"json": body, "headers": process.headers(tenant_of(number)), "timeout": 120}
        with httpx.stream("POST", f"{process.url}/v1/chat/completions", **options) as response:
            pieces = response.iter_raw()
            begun = next(pieces, b"")
            unloaded = process.post("/v1/adapters/unload", {"name": "calm"}, "admin")
            answer = _joined(begun + b"".join(pieces))
        crowd.outcomes.append(Outcome(number, answer))
        assert (loaded.status_code, unloaded.status_code) == (200, 200), loaded.text + unloaded.text
    return 3


def _broken_policy(process: Process, crowd: Crowd) -> int:
    """Files that are no policies, read again by SIGHUP: the old ones stay."""
    before, texts = process.version(), ("policies: [", "{}", "policies: {x: {floor: 9}}\ndeployment: [x]")
    for number, text in enumerate(texts, 1):
        process.policy.write_text(text, encoding="utf-8")
        process.running.send_signal(signal.SIGHUP)
        crowd.wait(lambda: _n_refused_reloads(process) >= number)  # noqa: B023  # called at once
        assert process.version() == before, "a broken policy was taken"
    process.policy.write_text(POLICY, encoding="utf-8")
    return _n_refused_reloads(process)


def _n_refused_reloads(process: Process) -> int:
    return (process.folder / "log").read_text(encoding="utf-8").count("reload refused")


def _disk_full(process: Process, crowd: Crowd) -> int:
    """No file of the server may grow for a second; counts the requests that are refused for it."""
    limits = resource.prlimit(process.running.pid, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
    try:
        crowd.wait(lambda: _n_unaudited(crowd) >= crowd.n_clients)
    finally:
        resource.prlimit(process.running.pid, resource.RLIMIT_FSIZE, limits)
    n_before = len(crowd.outcomes)
    crowd.wait(lambda: any(outcome.answer is not None for outcome in crowd.outcomes[n_before:]))
    return _n_unaudited(crowd)


def _n_unaudited(crowd: Crowd) -> int:
    return sum(outcome.refusal == "audit_unavailable" for outcome in crowd.outcomes)


def _sigterm(process: Process, crowd: Crowd) -> int:
    process.stop(signal.SIGTERM)
    return 1


def _sigkill(process: Process, crowd: Crowd) -> int:
    process.stop(signal.SIGKILL)
    return 1


FAULTS: dict[str, Callable[[Process, Crowd], int]] = {
    "disconnect": _disconnects,
    "malformed_json": _malformed,
    "oversized_body": _oversized,
    "slow_reader": _slow_readers,
    "adapter_unloaded": _unload,
    "broken_policy": _broken_policy,
    "audit_disk_full": _disk_full,
    "sigterm": _sigterm,
    "sigkill": _sigkill,
}
