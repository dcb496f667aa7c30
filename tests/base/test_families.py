"""Families: paths to blocks and norms, registration by strangers, and what a model object is refused for."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from safeside import Base, Family, attach, load_base, register_family
from safeside.base.families import FAMILIES, find_family, has_lora, locate, refused_reason
from safeside.errors import ConfigError, UnsupportedError
from tiny import BOS, ENCODERS, EOS, FAMILY_NAMES, N_LAYERS, PAD, VOCABULARY, WIDTH, tiny_tokenizer
from twin import close, mixed_logits, run_by_hand


@pytest.mark.parametrize("family_name", [*FAMILY_NAMES, "cohere2", *ENCODERS])
def test_every_family_finds_its_blocks_and_norm(tiny_family, family_name: str) -> None:
    base = tiny_family(family_name)
    assert isinstance(base.blocks, nn.ModuleList)
    assert base.n_layers == N_LAYERS == base.model.config.num_hidden_layers
    assert base.d_model == WIDTH
    assert base.is_encoder == (base.family.norm == "") == (family_name in ENCODERS)
    if base.family.norm:
        assert "norm" in type(locate(base.decoder, base.family.norm)).__name__.lower()


@pytest.mark.parametrize("family_name", ENCODERS)
def test_encoders_are_tapped_and_padded_like_the_twin(tiny_family, random_guard, family_name: str) -> None:
    """Up to the longest text they hold, which for roberta is less than its table of positions."""
    base = tiny_family(family_name)
    guard = random_guard(base)
    ids = torch.randint(10, 200, (2, base.max_tokens), generator=torch.Generator().manual_seed(0))
    keep = torch.ones_like(ids, dtype=torch.bool)
    keep[1, 9:] = False
    ids[1, 9:] = PAD
    expected = run_by_hand(base, guard, ids, keep).scores
    with torch.no_grad(), attach(base, guards=[guard]) as attachment:
        base.model(ids, attention_mask=keep.long())
        close(attachment.record.scores["harm"], expected)
        base.model(ids[1:, :9])
        close(attachment.record.scores["harm"], expected[1:, :9])


def test_an_unknown_model_type_suggests_a_neighbour() -> None:
    with pytest.raises(UnsupportedError, match=r"Unknown model type 'qwen4'.*Did you mean.*'qwen3'.*register_family"):
        find_family("qwen4")


def test_a_wrong_path_names_it(tiny_base: Base) -> None:
    with pytest.raises(UnsupportedError, match=r"LlamaModel has no sub-module 'blocks\.h'; expected the path"):
        locate(tiny_base.decoder, "blocks.h")
    assert locate(tiny_base.decoder, "layers.1.mlp") is tiny_base.blocks[1].mlp


@pytest.fixture
def stablelm() -> Iterator[Family]:
    family = Family("stranger", ("stablelm",))
    register_family(family)
    yield family
    FAMILIES.unregister("stranger")


def test_a_strangers_family_works_like_a_built_in(stablelm: Family, tmp_path, random_aligner) -> None:
    config = CONFIG_MAPPING["stablelm"](
        hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=96,
        vocab_size=VOCABULARY, max_position_embeddings=64, pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    base = load_base(tmp_path)
    aligner = random_aligner(base)
    ids = torch.arange(20, 30)[None]
    expected = mixed_logits(base, ids, [(aligner, 0.5)])
    with torch.no_grad(), attach(base, [aligner], strength=0.5):
        close(base.model(ids).logits, expected)


def test_a_name_cannot_be_taken_twice() -> None:
    register_family(FAMILIES.get("llama"))
    with pytest.raises(ConfigError, match="family 'llama' is already registered"):
        register_family(Family("llama", ("llama",), blocks="h"))


def test_a_plain_model_is_not_refused(tiny_base: Base) -> None:
    assert refused_reason(tiny_base.model) is None
    assert not has_lora(tiny_base.model)


@pytest.mark.parametrize(
    ("places", "fragment"),
    [
        ({"": 0}, None),
        ({"": "cpu"}, None),
        ({"a": "cuda:0", "b": "cuda:0"}, None),
        ({"a": 0, "b": 1}, "device_map on several devices. Load the base on one device."),
        ({"a": 0, "b": "cpu"}, "CPU offload"),
        ({"a": "cpu", "b": "disk"}, "CPU offload"),
        ({"": "disk"}, "CPU offload"),
    ],
)
def test_where_the_weights_lie_decides(tiny_base: Base, places: dict[str, object], fragment: str | None) -> None:
    model = copy.copy(tiny_base.model)
    model.hf_device_map = places
    reason = refused_reason(model)
    assert (reason is None) if fragment is None else (reason is not None and fragment in reason)
