"""A server in a thread of this process: for notebooks, tests and benchmarks."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import uvicorn
from fastapi import FastAPI

from safeside.errors import ServingError


def _run(server: uvicorn.Server, place: socket.socket) -> None:
    with suppress(SystemExit):  # how uvicorn ends where an application does not start: ``in_thread`` tells it
        server.run([place])


@contextmanager
def in_thread(app: FastAPI, keep_alive_s: int = 5) -> Iterator[str]:
    """The address of ``app`` on a free port of this machine; the end of the context ends the server and its service.

    Idle connections are kept for ``keep_alive_s`` seconds.  An application that does not start is a ServingError.
    """
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_keep_alive=keep_alive_s))
    with socket.create_server(("127.0.0.1", 0)) as place:
        thread = threading.Thread(target=_run, args=(server, place))
        thread.start()
        try:
            while not server.started:
                if not thread.is_alive():
                    raise ServingError("The application did not start; what it logged says why.")
                time.sleep(0.01)
            yield f"http://127.0.0.1:{place.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()
