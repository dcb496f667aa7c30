"""The public names: few, sorted, documented, and imported on first use."""

from __future__ import annotations

import ast
import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

import safeside


def test_the_three_lists_of_names_are_one() -> None:
    """What type checkers see, what is imported on first use, and ``__all__``, sorted."""
    tree = ast.parse(Path(safeside.__file__).read_text(encoding="utf-8"))
    typed = {
        (alias.name, node.module)
        for block in tree.body
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert typed == set(safeside._HOME_OF.items())
    assert safeside.__all__ == sorted(name for name, _ in typed) == dir(safeside)


@pytest.mark.parametrize("name", safeside.__all__)
def test_every_public_name_is_documented_where_it_lives(name: str) -> None:
    value = getattr(safeside, name)
    assert value.__doc__
    assert value.__module__ == safeside._HOME_OF[name]


def test_other_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="'safeside' has no attribute 'atach'"):
        _ = safeside.atach


def test_the_version_is_the_packages() -> None:
    assert importlib.metadata.version("safeside") == safeside.__version__


def test_importing_safeside_waits_for_nothing() -> None:
    code = "import safeside, sys; print(*sorted({'torch', 'transformers'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == ""


def test_a_module_does_not_hide_the_function_of_its_name() -> None:
    """Importing ``safeside.attach`` sets that name on the package."""
    safeside.attach = sys.modules[safeside.attach.__module__]
    assert safeside.attach.__name__ == "attach"
    assert callable(safeside.attach)
