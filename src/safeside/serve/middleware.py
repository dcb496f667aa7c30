"""What happens to every request before a route sees it: its body is read whole, and it is counted."""

from __future__ import annotations

import asyncio
import ipaddress
from http import HTTPStatus
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from safeside.serve.metrics import Metrics
from safeside.serve.problems import error_body

_KIND = "invalid_request_error"


class BodyLimit:
    """Refuses bodies over ``max_bytes``, and those that take longer than ``timeout_s`` seconds to arrive."""

    def __init__(self, app: ASGIApp, max_bytes: int, timeout_s: float) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._timeout_s = timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand the request on with its body, or answer it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            async with asyncio.timeout(self._timeout_s):
                body = await self._read(receive)
        except TimeoutError:
            told = error_body("The body did not arrive in time. Send it again.", _KIND, "timeout")
            await JSONResponse(told, HTTPStatus.REQUEST_TIMEOUT)(scope, receive, send)
            return
        if body is None:
            told = error_body(f"The body has more than {self._max_bytes:,} bytes. Send less.", _KIND, "too_large")
            response = JSONResponse(told, HTTPStatus.REQUEST_ENTITY_TOO_LARGE, {"Connection": "close"})
            await response(scope, receive, send)
            return
        await self._app(scope, _replayed(body, receive), send)

    async def _read(self, receive: Receive) -> bytes | None:
        """The body; None as soon as it is too large."""
        body = bytearray()
        while True:
            message = await receive()
            body += message.get("body", b"")
            if len(body) > self._max_bytes:
                return None
            if not message.get("more_body", False):
                return bytes(body)


def _replayed(body: bytes, receive: Receive) -> Receive:
    waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return waiting.pop() if waiting else await receive()

    return replay


class RequestCount:
    """Counts requests by route and status; never by the path that was asked for, which is a user's text."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand the request on and look at how its answer starts; an error that nobody handled is a 500."""
        statuses: list[int] = []

        def count(status: int) -> None:
            route = scope.get("route")
            statuses.append(status)
            self._metrics.requests.labels(route.path if route is not None else "other", status).inc()

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                count(message["status"])
            await send(message)

        try:
            await self._app(scope, receive, counted)
        except Exception:
            if not statuses:
                count(HTTPStatus.INTERNAL_SERVER_ERROR)
            raise


class LocalHost:
    """Refuses requests for hosts other than this machine, so that no page elsewhere reaches it by a name of its own."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand the request on, or answer it."""
        if scope["type"] == "http" and not _is_local(Headers(scope=scope).get("host", "")):
            told = error_body("Without keys this server is asked as localhost, or by its address.", _KIND, "bad_host")
            await JSONResponse(told, HTTPStatus.BAD_REQUEST)(scope, receive, send)
            return
        await self._app(scope, receive, send)


def is_loopback(host: str) -> bool:
    """Whether a name or address always means this machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _is_local(header: str) -> bool:
    """Whether the ``Host`` of a request, port included, is this machine."""
    try:
        return is_loopback(urlsplit(f"//{header}").hostname or "")
    except ValueError:
        return False
