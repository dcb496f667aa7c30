"""Ways to guard a base, as things that can be timed: the base alone, a guard, a second pass, a standalone guard.

All variants of a geometry share one set of weights; each has its own module tree, so hooks on one never slow another.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, DynamicCache, PreTrainedConfig
from transformers.initialization import no_init_weights

from geometry import PUBLISHED, numbers_in
from safeside.adapters.adapter import Adapter
from safeside.adapters.blocks import attention_bias
from safeside.adapters.config import AdapterConfig
from safeside.adapters.sizing import (
    base_matmuls,
    flops_share,
    geometry_base,
    sized_config,
)
from safeside.attach import attach
from safeside.base.model import Base, load_base
from safeside.base.taps import SideCache, Tape
from safeside.train.standalone import Standalone, create_standalone, standalone_matmuls

SIZE = 0.01  # share of the base's multiply-adds: the default dial
VARIANTS = ("base", "guard", "second_pass", "standalone")
LORA_RANK = 16
# From the checkpoint's config.json: Qwen/Qwen2.5-0.5B.
SMALL = ("qwen2", {
    "hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
    "intermediate_size": 4864, "vocab_size": 151936, "tie_word_embeddings": True, "max_position_embeddings": 32768,
})  # fmt: skip
GEOMETRIES = {"Qwen2.5-0.5B": SMALL, **PUBLISHED}
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}  # a CPU without the first emulates it, tenfold slower
_NOISE = 1 << 20  # weights repeat after so many: speed does not depend on their values


def config_of(geometry: str) -> PreTrainedConfig:
    """The published configuration of a geometry."""
    model_type, values = GEOMETRIES[geometry]
    return CONFIG_MAPPING[model_type](**values)


def random_base(config: PreTrainedConfig, name: str, device: str, dtype: torch.dtype) -> Base:
    """A base of the shape of ``config`` that runs, with random weights."""
    base = geometry_base(config, name)
    with no_init_weights(), torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.tie_weights()  # which making it without weights leaves out: the head would take as much again
    noise = torch.randn(_NOISE, generator=torch.Generator().manual_seed(0)).to(device, dtype) * 0.02
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.fill_(1.0)
                continue
            for part in parameter.view(-1).split(_NOISE):
                part.copy_(noise[: len(part)])
    return Base(model, base.tokenizer, base.family, name, base.folder)


def open_base(geometry: str, device: str, dtype: str = "bfloat16") -> Base:
    """The base of a geometry in ``dtype``, or the built-in one as it is."""
    if geometry == "builtin":
        return load_base("builtin", device=device)
    return random_base(config_of(geometry), geometry, device, DTYPES[dtype])


def twin_of(base: Base) -> Base:
    """The same base with a module tree of its own around the same weights."""
    tensors = [*base.model.parameters(), *base.model.buffers()]
    model = copy.deepcopy(base.model, {id(tensor): tensor for tensor in tensors})
    twin = Base(model, base.tokenizer, base.family, base.name, base.folder)
    twin.fingerprint = geometry_base(base.model.config).fingerprint  # empty: its adapters are timed, never saved
    return twin


def tapped_config(base: Base, n_taps: int | None, query_group: int = 1) -> AdapterConfig:
    """The widest ``lst`` of at most SIZE: on all layers, or on ``n_taps`` that are spread evenly and end at the top."""
    return sized_config(base, SIZE, n_taps, name="harm", query_group=query_group)


class Alone:
    """A base and nothing else: prompt in, then token by token, as ``generate`` runs it."""

    def __init__(self, base: Base) -> None:
        self.base = base
        self.extra_matmuls = 0.0

    def prefill(self, ids: Tensor) -> list[DynamicCache]:
        """Read a prompt (B, T); returns the caches that go on from it."""
        cache = DynamicCache()
        self._run(ids, torch.ones_like(ids), cache)
        return [cache]

    def step(self, ids: Tensor, mask: Tensor, caches: Sequence[DynamicCache]) -> None:
        """Read one more token a row, (B, 1); ``mask`` (B, S) covers it."""
        self._run(ids, mask, caches[0])

    def _run(self, ids: Tensor, mask: Tensor, cache: DynamicCache) -> None:
        """As the model does with ``logits_to_keep=1``, but from rows one behind the other, also where there is one row.

        From rows with gaps between them CPUs copy a tied head's whole matrix (torch 2.13), a cost that is not a base's.
        """
        output = self.base.decoder(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True)
        self.base.model.get_output_embeddings()(output[0][:, -1].clone(memory_format=torch.contiguous_format))


class Guarded(Alone):
    """With a guard that reads the same pass, and judges decoded tokens each by itself or in groups."""

    def __init__(self, base: Base, config: AdapterConfig, judge_every: int = 1) -> None:
        super().__init__(base)
        with torch.device(base.device):
            guard = Adapter(config).to(base.dtype).eval().requires_grad_(False)
        self.extra_matmuls = flops_share(base, guard)
        self.attachment = attach(base, guards=[guard], judge_every=judge_every)


class SecondPass(Alone):
    """With a LoRA guard: the same weights and a low-rank delta, run over the same text once more."""

    def __init__(self, base: Base) -> None:
        super().__init__(base)
        lora = LoraConfig(r=LORA_RANK, target_modules="all-linear", lora_dropout=0.0)
        twin = twin_of(base)
        self.tuned = get_peft_model(twin.model, lora).eval().requires_grad_(False)
        self.decoder = twin.decoder
        self.head = nn.Linear(base.d_model, 1, device=base.device, dtype=base.dtype).requires_grad_(False)
        extra = sum(tensor.numel() for name, tensor in self.tuned.named_parameters() if "lora_" in name)
        head = base.model.config.get_text_config().vocab_size * base.d_model
        self.extra_matmuls = (base_matmuls(base) - head + extra + base.d_model) / base_matmuls(base)

    def prefill(self, ids: Tensor) -> list[DynamicCache]:
        caches = [*super().prefill(ids), DynamicCache()]
        self._judge(ids, torch.ones_like(ids), caches[1])
        return caches

    def step(self, ids: Tensor, mask: Tensor, caches: Sequence[DynamicCache]) -> None:
        super().step(ids, mask, caches)
        self._judge(ids, mask, caches[1])

    def judge(self, ids: Tensor) -> Tensor:
        """The guard's score of whole texts (B, T), as a call of its own."""
        return self._judge(ids, torch.ones_like(ids), DynamicCache())

    def _judge(self, ids: Tensor, mask: Tensor, cache: DynamicCache) -> Tensor:
        output = self.decoder(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True)
        return torch.sigmoid(self.head(output[0][:, -1]).float())


