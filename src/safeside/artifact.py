"""Adapters as folders: ``safeside_config.json``, ``adapter.safetensors``, ``provenance.json`` and a card.

Safetensors only: never pickle, never remote code.  ``format`` is 1; older formats load forever, a newer one is refused
by name.  The weights file carries a checksum of both files' contents, so that a damaged adapter is never used: it
tells damage and careless edits, not forgery.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path

import torch
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open

from safeside.adapters.adapter import TRUNKS, Adapter
from safeside.adapters.config import FORMAT, AdapterConfig, require_valid
from safeside.adapters.sizing import flops_share
from safeside.adapters.toplayers import TopLayers
from safeside.base.fingerprint import Fingerprint
from safeside.base.model import BUILTIN_NAME, Base, load_base
from safeside.base.weights import save_weights
from safeside.card import card_of
from safeside.errors import (
    ArtifactError,
    ConfigError,
    FormatError,
    InputError,
    MismatchError,
    UnknownNameError,
    UnsupportedError,
    problems_of,
)
from safeside.provenance import provenance
from safeside.staging import empty_stage, finish_replacing, put_in_place, writing
from safeside.tasks.learnt import LEARNT_FILE

CONFIG_FILE, WEIGHTS_FILE = "safeside_config.json", "adapter.safetensors"
PROVENANCE_FILE, CARD_FILE = "provenance.json", "README.md"
FILES = (CONFIG_FILE, PROVENANCE_FILE, CARD_FILE, WEIGHTS_FILE, LEARNT_FILE)
"""All that can be in an adapter's folder, and all that is copied or uploaded."""
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
_PREFIX = f"{BUILTIN_NAME}:"
_STAGE = ".stage"


