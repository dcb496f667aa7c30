"""A LoRA inside the base: standard fine-tuning, which guards and aligners are measured against.

While one is there the base is changed: its states are not the base's.  ``unload``, or the end of the ``with`` block,
gives the base back bit for bit, and so does scale 0.  Folders are peft's own: ``adapter_config.json`` and
``adapter_model.safetensors``.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer, LoraModel
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from safeside.adapters.sizing import adapter_matmuls, base_matmuls
from safeside.artifact import PROVENANCE_FILE, make_folder, read_provenance
from safeside.base.families import has_lora
from safeside.base.fingerprint import Fingerprint
from safeside.base.model import Base
from safeside.base.weights import save_weights
from safeside.errors import AttachmentError, ConfigError, FormatError, InputError, MismatchError, problems_of
from safeside.provenance import provenance

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
LIMIT = 2.0
"""Greatest scale, as of an aligner's strength."""
_ADAPTER = "default"  # peft's name for the only LoRA
_FINGERPRINT = "fingerprint"  # of the base, in the provenance


@dataclass(frozen=True, slots=True)
class LoraShape:
    """The dimensions of a Lora."""

    rank: int = 8
    """Of each update."""
    alpha: float = 16.0
    """Updates are multiplied by ``alpha / rank``."""
    targets: tuple[str, ...] = ()
    """Endings of the names of linear layers to update, such as ``q_proj``; all in the blocks unless given."""
    depth: int | None = None
    """Update that many blocks at the top only; all unless given."""


class Lora(nn.Module):
    """Updates of linear layers inside ``base``, at scale 1.  Use it as a context manager, or call ``unload``.

    Its parameters are those of the updates only.  A base with an attachment or a LoRA is an AttachmentError.
    """

    def __init__(self, base: Base, config: LoraConfig) -> None:
        super().__init__()
        if base.attachment is not None or has_lora(base.model):
            raise AttachmentError(f"{base.name} has an attachment or a LoRA already. Detach it, or unload it, first.")
        self.base, self.config = base, config
        self._n_head = 0 if base.is_encoder else head_matmuls(base)
        self._n_base = base_matmuls(base)
        self._tuner = [LoraModel(base.model, config, _ADAPTER)]  # in a list: the base is no part of this module
        self._names = [name for name, _ in base.model.named_parameters() if "lora_" in name]
        self.updates = nn.ParameterList(base.model.get_parameter(name) for name in self._names)
        self.scale = 1.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.unload()

    def unload(self) -> None:
        """Take the updates out of the base again.  Safe to call twice."""
        if self._tuner:
            self._tuner.pop().unload()
            self.base.model.requires_grad_(False)

    def final_states(self, ids: Tensor, keep: Tensor) -> Tensor:
        """Final normed states (B, T, D) of one pass of the updated base."""
        if not self._tuner:
            raise AttachmentError("This LoRA was unloaded from its base. Make another one.")
        final: Tensor = self.base.decoder(input_ids=ids, attention_mask=keep, use_cache=False)[0]
        return final

    @contextlib.contextmanager
    def scaled(self, scale: float) -> Iterator[None]:
        """Multiply the updates by ``scale`` in [0, 2] inside the block; at 0 they are not computed: the plain base."""
        if not self._tuner:
            raise AttachmentError("This LoRA was unloaded from its base. Make another one.")
        if not (math.isfinite(scale) and 0 <= scale <= LIMIT):
            raise InputError(f"A LoRA's scale lies between 0 and {LIMIT:g}; got {scale}.")
        before = self.scale
        self._set_scale(scale)
        try:
            yield
        finally:
            self._set_scale(before)

    def _set_scale(self, scale: float) -> None:
        trained = [parameter.requires_grad for parameter in self.updates]
        for module in self.base.model.modules():
            if isinstance(module, LoraLayer):
                module.set_scale(_ADAPTER, scale)
                module.enable_adapters(scale != 0)  # it also changes what is trained, hence the lines around
        for parameter, is_trained in zip(self.updates, trained, strict=True):
            parameter.requires_grad_(is_trained)
        self.scale = scale

    @property
    def named_updates(self) -> dict[str, Tensor]:
        """The updates by their names in a peft folder."""
        names = [f"base_model.model.{name.replace(f'.{_ADAPTER}.', '.')}" for name in self._names]
        return dict(zip(names, self.updates, strict=True))

    @property
    def matmuls(self) -> int:
        """Multiply-adds a token of a pass of its own: the base's blocks and the updates, no vocabulary."""
        return self._n_base - self._n_head + adapter_matmuls(self)

    @property
    def flops_share(self) -> float:
        """What the updates cost beside the base with its head: 0.01 is 1%."""
        return adapter_matmuls(self) / self._n_base


def head_matmuls(base: Base) -> int:
    """Multiply-adds a token of the base's language-model head."""
    return int(base.model.config.get_text_config().vocab_size) * base.d_model


