"""A chat endpoint that speaks OpenAI's protocol, with time limits, retries and a ceiling on what it may cost.

Whatever goes wrong is an ``EndpointError`` that says so; the caller decides what that means.  The key goes into one
header and nowhere else: not into messages, records or another host's requests (redirects are refused).
"""

from __future__ import annotations

import json
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from http.client import HTTPException, HTTPResponse
from reprlib import repr as shortened
from threading import Thread
from urllib.parse import urlsplit

from safeside.errors import InputError, SafesideError

_TRANSIENT = (408, 409, 425, 429, 500, 502, 503, 504, 529)
_LARGEST_REPLY = 1 << 20  # bytes
_LONGEST_WAIT_S = 60.0
_FAILURES_IN_A_ROW = 5  # after so many, each with all its retries, nothing more is asked
_SURROGATE = re.compile("[\ud800-\udfff]")


class EndpointError(SafesideError, RuntimeError):
    """The endpoint gave no usable reply, or may not be asked any more."""

    def __init__(self, message: str, n_tokens: int = 0) -> None:
        super().__init__(message)
        self.n_tokens = n_tokens
        """Tokens that the failed attempts are taken to have cost."""


class _AttemptError(Exception):
    """This attempt failed, another may not."""

    def __init__(self, problem: str, wait_s: float | None = None) -> None:
        super().__init__(problem)
        self.wait_s = wait_s


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a language model is asked, and how patiently."""

    url: str
    """The protocol's root, such as ``http://localhost:8000/v1``."""
    model: str
    """What the endpoint calls the model."""
    key: str | None = field(default=None, repr=False)
    """Sent as a bearer token."""
    timeout_s: float = 60.0
    """Seconds that one attempt may take, from looking up the host's name to the last byte."""
    n_retries: int = 4
    """Further attempts after a timeout, a broken connection, an unreadable reply, 429 or 5xx."""
    first_wait_s: float = 1.0
    """Seconds before the first retry; doubled each time, unless the endpoint says how long."""
    max_tokens: int = 2_000_000
    """Ceiling of all tokens, asked and answered together."""
    max_reply_tokens: int = 400
    """Longest reply."""

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username is not None:
            raise InputError(f"An endpoint is an address such as http://localhost:8000/v1; got {self.url!r}.")
        if not self.model.strip():
            raise InputError("An endpoint needs the name of a model. Give the one that it serves.")
        if not 0 < self.timeout_s < float("inf") or self.n_retries < 0 or self.first_wait_s < 0:
            raise InputError(
                f"timeout_s must be above 0, n_retries and first_wait_s at least 0; got {self.timeout_s}, "
                f"{self.n_retries} and {self.first_wait_s}."
            )
        if self.max_tokens < 1 or self.max_reply_tokens < 1:
            raise InputError(
                f"max_tokens and max_reply_tokens must be at least 1; got {self.max_tokens} and "
                f"{self.max_reply_tokens}."
            )


def endpoint_of(url: str | None, model: str | None, key: str | None, max_tokens: int) -> Endpoint | None:
    """The endpoint that options name, if they name one; an address or a model alone is an InputError."""
    if url is None and model is None:
        return None
    if url is None or model is None:
        raise InputError("A judge's endpoint needs --endpoint URL and --judge-model NAME; got one of them.")
    return Endpoint(url, model, key, max_tokens=max_tokens)


@dataclass(frozen=True, slots=True)
class Reply:
    """What the model said, and what it cost."""

    text: str
    n_tokens: int
    """Asked and answered, as the endpoint counts them, else estimated; failed attempts included."""


