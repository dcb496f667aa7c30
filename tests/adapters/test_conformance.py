"""Every registered kind of adapter, in both roles, passes the same checks; so do a stranger's."""

from __future__ import annotations

import importlib.metadata
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from adapters.conformance import CHECKS
from safeside import Adapter, Base, register_adapter
from safeside import registry as registry_module
from safeside.adapters.adapter import TRUNKS
from safeside.adapters.blocks import normed
from safeside.adapters.config import AdapterConfig
from safeside.base.families import FAMILIES, find_family
from safeside.base.taps import SideCache, Tape
from safeside.errors import ConfigError, UnsupportedError
from safeside.evals.judges import JUDGES, Exchange, JudgeOptions
from safeside.tasks.task import TASKS
from tasks.conformance import CHECKS as TASK_CHECKS
from tasks.conformance import task_named

PLUGIN_PACKAGE = Path(__file__).parents[1] / "plugin_package"
VARIANTS: tuple[dict[str, object], ...] = (
    *({"kind": kind} for kind in TRUNKS),
    {"kind": "lst", "layers": (2,), "tap_rank": 4},
    {"kind": "lst", "layers": (0, 3), "gate": "channel"},
    {"kind": "lst", "width": 64, "query_group": 2},
    {"kind": "lst", "readout": "attention", "labels": ("hate", "harm")},
    {"kind": "plr", "readout": "attention"},
    {"kind": "plr", "width": 16},
    {"kind": "rtb", "layers": (1, 3), "bottleneck": 4},
    {"kind": "lst_plus", "cross_attention": True},
    {"kind": "lst_plus", "layers": (1, 3), "tap_rank": 4},
    {"kind": "state_map", "bottleneck": 2},
    {"kind": "toplayers", "depth": 1, "lora_rank": 4},
    {"kind": "toplayers", "depth": 3},
)
ALIGNERS_ONLY = ("state_map", "toplayers")


def name_of(value: object) -> str:
    if isinstance(value, dict):
        return "-".join(str(part).replace(" ", "") for part in value.values())
    return str(value.__name__).removeprefix("check_") if callable(value) else str(value)


def run(
    check: Callable[[Base, Adapter], None],
    base: Base,
    role: str,
    makers: dict[str, Callable[..., Adapter]],
    options: dict[str, object],
) -> None:
    if role == "align":
        options = {key: value for key, value in options.items() if key not in ("labels", "readout")}
    elif options["kind"] in ALIGNERS_ONLY:
        with pytest.raises(ConfigError, match="gives no scores; expected role 'align'"):
            makers[role](base, **options)
        return
    check(base, makers[role](base, **options))


@pytest.fixture
def makers(random_guard: Callable[..., Adapter], random_aligner: Callable[..., Adapter]) -> dict[str, object]:
    return {"guard": random_guard, "align": random_aligner}


@pytest.mark.parametrize("check", CHECKS, ids=name_of)
@pytest.mark.parametrize("role", ["guard", "align"])
@pytest.mark.parametrize("options", VARIANTS, ids=name_of)
def test_a_registered_kind_conforms(
    check: Callable[..., None], role: str, options: dict[str, object], tiny_base: Base, makers: dict[str, object]
) -> None:
    run(check, tiny_base, role, makers, options)


# ---- a class registered by hand --------------------------------------------------------------------------------------


class Averages(nn.Module):
    """A trunk with a cache: the mean so far of the last tapped state."""

    n_cache_layers = 1

    def __init__(self, config: AdapterConfig) -> None:
        super().__init__()
        self.width = config.base.d_model
        self.scale = nn.Parameter(torch.ones(self.width))

    def read(self, tape: Tape, layer: int, hidden: Tensor) -> None:
        tape.hidden[0] = normed(hidden) * self.scale

    def forward(self, tape: Tape, cache: SideCache | None) -> Tensor:
        states = tape.hidden[0][:, None]
        if cache is not None:
            states, _ = cache.update(states, states, 0)
        weights = tape.attend[:, 0].to(states.dtype)
        return weights @ states[:, 0] / weights.sum(-1, keepdim=True)


@pytest.fixture
def averages() -> Iterator[str]:
    register_adapter("tests/averages", Averages)
    yield "tests/averages"
    TRUNKS.unregister("tests/averages")


