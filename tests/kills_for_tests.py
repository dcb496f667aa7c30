"""A process that dies between two changes of the disk."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest


class KilledError(BaseException):
    """What nothing catches."""


def kill_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Let the process die just before the ``step``-th time that a file or folder is moved or copied, or one deleted."""
    steps = itertools.count()

    def dying(do: Callable[..., object]) -> Callable[..., object]:
        def act(*words: object, **options: object) -> object:
            if next(steps) >= step:
                raise KilledError
            return do(*words, **options)

        return act

    for name in ("rename", "replace", "unlink"):
        monkeypatch.setattr(Path, name, dying(getattr(Path, name)))
    for name in ("copyfile", "rmtree"):
        monkeypatch.setattr(shutil, name, dying(getattr(shutil, name)))
