"""Model families as data: where the blocks and the final norm sit, relative to the decoder.

Also the only place that asks a foreign model object what it can do.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce

from torch import nn
from transformers import PreTrainedModel

from safeside.base.updates import has_live_updates
from safeside.errors import UnsupportedError
from safeside.registry import Registry, did_you_mean


@dataclass(frozen=True, slots=True)
class Family:
    """A group of architectures that share two dotted paths: the block list and the final norm of the decoder."""

    name: str
    """What the family is registered as."""
    model_types: tuple[str, ...]
    """``model_type`` of each member's config.json."""
    blocks: str = "layers"
    """Path from the decoder to its list of transformer blocks."""
    norm: str = "norm"
    """Path from the decoder to the norm after the last block; empty for encoders, which have none."""
    is_encoder: bool = False
    """Whether members read both ways and have no language-model head: guards only."""
    spare_positions: int = 0
    """Entries of the position table that no token may use."""


FAMILIES: Registry[Family] = Registry("family")


def register_family(family: Family) -> None:
    """Make ``family`` known to ``load_base``.  A name that is taken by another family is a ConfigError."""
    FAMILIES.register(family.name, family)


for _family in (
    Family("llama", ("llama", "smollm3", "olmo2")),
    Family("qwen", ("qwen2", "qwen3", "qwen3_moe")),
    Family("mistral", ("mistral", "mixtral")),
    Family("gemma", ("gemma", "gemma2", "gemma3_text")),
    Family("phi", ("phi3",)),
    Family("granite", ("granite",)),
    Family("cohere", ("cohere", "cohere2")),
    Family("gpt-oss", ("gpt_oss",)),
    Family("gpt2", ("gpt2",), blocks="h", norm="ln_f"),
    Family("opt", ("opt",), norm="final_layer_norm"),
    Family("gpt-neox", ("gpt_neox",), norm="final_layer_norm"),
    Family("bert", ("bert", "electra"), blocks="encoder.layer", norm="", is_encoder=True),
    Family("roberta", ("roberta",), blocks="encoder.layer", norm="", is_encoder=True, spare_positions=2),
    Family("distilbert", ("distilbert",), blocks="transformer.layer", norm="", is_encoder=True),
):
    register_family(_family)


def find_family(model_type: str) -> Family:
    """The family that lists ``model_type``; an unknown one is an UnsupportedError that names ``register_family``."""
    known = {kind: FAMILIES.get(name) for name in FAMILIES for kind in FAMILIES.get(name).model_types}
    if model_type not in known:
        raise UnsupportedError(
            did_you_mean("model type", model_type, list(known))
            + " For another architecture call register_family(Family(name, (model_type,), blocks, norm))."
        )
    return known[model_type]


def locate(root: nn.Module, path: str) -> nn.Module:
    """The sub-module at a dotted path."""
    try:
        return reduce(lambda module, name: module.get_submodule(name), path.split("."), root)
    except AttributeError as error:
        raise UnsupportedError(
            f"{type(root).__name__} has no sub-module {path!r}; expected the path that its family names. "
            "Register a family with the right paths."
        ) from error


def decoder_of(model: PreTrainedModel, family: Family) -> nn.Module:
    """The module whose output goes into the language-model head; for encoders the encoder model itself."""
    decoder: nn.Module = model.base_model if family.is_encoder else model.get_decoder()  # type: ignore[no-untyped-call]
    return decoder


def refused_reason(model: nn.Module) -> str | None:
    """Why adapters cannot be attached to this model object, or None when they can."""
    modules = list(model.modules())
    if any(type(module).__name__ == "OptimizedModule" or module._compiled_call_impl is not None for module in modules):
        return "torch.compile: compiled code may skip hooks silently. Attach to the uncompiled model."
    if any(vars(module).get("gradient_checkpointing") is True for module in modules):
        return (
            "gradient checkpointing: a frozen base stores no activations, and recomputation would run the taps twice. "
            "Call model.gradient_checkpointing_disable()."
        )
    places = {str(place) for place in (vars(model).get("hf_device_map") or {}).values()}
    if "disk" in places or ("cpu" in places and len(places) > 1):
        return "CPU offload (device_map with 'cpu' or 'disk' entries). Load the base on one device."
    if len(places) > 1:
        return "device_map on several devices. Load the base on one device."
    if any(parameter.is_meta for parameter in model.parameters()):
        return "meta parameters: the weights are not loaded. Load the base on one device."
    return None


def has_lora(model: nn.Module) -> bool:
    """Whether PEFT layers sit inside the model."""
    return any(type(module).__module__.startswith("peft.tuners") for module in model.modules())


def is_updated(model: nn.Module) -> bool:
    """Whether a LoRA or a gene sits inside the model: either shifts the hidden states that guards were trained on."""
    return has_lora(model) or has_live_updates(model)
