"""What adapters cost beside real bases: published dimensions, no weights."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedTokenizerFast

from safeside.adapters.adapter import Adapter
from safeside.adapters.sizing import flops_share, make_config, sized_config
from safeside.base.families import find_family
from safeside.base.model import Base
from safeside.provenance import config_hash
from tidy import RESULTS, Row, figure_row, result_of, write_json

SIZE = 0.01  # share of the base's compute: the default dial
METHODS = ("plr", "rtb", "lst")
# From each checkpoint's config.json: Qwen/Qwen2.5-7B, mistralai/Mistral-7B-v0.3, google/gemma-2-9b, Qwen/Qwen2.5-14B.
PUBLISHED: dict[str, tuple[str, dict[str, int | bool]]] = {
    "Qwen2.5-7B": ("qwen2", {
        "hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
        "intermediate_size": 18944, "vocab_size": 152064, "tie_word_embeddings": False,
    }),
    "Mistral-7B": ("mistral", {
        "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "intermediate_size": 14336, "vocab_size": 32768, "tie_word_embeddings": False,
    }),
    "Gemma-2-9B": ("gemma2", {
        "hidden_size": 3584, "num_hidden_layers": 42, "num_attention_heads": 16, "num_key_value_heads": 8,
        "head_dim": 256, "intermediate_size": 14336, "vocab_size": 256000, "tie_word_embeddings": True,
    }),
    "Qwen2.5-14B": ("qwen2", {
        "hidden_size": 5120, "num_hidden_layers": 48, "num_attention_heads": 40, "num_key_value_heads": 8,
        "intermediate_size": 13824, "vocab_size": 152064, "tie_word_embeddings": False,
    }),
}  # fmt: skip


def published_config(name: str) -> PreTrainedConfig:
    """The configuration of one of PUBLISHED."""
    model_type, values = PUBLISHED[name]
    return CONFIG_MAPPING[model_type](**values)


def empty_base(name: str, folder: Path) -> Base:
    """A base on the meta device: shapes only.  Its checkpoint in ``folder`` is empty, so that it has a fingerprint."""
    config = published_config(name)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(BPE()))
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "model.safetensors").write_bytes(b"")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return Base(model, tokenizer, find_family(config.model_type), name, folder)


def geometry_rows() -> list[Row]:
    """The share of the base's multiply-adds that each method takes at the default size, for each published base."""
    rows = []
    for name in PUBLISHED:
        with tempfile.TemporaryDirectory() as folder:
            base = empty_base(name, Path(folder))
            for method in METHODS:
                config = (
                    sized_config(base, SIZE, name=method)
                    if method == "lst"
                    else make_config(base, kind=method, name=method)
                )
                with torch.device("meta"):
                    share = flops_share(base, Adapter(config))
                settings = config.model_dump(exclude={"base"})
                costs = {"flops_share": share, "config_hash": config_hash([name, settings])}
                rows.append(figure_row({"base": name, "method": method}, "flops_share", share, **costs))
    return rows


if __name__ == "__main__":
    started = time.perf_counter()
    rows = geometry_rows()
    write_json(RESULTS / "geometry.json", result_of("geometry", time.perf_counter() - started, rows, {}))
