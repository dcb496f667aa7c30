"""Faults, one after the other, beside ordinary requests of two tenants: is any lost, does anybody get what is not his?

``injected`` counts faults that took place, as the server's log or the clients tell: a reader that was slow enough to
hold its answer up, an adapter that steered a stream as it was unloaded.  ``lost`` and ``leaked`` are of serve_counts.
Half of the ordinary requests are streams.  Answers are drawn by a seed of each client's, and compared with what the
client got before any fault.
"""

from __future__ import annotations

import json
import random
import resource
import signal
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from io import BufferedReader
from urllib.parse import urlparse

import httpx

from safeside.terminal import note
from serve_counts import NOTHING, Right, is_foreign, lost, text_of
from serve_crowd import CALMER, CHATS, LONG, SHORT, Asked, Crowd, Outcome, ask, heard, leave
from serve_process import ASK_S, DRAIN_S, POLICY, Decisions, Json, Process, process_of
from tidy import Row, figure_row

STEERED = f"{POLICY.replace('{harm:', '{calm: FOLDER, harm:')}  {CALMER}: {{floor: 0.1}}\n"
STEERED_TOKENS = 64  # few answers that are steered are longer
_TIMES = 10
_SLOW, _UNLOADED, _SEEDS = 4, 3, 200
_RECEIVED, _SEGMENT = 2048, 536  # bytes that a slow reader takes; small segments keep the server's buffer small
_WORDY: Json = {"safety": {"tokens": True}, "logprobs": True, "top_logprobs": 20}
_TOO_LATE_S = 1  # to drain: the long answers take several seconds


@dataclass(frozen=True, slots=True)
class Fault:
    """How a fault is injected, returning how often, and what is right under it."""

    inject: Callable[[Process, Crowd], int]
    right: Right = NOTHING
    drain_s: float = DRAIN_S
    n_tokens: int = SHORT


@dataclass(frozen=True, slots=True)
class Expectation:
    """What a client gets while nothing goes wrong, and by which seed."""

    answer: Json
    seed: int


def fault_rows(n_clients: int) -> tuple[list[Row], dict[str, Json]]:
    """Rows ``fault, metric`` of every fault on the built-in base, and how the requests beside each ended."""
    rows: list[Row] = []
    notes: dict[str, Json] = {}
    with process_of() as process:
        found = expected_of(process, n_clients)
        expected = {key: one.answer for key, one in found.items()}
        seeds = [found["plain", number].seed for number in range(n_clients)]
        steered = [one.seed for (kind, _), one in found.items() if kind == "steered"]
        for name, fault in FAULTS.items():
            process.restart(fault.drain_s)
            before = process.decisions()
            crowd = Crowd(process, seeds, fault.n_tokens, steered)
            with crowd.asking():
                injected = fault.inject(process, crowd)
            decisions = process.settled(before) if process.is_up else _after(process, before)
            if name == "disconnect":
                injected = sum(steps[-1].action == "abandoned" for steps in decisions.values())
            counts = {
                "injected": injected,
                "lost": lost(fault.right, crowd.outcomes, decisions, expected),
                "leaked": sum(is_foreign(outcome, expected, decisions) for outcome in crowd.outcomes),
            }
            notes[name] = ends_of(crowd.outcomes)
            note(f"{name}: {counts}, {notes[name]}")
            n = len(crowd.outcomes)
            rows += [figure_row({"fault": name}, metric, count, n=n) for metric, count in counts.items()]
    return rows, notes


