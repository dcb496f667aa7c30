"""A server in a thread: it answers while the context holds, and an application that cannot start is told."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import pytest
from fastapi import FastAPI

from safeside.errors import ServingError
from safeside.serve.threaded import in_thread


def test_it_answers_until_its_context_ends() -> None:
    app = FastAPI()
    with in_thread(app) as url:
        assert httpx.get(f"{url}/openapi.json").status_code == 200
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/openapi.json")


def test_an_application_that_does_not_start_is_an_error() -> None:
    @asynccontextmanager
    async def broken(app: FastAPI) -> AsyncIterator[None]:
        raise RuntimeError("no")
        yield

    with pytest.raises(ServingError, match="did not start"), in_thread(FastAPI(lifespan=broken)):
        pass