def create_adapter(base: Base, config: AdapterConfig, seed: int = 0) -> Adapter:
    """A fresh adapter for ``base`` on its device, in float32; the same seed gives the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapter = Adapter(config)
    if isinstance(adapter.trunk, TopLayers):
        adapter.trunk.start(base)
    return adapter.to(base.device)


def save_adapter(
    adapter: Adapter,
    folder: str | Path,
    base: Base | None = None,
    facts: Mapping[str, str] | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> Path:
    """Write ``adapter`` to ``folder`` (made if missing) with its provenance and card.

    ``facts`` (a run's figures, data and licences) go into both.  With ``base`` the card tells the share of its compute.
    Weights are stored in ``dtype``, their own unless given.  An adapter that is there already goes; a kill leaves the
    old one or the new one.  A configuration that could not be loaded again is a ConfigError, and nothing is written.
    """
    stamp = {**provenance(), **(facts or {})}
    if base is not None:
        stamp["flops_share"] = f"{flops_share(base, adapter):.6f}"
    weights = {
        name: tensor.to("cpu", dtype or tensor.dtype).contiguous() for name, tensor in adapter.state_dict().items()
    }
    return _put(Path(folder), adapter, weights, stamp)


def copy_adapter(
    source: Path, folder: Path, config: AdapterConfig, facts: Mapping[str, str], *, loaded: str | None = None
) -> Path:
    """Write the adapter in ``source``, its weights byte for byte, to ``folder`` under another configuration.

    ``facts`` are added to its provenance.  ``folder`` may be ``source``: a kill leaves the old adapter or the new one.
    ``loaded`` is as for ``require_unchanged``.
    """
    _, weights = read_adapter(source)
    stamp = {**read_provenance(source), **facts}
    with torch.device("meta"):
        adapter = Adapter(config)
    return _put(folder, adapter, weights, stamp, (source, loaded))


def _put(
    folder: Path,
    adapter: Adapter,
    weights: dict[str, torch.Tensor],
    stamp: Mapping[str, str],
    source: tuple[Path, str | None] | None = None,
) -> Path:
    """The files of an adapter in ``folder`` (made if missing), all at once.

    ``source`` is the folder whose adapter it is under another configuration, for its record of learnt rows, and the
    checksum that it must still have.
    """
    values = json.loads(adapter.config.model_dump_json())
    require_valid(values)
    metadata = {"checksum": _checksum(values, weights)}  # one entry: the order of several is random in the file
    with writing(make_folder(folder)):
        if source is not None:
            require_unchanged(*source)
        stage = empty_stage(folder / _STAGE)
        _write_json(stage / CONFIG_FILE, values)
        save_weights(weights, stage / WEIGHTS_FILE, metadata, like=stage / CONFIG_FILE)
        _write_json(stage / PROVENANCE_FILE, stamp)
        (stage / CARD_FILE).write_text(card_of(adapter, stamp), encoding="utf-8")
        if source is not None and (source[0] / LEARNT_FILE).is_file():
            shutil.copyfile(source[0] / LEARNT_FILE, stage / LEARNT_FILE)
        put_in_place(stage, folder, FILES)
    return folder


def require_unchanged(folder: Path, loaded: str | None) -> None:
    """An InputError where the adapter in ``folder`` has another checksum than ``loaded``, that of when it was loaded.

    Another run has written to it then, and figures or weights that come from the adapter of before would not be its
    own.  None asks nothing.
    """
    if loaded is not None and read_checksum(folder) != loaded:
        raise InputError(
            f"{folder} has changed since this run began: another one wrote to it meanwhile. What that one wrote stays; "
            "start again, on top of it."
        )


def annotate_adapter(folder: str | Path, facts: Mapping[str, str]) -> Path:
    """Add ``facts`` to the provenance and card of a saved adapter; weights and configuration keep every byte."""
    folder = Path(folder)
    config, _ = read_adapter(folder)
    stamp = {**read_provenance(folder), **facts}
    with torch.device("meta"):
        adapter = Adapter(config)
    _write_json(folder / PROVENANCE_FILE, stamp)
    (folder / CARD_FILE).write_text(card_of(adapter, stamp), encoding="utf-8")
    return folder


def load_adapter(
    name_or_path: str | Path, base: Base, *, revision: str | None = None, allow_mismatch: str | None = None
) -> Adapter:
    """Load a guard or aligner for ``base``, in its dtype and on its device.

    ``name_or_path`` is a folder, a hub name, or ``builtin:harm`` and ``builtin:refuse``.  Another architecture or
    tokenizer is a MismatchError; so are other weights or another chat template unless ``allow_mismatch="weights"``,
    and then every verdict says so.  A damaged, unsafe or newer folder is a FormatError.
    """
    if allow_mismatch not in (None, "weights"):
        raise InputError(f"allow_mismatch can be 'weights' or None; got {allow_mismatch!r}.")
    config, weights = read_adapter(find_adapter(name_or_path, revision))
    config = check_base(config, (base.name, base.fingerprint), str(name_or_path), allow_mismatch)
    with torch.random.fork_rng(devices=[]):
        adapter = Adapter(config)
    adapter.load_state_dict(weights)
    if isinstance(adapter.trunk, TopLayers):
        adapter.trunk.bind(base)
    return adapter.to(device=base.device, dtype=base.dtype).eval().requires_grad_(False)


def base_of(name_or_path: str | Path, base_name: str | None = None, device: str = "cpu") -> Base:
    """The base that an adapter was made for, at the revision that it names; with ``base_name`` that one instead."""
    return load_base(*base_named(name_or_path, base_name), device)


def base_named(name_or_path: str | Path, base_name: str | None = None) -> tuple[str, str | None]:
    """Name and revision of the base of ``base_of``."""
    if base_name is not None:
        return base_name, None
    made_for = read_config(find_adapter(name_or_path)).base
    return made_for.name, made_for.revision


def make_folder(folder: Path) -> Path:
    """``folder``, made if missing; a place where none can be made is an InputError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder} cannot be a folder: {error.strerror}. Choose another place.") from error
    return folder


def require_new(folder: Path) -> Path:
    """``folder``, not made yet; one that exists, or lies under a file, is an InputError before any work is done."""
    if folder.exists():
        raise InputError(f"{folder} exists already; expected a new folder. Remove it or choose another.")
    above = next(place for place in folder.absolute().parents if place.exists())
    if not above.is_dir():
        raise InputError(f"{folder} cannot be a folder: {above} is a file. Choose another place.")
    return folder


