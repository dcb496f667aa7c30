"""Peak memory: of the block alone, without mapped files."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest
import torch

from safeside.train import memory as module
from safeside.train.memory import PeakMemory, anonymous_bytes

MEGABYTE = 1 << 20
CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


def block(megabytes: int) -> torch.Tensor:
    return torch.ones(megabytes * MEGABYTE, dtype=torch.uint8)


def test_what_is_freed_inside_counts_and_what_was_freed_before_does_not() -> None:
    before = anonymous_bytes()
    with PeakMemory(CPU) as memory:
        held = block(200)
        while memory.n_bytes < before + 190 * MEGABYTE:  # the thread sees it by itself
            time.sleep(0.01)
        del held
    assert memory.measure == "anonymous memory"
    with PeakMemory(CPU) as later:
        kept = block(20)
        later.sample()
    assert len(kept)
    assert later.n_bytes < memory.n_bytes - 100 * MEGABYTE


def test_the_start_counts() -> None:
    held = block(100)
    with PeakMemory(CPU) as memory:
        pass
    assert memory.n_bytes >= len(held)


def test_mapped_files_do_not_count(tmp_path: Path) -> None:
    n_bytes = 200 * MEGABYTE
    mapped = torch.from_file(str(tmp_path / "states"), shared=True, size=n_bytes, dtype=torch.uint8)
    with PeakMemory(CPU) as memory:
        before = memory.n_bytes
        mapped.fill_(1)
        memory.sample()
    assert memory.n_bytes < before + 100 * MEGABYTE


def test_other_systems_say_what_they_tell(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module, "_STATUS", tmp_path / "none")
    with PeakMemory(CPU) as memory:
        pass
    assert memory.measure == "most ever resident, mapped files included"
    assert memory.n_bytes > 10 * MEGABYTE


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_accelerator_starts_anew() -> None:
    device = torch.device("cuda")
    torch.ones(200 * MEGABYTE, dtype=torch.uint8, device=device)
    with PeakMemory(device) as memory:
        torch.ones(20 * MEGABYTE, dtype=torch.uint8, device=device)
    assert 20 * MEGABYTE <= memory.n_bytes < 100 * MEGABYTE
    assert memory.measure == "allocated on the accelerator"