@pytest.mark.parametrize("check", CHECKS, ids=name_of)
@pytest.mark.parametrize("role", ["guard", "align"])
def test_a_class_of_ones_own_conforms(
    check: Callable[..., None], role: str, averages: str, tiny_base: Base, makers: dict[str, object]
) -> None:
    run(check, tiny_base, role, makers, {"kind": averages})


def test_the_checks_catch_an_adapter_that_forgets_its_cache(
    averages: str, tiny_base: Base, random_guard: Callable[..., Adapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    def forgets(self: Averages, tape: Tape, cache: SideCache | None) -> Tensor:
        states = tape.hidden[0]
        count = torch.arange(1, states.shape[1] + 1)[None, :, None]
        return states.cumsum(1) / count

    monkeypatch.setattr(Averages, "forward", forgets)
    caught = []
    for check in CHECKS:
        try:
            check(tiny_base, random_guard(tiny_base, kind=averages))
        except AssertionError:
            caught.append(name_of(check))
    assert caught == ["padding_changes_nothing", "cached_equals_recomputed"]


# ---- an installed package --------------------------------------------------------------------------------------------


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The plugin package as pip would leave it on sys.path: its modules, and its dist-info with the entry points."""
    project = tomllib.loads((PLUGIN_PACKAGE / "pyproject.toml").read_text())["project"]
    information = tmp_path / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(f"Name: {project['name']}\nVersion: {project['version']}\n")
    lines = [f"[{group}]\n" + "\n".join(f"{key} = {value}" for key, value in names.items())
             for group, names in project["entry-points"].items()]  # fmt: skip
    (information / "entry_points.txt").write_text("\n".join(lines) + "\n")
    for folder in (PLUGIN_PACKAGE, tmp_path):
        monkeypatch.syspath_prepend(folder)
    yield
    for registry in (TRUNKS, FAMILIES, JUDGES, TASKS):
        for name in [name for name in registry if name.startswith("example/")]:
            registry.unregister(name)
    registry_module._loaded_plugins.discard("safeside_example:register")
    for name in [name for name in sys.modules if name.startswith("safeside_example")]:
        del sys.modules[name]


def test_nothing_of_the_plugin_is_known_without_it() -> None:
    assert not [
        name for registry in (TRUNKS, FAMILIES, JUDGES, TASKS) for name in registry if name.startswith("example/")
    ]
    with pytest.raises(UnsupportedError, match="olmo"):
        find_family("olmo")


def test_a_plugin_is_found_at_the_first_unknown_name(plugin: None) -> None:
    assert importlib.metadata.distribution("safeside-example").version == "0.1.0"
    assert "safeside_example" not in sys.modules
    assert TRUNKS.get("example/middle").__name__ == "Middle"
    assert JUDGES.get("example/shouts")(JudgeOptions())(Exchange(("Tea?",), ("NO",))).outcome == "refused"
    assert find_family("olmo").name == "example/olmo"


@pytest.mark.parametrize("look", [
    lambda: find_family("olmo"), lambda: JUDGES.get("example/shouts"), lambda: list(TRUNKS).index("example/middle"),
    lambda: FAMILIES.get("example/olmo"), lambda: TASKS.get("example/shouting"),
    lambda: None if "example/middle" in TRUNKS else 1 / 0,
])  # fmt: skip
def test_any_registry_is_the_first_to_ask(plugin: None, look: Callable[[], object]) -> None:
    look()
    assert "safeside_example" in sys.modules


@pytest.mark.parametrize("check", CHECKS, ids=name_of)
@pytest.mark.parametrize("role", ["guard", "align"])
def test_a_plugins_kind_conforms(
    check: Callable[..., None], role: str, plugin: None, tiny_base: Base, makers: dict[str, object]
) -> None:
    run(check, tiny_base, role, makers, {"kind": "example/middle", "tap_rank": 8})


@pytest.mark.parametrize("check", TASK_CHECKS, ids=name_of)
def test_a_plugins_task_conforms(check: Callable[..., None], plugin: None, tmp_path: Path) -> None:
    check(task_named("example/shouting"), tmp_path)
