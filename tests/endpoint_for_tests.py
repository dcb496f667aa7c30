"""A chat endpoint on this machine that speaks the protocol, and misbehaves where it is told to."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Answer:
    """What the endpoint sends next."""

    text: str = ""
    """The model's reply; ``body`` unless it is empty."""
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    """Sent as it is."""
    n_tokens: int | None = 50
    """``usage`` of a reply; None leaves it out."""
    wait_s: float = 0.0
    """Before anything is sent."""
    drip_s: float = 0.0
    """Between the bytes of the body."""
    header_drip_s: float = 0.0
    """Between 110 lines of further headers, more than clients take."""
    hangs_up: bool = False
    """Closes the connection instead."""

    @property
    def content(self) -> bytes:
        usage = {} if self.n_tokens is None else {"usage": {"total_tokens": self.n_tokens}}
        return self.body or json.dumps({"choices": [{"message": {"content": self.text}}], **usage}).encode()


@dataclass
class Server:
    """A running endpoint: what it was asked, and what it says next (the last answer again and again)."""

    answers: list[Answer]
    url: str = ""
    asked: list[dict[str, object]] = field(default_factory=list)
    """The requests' bodies, with ``path`` and ``authorization``."""

    def next(self) -> Answer:
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]

    @property
    def prompts(self) -> list[str]:
        return [body["messages"][0]["content"] for body in self.asked]  # type: ignore[index]


@contextmanager
def serving(*answers: Answer) -> Iterator[Server]:
    """An endpoint that gives these answers in turn."""
    server = Server(list(answers))
    released = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            server.asked.append({**body, "path": self.path, "authorization": self.headers["Authorization"]})
            answer = server.next()
            released.wait(answer.wait_s)
            if answer.hangs_up:
                self.close_connection = True
                return
            with suppress(OSError):  # the client has gone
                self._send(answer)

        def _send(self, answer: Answer) -> None:
            self.send_response(answer.status)
            for name, value in answer.headers.items():
                self.send_header(name, value)
            for number in range(110 if answer.header_drip_s else 0):
                self.send_header(f"X-{number}", "1")
                self.flush_headers()
                time.sleep(answer.header_drip_s)
            self.send_header("Content-Length", str(len(answer.content)))
            self.end_headers()
            if not answer.drip_s:
                self.wfile.write(answer.content)
                return
            for byte in answer.content:
                self.wfile.write(bytes([byte]))
                time.sleep(answer.drip_s)

        def log_message(self, format: str, *args: object) -> None:
            pass

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    running.daemon_threads = True
    running.block_on_close = False
    server.url = f"http://127.0.0.1:{running.server_port}/v1"
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        released.set()
        running.shutdown()
        thread.join()
        running.server_close()
