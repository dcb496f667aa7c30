"""What ``safeside serve`` does: load everything, run until a signal, reload on SIGHUP."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import uvicorn

from safeside.base.model import load_base
from safeside.errors import ConfigError, InputError, SafesideError
from safeside.serve.app import AppOptions, create_app
from safeside.serve.audit import AuditLog
from safeside.serve.engine import Engine, EngineLimits
from safeside.serve.keys import Keys
from safeside.serve.loading import AddGenes, allowed_folder, load_adapters, no_genes
from safeside.serve.middleware import is_loopback
from safeside.serve.policy import PolicyBook
from safeside.serve.service import Service, ServiceLimits
from safeside.terminal import note

_log = logging.getLogger("safeside.serve")
_AUDIT_KEY = "SAFESIDE_AUDIT_KEY"
_LAST_WORDS_S = 5  # for clients to be told that their answers were cut off


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
    add_genes: AddGenes = no_genes
    engine: EngineLimits = field(default_factory=EngineLimits)
    service: ServiceLimits = field(default_factory=ServiceLimits)


def make_service(options: ServeOptions) -> Service:
    """Base with its genes, adapters, policies, keys and audit log, loaded and checked against each other."""
    book = PolicyBook.load(options.policy)
    keys = Keys.load(options.keys) if options.keys is not None else None
    base = load_base(options.base, device=options.device, dtype=options.dtype)
    roots = [root.resolve() for root in options.adapter_roots]
    genes = options.add_genes(base, {name: allowed_folder(place, roots) for name, place in book.genes.items()})
    guards, aligners = load_adapters(book, base)
    book.bind(guards, list(aligners), list(genes))
    key = os.environ.get(_AUDIT_KEY)
    audit = AuditLog(options.audit, key=key.encode() if key else None)
    engine = Engine(base, [*guards.values(), *aligners.values()], limits=options.engine)
    _warn_of_tenants(keys, book)
    model = options.model or (Path(base.name).resolve().name if Path(base.name).is_dir() else base.name)
    return Service(engine, book, audit, keys=keys, model=model, genes=genes, limits=options.service)


def serve_command(options: ServeOptions) -> None:
    """Serve until SIGINT or SIGTERM; SIGHUP reads policies and keys again.

    An address that cannot be listened at is a ConfigError, before anything is loaded.
    """
    _check(options)
    with _bound(options.host, options.port) as place, _cores_for_the_engine(options) as own:
        service = make_service(own)
        try:
            app_options = AppOptions(
                options.adapter_roots, options.origins, options.drain_s, lambda: _started(service, options, place)
            )
            config = uvicorn.Config(
                create_app(service, app_options),
                access_log=False,  # it would hold what users ask for
                server_header=False,
                timeout_graceful_shutdown=math.ceil(options.drain_s) + _LAST_WORDS_S,
            )
            _Server(config, lambda: service.engine.stop(options.drain_s)).run([place])
        except OSError as error:  # another one was faster
            raise _cannot_listen(options.host, options.port, error) from error
        finally:
            service.close(0.0)


class _Server(uvicorn.Server):
    """Tells the engine to end as soon as a signal came; uvicorn's lifespan would only once all answers have ended."""

    def __init__(self, config: uvicorn.Config, stop: Callable[[], None]) -> None:
        super().__init__(config)
        self._stop = stop

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close listeners, and connections once their answers have ended."""
        self._stop()
        await super().shutdown(sockets)


@contextmanager
def _cores_for_the_engine(options: ServeOptions) -> Iterator[ServeOptions]:
    """Options with which the engine's thread alone computes with more than one thread: see ``EngineLimits.threads``."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield replace(options, engine=replace(options.engine, threads=options.engine.threads or threads))
    finally:
        torch.set_num_threads(threads)


def reload(service: Service, options: ServeOptions) -> None:
    """Read policies and keys again; what is broken is logged and counted, and what held before stays.

    Adapters stay those that are loaded: where their places in the file changed it is logged.
    """
    places = service.book.adapters
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
    _warn_of_tenants(keys, service.book)
    if moved := sorted(name for name, place in service.book.adapters.items() if places.get(name) != place):
        _log.warning("adapters stay as loaded; POST /v1/adapters/load or a restart changes %s", ", ".join(moved))


def _warn_of_tenants(keys: Keys | None, book: PolicyBook) -> None:
    """Say which keys' tenants a policy file with tenants does not name: a name may be misspelled in either file."""
    tenants = keys.tenants if keys is not None else {}
    told = sorted(f"{name} ({tenant})" for name, tenant in tenants.items() if tenant not in book.tenants)
    if book.tenants and told:
        _log.warning(
            "the policy file does not name the tenants of these keys, so only its deployment's policies hold "
            "for them: %s",
            ", ".join(told),
        )


def _started(service: Service, options: ServeOptions, place: socket.socket) -> None:
    """Reload on SIGHUP from now on, and say where clients find the server."""
    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, reload, service, options)
    host = f"[{options.host}]" if ":" in options.host else options.host
    note(f"safeside: serving {service.model} at http://{host}:{place.getsockname()[1]}/v1; Ctrl-C stops it")


def _bound(host: str, port: int) -> socket.socket:
    """A socket at the address that ``host`` means, the IPv4 one where there are two; nobody can connect yet."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        family, _, _, _, address = min(found, key=lambda entry: entry[0] != socket.AF_INET)
        place = socket.socket(family)
        try:
            place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            place.bind(address)
        except OSError:
            place.close()
            raise
    except OSError as error:
        raise _cannot_listen(host, port, error) from error
    return place


def _cannot_listen(host: str, port: int, error: OSError) -> ConfigError:
    return ConfigError(
        f"Cannot listen at {host}, port {port}: {error.strerror}. Stop what listens there, or choose another --port "
        "(0 for any that is free) or --host."
    )


def _check(options: ServeOptions) -> None:
    for root in options.adapter_roots:
        if not root.is_dir():
            raise InputError(f"--adapter-root {root} is no folder. Make it, or leave the option out.")
    if options.keys is None and not is_loopback(options.host):
        raise ConfigError(
            f"Without --keys everybody who reaches {options.host} could ask. Pass --keys FILE (see safeside key), or "
            "serve on 127.0.0.1."
        )
