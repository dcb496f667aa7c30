"""Stand-ins for the parts of vLLM that the plugin imports: enough to import it, and to build a model of one layer."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

WIDTH = 64  # of the tiny llama
OURS = tuple(
    f"safeside.vllm_plugin.{name}" for name in ("register", "model", "pooling", "runner_v1", "runner_v2", "side")
)


class StandInBase(nn.Module):
    """A base of vLLM's whose states are the embeddings."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__()
        self.head = nn.Linear(WIDTH, vllm_config.model_config.hf_text_config.vocab_size, bias=False)

    def set_aux_hidden_state_layers(self, layers: tuple[int, ...]) -> None:
        self.layers = layers

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        return torch.sin(input_ids[:, None] * torch.arange(1, WIDTH + 1))

    def forward(self, input_ids: Tensor, *others: object) -> tuple[Tensor, list[Tensor]]:
        states = self.embed_input_ids(input_ids)
        return states, [states] * len(self.layers)

    def compute_logits(self, states: Tensor) -> Tensor:
        logits: Tensor = self.head(states)
        return logits

    def load_weights(self, weights: object) -> set[str]:
        return {"head.weight"}


class StandInPooler(nn.Module):
    """Any of vLLM's poolers: it keeps what it was made of."""

    def __init__(self, *parts: Any) -> None:
        super().__init__()
        self.parts = parts


class StandInRegistry:
    """vLLM's registry of architectures."""

    def __init__(self) -> None:
        self.models = {"LlamaForCausalLM": SimpleNamespace(load_model_cls=lambda: StandInBase), "BertModel": None}

    def get_supported_archs(self) -> set[str]:
        return set(self.models)

    def register_model(self, name: str, target: str) -> None:
        self.models[name] = SimpleNamespace(target=target)


def stand_ins() -> dict[str, dict[str, object]]:
    """By module, what is imported from it."""
    processor = "logits_processor.LogitsProcessor"
    named = {
        name: type(name.rpartition(".")[2], (), {})
        for name in ("config.VllmConfig", "v1.core.sched.output.NewRequestData", "v1.worker.gpu.states.RequestState")
    } | {
        f"v1.sample.{processor}": type("V1", (), {}), f"v1.worker.gpu.sample.{processor}": type("V2", (), {}),
        "v1.sample.logits_processor.BatchUpdate": object,
        "v1.sample.logits_processor.MoveDirectionality": SimpleNamespace(SWAP=True),
        "v1.worker.gpu.input_batch.InputBatch": object,
        "v1.worker.gpu.model_states.default.DefaultModelState": type("DefaultModelState", (), {}),
        "compilation.backends.set_model_tag": contextlib.nullcontext,
        "compilation.decorators.support_torch_compile": lambda **options: lambda made: made,
        "distributed.get_tensor_model_parallel_rank": lambda: 0,
        "forward_context.get_forward_context": lambda: None,
        "model_executor.layers.attention.Attention": nn.Module,
        "model_executor.models.interfaces.supports_eagle3": lambda base: True,
        "model_executor.layers.pooler.DispatchPooler": StandInPooler, "v1.pool.metadata.PoolingMetadata": object,
        "model_executor.layers.pooler.tokwise.AllPool": nn.Identity,
        "model_executor.layers.pooler.tokwise.TokenPooler": StandInPooler,
        "model_executor.layers.pooler.seqwise.LastPool": nn.Identity,
        "model_executor.layers.pooler.seqwise.SequencePooler": StandInPooler,
    }  # fmt: skip
    modules: dict[str, dict[str, object]] = {
        "vllm": {"ModelRegistry": StandInRegistry(), "SamplingParams": SimpleNamespace, "__version__": "0.32.0"}
    }
    for name, value in named.items():
        module, _, last = f"vllm.{name}".rpartition(".")
        modules.setdefault(module, {})[last] = value
        while "." in module:
            module = module.rpartition(".")[0]
            modules.setdefault(module, {})
    return modules


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Any]]:
    """``plugin("model")`` is a module of the plugin, imported with stand-ins; vLLM itself is never used."""
    for name, values in stand_ins().items():
        module = ModuleType(name)
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, name, module)
    kept = {name: sys.modules.pop(name) for name in OURS if name in sys.modules}
    yield lambda name: import_module(f"safeside.vllm_plugin.{name}")
    for name in OURS:
        sys.modules.pop(name, None)
    sys.modules.update(kept)
