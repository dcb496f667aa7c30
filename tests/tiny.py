"""Tiny random models of every family, built from configurations: no downloads, well under a second each.

``make_tiny("llama", folder)`` writes what ``save_pretrained`` writes: a model of 3 layers and width 64 whose weights
are random and large enough that logits differ clearly, and a byte-level BPE tokenizer with special tokens and a chat
template.  The same name gives the same bytes.
"""

from __future__ import annotations

import functools
import zlib
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CONFIG_MAPPING,
    AutoModel,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)

N_LAYERS, WIDTH, N_HEADS = 3, 64, 4
N_POSITIONS = 256
WINDOW = 8  # of the families with a sliding window: prompts of a dozen tokens run past it
SPECIAL = ("<|pad|>", "<|bos|>", "<|eos|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>")
PAD, BOS, EOS, USER, ASSISTANT, SYSTEM, END = range(len(SPECIAL))
N_TOKENS = len(SPECIAL) + 256 + 25  # specials, every byte, a few merges
VOCABULARY = 304  # of the model: a little more than the tokenizer's, as checkpoints have it
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_CORPUS = ["the cat sat on the mat and then the other cat sat on the hat; how can this be, they said there and then."]

_LLAMA_LIKE = {
    "hidden_size": WIDTH, "num_hidden_layers": N_LAYERS, "num_attention_heads": N_HEADS, "num_key_value_heads": 2,
    "intermediate_size": 96, "max_position_embeddings": N_POSITIONS,
}  # fmt: skip
_MIXED_WINDOWS = {
    "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}  # fmt: skip
_CLASSIC = {
    "hidden_size": WIDTH, "num_hidden_layers": N_LAYERS, "num_attention_heads": N_HEADS,
    "max_position_embeddings": N_POSITIONS,
}  # fmt: skip

_CONFIGS: dict[str, tuple[str, dict[str, object]]] = {
    "llama": ("llama", _LLAMA_LIKE),
    "qwen2": ("qwen2", _LLAMA_LIKE),
    "qwen3": ("qwen3", {**_LLAMA_LIKE, "head_dim": 16}),
    "mistral": ("mistral", {**_LLAMA_LIKE, "sliding_window": WINDOW}),
    "gemma": ("gemma", {**_LLAMA_LIKE, "head_dim": 16}),
    "gemma2": ("gemma2", {**_LLAMA_LIKE, **_MIXED_WINDOWS}),
    "gemma3": ("gemma3_text", {**_LLAMA_LIKE, **_MIXED_WINDOWS}),
    "phi3": ("phi3", _LLAMA_LIKE),
    "olmo2": ("olmo2", _LLAMA_LIKE),
    "granite": ("granite", {
        **_LLAMA_LIKE, "embedding_multiplier": 1.5, "logits_scaling": 2.0, "residual_multiplier": 0.7,
        "attention_multiplier": 0.3,
    }),
    "smollm3": ("smollm3", {**_LLAMA_LIKE, "no_rope_layers": [1, 0, 1]}),
    "cohere": ("cohere", {**_LLAMA_LIKE, "logit_scale": 0.5}),
    "gpt-oss": ("gpt_oss", {
        **_LLAMA_LIKE, "head_dim": 16, "sliding_window": WINDOW, "num_local_experts": 4, "num_experts_per_tok": 2,
        "layer_types": _MIXED_WINDOWS["layer_types"], "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    }),
    "qwen3-moe": ("qwen3_moe", {
        **_LLAMA_LIKE, "head_dim": 16, "moe_intermediate_size": 48, "num_experts": 4, "num_experts_per_tok": 2,
    }),
    "mixtral": ("mixtral", {**_LLAMA_LIKE, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "gpt2": ("gpt2", {"n_embd": WIDTH, "n_layer": N_LAYERS, "n_head": N_HEADS, "n_positions": N_POSITIONS}),
    "opt": ("opt", {**_CLASSIC, "ffn_dim": 96, "word_embed_proj_dim": WIDTH}),
    "gpt-neox": ("gpt_neox", {**_CLASSIC, "intermediate_size": 96}),
    "cohere2": ("cohere2", {
        **_LLAMA_LIKE, "sliding_window": WINDOW, "layer_types": _MIXED_WINDOWS["layer_types"], "logit_scale": 0.5,
    }),
    "bert": ("bert", {**_CLASSIC, "intermediate_size": 96}),
    "roberta": ("roberta", {**_CLASSIC, "intermediate_size": 96}),
    "electra": ("electra", {**_CLASSIC, "intermediate_size": 96, "embedding_size": 32}),
    "distilbert": ("distilbert", {
        "dim": WIDTH, "n_layers": N_LAYERS, "n_heads": N_HEADS, "hidden_dim": 96,
        "max_position_embeddings": N_POSITIONS,
    }),
}  # fmt: skip

ENCODERS = ("bert", "roberta", "electra", "distilbert")
FAMILY_NAMES = tuple(name for name in _CONFIGS if name not in (*ENCODERS, "cohere2"))  # the 18 of design.md, section 1
WINDOWED = ("mistral", "gemma2", "gemma3", "gpt-oss")


def tiny_config(family_name: str, **changes: object) -> PreTrainedConfig:
    """The configuration of the tiny model of ``family_name``, one of FAMILY_NAMES, ENCODERS or ``cohere2``."""
    model_type, values = _CONFIGS[family_name]
    config = CONFIG_MAPPING[model_type](
        vocab_size=VOCABULARY, pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS, **{**values, **changes}
    )
    assert isinstance(config, PreTrainedConfig)
    return config


def make_tiny(family_name: str, folder: Path, **changes: object) -> Path:
    """Write the tiny model and its tokenizer to ``folder``; returns it.  ``changes`` are of its configuration."""
    is_encoder = family_name in ENCODERS
    loader = AutoModel if is_encoder else AutoModelForCausalLM
    model = loader.from_config(tiny_config(family_name, **changes))
    _randomise(model, seed=zlib.crc32(family_name.encode()))
    if family_name.startswith("gemma"):  # multiplies its embeddings by 8; unscaled, texts would repeat one token
        with torch.no_grad():
            model.get_input_embeddings().weight.mul_(0.25)
    if not is_encoder:
        model.generation_config = GenerationConfig(pad_token_id=PAD, bos_token_id=BOS, eos_token_id=[EOS, END])
    model.save_pretrained(folder)
    tiny_tokenizer(is_encoder=is_encoder).save_pretrained(folder)
    return folder


def _randomise(model: torch.nn.Module, seed: int) -> None:
    """Matrices of unit gain times 1.5, and norms, biases and sinks that are not the identity."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim >= 2:
                parameter.copy_(noise * 1.5 / parameter.shape[-1] ** 0.5)
            else:
                parameter.add_(0.2 * noise)


def tiny_tokenizer(*, is_encoder: bool = False) -> PreTrainedTokenizerFast:
    """A fresh fast byte-level BPE tokenizer with SPECIAL at ids 0..6 and a chat template."""
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained_tokenizer()),
        pad_token=SPECIAL[PAD],
        bos_token=SPECIAL[BOS],
        eos_token=SPECIAL[EOS],
        additional_special_tokens=list(SPECIAL[USER:]),
        **({"cls_token": SPECIAL[BOS], "sep_token": SPECIAL[EOS]} if is_encoder else {}),
    )
    wrapped.chat_template = None if is_encoder else CHAT_TEMPLATE
    return wrapped


@functools.cache
def _trained_tokenizer() -> str:
    """The tokenizer's JSON, trained once."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=N_TOKENS,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    return str(tokenizer.to_str())
