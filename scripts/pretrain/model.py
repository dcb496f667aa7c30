"""The model: built small, grown from a smaller one, written in Hugging Face format."""

import json
import math
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase


class Shape(NamedTuple):
    """Sizes of the network; ``feed_forward`` 0 stands for 2.75 times ``hidden``."""

    hidden: int
    layers: int
    feed_forward: int
    head: int
    key_value_heads: int
    context: int


def build(shape: Shape, tokenizer: PreTrainedTokenizerBase, initial: str | None = None) -> LlamaForCausalLM:
    """A model whose layers do nothing yet, or the exported model ``initial`` with layers added."""
    n_heads = shape.hidden // shape.head
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=shape.hidden,
        intermediate_size=shape.feed_forward or int(2.75 * shape.hidden) // 32 * 32,
        num_hidden_layers=shape.layers,
        num_attention_heads=n_heads,
        num_key_value_heads=min(shape.key_value_heads, n_heads),
        max_position_embeddings=shape.context,
        tie_word_embeddings=True,
        # On CPUs and at this size, compiled eager attention is faster than the fused kernel.
        attn_implementation="sdpa" if torch.cuda.is_available() else "eager",
        use_cache=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            nn.init.zeros_(parameter)
        elif parameter.ndim == 2 and "embed" not in name:
            nn.init.normal_(parameter, std=0.64 / math.sqrt(parameter.shape[1]))
    if initial:
        grow(model, LlamaForCausalLM.from_pretrained(initial, dtype=torch.float32))
    return model


def spread(n_old: int, n_new: int) -> list[tuple[int, bool]]:
    """For each new layer the old layer to copy, and whether it is the first copy; extras go to the middle."""
    copies = [1] * n_old
    from_the_middle = sorted(range(n_old), key=lambda layer: (abs(layer - (n_old - 1) / 2), layer))
    for extra in range(n_new - n_old):
        copies[from_the_middle[extra % max(1, n_old - 2)]] += 1
    return [(layer, copy == 0) for layer, count in enumerate(copies) for copy in range(count)]


def grow(model: LlamaForCausalLM, small: LlamaForCausalLM) -> None:
    """Copy ``small`` into ``model``; added layers put out zeros, so the function stays that of ``small``."""
    source, target = small.model, model.model
    if len(source.layers) > len(target.layers):
        raise SystemExit(
            f"The initial model has {len(source.layers)} layers; expected at most {len(target.layers)}. Raise --layers."
        )
    target.embed_tokens.load_state_dict(source.embed_tokens.state_dict())
    target.norm.load_state_dict(source.norm.state_dict())
    copies = spread(len(source.layers), len(target.layers))
    for layer, (original, is_first) in zip(target.layers, copies, strict=True):
        layer.load_state_dict(source.layers[original].state_dict())
        if not is_first:
            nn.init.zeros_(layer.self_attn.o_proj.weight)
            nn.init.zeros_(layer.mlp.down_proj.weight)


def export(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write bf16 weights, tokenizer and generation settings; transformers and vLLM load them as they are."""
    model.config.use_cache = True
    half = LlamaForCausalLM(model.config).to(torch.bfloat16)
    half.load_state_dict({name: value.to(torch.bfloat16) for name, value in model.state_dict().items()})
    half.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=[tokenizer.convert_tokens_to_ids("<|end|>"), tokenizer.eos_token_id],
        pad_token_id=tokenizer.pad_token_id,
        max_new_tokens=128,
        do_sample=True,
        temperature=0.7,
        top_p=0.9,
    )
    half.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    make_portable(folder / "tokenizer_config.json")
    model.config.use_cache = False


def make_portable(path: Path) -> None:
    """Rewrite the tokenizer settings so that transformers 4 and 5 both read them."""
    settings = json.loads(path.read_text())
    for name in ("backend", "is_local", "local_files_only"):
        settings.pop(name, None)
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    special = settings.get("additional_special_tokens", [])
    settings["additional_special_tokens"] = settings.pop("extra_special_tokens", special)
    path.write_text(json.dumps(settings, indent=2))
