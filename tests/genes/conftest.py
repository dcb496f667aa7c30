"""A family of tiny models for genes: one is called aligned, and a sibling of it lost something."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from genes_for_tests import moved_copy, random_gene
from safeside import Base, load_base


@pytest.fixture(scope="session")
def degraded(session_base: Base, tmp_path_factory: pytest.TempPathFactory) -> Base:
    """The tiny llama without something of low rank that it had: what a gene should give back."""
    lost = random_gene(session_base, seed=7, scale=0.15)
    matrices = {name: -update.matrix for name, update in lost.updates.items()}
    return moved_copy(session_base, tmp_path_factory.mktemp("degraded"), matrices)


@pytest.fixture
def fresh_base(tiny_folder: Callable[[str], Path]) -> Base:
    """A tiny llama that a test may break."""
    return load_base(tiny_folder("llama"))
