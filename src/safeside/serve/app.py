"""The application: routes, what every request goes through, and what operators look at."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from http import HTTPStatus
from importlib.metadata import version
from pathlib import Path

from fastapi import APIRouter, FastAPI
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, PlainTextResponse, Response

from safeside.serve import playground, routes
from safeside.serve.admin import AdapterDesk
from safeside.serve.middleware import BodyLimit, LocalHost, RequestCount
from safeside.serve.problems import PROBLEMS, install
from safeside.serve.routes import Served
from safeside.serve.service import Service

router = APIRouter()


@dataclass(frozen=True, slots=True)
class AppOptions:
    """What an operator decides of the HTTP side."""

    adapter_roots: tuple[Path, ...] = ()
    """Folders that adapters may be loaded from while the server runs; none unless given."""
    origins: tuple[str, ...] = ()
    """Web pages of other origins that may call; none unless given."""
    drain_s: float = 30.0
    """Seconds that answers may go on after the server was told to stop."""
    started: Callable[[], None] = lambda: None
    """Called once in the event loop, before the first request."""


def create_app(service: Service, options: AppOptions = AppOptions()) -> FastAPI:
    """The application; its shutdown closes the service."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        options.started()
        yield
        await asyncio.to_thread(service.close, options.drain_s)

    app = FastAPI(title="safeside", version=version("safeside"), docs_url=None, redoc_url=None, lifespan=lifespan)
    app.state.service = service
    app.state.desk = AdapterDesk(service, options.adapter_roots)
    app.include_router(router)
    app.include_router(routes.router, responses=PROBLEMS)
    app.include_router(playground.router)
    app.add_middleware(BodyLimit, max_bytes=service.limits.max_body_bytes, timeout_s=service.limits.body_timeout_s)
    if service.keys is None:
        app.add_middleware(LocalHost)
    app.add_middleware(RequestCount, metrics=service.metrics)
    if options.origins:
        origins = list(options.origins)
        app.add_middleware(CORSMiddleware, allow_origins=origins, allow_headers=["*"], allow_methods=["GET", "POST"])
    install(app)
    return app


@router.get("/healthz", responses={503: {"description": "Its engine has ended or hangs: start the server anew."}})
async def healthz(service: Served) -> Response:
    """Whether the process is alive, or still ends what was begun."""
    if not service.engine.is_alive:
        return JSONResponse({"status": "the engine has ended"}, HTTPStatus.SERVICE_UNAVAILABLE)
    if _hangs(service):
        told = f"the engine has been in one pass for {service.engine.turn_s:.0f} s, more than a whole answer may take"
        return JSONResponse({"status": told}, HTTPStatus.SERVICE_UNAVAILABLE)
    return JSONResponse({"status": "ok"})


@router.get("/readyz", responses={503: {"description": "It is shutting down, or its engine has ended or hangs."}})
async def readyz(service: Served) -> Response:
    """Whether it takes requests."""
    if service.engine.is_ready and not _hangs(service):
        return JSONResponse({"status": "ready", "policy_version": service.book.version})
    return JSONResponse({"status": "not ready"}, HTTPStatus.SERVICE_UNAVAILABLE)


def _hangs(service: Service) -> bool:
    """Whether the engine's pass takes so long that every answer in it is overdue."""
    return service.engine.turn_s > service.limits.deadline_s


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(service: Served) -> Response:
    """Prometheus' text format."""
    service.metrics.queue_depth.set(service.engine.n_waiting)
    service.metrics.running.set(service.engine.n_running)
    return Response(service.metrics.exposition(), media_type="text/plain; version=0.0.4; charset=utf-8")
