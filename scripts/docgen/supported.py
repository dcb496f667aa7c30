"""docs/reference/supported.md: what works and what is refused, from the table that the suite runs."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType
from typing import Any

from docgen.api import registries_table
from docgen.markdown import code, page, table
from docgen.source import ROOT
from safeside.adapters.adapter import TRUNKS
from safeside.base.families import FAMILIES
from safeside.evals.judges import JUDGES
from safeside.evals.suites import SUITES
from safeside.registry import Registry
from safeside.scale.engines import ENGINES

TABLE = "tests/test_supported.py"
REGISTERED: dict[str, Registry[Any]] = {
    "TRUNKS": TRUNKS, "FAMILIES": FAMILIES, "SUITES": SUITES, "JUDGES": JUDGES, "ENGINES": ENGINES,
}  # fmt: skip


def supported_page() -> str:
    """Ways of running a base, model families, and what is registered."""
    ways = _ways()
    families = [FAMILIES.get(name) for name in built_in(FAMILIES)]
    return page(
        "What is supported",
        f"Every row of the first two tables is run by the suite (`{TABLE}`). A refused way raises `UnsupportedError`; "
        "nothing is left to fail in silence.",
        "## Ways of running a base that work",
        table(["way", "note"], [[way.name, way.note] for way in ways if way.supported]),
        "## Ways that are refused",
        table(["way", "instead"], [[way.name, way.note] for way in ways if not way.supported]),
        "## Model families",
        "Any other architecture is an `UnsupportedError` until it is registered with "
        "[`register_family`](api.md#register_family).",
        table(
            ["family", "model types", "takes"],
            [
                [family.name, ", ".join(code(kind) for kind in family.model_types), _roles(family.is_encoder)]
                for family in families
            ],
        ),
        "## Built in",
        registries_table({name: built_in(registry) for name, registry in REGISTERED.items()}),
    )


def refused() -> list[str]:
    """The names of all refused ways."""
    return [way.name for way in _ways() if not way.supported]


def built_in(registry: Registry[Any]) -> list[str]:
    """Names that the package itself registers: those of strangers have a slash."""
    return [name for name in registry if "/" not in name]


def _roles(is_encoder: bool) -> str:
    return "guards" if is_encoder else "guards and aligners"


def _ways() -> list[Any]:
    return list(_module().SUPPORTED)


def _module() -> ModuleType:
    """tests/test_supported.py, imported with its helpers in reach."""
    if "supported_table" not in sys.modules:
        sys.path.insert(0, str(ROOT / "tests"))
        try:
            spec = importlib.util.spec_from_file_location("supported_table", ROOT / TABLE)
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            sys.modules["supported_table"] = module
            spec.loader.exec_module(module)
        finally:
            sys.path.remove(str(ROOT / "tests"))
    return sys.modules["supported_table"]
