"""What adapters cost beside real bases: published dimensions, no weights."""

from __future__ import annotations

import re
import tempfile
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedTokenizerFast

from safeside.adapters.adapter import Adapter
from safeside.adapters.config import AdapterConfig
from safeside.adapters.sizing import adapter_matmuls, base_matmuls, flops_share, make_config, sized_config
from safeside.base.families import find_family
from safeside.base.model import Base
from safeside.provenance import config_hash
from tidy import RESULTS, Row, figure_row, result_of, write_json

SIZE = 0.01  # share of the base's compute: the default dial
METHODS = ("plr", "rtb", "lst", "lst_8", "lst_8_group_4")
SERVED_BYTES = 2  # a number, in bfloat16
# From each checkpoint's config.json: Qwen/Qwen2.5-7B, mistralai/Mistral-7B-v0.3, google/gemma-2-9b, Qwen/Qwen2.5-14B,
# meta-llama/Llama-3.1-70B.
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
    "Llama-3.1-70B": ("llama", {
        "hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8,
        "intermediate_size": 28672, "vocab_size": 128256, "tie_word_embeddings": False,
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


def cache_bytes(base: Base) -> int:
    """Bytes of keys and values that the base keeps for each token."""
    config = base.model.config.get_text_config()
    head_dim = config.to_dict().get("head_dim") or config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * SERVED_BYTES)


def side_cache_bytes(adapter: Adapter) -> int:
    """Bytes of keys and values that an adapter keeps for each token: a head of each for every group of its heads."""
    return 2 * adapter.n_cache_layers * adapter.config.width // adapter.config.query_group * SERVED_BYTES


def config_of(base: Base, method: str) -> AdapterConfig:
    """A guard of a method: ``lst`` as wide as the dial allows on all layers, ``lst_8`` on eight or fewer.

    With ``_group_G`` so many heads of queries share one of keys and values.
    """
    if method.startswith("lst"):
        named = numbers_in(method)
        n_taps = min(named["lst"], base.n_layers + 1) if "lst" in named else None
        return sized_config(base, SIZE, n_taps, name=method, query_group=named.get("group", 1))
    return make_config(base, kind=method, name=method)


def numbers_in(name: str) -> dict[str, int]:
    """The numbers in a name, by the word before each."""
    return {word: int(number) for word, number in re.findall(r"([a-z]+)_(\d+)", name)}


def geometry_rows() -> list[Row]:
    """What each method takes beside each published base at the default size: compute, weights, cache."""
    rows = []
    for name in PUBLISHED:
        with tempfile.TemporaryDirectory() as folder:
            base = empty_base(name, Path(folder))
            own = {"matmuls": base_matmuls(base), "cache_bytes": cache_bytes(base), "params": n_params(base.model)}
            rows += [figure_row({"base": name, "method": "base"}, metric, value) for metric, value in own.items()]
            for method in METHODS:
                config = config_of(base, method)
                with torch.device("meta"):
                    adapter = Adapter(config)
                share = flops_share(base, adapter)
                settings = config.model_dump(exclude={"base"})
                costs = {"flops_share": share, "config_hash": config_hash([name, settings])}
                found = {
                    "flops_share": share,
                    "matmuls": adapter_matmuls(adapter),
                    "cache_bytes": side_cache_bytes(adapter),
                    "params": n_params(adapter),
                }
                labels = {"base": name, "method": method}
                rows += [figure_row(labels, metric, value, **costs) for metric, value in found.items()]
    return rows


def n_params(module: torch.nn.Module) -> int:
    """Parameters of a module, each storage once."""
    return sum(parameter.numel() for parameter in module.parameters())


if __name__ == "__main__":
    started = time.perf_counter()
    rows = geometry_rows()
    write_json(RESULTS / "geometry.json", result_of("geometry", time.perf_counter() - started, rows, {}))
