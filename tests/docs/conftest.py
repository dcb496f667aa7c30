"""The generator's modules, importable in these tests."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest

from docs.pages import ROOT


@pytest.fixture(scope="session", autouse=True)
def _scripts_on_the_path() -> Iterator[None]:
    sys.path.append(str(ROOT / "scripts"))
    yield
    sys.path.remove(str(ROOT / "scripts"))


@pytest.fixture
def docgen_api() -> ModuleType:
    """scripts/docgen/api.py"""
    return importlib.import_module("docgen.api")


@pytest.fixture
def docs_script() -> ModuleType:
    """scripts/docs.py under another name: these tests lie in a package called docs."""
    spec = importlib.util.spec_from_file_location("docs_script", ROOT / "scripts" / "docs.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
