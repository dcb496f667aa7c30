"""What an aligner costs while decoding: beside the base alone, a second aligned model, and LoRA-DPO, in one run.

    python benchmarks/align_cost.py                 # 0.5B geometry with random weights
    python benchmarks/align_cost.py --device cuda --geometry Qwen2.5-7B

Every round times all variants once, in an order that rotates (see ``overhead.py``).  The second model is a whole pass
of its own whose logits are mixed with the base's, as decoding-time alignment without a side network does it.  LoRA-DPO
is not merged: merged it costs nothing, and has no dial.  Writes a file that align.py puts into align.json.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import DynamicCache

from align_training import KINDS
from overhead import Settings, measure
from overhead_variants import LORA_RANK, SIZE, Alone, open_base, twin_of
from safeside.adapters.adapter import Adapter
from safeside.adapters.config import AdapterConfig
from safeside.adapters.sizing import base_matmuls, flops_share, make_config, sized_config
from safeside.adapters.toplayers import TopLayers
from safeside.attach import attach
from safeside.base.model import Base
from safeside.lora import head_matmuls
from safeside.mixing import step
from safeside.terminal import note
from tidy import Row, figure_row, ratio_figure, write_json

OTHERS = ("base", "second_model", "lora_dpo")
GATED = "lst_gated"  # the ladder behind a guard, which is a ladder as well, with the gate open
CELL = Path(__file__).parent / ".cells" / "align" / "cost.json"


def config_of(base: Base, kind: str) -> AdapterConfig:
    """An aligner of its default size: ladders of 1% of the base, the top two blocks by LoRA, a map of rank 32."""
    if kind == "guard":
        return sized_config(base, SIZE, kind="lst", role="guard", name="gate", labels=("harm",))
    if kind.startswith("lst"):
        return sized_config(base, SIZE, kind=kind, role="align", name=kind)
    options: dict[str, object] = {"depth": 2, "lora_rank": LORA_RANK} if kind == "toplayers" else {"bottleneck": 32}
    return make_config(base, kind=kind, role="align", name=kind, **options)  # type: ignore[arg-type]


class WithAligner(Alone):
    """With an aligner at full strength, which a guard's score gives it if it ``is_gated``."""

    def __init__(self, base: Base, kind: str, *, is_gated: bool = False) -> None:
        super().__init__(base)
        aligner = _made(base, kind)
        guards = [_made(base, "guard")] if is_gated else []
        self.extra_matmuls = flops_share(base, *guards, aligner)
        strength = step(guards[0], 0.0, latched=False) if is_gated else 1.0
        self.attachment = attach(base, [aligner], guards=guards, strength=strength)


def _made(base: Base, kind: str) -> Adapter:
    with torch.device(base.device):
        adapter = Adapter(config_of(base, kind))
    if isinstance(adapter.trunk, TopLayers):
        adapter.trunk.bind(base)
    return adapter.to(base.dtype).eval().requires_grad_(False)


class WithSecondModel(Alone):
    """With a second model of the same size, whose logits are mixed with the base's."""

    def __init__(self, base: Base) -> None:
        super().__init__(base)
        self.second = twin_of(base)
        self.extra_matmuls = 1.0

    def prefill(self, ids: Tensor) -> list[DynamicCache]:
        caches = [*super().prefill(ids), DynamicCache()]
        self._mixed(ids, torch.ones_like(ids), caches[1])
        return caches

    def step(self, ids: Tensor, mask: Tensor, caches: Sequence[DynamicCache]) -> None:
        super().step(ids, mask, caches)
        self._mixed(ids, mask, caches[1])

    def _mixed(self, ids: Tensor, mask: Tensor, cache: DynamicCache) -> None:
        output = self.second.decoder(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True)
        self.second.model.get_output_embeddings()(output[0][:, -1].contiguous())


class WithLora(Alone):
    """With a LoRA on every linear layer of the blocks, not merged."""

    def __init__(self, base: Base) -> None:
        lora = LoraConfig(r=LORA_RANK, target_modules="all-linear", lora_dropout=0.0)
        self.tuned = get_peft_model(base.model, lora).eval().requires_grad_(False)
        super().__init__(base)
        extra = sum(tensor.numel() for name, tensor in self.tuned.named_parameters() if "lora_" in name)
        self.extra_matmuls = extra / base_matmuls(base)
        assert self.extra_matmuls < 1 - head_matmuls(base) / base_matmuls(base)


def variants_of(base: Base) -> dict[str, Alone]:
    """Everything that is timed, around one set of weights."""
    found: dict[str, Alone] = {"base": Alone(twin_of(base))}
    found |= {kind: WithAligner(twin_of(base), kind) for kind in KINDS}
    found[GATED] = WithAligner(twin_of(base), "lst", is_gated=True)
    return {**found, "second_model": WithSecondModel(twin_of(base)), "lora_dpo": WithLora(twin_of(base))}


def timings(geometry: str, batch: int, settings: Settings) -> dict[str, object]:
    """Seconds of one decoded token by variant and round, and what each adds in multiply-adds."""
    variants = variants_of(open_base(geometry, settings.device))
    seconds = measure(variants, "decode", batch, settings)
    for variant in variants.values():
        if isinstance(variant, WithAligner):
            variant.attachment.detach()
    extra = {name: variant.extra_matmuls for name, variant in variants.items()}
    return {"geometry": geometry, "batch": batch, "seconds": seconds, "extra": extra}


def cost_rows(path: Path) -> list[Row]:
    """``decode_ratio`` of every variant over the base, a second model and LoRA-DPO; none without the file.

    Their column ``base`` names the geometry that was timed.
    """
    if not path.is_file():
        return []
    found = json.loads(path.read_text(encoding="utf-8"))
    rows = []
    for name, taken in found["seconds"].items():
        for against in OTHERS:
            if name == against:
                continue
            method, policy = ("lst", "targeted_step") if name == GATED else (name, "fixed")
            labels = {"base": found["geometry"], "method": method, "policy": policy, "strength": 1.0}
            labels |= {"suite": "decode", "judge": "", "seed": 0, "against": against, "batch": found["batch"]}
            value, interval = ratio_figure(taken, found["seconds"][against])
            counts = {"n": len(taken), "flops_share": found["extra"][name]}
            rows.append(figure_row(labels, "decode_ratio", value, interval, **counts))
    return rows


def main(arguments: Sequence[str] | None = None) -> Path:
    """Parse, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--geometry", default="Qwen2.5-0.5B")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=128, help="of the prompt")
    parser.add_argument("--steps", type=int, default=8, help="decoded tokens of one timing")
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=CELL, help="the file")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    settings = Settings(options.tokens, options.steps, options.pairs, options.device, options.threads)
    path = write_json(options.output, timings(options.geometry, options.batch, settings))
    note(f"wrote {path}")
    return path


if __name__ == "__main__":
    main()
