"""What an adapter costs beside its base, and the dial that picks one of a wanted size.

Cost is counted in matmul multiply-adds a token: every weight matrix is used once, so the count is the number of
matrix entries.  The base counts its blocks and one head pass (for mixtures of experts only the experts a
token visits); attention scores are left out on both sides.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from transformers import PreTrainedConfig, PreTrainedTokenizerFast

from safeside.adapters.adapter import DIMENSIONS, Adapter, check_role, dimensions_of
from safeside.adapters.config import LADDERS, AdapterConfig, BaseReference, HeadDim, reference_of, require_valid
from safeside.adapters.toplayers import TopLayers
from safeside.base.families import find_family
from safeside.base.fingerprint import Fingerprint
from safeside.base.model import Base
from safeside.base.shell import meta_model
from safeside.base.top import described
from safeside.errors import ConfigError


def geometry_base(config: PreTrainedConfig, name: str = "geometry") -> Base:
    """A base of the shape of ``config``, without weights or files: to size adapters for, never to run.

    Its fingerprint is empty, so an adapter made for it fits no real base.
    """
    family = find_family(config.model_type)
    model = meta_model(config, family)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel()))  # type: ignore[no-untyped-call]
    base = Base(model, tokenizer, family, name, Path())
    base.fingerprint = Fingerprint(architecture="", tokenizer="", template="", weights="")
    return base


def base_matmuls(base: Base) -> int:
    """Multiply-adds a token of the base: blocks plus one head pass."""
    config = base.model.config.get_text_config()
    head = 0 if base.is_encoder else config.vocab_size * base.d_model
    return int(_block_matmuls(base.blocks, config) + head)


def _block_matmuls(blocks: nn.Module, config: PreTrainedConfig) -> int:
    """Multiply-adds a token of a base's blocks; of a mixture of experts those of the active ones."""
    fields = config.to_dict()
    n_experts = fields.get("num_local_experts") or fields.get("num_experts") or 1
    active = (fields.get("num_experts_per_tok") or 1) / n_experts
    return sum(
        round(parameter.numel() * (active if parameter.ndim == 3 else 1))
        for name, parameter in blocks.named_parameters()
        if parameter.ndim >= 2 and not name.endswith("bias")
    )


def adapter_matmuls(adapter: nn.Module) -> int:
    """Multiply-adds a token of one adapter, projections from and to the base's width included.

    Blocks of the base that it runs a second time count too, whoever holds their weights.
    """
    if isinstance(adapter, Adapter) and isinstance(adapter.trunk, TopLayers):
        top = adapter.trunk.own_top
        return _block_matmuls(top.blocks, top.config) + adapter_matmuls(adapter.trunk.updates)
    return sum(parameter.numel() for parameter in adapter.parameters() if parameter.ndim >= 2)


def flops_share(base: Base, *adapters: nn.Module) -> float:
    """Cost of the adapters over the cost of the base, in matmul multiply-adds a token: 0.01 is 1%.

    Projections from and to the base's width count; the base counts its blocks and one head pass; attention scores are
    left out on both sides.  Several adapters add up.
    """
    return sum(adapter_matmuls(adapter) for adapter in adapters) / base_matmuls(base)


