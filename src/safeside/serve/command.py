"""What ``safeside serve`` does: load everything, run until a signal, reload on SIGHUP."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import os
import signal
from dataclasses import dataclass, field
from pathlib import Path

import uvicorn

from safeside.base.model import load_base
from safeside.errors import ConfigError, InputError, SafesideError
from safeside.serve.app import AppOptions, create_app
from safeside.serve.audit import AuditLog
from safeside.serve.engine import Engine, EngineLimits
from safeside.serve.keys import Keys
from safeside.serve.loading import load_adapters
from safeside.serve.policy import PolicyBook
from safeside.serve.service import Service, ServiceLimits

_log = logging.getLogger("safeside.serve")
_AUDIT_KEY = "SAFESIDE_AUDIT_KEY"


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """The options of ``safeside serve``."""

    base: str
    policy: Path
    keys: Path | None = None
    audit: str = "sqlite:///safeside-audit.db"
    model: str | None = None
    device: str = "cpu"
    dtype: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    adapter_roots: tuple[Path, ...] = ()
    origins: tuple[str, ...] = ()
    drain_s: float = 30.0
    engine: EngineLimits = field(default_factory=EngineLimits)
    service: ServiceLimits = field(default_factory=ServiceLimits)


def make_service(options: ServeOptions) -> Service:
    """Base, adapters, policies, keys and audit log, loaded and checked against each other."""
    book = PolicyBook.load(options.policy)
    keys = Keys.load(options.keys) if options.keys is not None else None
    base = load_base(options.base, device=options.device, dtype=options.dtype)
    guards, aligners = load_adapters(book.adapters, base)
    book.bind(guards, list(aligners))
    key = os.environ.get(_AUDIT_KEY)
    audit = AuditLog(options.audit, key=key.encode() if key else None)
    engine = Engine(base, [*guards.values(), *aligners.values()], limits=options.engine)
    model = options.model or (Path(base.name).resolve().name if Path(base.name).is_dir() else base.name)
    return Service(engine, book, audit, keys=keys, model=model, limits=options.service)


def serve_command(options: ServeOptions) -> None:
    """Serve until SIGINT or SIGTERM; SIGHUP reads policies and keys again."""
    _check(options)
    service = make_service(options)
    try:
        app_options = AppOptions(
            tuple(options.adapter_roots), tuple(options.origins), options.drain_s, lambda: _listen(service, options)
        )
        server = uvicorn.Server(
            uvicorn.Config(
                create_app(service, app_options),
                host=options.host,
                port=options.port,
                access_log=False,  # it would hold what users ask for
                server_header=False,
                timeout_graceful_shutdown=max(1, round(options.drain_s)),
            )
        )
        server.run()
    finally:
        service.close(0.0)


def reload(service: Service, options: ServeOptions) -> None:
    """Read policies and keys again; what is broken is logged and counted, and what held before stays."""
    try:
        keys = Keys.load(options.keys) if options.keys is not None else None
        version = service.book.reload()
    except SafesideError as error:
        service.metrics.policy_reloads.labels("refused").inc()
        _log.error("reload refused, what held before stays: %s", error)
        return
    service.keys = keys
    service.metrics.policy_reloads.labels("loaded").inc()
    _log.warning("policies reloaded: version %s", version)


def _listen(service: Service, options: ServeOptions) -> None:
    """Reload on SIGHUP from now on."""
    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, reload, service, options)


def _check(options: ServeOptions) -> None:
    for root in options.adapter_roots:
        if not root.is_dir():
            raise InputError(f"--adapter-root {root} is no folder. Make it, or leave the option out.")
    if options.keys is None and not _is_loopback(options.host):
        raise ConfigError(
            f"Without --keys everybody who reaches {options.host} could ask. Pass --keys FILE (see safeside key), or "
            "serve on 127.0.0.1."
        )


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
