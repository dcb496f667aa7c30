"""What ``load_base`` checks first, and how a checkpoint that cannot be loaded is told."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import torch

from safeside.errors import InputError, SafesideError


def checked_device(device: str | torch.device) -> torch.device:
    """``device`` as torch knows it; one that this machine does not have is an InputError."""
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(
            f"Device {str(device)!r} cannot be used here: {reason}. Use 'cpu', or another device."
        ) from error
    return found


def checked_dtype(dtype: torch.dtype | str) -> torch.dtype | str:
    """A floating-point dtype, or ``"auto"``; anything else is an InputError."""
    found = vars(torch).get(dtype) if isinstance(dtype, str) else dtype
    if dtype != "auto" and not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise InputError(
            f"A base cannot have dtype {str(dtype)!r}; expected 'float32', 'bfloat16', 'float16' or 'auto'."
        )
    return dtype if found is None else found


def model_type_of(folder: Path, name: str) -> str:
    """``model_type`` of the checkpoint's config.json; a missing or broken file is an InputError."""
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(f"{name} has no config.json; expected a folder made by save_pretrained.")
    try:
        return str(dict(json.loads(path.read_text(encoding="utf-8"))).get("model_type"))
    except (ValueError, TypeError) as error:
        raise InputError(f"{path} is not a model's configuration: {error}. Get the checkpoint again.") from error


@contextlib.contextmanager
def explained_loading(name: str) -> Iterator[None]:
    """Whatever goes wrong while transformers reads a checkpoint's files becomes one InputError.

    Loaders and tokenizers raise everything from OSError to a bare Exception, so everything is taken.
    """
    try:
        yield
    except SafesideError:
        raise
    except Exception as error:
        raise InputError(
            f"The checkpoint {name} cannot be loaded: {error}. Its files are missing, damaged or do not fit together; "
            "get it again, or save it anew with save_pretrained (model and tokenizer)."
        ) from error