def expected_of(process: Process, n_clients: int) -> dict[tuple[str, int], Expectation]:
    """A long answer of each client under the policies of the start, of some under those that steer by ``calm``."""
    found = {}
    with ThreadPoolExecutor(n_clients) as pool:
        for number, one in enumerate(pool.map(lambda number: _long(process, Asked(number, LONG)), range(n_clients))):
            found["plain", number] = one
        _take_calm(process)
        asked = [Asked(number, STEERED_TOKENS, kind="steered") for number in range(min(_UNLOADED, n_clients))]
        for number, one in enumerate(pool.map(lambda each: _long(process, each), asked)):
            found["steered", number] = one
    _drop_calm(process)
    for (kind, number), one in found.items():
        if kind == "steered":
            other = ask(process, Asked(number, STEERED_TOKENS, seed=one.seed)).answer
            assert other is not None, "a request was refused without a fault"
            assert text_of(other) != text_of(one.answer), (
                f"the second aligner changes nothing in the answer of {number}"
            )
    return found


def _long(process: Process, asked: Asked) -> Expectation:
    """An answer of all the tokens asked for, by the first seed that gives one."""
    for seed in range(_SEEDS):
        answer = ask(process, replace(asked, seed=seed)).answer
        assert answer is not None, "a request was refused without a fault"
        if answer["usage"]["completion_tokens"] == asked.n_tokens:
            return Expectation(answer, seed)
    raise AssertionError(f"no answer of {asked.n_tokens} tokens by {_SEEDS} seeds")


def ends_of(outcomes: list[Outcome]) -> dict[str, int]:
    """How many requests were answered, left, broken, and refused with each code."""
    counts: dict[str, int] = {}
    for outcome in outcomes:
        end = "answered" if outcome.answer is not None else "left" if outcome.is_left else outcome.refusal or "broken"
        counts[end] = counts.get(end, 0) + 1
    return counts


def _after(process: Process, before: Decisions) -> Decisions:
    """The decisions of a server that ended; the log is read by one that runs again, as an operator's would be."""
    process.restart()
    return {trace_id: steps for trace_id, steps in process.decisions().items() if trace_id not in before}


def _disconnects(process: Process, crowd: Crowd) -> int:
    """Clients that go away at random, before, amid and after the first words, from streams and from whole answers."""
    generator = random.Random(0)
    for turn in range(2 * _TIMES):
        asked = crowd.asked(turn % crowd.n_clients, LONG // 4, is_stream=turn % 2 == 0)
        after = generator.randint(1, LONG // 8) if asked.is_stream else generator.uniform(0.01, 0.5)
        crowd.outcomes.append(leave(process, asked, after))
    return 2 * _TIMES


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
    found = httpx.post(process.url + CHATS, content=body, headers=process.headers("even"), timeout=120)
    assert found.status_code == status, found.status_code


def _slow_readers(process: Process, crowd: Crowd) -> int:
    """Long streams that nobody reads until a later one has ended; counts those whose answer waited for its reader."""
    numbers = range(min(_SLOW, crowd.n_clients))
    asked = [crowd.asked(number, LONG, is_stream=True, **_WORDY) for number in numbers]
    with ExitStack() as stack:
        readers = [stack.enter_context(_opened(process, each)) for each in asked]
        begun = [_first_lines(reader) for reader in readers]
        crowd.outcomes.append(ask(process, crowd.asked(numbers[-1], LONG)))  # begun later, and has as many tokens
        log = process.decisions()
        traces = [heard(each, lines).trace_id for each, lines in zip(asked, begun, strict=True)]
        n_held = sum(trace in log and log[trace][-1].stage == "prompt" for trace in traces)
        for each, lines, reader in zip(asked, begun, readers, strict=True):
            crowd.outcomes.append(heard(each, [*lines, *reader.read().decode().splitlines()]))
    return n_held


@contextmanager
def _opened(process: Process, asked: Asked) -> Iterator[BufferedReader]:
    """A stream that is asked for, over a connection of which little is taken before it is read."""
    place, body = urlparse(process.url), json.dumps(asked.body).encode()
    fields = {**process.headers(asked.tenant), "Host": "x", "Content-Length": len(body), "Connection": "close"}
    head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVED)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, _SEGMENT)
        connection.settimeout(ASK_S)
        connection.connect((place.hostname, place.port))
        connection.sendall(f"POST {CHATS} HTTP/1.1\r\n{head}\r\n".encode() + body)
        with connection.makefile("rb", _RECEIVED) as reader:
            yield reader