class WithStandalone(Alone):
    """With a transformer of its own that costs the guard's multiply-adds and reads the ids."""

    def __init__(self, base: Base, config: AdapterConfig) -> None:
        super().__init__(base)
        with torch.device(base.device):
            guard = Adapter(config)
        self.model: Standalone = create_standalone(base, guard).to(base.dtype).eval().requires_grad_(False)
        self.extra_matmuls = standalone_matmuls(self.model) / base_matmuls(base)

    def prefill(self, ids: Tensor) -> list[DynamicCache]:
        caches = [*super().prefill(ids), DynamicCache()]
        self._judge(ids, torch.ones_like(ids), caches[1])
        return caches

    def step(self, ids: Tensor, mask: Tensor, caches: Sequence[DynamicCache]) -> None:
        super().step(ids, mask, caches)
        self._judge(ids, mask, caches[1])

    def _judge(self, ids: Tensor, mask: Tensor, cache: DynamicCache) -> Tensor:
        tape = Tape(mask.bool(), ids.shape[1])
        side, states = SideCache(cache, 0), self.model.embedding(ids)
        rotary, bias = self.model.rotary(tape.positions), attention_bias(tape.attend, states.dtype)
        for index, block in enumerate(self.model.blocks):
            states = block(states, rotary, bias, side, index)
        scores = self.model.head(states, tape, side, len(self.model.blocks)).scores
        assert scores is not None
        return scores


@dataclass(frozen=True, slots=True)
class Plan:
    """Which variants are timed: those of VARIANTS, and guards as ``guarded`` names them."""

    geometry: str
    variants: tuple[str, ...]
    device: str = "cpu"
    dtype: str = "bfloat16"
    """Of DTYPES: what the geometry's weights, and all that is beside them, are held in."""


def guarded(base: Base, name: str) -> Guarded:
    """``guard``, ``guard_N`` on N layers; with ``_group_G`` G heads of queries share one of keys and values.

    With ``_every_K`` decoded tokens are judged K at a time.
    """
    assert re.fullmatch(r"guard(_\d+)?(_group_\d+)?(_every_\d+)?", name), name
    named = numbers_in(name)
    return Guarded(base, tapped_config(base, named.get("guard"), named.get("group", 1)), named.get("every", 1))


def build(plan: Plan, base: Base | None = None) -> dict[str, Alone]:
    """The variants of a plan around one set of weights."""
    base = base or open_base(plan.geometry, plan.device, plan.dtype)
    made: dict[str, Alone] = {}
    for name in plan.variants:
        twin = twin_of(base)
        if name.startswith("guard"):
            made[name] = guarded(twin, name)
        elif name == "second_pass":
            made[name] = SecondPass(twin)
        elif name == "standalone":
            made[name] = WithStandalone(twin, tapped_config(twin, None))
        else:
            made[name] = Alone(twin)
    return made