def make_config(
    base: Base | BaseReference,
    *,
    kind: str = "lst",
    role: Literal["guard", "align"] = "guard",
    name: str = "adapter",
    labels: tuple[str, ...] | None = None,
    reduction: float | None = None,
    layers: tuple[int, ...] | None = None,
    head_dim: HeadDim | None = None,
    query_group: int | None = None,
    **dimensions: object,
) -> AdapterConfig:
    """A configuration for ``base`` with the usual layers and ``width = D / reduction`` where the kind has a width.

    ``reduction`` is 16 unless given.  The width is rounded to a multiple of ``head_dim`` (32 unless given) times
    ``query_group`` (1 unless given) and is at least that.  ``layers`` are all from the embedding (0) up, for ``plr``
    and ``state_map`` the last, for ``toplayers`` the one below its ``depth`` (2 unless given) blocks.  A guard has the
    one label ``harm`` unless ``labels`` are given; on an encoder its ``readout`` is ``attention`` unless given.
    ``plr`` as a guard is a linear probe unless ``width`` is given.  Further ``dimensions`` are fields of AdapterConfig.
    What does not fit together is a ConfigError, and so is what the kind or role would not read.
    """
    sizes = {"head_dim": head_dim, "query_group": query_group}
    given = {**dimensions, **sizes, "reduction": reduction, "layers": layers}
    _check_read(kind, role, {name: value for name, value in given.items() if value is not None})
    reference = reference_of(base) if isinstance(base, Base) else base
    values: dict[str, object] = {
        "kind": kind,
        "role": role,
        "name": name,
        "labels": ("harm",) if labels is None and role == "guard" else labels or (),
        "layers": layers or default_layers(kind, reference.n_layers),
        "head_dim": 32 if head_dim is None else head_dim,
        "query_group": 1 if query_group is None else query_group,
        "base": reference,
    }
    if role == "guard" and reference.is_encoder:
        values["readout"] = "attention"
    if _has_default_width(kind, role):
        share = reference.d_model / (16 if reduction is None else reduction)
        step = _width_step(values, reference.d_model)
        values["width"] = max(step, round(share / step) * step)
    if kind == "toplayers":
        values |= _top_values(base, reference, dimensions)
    return require_valid({**values, **dimensions})


def _top_values(base: Base | BaseReference, reference: BaseReference, given: dict[str, object]) -> dict[str, object]:
    """Depth, tapped layer and the base's own configuration, for ``toplayers``."""
    if not isinstance(base, Base):
        raise ConfigError("Kind 'toplayers' is built from the base's own blocks. Pass the base, not a reference.")
    depth = given.get("depth", min(2, reference.n_layers))
    values: dict[str, object] = {"depth": depth, "blocks": described(base)}
    if isinstance(depth, int):
        values["layers"] = (max(0, reference.n_layers - depth),)
    return values


def _has_default_width(kind: str, role: str) -> bool:
    return kind in LADDERS or (kind == "plr" and role == "align")


def _check_read(kind: str, role: str, given: dict[str, object]) -> None:
    """Raise a ConfigError for the first of the ``given`` fields that nothing would read."""
    used = dimensions_of(kind)
    check_role(kind, role)
    for name in DIMENSIONS:
        if name in given and name not in used:
            known = ", ".join(sorted(used)) or "none"
            raise ConfigError(f"{name!r} does nothing for kind {kind!r}, which reads {known}. Leave it out.")
    if "reduction" in given:
        if not _has_default_width(kind, role):
            other = next((name for name in ("width", "bottleneck", "depth") if name in used), "its dimensions")
            raise ConfigError(
                f"'reduction' does nothing for a {role} of kind {kind!r}. Give {other!r}, or leave it out."
            )
        if "width" in given:
            raise ConfigError("'reduction' and 'width' both set the width; keep one.")
        if not 1 <= float(str(given["reduction"])) < math.inf:
            raise ConfigError(f"'reduction' must be a number from 1 on; got {given['reduction']}.")
    layers = given.get("layers")
    if kind == "plr" and isinstance(layers, tuple | list) and len(layers) > 1:
        raise ConfigError(f"kind 'plr' reads one layer; got layers {tuple(layers)}. Name the one to read.")
    if kind == "plr" and "tap_rank" in given and not (given.get("width") or _has_default_width(kind, role)):
        raise ConfigError("'tap_rank' does nothing for a linear probe (kind 'plr' without 'width'). Give a width too.")
    if role == "align" and given.get("readout", "last") != "last":
        raise ConfigError("'readout' is for guards: an aligner changes every token. Leave it out.")