class ChatClient:
    """Asks one endpoint, one prompt after the other, and counts what was spent."""

    def __init__(self, endpoint: Endpoint, sleep: Callable[[float], None] = time.sleep) -> None:
        self.endpoint = endpoint
        self.n_spent = 0
        """Tokens so far."""
        self._sleep = sleep
        self._n_failures = 0
        self._opener = _opener()

    def ask(self, prompt: str) -> Reply:
        """The reply to one user's message, at temperature 0; an EndpointError where there is none."""
        self._check_allowed(prompt)
        before, wait_s, problems = self.n_spent, self.endpoint.first_wait_s, []
        for attempt in range(self.endpoint.n_retries + 1):
            try:
                text, n_tokens = self._attempt(prompt)
            except _AttemptError as failure:
                problems.append(str(failure))
                self.n_spent += estimated_tokens(prompt)  # it may well be charged
                if attempt < self.endpoint.n_retries:
                    self._check_budget(prompt, before)
                    self._sleep(min(_LONGEST_WAIT_S, wait_s if failure.wait_s is None else failure.wait_s))
                    wait_s *= 2
                continue
            except EndpointError as error:
                self._n_failures += 1
                raise EndpointError(str(error), self.n_spent - before) from error
            self._n_failures = 0
            self.n_spent += n_tokens
            return Reply(text, self.n_spent - before)
        self._n_failures += 1
        raise EndpointError(f"{len(problems)} attempts failed, the last: {problems[-1]}", self.n_spent - before)

    def _check_allowed(self, prompt: str) -> None:
        if self._n_failures >= _FAILURES_IN_A_ROW:
            raise EndpointError(f"not asked: the endpoint failed {_FAILURES_IN_A_ROW} times in a row")
        self._check_budget(prompt, self.n_spent)

    def _check_budget(self, prompt: str, before: int) -> None:
        needed = estimated_tokens(prompt) + self.endpoint.max_reply_tokens
        if self.n_spent + needed > self.endpoint.max_tokens:
            raise EndpointError(
                f"not asked: {self.n_spent} of {self.endpoint.max_tokens} tokens are spent, and this may take {needed}",
                self.n_spent - before,
            )

    def _attempt(self, prompt: str) -> tuple[str, int]:
        request = urllib.request.Request(
            self.endpoint.url.rstrip("/") + "/chat/completions",
            data=json.dumps(self._body(prompt)).encode(),
            headers={"Content-Type": "application/json", "Accept": "application/json", **self._authorization()},
            method="POST",
        )
        try:
            content = _within(self.endpoint.timeout_s, lambda: self._exchange(request))
        except TimeoutError as error:
            raise _AttemptError(f"no reply within {self.endpoint.timeout_s:g} s") from error
        return _read_reply(content, prompt)

    def _exchange(self, request: urllib.request.Request) -> bytes:
        """The body of the answer to one request; it changes nothing here, for it may end after it was given up."""
        deadline = time.monotonic() + self.endpoint.timeout_s
        try:
            with self._opener.open(request, timeout=self.endpoint.timeout_s) as response:
                return _read(response, deadline)
        except urllib.error.HTTPError as error:
            with error:
                raise _status_error(error) from error
        except TimeoutError:
            raise
        except (urllib.error.URLError, HTTPException, OSError) as error:
            reason = error.reason if isinstance(error, urllib.error.URLError) else error
            if isinstance(reason, TimeoutError):
                raise reason from error
            raise _AttemptError(f"the connection failed: {reason}") from error

    def _body(self, prompt: str) -> dict[str, object]:
        return {
            "model": self.endpoint.model,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": 0,
            "max_tokens": self.endpoint.max_reply_tokens,
        }

    def _authorization(self) -> Mapping[str, str]:
        return {"Authorization": f"Bearer {self.endpoint.key}"} if self.endpoint.key else {}


def _status_error(error: urllib.error.HTTPError) -> Exception:
    """Whether another attempt may help."""
    if error.code in _TRANSIENT:
        return _AttemptError(f"status {error.code}", _seconds(error.headers.get("Retry-After")))
    return EndpointError(f"status {error.code}; check the endpoint's address, key and model")


def _within(seconds: float, work: Callable[[], bytes]) -> bytes:
    """What ``work`` gives or raises, or a TimeoutError.

    Time limits of sockets hold for each part, and none for names; what is late goes on in a thread that nobody waits
    for.
    """
    outcome: Future[bytes] = Future()

    def run() -> None:
        try:
            outcome.set_result(work())
        except Exception as error:  # handed to whoever waits
            outcome.set_exception(error)

    Thread(target=run, daemon=True).start()
    return outcome.result(seconds)


def _opener() -> urllib.request.OpenerDirector:
    """Without the handler of redirects: one would carry the key to another host."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
    ):
        opener.add_handler(handler)
    return opener


def estimated_tokens(text: str) -> int:
    """More tokens than most tokenizers make of ``text``: one for every three bytes, and some for the template."""
    return len(text.encode()) // 3 + 16


def encodable(text: str) -> str:
    """``text`` with U+FFFD for lone surrogates: JSON can spell them, and no file of records can hold them."""
    return _SURROGATE.sub("\ufffd", text)


def _read(response: HTTPResponse, deadline: float) -> bytes:
    """The body; socket time limits hold for each part, ``deadline`` for all of it."""
    parts: list[bytes] = []
    while part := response.read1(1 << 16):
        parts.append(part)
        if sum(map(len, parts)) > _LARGEST_REPLY:
            raise _AttemptError(f"a reply of more than {_LARGEST_REPLY} bytes")
        if time.monotonic() > deadline:
            raise TimeoutError
    return b"".join(parts)


def _read_reply(content: bytes, prompt: str) -> tuple[str, int]:
    """Text and tokens of a reply in the protocol's shape."""
    try:
        values = json.loads(content)
        text = values["choices"][0]["message"]["content"]
    except (ValueError, RecursionError, KeyError, IndexError, TypeError) as error:
        raise _AttemptError(f"not a chat completion: {shortened(content.decode(errors='replace'))}") from error
    if not isinstance(text, str):
        raise _AttemptError(f"a chat completion without text: {shortened(text)}")
    text = encodable(text)
    usage = values.get("usage")
    total = usage.get("total_tokens") if isinstance(usage, dict) else None
    if isinstance(total, int) and not isinstance(total, bool) and total > 0:
        return text, total
    return text, estimated_tokens(prompt) + estimated_tokens(text)


def _seconds(text: str | None) -> float | None:
    """A Retry-After in seconds; dates are left to our own waiting."""
    return float(text) if text is not None and text.strip().isdecimal() else None