def find_adapter(name_or_path: str | Path, revision: str | None = None) -> Path:
    """The local folder of an adapter; hub names are downloaded (never files that could hold code)."""
    name = str(name_or_path)
    if name.startswith(_PREFIX):
        folder = Path(str(files("safeside.builtin") / "adapters" / name.removeprefix(_PREFIX)))
        if not folder.is_dir():
            known = sorted(path.parent.name for path in folder.parent.glob(f"*/{CONFIG_FILE}"))
            raise InputError(f"There is no built-in adapter {name!r}; expected one of {_PREFIX}{{{', '.join(known)}}}.")
        return folder
    if Path(name).is_dir():
        finish_replacing(Path(name), FILES)
        return Path(name)
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(FILES)))
    except (HfHubHTTPError, LocalEntryNotFoundError, ValueError, OSError) as error:
        raise InputError(
            f"Cannot load an adapter from {name!r}: no such folder, and the model hub gave: {error}. "
            "Expected a folder with safeside_config.json, a hub name, or builtin:harm."
        ) from error


def push_adapter(folder: str | Path, repository: str, *, private: bool = False) -> str:
    """Upload a checked adapter folder to the hub, its own files only; returns the address.

    Whatever the hub refuses, or a hub that cannot be reached, is an ArtifactError.
    """
    config, _ = read_adapter(Path(folder))
    api, message = HfApi(), f"safeside {config.name}"
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        address = api.upload_folder(
            repo_id=repository, folder_path=folder, allow_patterns=list(FILES), commit_message=message
        )
    except Exception as error:  # the hub's client has no common root for its own errors and the network's
        raise ArtifactError(
            f"{folder} was not pushed to {repository!r}: the model hub gave: {error}. "
            "Check the name (owner/name), your login (hf auth login) and the connection."
        ) from error
    return str(address)


def pull_adapter(name: str, folder: str | Path, *, revision: str | None = None) -> Path:
    """Copy an adapter (hub name, built-in or folder) to ``folder``, which must not exist yet."""
    folder = require_new(Path(folder))
    source = find_adapter(name, revision)
    read_adapter(source)
    make_folder(folder)
    for file in FILES:
        if (source / file).is_file():
            shutil.copyfile(source / file, folder / file)
    return folder


def read_adapter(folder: Path) -> tuple[AdapterConfig, dict[str, torch.Tensor]]:
    """Configuration and weights in ``folder``, checked against each other; whatever is wrong is a FormatError."""
    finish_replacing(folder, FILES)
    values = _read_values(folder)
    config = _config_of(values, folder)
    weights, metadata = _read_weights(folder)
    _check_tensors(config, weights, folder)
    if metadata.get("checksum") != _checksum(values, weights):
        raise FormatError(
            f"{folder}: contents differ from the checksum that they were saved with; expected them as save_adapter "
            "wrote them. Get the folder again, or make changes in Python and save the adapter anew."
        )
    return config, weights


def read_checksum(folder: Path) -> str:
    """The sha256 of configuration and weights that the adapter in ``folder`` was saved with."""
    return _read_weights(folder)[1].get("checksum", "")


def read_config(folder: Path) -> AdapterConfig:
    """The configuration in ``folder`` alone; whatever is wrong with it is a FormatError."""
    return _config_of(_read_values(folder), folder)


def read_provenance(folder: Path) -> dict[str, str]:
    """What is known of the making of the adapter in ``folder``; nothing without its file, a FormatError if broken."""
    path = folder / PROVENANCE_FILE
    if not path.is_file():
        return {}
    try:
        return {str(key): str(value) for key, value in dict(json.loads(path.read_text(encoding="utf-8"))).items()}
    except (ValueError, TypeError) as error:
        raise FormatError(f"{path} is not a JSON object: {error}. Get the folder again, or remove the file.") from error


