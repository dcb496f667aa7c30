"""Adapters as folders: ``safeside_config.json``, ``adapter.safetensors``, ``provenance.json`` and a card.

Safetensors only: never pickle, never remote code.  ``format`` is 1; older formats load forever, a newer one is refused
by name.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path

import torch
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from safeside.adapters.adapter import TRUNKS, Adapter
from safeside.adapters.config import FORMAT, AdapterConfig
from safeside.adapters.sizing import adapter_matmuls, flops_share
from safeside.base.model import BUILTIN_NAME, Base
from safeside.errors import FormatError, InputError, MismatchError
from safeside.provenance import provenance

CONFIG_FILE, WEIGHTS_FILE = "safeside_config.json", "adapter.safetensors"
PROVENANCE_FILE, CARD_FILE = "provenance.json", "README.md"
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
_PREFIX = f"{BUILTIN_NAME}:"


def create_adapter(base: Base, config: AdapterConfig, seed: int = 0) -> Adapter:
    """A fresh adapter for ``base`` on its device, in float32; the same seed gives the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapter = Adapter(config)
    return adapter.to(base.device)


def save_adapter(
    adapter: Adapter, folder: str | Path, base: Base | None = None, facts: Mapping[str, str] | None = None
) -> Path:
    """Write ``adapter`` to ``folder`` (made if missing) with its provenance and card.

    ``facts`` (a run's figures, data and licences) go into both.  With ``base`` the card tells the share of its compute.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    stamp = {**provenance(), **(facts or {})}
    if base is not None:
        stamp["flops_share"] = f"{flops_share(base, adapter):.6f}"
    weights = {name: tensor.contiguous() for name, tensor in adapter.state_dict().items()}
    save_file(weights, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    _write_json(folder / CONFIG_FILE, json.loads(adapter.config.model_dump_json()))
    _write_json(folder / PROVENANCE_FILE, stamp)
    (folder / CARD_FILE).write_text(_card(adapter, stamp), encoding="utf-8")
    return folder


def load_adapter(
    name_or_path: str | Path, base: Base, *, revision: str | None = None, allow_mismatch: str | None = None
) -> Adapter:
    """Load a guard or aligner for ``base``, in its dtype and on its device.

    ``name_or_path`` is a folder, a hub name, or ``builtin:harm`` and ``builtin:refuse``.  Another architecture or
    tokenizer is a MismatchError; so are other weights of the same architecture unless ``allow_mismatch="weights"``,
    and then every verdict says so.  A damaged, unsafe or newer folder is a FormatError.
    """
    if allow_mismatch not in (None, "weights"):
        raise InputError(f"allow_mismatch can be 'weights' or None; got {allow_mismatch!r}.")
    folder = find_adapter(name_or_path, revision)
    config = read_config(folder)
    config = _check_base(config, base, str(name_or_path), allow_mismatch)
    weights = _read_weights(folder)
    adapter = Adapter(config)
    _check_shapes(adapter, weights, folder)
    adapter.load_state_dict(weights)
    return adapter.to(device=base.device, dtype=base.dtype).eval().requires_grad_(False)


def find_adapter(name_or_path: str | Path, revision: str | None = None) -> Path:
    """The local folder of an adapter; hub names are downloaded (never files that could hold code)."""
    name = str(name_or_path)
    if name.startswith(_PREFIX):
        folder = Path(str(files("safeside.builtin") / "adapters" / name.removeprefix(_PREFIX)))
        if not folder.is_dir():
            known = sorted(path.name for path in folder.parent.iterdir() if path.is_dir())
            raise InputError(f"There is no built-in adapter {name!r}; expected one of {_PREFIX}{{{', '.join(known)}}}.")
        return folder
    if Path(name).is_dir():
        return Path(name)
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=["*.json", "*.safetensors", "*.md"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, ValueError, OSError) as error:
        raise InputError(
            f"Cannot load an adapter from {name!r}: no such folder, and the model hub gave: {error}. "
            "Expected a folder with safeside_config.json, a hub name, or builtin:harm."
        ) from error


def push_adapter(folder: str | Path, repository: str, *, private: bool = False) -> str:
    """Upload a checked adapter folder to the hub; returns its address."""
    folder = Path(folder)
    config = read_config(folder)
    _check_shapes(Adapter(config), _read_weights(folder), folder)
    api = HfApi()
    api.create_repo(repository, private=private, exist_ok=True)
    return str(api.upload_folder(repo_id=repository, folder_path=folder, commit_message=f"safeside {config.name}"))


def pull_adapter(name: str, folder: str | Path, *, revision: str | None = None) -> Path:
    """Copy an adapter (hub name, built-in or folder) to ``folder``, which must not exist yet."""
    folder = Path(folder)
    if folder.exists():
        raise InputError(f"{folder} exists already; expected a new folder. Remove it or choose another.")
    source = find_adapter(name, revision)
    read_config(source)
    folder.mkdir(parents=True)
    for file in (CONFIG_FILE, WEIGHTS_FILE, PROVENANCE_FILE, CARD_FILE):
        if (source / file).is_file():
            shutil.copyfile(source / file, folder / file)
    return folder


def read_config(folder: Path) -> AdapterConfig:
    """The configuration in ``folder``, checked; whatever is wrong is a FormatError."""
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise FormatError(f"{folder} has no {CONFIG_FILE}; expected an adapter made by safeside. Check the path.")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        found = values["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise FormatError(f"{path} is not a valid configuration: {error!r}. Get the folder again.") from error
    if not isinstance(found, int) or not 1 <= found <= FORMAT:
        raise FormatError(
            f"{folder} has format {found!r}; this safeside reads formats up to {FORMAT}. Update safeside."
        )
    TRUNKS.get(str(values.get("kind")))
    try:
        return AdapterConfig.model_validate_json(json.dumps(values))
    except ValidationError as error:
        raise FormatError(f"{path} is not a valid configuration: {error}") from error


def _check_base(config: AdapterConfig, base: Base, name: str, allow_mismatch: str | None) -> AdapterConfig:
    trained, given = config.base.fingerprint, base.fingerprint
    both = f"trained on {config.base.name} ({trained}) but the base is {base.name} ({given})"
    for part, what in (("architecture", "another architecture"), ("tokenizer", "another tokenizer")):
        if getattr(trained, part) != getattr(given, part):
            raise MismatchError(f"Adapter {name!r} was {both}: {what}. Load the base that it was made for.")
    if trained.weights == given.weights:
        return config
    if allow_mismatch != "weights":
        raise MismatchError(
            f"Adapter {name!r} was {both}: the same architecture with other weights. Load the matching base, or pass "
            'allow_mismatch="weights" and check its figures on this one.'
        )
    return config.model_copy(update={"allow_mismatch": True})


def _read_weights(folder: Path) -> dict[str, torch.Tensor]:
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        pickles = [file.name for file in folder.iterdir() if file.suffix in _PICKLES]
        found = f"found {', '.join(pickles)}, which can run code and is never read" if pickles else "found nothing"
        raise FormatError(f"{folder} has no {WEIGHTS_FILE}; {found}. Save the adapter with save_adapter.")
    try:
        return load_file(path)
    except (SafetensorError, ValueError, OSError) as error:
        raise FormatError(
            f"{path} cannot be read: {error}. It is truncated, or not safetensors at all (a pickle is never loaded). "
            "Get the file again."
        ) from error


def _check_shapes(adapter: Adapter, weights: Mapping[str, torch.Tensor], folder: Path) -> None:
    expected = {name: tuple(tensor.shape) for name, tensor in adapter.state_dict().items()}
    for name, shape in expected.items():
        found = tuple(weights[name].shape) if name in weights else None
        if found != shape:
            raise FormatError(f"{folder}: tensor {name!r} has shape {found}; its configuration expects {shape}.")
    extra = sorted(set(weights) - set(expected))
    if extra:
        raise FormatError(f"{folder}: tensors that its configuration does not have: {', '.join(extra[:5])}.")
    broken = [name for name, tensor in weights.items() if not tensor.isfinite().all()]
    if broken:
        raise FormatError(f"{folder}: tensors with NaN or infinity: {', '.join(broken[:5])}. Train the adapter again.")


def _write_json(path: Path, values: object) -> None:
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _card(adapter: Adapter, stamp: Mapping[str, str]) -> str:
    """The generated README of an adapter folder."""
    config = adapter.config
    use = (
        f"guards=[load_adapter('path/to/{config.name}', base)]"
        if config.role == "guard"
        else f"aligners=[load_adapter('path/to/{config.name}', base)], strength=1.0"
    )
    lines = [
        "---", "library_name: safeside", f"base_model: {config.base.name}", "tags: [safety, adapter]", "---", "",
        f"# {config.name}", "",
        f"A safeside {'guard' if config.role == 'guard' else 'aligner'} of kind `{config.kind}` for "
        f"`{config.base.name}` (fingerprint {config.base.fingerprint}): it reads layers "
        f"{', '.join(map(str, config.layers))} of the frozen base in the base's own forward pass.", "",
        "```python", "from safeside import attach, load_adapter, load_base",
        f"base = load_base('{config.base.name}')", f"with attach(base, {use}):", "    ...", "```", "",
        "| fact | value |", "|---|---|",
        f"| multiply-adds a token | {adapter_matmuls(adapter):,} |",
        *([f"| labels | {', '.join(config.labels)} |"] if config.labels else []),
        *([f"| thresholds | {', '.join(f'{value:.4f}' for value in adapter.thresholds)} at a false-positive rate of "
           f"{config.calibration.false_positive_rate:.0%} on validation data |"] if config.calibration else []),
        *(f"| {key} | {value} |" for key, value in sorted(stamp.items())),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"
