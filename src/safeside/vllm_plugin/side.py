"""The library's own adapters in vLLM: the same modules, weights and arithmetic, with attention over paged memory."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention as PagedKernel

from safeside.adapters.adapter import Adapter
from safeside.adapters.blocks import Attention, SideBlock
from safeside.artifact import read_adapter, read_checksum
from safeside.base.taps import SideCache, Tape
from safeside.errors import FormatError, UnsupportedError
from safeside.vllm_plugin.plan import EngineConfig


class PagedTape(Tape):
    """The tape of a flat batch: one row that holds the tokens of all requests, each at its own position."""

    def __init__(self, positions: Tensor) -> None:
        super().__init__(torch.ones_like(positions, dtype=torch.bool)[None], positions.shape[0])
        self._positions = positions[None]

    @property
    def is_short(self) -> bool:
        """As of any tape; compiled code fuses its steps and needs no other path for few tokens."""
        return not torch.compiler.is_compiling() and super().is_short

    @property
    def is_blank(self) -> Tensor:
        """Never: the row holds the tokens of all requests."""
        return self.keep.new_zeros(1)

    @property
    def positions(self) -> Tensor:
        """Of each token in its own request."""
        return self._positions

    @property
    def attend(self) -> Tensor:
        """Nothing: which tokens see which is known to the kernels, by block tables."""
        return self.keep.new_zeros(1, 1, self.n_new, 0)


class PagedAttention(Attention):
    """Attention whose keys and values lie in vLLM's own cache, over all earlier tokens of the request."""

    def __init__(self, like: Attention, prefix: str) -> None:
        width, head_dim = like.output.in_features, like.head_dim
        super().__init__(width, head_dim, like.query_group)
        self.paged = PagedKernel(self.n_heads, head_dim, head_dim**-0.5, num_kv_heads=self.n_shared, prefix=prefix)

    def forward(
        self, states: Tensor, rotary: tuple[Tensor, Tensor], bias: Tensor, cache: SideCache | None, layer: int
    ) -> Tensor:
        mixed = self.paged(*(heads[0].transpose(0, 1).flatten(1) for heads in self.heads(states, rotary)))
        return self.output(mixed[None])  # type: ignore[no-any-return]


@support_torch_compile(dynamic_arg_dims={"positions": 0, "taps": 1})
class SideNetworks(nn.Module):
    """All adapters of an engine.  On every rank of a tensor-parallel group whole: they are small."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", config: EngineConfig, n_layers: int) -> None:
        super().__init__()
        self.config = config
        self.layers = tuple(sorted({layer for entry in config.adapters for layer in entry.config.layers}))
        """Tapped layers, rising."""
        self.adapters = nn.ModuleList(Adapter(entry.config) for entry in config.adapters)
        for adapter in self._all():
            n_layers += _page(adapter, prefix, n_layers)

    def _all(self) -> list[Adapter]:
        return [adapter for adapter in self.adapters if isinstance(adapter, Adapter)]

    def forward(self, positions: Tensor, taps: Tensor) -> tuple[Tensor, Tensor]:
        """Scores (T, K) of all guards and the aligner's delta (T, D), of states (layers, T, D); either may be empty."""
        scores, delta = [positions.new_zeros(positions.shape[0], 0, dtype=torch.float32)], taps[0, :, :0]
        for adapter in self._all():
            tape = PagedTape(positions)
            for layer, hidden in zip(self.layers, taps, strict=True):
                if layer in adapter.config.layers:
                    adapter.read(tape, layer, hidden[None])
            output = adapter(tape, None)
            if output.scores is not None:
                scores.append(output.scores[0])
            elif output.delta is not None:
                delta = output.delta[0]
        return torch.cat(scores, -1), delta

    def load_adapters(self) -> set[str]:
        """Read every adapter's weights from its folder; returns the names of all parameters."""
        for adapter, entry in zip(self._all(), self.config.adapters, strict=True):
            folder = Path(entry.folder)
            _, weights = read_adapter(folder)
            if read_checksum(folder) != entry.content:
                raise FormatError(
                    f"{folder} has changed since the engine was planned; expected content {entry.content[:12]}... "
                    "Plan it again: safeside serve --engine vllm prints the flags."
                )
            missing, unexpected = adapter.load_state_dict(weights, strict=False)
            assert not unexpected, "read_adapter has compared them"
            assert all(".paged." in name for name in missing), "the kernel's own scales alone"
        return {name for name, _ in self.named_parameters()}


def _page(adapter: Adapter, prefix: str, first: int) -> int:
    """Exchange the attention of every block; returns how many layers of the cache the adapter takes."""
    blocks = [module for module in adapter.modules() if isinstance(module, SideBlock)]
    for index, block in enumerate(blocks):
        block.attention = PagedAttention(block.attention, f"{prefix}.layers.{first + index}.attn")
    if len(blocks) != adapter.n_cache_layers:
        raise UnsupportedError(
            f"{adapter.name!r} remembers earlier tokens in {adapter.n_cache_layers} layers; {len(blocks)} run in vLLM. "
            "Use attach() or safeside serve instead."
        )
    return len(blocks)
