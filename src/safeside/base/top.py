"""The top blocks of a base once more: the same classes, built from its configuration alone.

What stands beside the blocks in a decoder (masks, positions, sliding windows, the final norm) is the decoder's own
code, so no architecture is written twice.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, DynamicCache, PreTrainedConfig

from safeside.base.families import Family, decoder_of, find_family, locate
from safeside.base.model import Base
from safeside.base.taps import SideCache, Tape
from safeside.errors import ConfigError, InputError, UnsupportedError

# Of a configuration, what would load code, another dtype or packed weights instead of describing blocks.
_NOT_SHAPE = {
    "dtype",
    "torch_dtype",
    "quantization_config",
    "auto_map",
    "attn_implementation",
    "experts_implementation",
}
_TOLERANCE = {torch.float32: 1e-3}  # else 0.05: of states of unit size, in the check of a copy


class _Fed(threading.local):
    """What the first block of a Top reads in this thread."""

    hidden: Tensor | None = None


_fed = _Fed()


def _feed(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Hand the first block the state itself: embeddings are scaled or get positions added on their way to it."""
    assert _fed.hidden is not None
    return (_fed.hidden, *args[1:]), {name: value for name, value in kwargs.items() if name != "hidden_states"}


class _Nothing(nn.Module):
    """In place of learned positions and other parts before the blocks: adds nothing, whatever it is called with."""

    def __call__(self, *_args: object, **_kwargs: object) -> Tensor:
        return torch.zeros(())


def described(base: Base) -> dict[str, Any]:
    """The configuration of the base's text model as plain values, for ``Top``."""
    values: dict[str, Any] = json.loads(base.model.config.get_text_config().to_json_string(use_diff=False))
    return _shape_of(values)


def _shape_of(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in _NOT_SHAPE and not name.startswith("_")}