def _read_values(folder: Path) -> dict[str, object]:
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise FormatError(f"{folder} has no {CONFIG_FILE}; expected an adapter made by safeside. Check the path.")
    try:
        values = dict(json.loads(path.read_text(encoding="utf-8")))
        found = values["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise FormatError(f"{path} is not a valid configuration: {error!r}. Get the folder again.") from error
    if not isinstance(found, int) or not 1 <= found <= FORMAT:
        raise FormatError(f"{folder} has format {found!r}; this safeside reads formats 1 to {FORMAT}. Update safeside.")
    return values


def _config_of(values: Mapping[str, object], folder: Path) -> AdapterConfig:
    try:
        TRUNKS.get(str(values.get("kind")))
        return AdapterConfig.model_validate_json(json.dumps(values))
    except (ValidationError, UnknownNameError) as error:
        what = problems_of(error) if isinstance(error, ValidationError) else str(error)
        raise FormatError(f"{folder / CONFIG_FILE} is not a valid configuration: {what}") from error


def check_base(
    config: AdapterConfig, base: tuple[str, Fingerprint], name: str, allow_mismatch: str | None
) -> AdapterConfig:
    """The configuration of adapter ``name``, marked where ``base`` (its name and fingerprint) has other weights.

    What ``load_adapter`` refuses is a MismatchError.
    """
    trained, (base_name, given) = config.base.fingerprint, base
    both = f"trained on {config.base.name} ({trained}) but the base is {base_name} ({given})"
    parts = {
        "architecture": (trained.architecture, given.architecture),
        "tokenizer": (trained.tokenizer, given.tokenizer),
    }
    what = " and another ".join(part for part, (wanted, found) in parts.items() if wanted != found)
    if what:
        raise MismatchError(f"Adapter {name!r} was {both}: another {what}. Load the base that it was made for.")
    other = [part for part in ("weights", "template") if trained.model_dump()[part] != given.model_dump()[part]]
    if other and allow_mismatch != "weights":
        found = " and ".join({"weights": "other weights", "template": "another chat template"}[part] for part in other)
        raise MismatchError(
            f"Adapter {name!r} was {both}: the same architecture with {found}. Load the matching base, or pass "
            'allow_mismatch="weights" and check its figures on this one.'
        )
    return config.model_copy(update={"allow_mismatch": bool(other)})


def _read_weights(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors by name, and the file's metadata."""
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        pickles = [file.name for file in folder.iterdir() if file.suffix in _PICKLES]
        found = f"found {', '.join(pickles)}, which can run code and is never read" if pickles else "found nothing"
        raise FormatError(f"{folder} has no {WEIGHTS_FILE}; {found}. Save the adapter with save_adapter.")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, ValueError, OSError) as error:
        raise FormatError(
            f"{path} cannot be read: {error}. It is truncated, or not safetensors at all (a pickle is never loaded). "
            "Get the file again."
        ) from error


def _check_tensors(config: AdapterConfig, weights: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Raise unless ``weights`` are finite floats of exactly the shapes that ``config`` asks for."""
    try:
        with torch.device("meta"):
            expected = {name: tuple(tensor.shape) for name, tensor in Adapter(config).state_dict().items()}
    except (ConfigError, UnsupportedError) as error:
        raise FormatError(f"{folder / CONFIG_FILE} is not a valid configuration: {error}") from error
    for name, shape in expected.items():
        found = tuple(weights[name].shape) if name in weights else None
        if found != shape:
            raise FormatError(f"{folder}: tensor {name!r} has shape {found}; its configuration expects {shape}.")
    extra = sorted(set(weights) - set(expected))
    if extra:
        raise FormatError(f"{folder}: tensors that its configuration does not have: {', '.join(extra[:5])}.")
    odd = [f"{name} ({tensor.dtype})" for name, tensor in weights.items() if tensor.dtype not in _DTYPES]
    if odd:
        raise FormatError(f"{folder}: tensors that are not float32, bfloat16 or float16: {', '.join(odd[:5])}.")
    broken = [name for name, tensor in weights.items() if not tensor.isfinite().all()]
    if broken:
        raise FormatError(f"{folder}: tensors with NaN or infinity: {', '.join(broken[:5])}. Train the adapter again.")


def _checksum(values: Mapping[str, object], weights: Mapping[str, torch.Tensor]) -> str:
    """sha256 of the configuration as stored and of every tensor, whatever their order."""
    hasher = hashlib.sha256(json.dumps(values, sort_keys=True).encode())
    for name, tensor in sorted(weights.items()):
        hasher.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        hasher.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return hasher.hexdigest()


def _write_json(path: Path, values: object) -> None:
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