def default_layers(kind: str, n_layers: int) -> tuple[int, ...]:
    """All layers from the embedding up; for ``plr`` and ``state_map`` the last one."""
    return (n_layers,) if kind in ("plr", "state_map") else tuple(range(n_layers + 1))


def spread_layers(n_layers: int, n_taps: int) -> tuple[int, ...]:
    """``n_taps`` layers, evenly spread and ending at the top; the embedding is tapped only if all others are."""
    if not 1 <= n_taps <= n_layers + 1:
        raise ConfigError(f"n_taps must lie in 1..{n_layers + 1}, blocks and embedding; got {n_taps}.")
    if n_taps > n_layers:
        return tuple(range(n_layers + 1))
    return tuple(round(n_layers * (index + 1) / n_taps) for index in range(n_taps))


def sized_config(base: Base, size: float = 0.01, n_taps: int | None = None, **options: object) -> AdapterConfig:
    """The largest configuration that costs at most ``size`` of the base (0.01 is 1%).

    The greatest width that fits, on ``n_taps`` layers that are spread evenly and end at the top, on all unless given;
    where even the narrowest does not fit, on fewer.  At equal multiply-adds few wide taps take less time than many
    narrow ones, since each brings a block with steps of its own.  A base too small for any gets the narrowest single
    tap: ``flops_share`` then tells by how much it is over.  ``options`` are those of ``make_config``; it picks width
    and layers itself.  It sizes ``lst`` and ``lst_plus`` only: other kinds, a ``size`` that is not a number above
    0, and more taps than layers are a ConfigError.
    """
    if options.get("kind", "lst") not in LADDERS:
        raise ConfigError(f"size is for kind 'lst'; call make_config with the dimensions of {options['kind']!r}.")
    if not 0 < size < math.inf:
        raise ConfigError(f"size is a share of the base's compute above 0, such as 0.01; got {size}.")
    chosen = sorted({"width", "reduction", "layers"} & {name for name, value in options.items() if value is not None})
    if chosen:
        raise ConfigError(f"size picks width and layers; leave {', '.join(chosen)} out, or call make_config.")
    step = _width_step(options, base.d_model)
    if n_taps is None:
        choices = [tuple(range(base.n_layers, -1, -stride))[::-1] for stride in range(1, base.n_layers + 2)]
    else:
        choices = [spread_layers(base.n_layers, count) for count in (n_taps, *range(n_taps - 1, 0, -1))]

    def config(layers: tuple[int, ...], width: int) -> AdapterConfig:
        return make_config(base, **{**options, "layers": layers, "width": width})  # type: ignore[arg-type]

    for layers in choices:
        found = widest(base, size, step, partial(config, layers))
        if found is not None:
            return found
    return config(choices[-1], step)


def _width_step(options: dict[str, object], d_model: int) -> int:
    """The narrowest width: one group of heads.  What is no size of either is left to ``make_config`` to refuse."""
    sizes = (options.get("head_dim") or 32, options.get("query_group") or 1)
    step = math.prod(size for size in sizes if isinstance(size, int) and size > 0)
    if step > d_model and sizes[1] != 1:
        raise ConfigError(
            f"query_group {sizes[1]} of heads {sizes[0]} wide takes a width of {step} at least; the base is {d_model} "
            "wide. Use a smaller one."
        )
    return step


def widest(base: Base, size: float, step: int, config_of: Callable[[int], AdapterConfig]) -> AdapterConfig | None:
    """The configuration of the greatest width that costs at most ``size`` of the base; None where none does.

    Widths are the multiples of ``step`` up to the base's own.
    """
    widths = range(step, max(base.d_model, step) + 1, step)
    n_fitting = bisect_right(widths, size * base_matmuls(base), key=lambda width: _cost(config_of(width)))
    return config_of(widths[n_fitting - 1]) if n_fitting else None


def _cost(config: AdapterConfig) -> int:
    with torch.device("meta"):
        return adapter_matmuls(Adapter(config))
