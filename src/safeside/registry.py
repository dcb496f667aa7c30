"""Open registries: a name, and the object itself or a lazy ``"module:Object"`` that is imported on first use."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import entry_points
from typing import Generic, TypeVar, cast

from safeside.errors import ConfigError, UnknownNameError

Item = TypeVar("Item")

PLUGIN_GROUP = "safeside.plugins"


class Registry(Generic[Item]):
    """Names of one kind of thing.  Built-ins and strangers register by the same call."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._items: dict[str, Item | str] = {}

    def register(self, name: str, item: Item | str) -> None:
        """Add ``item`` under ``name``; the same item twice is harmless, another one is a ConfigError."""
        known = self._items.get(name)
        if known is not None and known is not item and known != item:
            raise ConfigError(
                f"{self.kind} {name!r} is already registered as {known!r}; expected a new name. "
                "Choose another name, such as 'yourpackage/name'."
            )
        self._items[name] = item

    def unregister(self, name: str) -> None:
        """Forget ``name``; unknown names are an UnknownNameError."""
        if name not in self._items:
            raise UnknownNameError(did_you_mean(self.kind, name, list(self._items)))
        del self._items[name]

    def get(self, name: str) -> Item:
        """The item called ``name``; an unknown name lists its neighbours."""
        if name not in self._items:
            load_plugins()
        if name not in self._items:
            raise UnknownNameError(did_you_mean(self.kind, name, list(self._items)))
        item = self._items[name]
        return self._resolve(name, item) if isinstance(item, str) else item

    def _resolve(self, name: str, target: str) -> Item:
        module, _, attribute = target.partition(":")
        try:
            return cast(Item, vars(import_module(module))[attribute])
        except (KeyError, ValueError) as error:
            raise ConfigError(
                f"{self.kind} {name!r} is registered as {target!r}, which names nothing; expected 'module:Object'. "
                "Register the object itself, or correct its name."
            ) from error

    def __contains__(self, name: object) -> bool:
        if name not in self._items:
            load_plugins()
        return name in self._items

    def __iter__(self) -> Iterator[str]:
        load_plugins()
        return iter(sorted(self._items))


def did_you_mean(kind: str, name: str, known: list[str]) -> str:
    """The message for an unknown name, with close matches first."""
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(repr(match) for match in close)}?" if close else ""
    return f"Unknown {kind} {name!r}; expected one of {', '.join(sorted(known)) or 'none registered yet'}.{hint}"


_loaded_plugins: set[str] = set()


def load_plugins() -> None:
    """Call every installed ``safeside.plugins`` entry point once; each registers what its package brings."""
    for entry_point in entry_points(group=PLUGIN_GROUP):
        if entry_point.value not in _loaded_plugins:
            _loaded_plugins.add(entry_point.value)
            entry_point.load()()
