"""Loading and unloading adapters while the server runs, with the meaning of vLLM's dynamic LoRA endpoints."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

from safeside.adapters.adapter import Adapter
from safeside.errors import ConfigError, InputError, UnknownNameError
from safeside.registry import did_you_mean
from safeside.serve.fingerprints import fingerprint_of
from safeside.serve.loading import allowed_folder, load_for
from safeside.serve.rules import SteerRule
from safeside.serve.service import Service


class AdapterDesk:
    """The adapters of one service; one change at a time."""

    def __init__(self, service: Service, roots: Sequence[Path] = ()) -> None:
        self._service = service
        self._roots = tuple(root.resolve(strict=True) for root in roots)
        self._places = dict(service.book.adapters)
        self._lock = asyncio.Lock()

    def listed(self) -> list[dict[str, object]]:
        """What is loaded; genes, which are in the base itself, stay to the end."""
        genes: list[dict[str, object]] = [
            {
                "id": name,
                "object": "adapter",
                "role": "gene",
                "fingerprint": fingerprint,
                "root": self._service.book.genes[name],
                "parent": self._service.model,
            }
            for name, fingerprint in self._service.genes.items()
        ]
        adapters: list[dict[str, object]] = [
            {
                "id": name,
                "object": "adapter",
                "role": adapter.config.role,
                "kind": adapter.config.kind,
                "labels": list(adapter.config.labels),
                "fingerprint": self._service.fingerprints[name],
                "root": self._places.get(name, ""),
                "parent": self._service.model,
            }
            for name, adapter in self._service.engine.adapters.items()
        ]
        return adapters + genes

    async def load(self, name: str, path: str, *, in_place: bool) -> None:
        """Load the adapter in a folder under the allowed roots; answers in progress end with those they began with."""
        async with self._lock:
            loaded = self._service.engine.adapters
            if (name in loaded and not in_place) or name in self._service.genes:
                raise InputError(f"An adapter called {name!r} is loaded already. Unload it, or set load_inplace.")
            folder = await asyncio.to_thread(allowed_folder, path, self._roots)
            allow = self._service.book.allow_mismatch
            adapter = await asyncio.to_thread(load_for, folder, self._service.base, allow)
            if adapter.name != name:
                raise InputError(f"The adapter in that folder is called {adapter.name!r}, not {name!r}.")
            others = [other for key, other in loaded.items() if key != name]
            await self._change([*others, adapter])
            self._places[name] = path

    async def unload(self, name: str) -> None:
        """Drop an adapter that no policy asks for; one that a policy asks for is a ConfigError."""
        async with self._lock:
            loaded = self._service.engine.adapters
            if name not in loaded:
                raise UnknownNameError(did_you_mean("adapter", name, list(loaded)))
            try:
                await self._change([other for key, other in loaded.items() if key != name])
            except ConfigError as error:
                raise ConfigError(
                    f"Adapter {name!r} is in use by {', '.join(self._users_of(name)) or 'a policy'}. Take it out of "
                    "the policy file, reload (SIGHUP), and unload it then."
                ) from error
            self._places.pop(name, None)

    def _users_of(self, name: str) -> list[str]:
        """The policies that need an adapter: whose rules name it or, of an aligner, which set a strength by any."""
        is_aligner = self._service.engine.adapters[name].config.role == "align"
        found = []
        for policy_name, policy in self._service.book.policies.items():
            rules = [*policy.prompt, *policy.answer]
            steers = [rule for rule in rules if isinstance(rule, SteerRule)]
            needs_any = bool(policy.floor) or any(rule.aligner is None for rule in steers)
            is_named = any(rule.guard == name for rule in rules) or any(rule.aligner == name for rule in steers)
            if is_named or (is_aligner and needs_any):
                found.append(f"policy {policy_name!r}")
        return found

    async def _change(self, adapters: Sequence[Adapter]) -> None:
        """Exchange all adapters, unless a policy would then ask for one that is missing."""
        service = self._service
        before = list(service.engine.adapters.values())
        known = service.fingerprints
        prints = {
            adapter.name: known[adapter.name] if adapter in before else await asyncio.to_thread(fingerprint_of, adapter)
            for adapter in adapters
        }
        changed = service.engine.change(adapters)  # jobs that come now wait for it, and find the new ones
        try:
            bind(service, adapters)
        except ConfigError:
            if not changed.cancel():
                await asyncio.wrap_future(service.engine.change(before))
            raise
        try:
            await asyncio.wrap_future(changed)
        except BaseException:
            bind(service, before)
            raise
        service.fingerprints = prints | service.genes


def bind(service: Service, adapters: Sequence[Adapter]) -> None:
    """Let the policies use these adapters; one that a policy needs and is missing is a ConfigError."""
    guards = {adapter.name: adapter for adapter in adapters if adapter.config.role == "guard"}
    aligners = [adapter.name for adapter in adapters if adapter.config.role == "align"]
    service.book.bind(guards, aligners, list(service.genes))