def linear_layers(base: Base, targets: tuple[str, ...] = (), depth: int | None = None) -> list[str]:
    """Full names of the linear layers in the top ``depth`` blocks whose names end in one of ``targets``.

    All blocks without a depth, all layers without targets; none at all is a ConfigError.
    """
    if depth is not None and not 1 <= depth <= base.n_layers:
        raise ConfigError(f"depth counts blocks from the top and lies in 1..{base.n_layers}; got {depth}.")
    blocks = list(base.blocks)[-(depth or base.n_layers) :]
    inside = {module for block in blocks for module in block.modules() if isinstance(module, nn.Linear | Conv1D)}
    names = [name for name, module in base.model.named_modules() if module in inside]
    chosen = [name for name in names if not targets or name.rpartition(".")[2] in targets]
    if not chosen:
        known = ", ".join(sorted({name.rpartition(".")[2] for name in names}))
        raise ConfigError(f"No linear layer in the blocks of {base.name} ends in {', '.join(targets)}; found {known}.")
    return chosen


def lora_config(base: Base, shape: LoraShape) -> LoraConfig:
    """peft's configuration of a LoRA of that shape in ``base``."""
    names = linear_layers(base, shape.targets, shape.depth)
    return LoraConfig(
        r=shape.rank,
        lora_alpha=shape.alpha,  # type: ignore[arg-type]
        target_modules=names,
        fan_in_fan_out=isinstance(base.model.get_submodule(names[0]), Conv1D),
        base_model_name_or_path=base.name,
        revision=base.revision,
        task_type=None if base.is_encoder else "CAUSAL_LM",
    )


def add_lora(base: Base, shape: LoraShape | None = None, seed: int = 0) -> Lora:
    """A fresh trainable Lora inside ``base``: it starts as the base, and the same seed gives the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Lora(base, lora_config(base, shape or LoraShape()))


def save_lora(
    lora: Lora, folder: str | Path, facts: Mapping[str, str] | None = None, *, dtype: torch.dtype | None = None
) -> Path:
    """Write a peft folder (made if missing) that peft, too, can load, and beside it where it comes from.

    ``facts`` are a run's figures.  Weights are stored in ``dtype``, their own unless given.
    """
    folder = make_folder(Path(folder))
    lora.config.inference_mode = True
    lora.config.save_pretrained(str(folder))
    weights = {name: tensor.detach().to("cpu", dtype or tensor.dtype) for name, tensor in lora.named_updates.items()}
    stored = {name: tensor.contiguous() for name, tensor in weights.items()}
    save_weights(stored, folder / WEIGHTS_FILE, {"format": "pt"}, like=folder / CONFIG_FILE)
    stamp = {**provenance(), **(facts or {}), _FINGERPRINT: lora.base.fingerprint.model_dump_json()}
    (folder / PROVENANCE_FILE).write_text(json.dumps(stamp, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return folder


def load_lora(folder: str | Path, base: Base) -> Lora:
    """The LoRA of a peft folder, put into ``base`` at scale 1 and frozen.

    One that ``save_lora`` wrote for another base is a MismatchError; of other folders the base is not known, only
    whether the tensors fit.  A folder that is damaged, or is no LoRA, is a FormatError.
    """
    folder = Path(folder)
    config, weights = _read(folder)
    _check_base(folder, base)
    lora = Lora(base, config)
    try:
        _fill(lora, weights, folder)
    except FormatError:
        lora.unload()
        raise
    lora.requires_grad_(False)
    return lora


def _read(folder: Path) -> tuple[LoraConfig, dict[str, Tensor]]:
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / file).is_file():
            raise FormatError(f"{folder} has no {file}; expected a LoRA's folder as peft saves it. Check the path.")
    try:
        kind = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))["peft_type"]
        if kind != "LORA":
            raise FormatError(f"{folder} holds a {kind} adapter of peft; expected a LoRA. Choose another folder.")
        return LoraConfig.from_pretrained(str(folder)), load_file(folder / WEIGHTS_FILE)
    except (SafetensorError, ValueError, TypeError, KeyError) as error:
        if isinstance(error, FormatError):
            raise
        raise FormatError(f"{folder} cannot be read as a LoRA: {error!r}. Get the folder again.") from error


def _check_base(folder: Path, base: Base) -> None:
    stored = read_provenance(folder).get(_FINGERPRINT)
    if stored is None:
        return
    try:
        trained = Fingerprint.model_validate_json(stored)
    except ValidationError as error:
        raise FormatError(
            f"{folder / PROVENANCE_FILE} has a broken fingerprint: {problems_of(error)}. Get it again."
        ) from error
    if trained != base.fingerprint:
        raise MismatchError(
            f"The LoRA in {folder} was trained on a base with fingerprint {trained} but the base is {base.name} "
            f"({base.fingerprint}). Load the base that it was made for."
        )


def _fill(lora: Lora, weights: Mapping[str, Tensor], folder: Path) -> None:
    """Copy stored weights into the updates; whatever does not fit is a FormatError."""
    own = lora.named_updates
    wrong = sorted(set(own) ^ set(weights)) + [
        name for name in set(own) & set(weights) if own[name].shape != weights[name].shape
    ]
    if wrong:
        raise FormatError(
            f"{folder} does not fit {lora.base.name}: {len(wrong)} tensors are missing, unknown or of another shape, "
            f"such as {wrong[0]}. Load the base that it was made for."
        )
    broken = [name for name, tensor in weights.items() if not tensor.isfinite().all()]
    if broken:
        raise FormatError(f"{folder} has tensors with NaN or infinity, such as {broken[0]}. Train it again.")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(weights[name])
