"""Open registries: lazy items, neighbours of a mistyped name, plugins."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable

import pytest

from safeside import registry as module
from safeside.errors import ConfigError, UnknownNameError
from safeside.registry import PLUGIN_GROUP, Registry, did_you_mean, load_plugins


@pytest.fixture
def colours() -> Registry[object]:
    registry: Registry[object] = Registry("colour")
    registry.register("red", 1)
    registry.register("green", "math:pi")
    return registry


def test_items_and_lazy_items(colours: Registry[object]) -> None:
    assert colours.get("red") == 1
    assert colours.get("green") == pytest.approx(3.14159, abs=1e-5)
    assert list(colours) == ["green", "red"]
    assert "red" in colours
    assert "blue" not in colours
    assert None not in colours


def test_the_same_item_twice_is_harmless_even_after_use(colours: Registry[object]) -> None:
    colours.get("green")
    colours.register("green", "math:pi")
    colours.register("red", 1)
    with pytest.raises(ConfigError, match=r"colour 'red' is already registered as 1.*'yourpackage/name'"):
        colours.register("red", 2)
    assert colours.get("red") == 1


def test_unknown_names_suggest_their_neighbours(colours: Registry[object]) -> None:
    with pytest.raises(UnknownNameError, match=r"Unknown colour 'rde'; expected one of green, red. Did you mean 'red'"):
        colours.get("rde")
    with pytest.raises(UnknownNameError) as caught:
        colours.get("zzz")
    assert str(caught.value) == "Unknown colour 'zzz'; expected one of green, red."
    assert isinstance(caught.value, KeyError)
    assert did_you_mean("colour", "x", []) == "Unknown colour 'x'; expected one of none registered yet."


def test_names_can_be_forgotten(colours: Registry[object]) -> None:
    colours.unregister("green")
    assert list(colours) == ["red"]
    with pytest.raises(UnknownNameError):
        colours.unregister("green")


@pytest.mark.parametrize("target", ["math:no_such_thing", "math", ":pi"])
def test_a_target_that_names_nothing_is_a_config_error(colours: Registry[object], target: str) -> None:
    colours.register("odd", target)
    with pytest.raises(ConfigError, match=f"'odd' is registered as '{target}'"):
        colours.get("odd")


def test_a_module_that_is_missing_says_so(colours: Registry[object]) -> None:
    colours.register("odd", "no_such_module:thing")
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        colours.get("odd")


class EntryPoint:
    """What importlib.metadata gives of one plugin."""

    def __init__(self, value: str, function: Callable[[], None]) -> None:
        self.value = value
        self.function = function

    def load(self) -> Callable[[], None]:
        return self.function


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """``install(function, ...)`` makes these the only plugins."""
    monkeypatch.setattr(module, "_loaded_plugins", set())

    def install(*functions: Callable[[], None]) -> None:
        found = [EntryPoint(f"plugin:{index}", function) for index, function in enumerate(functions)]
        monkeypatch.setattr(module, "entry_points", lambda group: found if group == PLUGIN_GROUP else [])

    return install


def test_plugins_are_called_once_when_a_name_is_missing(
    colours: Registry[object], install: Callable[..., None]
) -> None:
    calls: list[str] = []

    def plugin() -> None:
        calls.append("called")
        colours.register("blue", 3)

    install(plugin)
    assert colours.get("red") == 1
    assert calls == []
    assert colours.get("blue") == 3
    load_plugins()
    assert list(colours) == ["blue", "green", "red"]
    assert calls == ["called"]


def test_a_plugin_may_look_things_up_itself(colours: Registry[object], install: Callable[..., None]) -> None:
    def plugin() -> None:
        assert "blue" not in colours
        colours.register("blue", colours.get("red"))

    install(plugin)
    assert colours.get("blue") == 1


def test_a_plugin_that_fails_is_heard(colours: Registry[object], install: Callable[..., None]) -> None:
    def plugin() -> None:
        raise RuntimeError("broken plugin")

    install(plugin)
    with pytest.raises(RuntimeError, match="broken plugin"):
        colours.get("blue")


def test_the_group_is_the_one_in_our_own_metadata() -> None:
    names = importlib.metadata.entry_points(group=PLUGIN_GROUP)
    assert all(":" in entry_point.value for entry_point in names)
