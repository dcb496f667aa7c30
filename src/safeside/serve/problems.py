"""Errors as OpenAI's clients know them: a status, and an object that says what was wrong."""

from __future__ import annotations

import logging
import math
from http import HTTPStatus

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from safeside.errors import (
    AccessError,
    ArtifactError,
    AuditError,
    ConfigError,
    DeadlineError,
    InputError,
    LimitError,
    SafesideError,
    ServingError,
    UnknownKeyError,
    UnknownNameError,
    UnsupportedError,
)

_log = logging.getLogger(__name__)
# The first that fits counts: status, OpenAI's type, code.
_KINDS: tuple[tuple[type[Exception], HTTPStatus, str, str], ...] = (
    (UnknownKeyError, HTTPStatus.UNAUTHORIZED, "invalid_request_error", "invalid_api_key"),
    (AccessError, HTTPStatus.FORBIDDEN, "permission_error", "forbidden"),
    (LimitError, HTTPStatus.TOO_MANY_REQUESTS, "rate_limit_error", "rate_limit_exceeded"),
    (UnknownNameError, HTTPStatus.NOT_FOUND, "invalid_request_error", "not_found"),
    (DeadlineError, HTTPStatus.GATEWAY_TIMEOUT, "server_error", "timeout"),
    (ServingError, HTTPStatus.SERVICE_UNAVAILABLE, "server_error", "unavailable"),
    (AuditError, HTTPStatus.SERVICE_UNAVAILABLE, "server_error", "audit_unavailable"),
    (ConfigError, HTTPStatus.BAD_REQUEST, "invalid_request_error", "conflict"),
    (InputError, HTTPStatus.BAD_REQUEST, "invalid_request_error", "invalid_value"),
    (UnsupportedError, HTTPStatus.BAD_REQUEST, "invalid_request_error", "unsupported"),
    (ArtifactError, HTTPStatus.BAD_REQUEST, "invalid_request_error", "bad_adapter"),
)


class ErrorTold(BaseModel):
    """OpenAI's error."""

    message: str
    type: str
    param: str | None
    code: str | None


class Problem(BaseModel):
    """The body of every answer that is an error."""

    error: ErrorTold


PROBLEMS: dict[int | str, dict[str, object]] = {
    status: {"model": Problem} for status in (400, 401, 403, 404, 408, 413, 429, 500, 503, 504)
}
"""For the OpenAPI document."""


def error_body(message: str, kind: str, code: str, param: str | None = None) -> dict[str, object]:
    """OpenAI's error object."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def problem_of(error: Exception) -> tuple[HTTPStatus, dict[str, object]]:
    """Status and body for an error; of one that is not ours nothing is told but that it happened."""
    for kind, status, name, code in _KINDS:
        if isinstance(error, kind):
            return status, error_body(str(error), name, code)
    _log.error("a request failed: %s", type(error).__name__, exc_info=error)
    message = "Something went wrong in the server. Try again; its log says what it was."
    return HTTPStatus.INTERNAL_SERVER_ERROR, error_body(message, "server_error", "internal_error")


def install(app: FastAPI) -> None:
    """Answer every error of ``app`` in OpenAI's shape."""

    @app.exception_handler(SafesideError)
    async def ours(request: Request, error: SafesideError) -> JSONResponse:
        status, body = problem_of(error)
        wait = {"Retry-After": str(math.ceil(error.retry_after_s))} if isinstance(error, LimitError) else {}
        asks = {"WWW-Authenticate": "Bearer"} if status == HTTPStatus.UNAUTHORIZED else {}
        return JSONResponse(body, status, {**wait, **asks})

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]  # its 'input' is the user's text and is not repeated
        place = ".".join(str(part) for part in first["loc"][1:])
        told = error_body(f"{place or 'body'}: {first['msg']}", "invalid_request_error", str(first["type"]), place)
        return JSONResponse(told, HTTPStatus.BAD_REQUEST)

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        status = HTTPStatus(error.status_code)
        told = error_body(str(error.detail), "invalid_request_error", status.phrase.lower().replace(" ", "_"))
        return JSONResponse(told, status, error.headers)

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> JSONResponse:
        status, body = problem_of(error)
        return JSONResponse(body, status)
