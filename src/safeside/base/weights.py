"""Files of weights."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor


def save_weights(weights: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str], like: Path) -> None:
    """Write a safetensors file that may be read by whom the file ``like`` beside it may.

    The library writes another file and puts it in the place of an old one, which a process may have mapped, and lets
    the owner alone read it.
    """
    save_file(dict(weights), path, dict(metadata))
    shutil.copymode(like, path)
