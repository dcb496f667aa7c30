"""Clients of two tenants that ask a server, each its own question, and what became of each request."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import httpx

from serve_process import ASK_S, TENANTS, Json, Process

SHORT, LONG = 16, 384
"""Tokens of an answer; the built-in base holds 512."""
CHATS = "/v1/chat/completions"
CALMER = "calmer"
_LATER = ("rate_limit_exceeded", "unavailable")


@dataclass(frozen=True, slots=True)
class Asked:
    """One request.  Its seed makes its answer the same each time."""

    number: int
    n_tokens: int = SHORT
    is_stream: bool = False
    seed: int = 0
    kind: str = "plain"
    """``steered`` where it asks for the policy ``CALMER``, so that its answer is another."""
    more: Json = field(default_factory=dict)

    @property
    def tenant(self) -> str:
        """Whose it is."""
        return TENANTS[self.number % 2]

    @property
    def text(self) -> str:
        """What it asks: no other number asks the same."""
        return f"What is {self.number} and {self.number + 1}, and how are {self.number} eggs boiled?"

    @property
    def body(self) -> Json:
        """As it is sent."""
        messages = [{"role": "user", "content": self.text}]
        stream = {"stream": True, "stream_options": {"include_usage": True}} if self.is_stream else {}
        sampling = {"temperature": 2, "seed": self.seed, "max_tokens": self.n_tokens}
        named = {"safety": {"policy": CALMER}} if self.kind == "steered" else {}
        return {"model": "builtin", "messages": messages, **sampling, **stream, **named, **self.more}


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one request."""

    asked: Asked
    answer: Json | None = None
    """The whole answer."""
    refusal: str = ""
    """The code of the error that it was refused with, ``unreachable`` where nobody took it."""
    trace_id: str = ""
    """Of a stream that began."""
    is_left: bool = False
    """Whether its client went away."""
    n_put_off: int = 0
    """How often it was told to come back before."""

    @property
    def is_broken(self) -> bool:
        """Whether neither an answer came nor an error that says why there is none."""
        return self.answer is None and not self.refusal and not self.is_left


def ask(process: Process, asked: Asked) -> Outcome:
    """Ask until it is answered, as long as the server says to come back."""
    n_put_off = 0
    while True:
        try:
            outcome = replace(_asked(process, asked), n_put_off=n_put_off)
        except httpx.ReadTimeout:
            return Outcome(asked)
        if outcome.refusal not in _LATER or process.is_ending or not process.is_up:
            return outcome
        n_put_off += 1
        time.sleep(0.05)


def leave(process: Process, asked: Asked, after: float) -> Outcome:
    """Ask, and go away after so many events of a stream or so many seconds of a whole answer."""
    try:
        return _asked(process, asked, after)
    except httpx.ReadTimeout:
        return Outcome(asked, is_left=True)


def _asked(process: Process, asked: Asked, leave_after: float = float("inf")) -> Outcome:
    waits = leave_after if leave_after < ASK_S and not asked.is_stream else ASK_S
    options = {"json": asked.body, "headers": process.headers(asked.tenant)}
    try:
        with httpx.stream("POST", process.url + CHATS, **options, timeout=httpx.Timeout(ASK_S, read=waits)) as response:
            if asked.is_stream and response.status_code == httpx.codes.OK:
                return heard(asked, response.iter_lines(), leave_after)
            return _whole(asked, response.status_code, response.read())
    except (httpx.ConnectError, httpx.ReadError, httpx.WriteError):  # refused or reset, before any byte of an answer
        return Outcome(asked, refusal="unreachable")
    except httpx.RemoteProtocolError:
        return Outcome(asked)


def _whole(asked: Asked, status: int, content: bytes) -> Outcome:
    try:
        found = json.loads(content)
    except ValueError:
        return Outcome(asked)
    if status == httpx.codes.OK:
        return Outcome(asked, found)
    return Outcome(asked, refusal=_code(found))


def _code(found: Json) -> str:
    """The code of an OpenAI error; empty where it is none."""
    error = found.get("error")
    return str(error.get("code") or error.get("type") or "") if isinstance(error, dict) else ""


def heard(asked: Asked, lines: Iterable[str], leave_after: float = float("inf")) -> Outcome:
    """What a stream's lines say: the whole answer, an error, or that it was cut."""
    outcome, text, usage, safety = Outcome(asked), "", {}, {}
    n_events = 0
    try:
        for line in lines:
            if line == "data: [DONE]":
                answer = {"choices": [{"message": {"content": text}}], "safety": safety, "usage": usage}
                return replace(outcome, answer=answer)
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line.removeprefix("data: "))
            if "error" in chunk:
                return replace(outcome, refusal=_code(chunk))
            outcome = replace(outcome, trace_id=str(chunk["id"]).rpartition("-")[2])
            text += "".join(choice["delta"].get("content") or "" for choice in chunk["choices"])
            usage = chunk.get("usage") or usage
            safety = chunk["safety"] if "verdicts" in chunk.get("safety", {}) else safety
            n_events += 1
            if n_events >= leave_after:
                return replace(outcome, is_left=True)
    except httpx.TransportError:
        pass  # cut short
    return outcome


@dataclass
class Crowd:
    """Clients that ask one thing after the other, each the same, until they are told to stop or nobody listens."""

    process: Process
    seeds: Sequence[int]
    """One for each client, by which its answer is long."""
    n_tokens: int = SHORT
    steered: Sequence[int] = ()
    """Seeds of some of them where another policy steers."""
    outcomes: list[Outcome] = field(default_factory=list)
    is_over: threading.Event = field(default_factory=threading.Event)

    @property
    def n_clients(self) -> int:
        """How many they are."""
        return len(self.seeds)

    def asked(self, number: int, n_tokens: int, is_stream: bool = False, **more: object) -> Asked:
        """A request of one of them."""
        return Asked(number, n_tokens, is_stream, self.seeds[number], more=more)

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
        generator = random.Random(number)
        while not self.is_over.is_set():
            outcome = ask(self.process, self.asked(number, self.n_tokens, generator.random() < 0.5))
            self.outcomes.append(outcome)
            if outcome.refusal == "unreachable" or outcome.is_broken:
                return