def _first_lines(reader: BufferedReader) -> list[str]:
    """All up to the first event, by which its request has a name."""
    lines = [""]
    while not lines[-1].startswith("data: {"):
        line = reader.readline()
        assert line, f"the stream ended before its first event: {lines}"
        lines.append(line.decode().rstrip())
    return lines


def _unload(process: Process, crowd: Crowd) -> int:
    """An aligner that no policy asks for any more is unloaded while it steers a stream; counts unloadings amid one."""
    n_amid = 0
    for number in range(min(_UNLOADED, crowd.n_clients)):
        _take_calm(process)
        asked = Asked(number, STEERED_TOKENS, True, crowd.steered[number], "steered")
        options = {"json": asked.body, "headers": process.headers(asked.tenant), "timeout": ASK_S}
        with httpx.stream("POST", process.url + CHATS, **options) as response:
            lines = response.iter_lines()
            begun = [line for line, _ in zip(lines, range(5), strict=False)]
            with ThreadPoolExecutor(1) as pool:
                dropping = pool.submit(_drop_calm, process)
                crowd.wait(lambda: process.policy.read_text(encoding="utf-8") == POLICY)
                n_amid += not dropping.done()
                crowd.outcomes.append(heard(asked, [*begun, *lines]))
                dropping.result()
    return n_amid


def _take_calm(process: Process) -> None:
    """Load the aligner ``calm`` and steer with it what asks for the policy ``CALMER``."""
    folder = str(process.folder / "adapters" / "calm")
    loaded = process.post("/v1/adapters/load", {"name": "calm", "path": folder}, "admin")
    assert loaded.status_code == httpx.codes.OK, loaded.text
    _take_policy(process, STEERED.replace("FOLDER", folder))


def _drop_calm(process: Process) -> None:
    _take_policy(process, POLICY)
    unloaded = process.post("/v1/adapters/unload", {"name": "calm"}, "admin")
    assert unloaded.status_code == httpx.codes.OK, unloaded.text


def _take_policy(process: Process, text: str) -> None:
    """Have other policies hold."""
    before = process.version()
    process.policy.write_text(text, encoding="utf-8")
    process.running.send_signal(signal.SIGHUP)
    end = time.monotonic() + ASK_S
    while process.version() == before:
        assert time.monotonic() < end, "the policies were not read again"
        time.sleep(0.02)


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
    """No file of the server may grow until everybody met it; counts the requests that are refused for it."""
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


def _sigterm_amid(process: Process, crowd: Crowd) -> int:
    """SIGTERM while an answer of every client is being written."""
    known = process.decisions()

    def are_all_begun() -> bool:
        new = [steps for key, steps in process.decisions().items() if key not in known]
        return sum(steps[-1].stage == "prompt" for steps in new) >= crowd.n_clients

    crowd.wait(are_all_begun)
    return _sigterm(process, crowd)


def _sigkill(process: Process, crowd: Crowd) -> int:
    process.stop(signal.SIGKILL)
    return 1


_STOPPED = frozenset({"unreachable", "unavailable"})
FAULTS = {
    "disconnect": Fault(_disconnects),
    "malformed_json": Fault(_malformed),
    "oversized_body": Fault(_oversized),
    "slow_reader": Fault(_slow_readers),
    "adapter_unloaded": Fault(_unload),
    "broken_policy": Fault(_broken_policy),
    "audit_disk_full": Fault(_disk_full, Right(frozenset({"audit_unavailable"}), may_cut=True, can_log=False)),
    "sigterm": Fault(_sigterm, Right(_STOPPED)),
    "sigterm_past_drain": Fault(_sigterm_amid, Right(_STOPPED, may_cut=True), _TOO_LATE_S, LONG),
    "sigkill": Fault(_sigkill, Right(is_kill=True)),
}