def _cut(values: Mapping[str, Any], depth: int) -> PreTrainedConfig:
    """The configuration of the top ``depth`` blocks, with a vocabulary of one word."""
    model_type = str(values.get("model_type"))
    find_family(model_type)
    known = CONFIG_MAPPING[model_type]
    name = known.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    n_layers = values.get(name)
    if not isinstance(n_layers, int) or not 1 <= depth <= n_layers:
        raise ConfigError(f"blocks say {name} = {n_layers!r}; expected a number from depth {depth} on.")
    cut = {
        key: value[-depth:] if "layer" in key and isinstance(value, list) and len(value) == n_layers else value
        for key, value in _shape_of(values).items()
    }
    cut |= {name: depth, "vocab_size": 1, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    try:
        config: PreTrainedConfig = known.from_dict(cut)
    except (TypeError, ValueError, KeyError, AttributeError, StrictDataclassError) as error:
        raise ConfigError(f"blocks are no configuration of a {model_type!r} model: {error}. Make them anew.") from error
    return config


class Top(nn.Module):
    """The top ``depth`` blocks and the final norm of the base that ``values`` (of ``described``) describe.

    Built with random weights; ``copy_from`` gives it the base's.  In evaluation mode always: the base has no dropout
    either.
    """

    def __init__(self, values: Mapping[str, Any], depth: int) -> None:
        super().__init__()
        config = _cut(values, depth)
        self.family: Family = find_family(config.model_type)
        self.depth = depth
        self.config = config
        model = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
        self.decoder = decoder_of(model, self.family)
        kept = {path.split(".")[0] for path in (self.family.blocks, self.family.norm)}
        for name, child in list(self.decoder.named_children()):
            if name not in kept and any(True for _ in child.parameters()):
                self.decoder.add_module(name, _Nothing())
        self.blocks[0].register_forward_pre_hook(_feed, with_kwargs=True)
        self.train()

    @property
    def blocks(self) -> nn.ModuleList:
        """The blocks, in order."""
        blocks = locate(self.decoder, self.family.blocks)
        assert isinstance(blocks, nn.ModuleList)
        return blocks

    @property
    def norm(self) -> nn.Module:
        """The norm after the last block."""
        return locate(self.decoder, self.family.norm)

    def train(self, mode: bool = True) -> Top:
        """Stay in evaluation mode, whatever is asked."""
        super().train(False)
        return self

    def forward(self, hidden: Tensor, tape: Tape, cache: SideCache | None) -> Tensor:
        """The final normed state (B, T, D) of states (B, T, D) that enter the first of its blocks."""
        view = None
        if cache is not None:
            view = DynamicCache()
            view.layers = cache.cache.layers[cache.offset : cache.offset + self.depth]
        _fed.hidden = hidden
        try:
            output = self.decoder(
                inputs_embeds=hidden,
                attention_mask=tape.keep.long(),
                position_ids=tape.positions,
                past_key_values=view,
                use_cache=view is not None,
            )
        finally:
            _fed.hidden = None
        final: Tensor = output[0]
        return final

    def copy_from(self, base: Base, *, shares: bool) -> None:
        """Take the weights of the base's top blocks and final norm: a copy of them, or the very same storage.

        A base whose blocks do not fit, or do not compute the same in another place of the stack, is an
        UnsupportedError.
        """
        pairs = list(zip(self.blocks, base.blocks[base.n_layers - self.depth :], strict=True))
        norm = locate(base.decoder, base.family.norm)
        for own, theirs in [*pairs, (self.norm, norm)]:
            _take(own, theirs, base.name, shares)
        if shares:
            for name, _ in list(self.decoder.named_buffers()):
                if name.split(".")[0] != self.family.blocks.split(".")[0]:
                    _set_buffer(self.decoder, name, base.decoder.get_buffer(name))

    @torch.no_grad()
    def check_same(self, base: Base) -> None:
        """Raise an UnsupportedError where these blocks, still the base's, do not give the base's final state.

        Runs the base on a few tokens, so nothing may be attached to it: that is an InputError.
        """
        if base.attachment is not None:
            raise InputError(f"{base.name} has an attachment. Detach it first: its top blocks are compared with it.")
        seen: list[Tensor] = []

        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen.append(args[0] if args else kwargs["hidden_states"])

        ids = torch.arange(8, device=base.device)[None] % base.model.config.get_text_config().vocab_size
        handle = base.blocks[base.n_layers - self.depth].register_forward_pre_hook(keep, with_kwargs=True)
        try:
            expected = base.decoder(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)[0]
        finally:
            handle.remove()
        tape = Tape(torch.ones_like(ids, dtype=torch.bool), ids.shape[1])
        found = self(seen[0].to(next(self.parameters()).dtype), tape, None)
        difference = float((found.float() - expected.float()).abs().max() / expected.float().abs().max())
        if not difference <= _TOLERANCE.get(base.dtype, 0.05):
            raise UnsupportedError(
                f"The top {self.depth} blocks of {base.name} differ by {difference:.1%} when they stand alone: their "
                "place in the stack counts. Use another kind, such as 'lst'."
            )


def _take(own: nn.Module, theirs: nn.Module, name: str, shares: bool) -> None:
    """Give ``own`` the weights of ``theirs``."""
    state = {key: tensor.detach() for key, tensor in theirs.state_dict().items()}
    try:
        own.load_state_dict(state, assign=shares)
    except RuntimeError as error:
        raise UnsupportedError(
            f"The top blocks of {name} cannot be built anew: {error}. Use another kind, such as 'lst'."
        ) from error
    if shares:
        own.requires_grad_(False)
        for key, buffer in theirs.named_buffers():
            _set_buffer(own, key, buffer)


def _set_buffer(root: nn.Module, path: str, tensor: Tensor) -> None:
    owner, _, leaf = path.rpartition(".")
    root.get_submodule(owner).register_buffer(leaf, tensor.detach(), persistent=False)
