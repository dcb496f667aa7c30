"""Every way of running a base: what works and what is refused by name, as one table that the documentation prints.

``SUPPORTED`` holds the table.  A supported row's function checks that the way gives what it should; a refused row's
function is the use that must raise UnsupportedError with ``message`` in its text.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache, StaticCache, pipeline
from transformers.cache_utils import Cache

from safeside import Adapter, Base, Message, attach, fixed, load_base, ramp
from safeside.errors import UnsupportedError
from twin import close, mixed_logits, run_by_hand

GREEDY = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}


@dataclass
class Rig:
    """A tiny llama of its own, an adapter of each role, two prompts, and the greedy answers under attachment."""

    base: Base
    encoder: Base
    guard: Adapter
    aligner: Adapter
    encoder_guard: Adapter
    ids: Tensor
    greedy: Tensor

    def attach(self, strength: object = 1.0):
        return attach(self.base, [self.aligner], [self.guard], strength)

    def generate(self, ids: Tensor | None = None, **options: object) -> Tensor:
        return self.base.model.generate(self.ids if ids is None else ids, **{**GREEDY, **options})


@pytest.fixture(scope="module")
def rig(tiny_folder, random_guard, random_aligner) -> Rig:
    base, encoder = load_base(tiny_folder("llama")), load_base(tiny_folder("bert"))
    ids = torch.tensor([[11, 90, 40, 11, 90, 77, 200, 11, 90], [70, 70, 12, 150, 70, 12, 33, 99, 70]])
    rig = Rig(base, encoder, random_guard(base), random_aligner(base), random_guard(encoder), ids, ids)
    with rig.attach():
        rig.greedy = rig.generate()
    return rig


def sampling(rig: Rig) -> None:
    """One prompt and several samples are the prompt repeated; strengths are repeated with their rows."""
    options = {"do_sample": True}
    with rig.attach(fixed([0.0, 1.0])) as attachment, attachment.request(copies=2):
        torch.manual_seed(0)
        several = rig.generate(num_return_sequences=2, **options)
    with rig.attach(fixed([0.0, 0.0, 1.0, 1.0])):
        torch.manual_seed(0)
        repeated = rig.generate(rig.ids.repeat_interleave(2, 0), **options)
    assert several.tolist() == repeated.tolist()


def beams(rig: Rig) -> None:
    with rig.attach(fixed([0.4, 1.0])) as attachment, attachment.request(copies=2):
        cached = rig.generate(num_beams=2)
        assert cached.tolist() == rig.generate(num_beams=2, use_cache=False).tolist()
    with rig.attach(1.0):
        alone = rig.generate(rig.ids[1:], num_beams=2)
    assert cached[1:].tolist() == alone.tolist()


def prompt_lookup(rig: Rig) -> None:
    with rig.attach():
        for row in (0, 1):
            found = rig.generate(rig.ids[row : row + 1], prompt_lookup_num_tokens=3)
            assert found[0].tolist() == rig.greedy[row].tolist()


def assisted(rig: Rig) -> None:
    assistant = copy.deepcopy(rig.base.model)
    with rig.attach():
        found = rig.base.model.generate(rig.ids[:1], assistant_model=assistant, max_new_tokens=6, do_sample=False)
    assert found[0].tolist() == rig.greedy[0].tolist()


def chunked_prefill(rig: Rig) -> None:
    with rig.attach():
        assert rig.generate(prefill_chunk_size=4).tolist() == rig.greedy.tolist()


def own_and_lazy_caches(rig: Rig) -> None:
    with rig.attach():
        assert rig.generate(past_key_values=DynamicCache()).tolist() == rig.greedy.tolist()
        config = rig.base.model.config
        assert rig.generate(past_key_values=DynamicCache(config=config)).tolist() == rig.greedy.tolist()
        assert rig.generate(cache_implementation="dynamic").tolist() == rig.greedy.tolist()


def embeddings(rig: Rig) -> None:
    with rig.attach():
        found = rig.base.model.generate(inputs_embeds=rig.base.model.get_input_embeddings()(rig.ids), **GREEDY)
    assert found.tolist() == rig.greedy[:, rig.ids.shape[1] :].tolist()


def pipelines(rig: Rig) -> None:
    with rig.attach():
        pipe = pipeline("text-generation", model=rig.base.model, tokenizer=rig.base.tokenizer)
        text = pipe("the cat", max_new_tokens=6, do_sample=False)[0]["generated_text"]
        ids = rig.base.tokenizer("the cat", return_tensors="pt").input_ids
        expected = rig.base.model.generate(ids, max_new_tokens=6, do_sample=False)
    assert text == rig.base.tokenizer.decode(expected[0], skip_special_tokens=True)


def tuple_output(rig: Rig) -> None:
    with rig.attach(), torch.no_grad():
        expected = rig.base.model(rig.ids).logits
        assert torch.equal(rig.base.model(rig.ids, return_dict=False)[0], expected)


def one_device_map(rig: Rig) -> None:
    rig.base.model.hf_device_map = {"": "cpu"}
    try:
        with rig.attach():
            assert rig.generate().tolist() == rig.greedy.tolist()
    finally:
        del rig.base.model.hf_device_map


class Int8Linear(nn.Module):
    """A linear layer with int8 weights and one scale a row, as weight-only quantisation makes them."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.abs().amax(1, keepdim=True) / 127
        self.register_buffer("quantised", (linear.weight / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)

    def forward(self, states: Tensor) -> Tensor:
        return F.linear(states, self.quantised * self.scale)


def int8_weights(rig: Rig) -> None:
    base = copy.deepcopy(rig.base)
    for block in base.blocks:
        for parent, name in ((block.mlp, "down_proj"), (block.self_attn, "q_proj")):
            setattr(parent, name, Int8Linear(parent.get_submodule(name)))
    check_mixing(rig, base)


def check_mixing(rig: Rig, base: Base) -> None:
    """Mixed logits against the twin, and bit-exactness at strength 0."""
    expected, plain = mixed_logits(base, rig.ids, [(rig.aligner, 1.0)]), base.model(rig.ids).logits
    with torch.no_grad():
        with attach(base, [rig.aligner], [rig.guard], strength=1.0):
            close(base.model(rig.ids).logits, expected)
        with attach(base, [rig.aligner], [rig.guard], strength=0.0):
            assert torch.equal(base.model(rig.ids).logits, plain)


def lora(rig: Rig) -> None:
    base = copy.deepcopy(rig.base)
    peft = get_peft_model(base.model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    assert peft.base_model.model is base.model
    check_mixing(rig, base)
    with attach(base, guards=[rig.guard]):
        verdicts = base.chat([Message("user", "hi")], max_new_tokens=2).verdicts
    assert verdicts
    assert all("a LoRA or a gene in the base shifts the states" in verdict.reason for verdict in verdicts)
    with rig.attach():
        verdicts = rig.base.chat([Message("user", "hi")], max_new_tokens=2).verdicts
    assert not any("LoRA" in verdict.reason for verdict in verdicts)


def encoder_guards(rig: Rig) -> None:
    keep = torch.ones_like(rig.ids, dtype=torch.bool)
    keep[1, 6:] = False
    expected = run_by_hand(rig.encoder, rig.encoder_guard, rig.ids, keep).scores
    plain = rig.encoder.model(rig.ids, attention_mask=keep).last_hidden_state
    with attach(rig.encoder, guards=[rig.encoder_guard]) as attachment:
        assert torch.equal(rig.encoder.model(rig.ids, attention_mask=keep).last_hidden_state, plain)
        close(attachment.record.scores["harm"], expected)


def gated_beams(rig: Rig) -> None:
    with rig.attach(ramp("harm", 0.2, 0.8, latched=False)):
        rig.generate(num_beams=2)


def static_cache(rig: Rig) -> None:
    with rig.attach():
        rig.generate(cache_implementation="static")


def static_cache_by_hand(rig: Rig) -> None:
    with rig.attach():
        rig.base.model(rig.ids, past_key_values=StaticCache(config=rig.base.model.config, max_cache_len=32))


def quantised_cache(rig: Rig) -> None:
    class QuantizedCache(Cache):
        """What transformers builds when a quantisation library is installed."""

    layers = DynamicCache(config=rig.base.model.config).layers
    with rig.attach():
        rig.base.model(rig.ids, past_key_values=QuantizedCache(layers=layers))


def offloaded_cache(rig: Rig) -> None:
    with rig.attach():
        rig.generate(cache_implementation="offloaded")


def compiled_in_place(rig: Rig) -> None:
    base = copy.deepcopy(rig.base)
    base.model.compile(backend="eager")
    attach(base, [rig.aligner])


def compiled_block(rig: Rig) -> None:
    base = copy.deepcopy(rig.base)
    base.blocks[1] = torch.compile(base.blocks[1], backend="eager")
    attach(base, [rig.aligner])


def compiled_before(rig: Rig) -> None:
    """Compiled code would go on without the hooks: the aligner would be off, silently."""
    compiled = torch.compile(rig.base.model, backend="eager")
    compiled(rig.ids)
    with rig.attach():
        compiled(rig.ids)


def compiled_after(rig: Rig) -> None:
    with rig.attach():
        torch.compile(rig.base.model, backend="eager")(rig.ids)


def several_devices(rig: Rig) -> None:
    with_device_map(rig, {"model.layers.0": 0, "model.layers.1": 1})


def cpu_offload(rig: Rig) -> None:
    with_device_map(rig, {"model.layers.0": 0, "model.layers.1": "cpu"})


def with_device_map(rig: Rig, places: dict[str, object]) -> None:
    base = copy.deepcopy(rig.base)
    base.model.hf_device_map = places
    attach(base, [rig.aligner])


def meta_weights(rig: Rig) -> None:
    base = copy.deepcopy(rig.base)
    base.model.to("meta")
    attach(base, [rig.aligner])


def checkpointing(rig: Rig) -> None:
    base = copy.deepcopy(rig.base)
    with warnings.catch_warnings():  # newer releases of transformers call it activation checkpointing
        warnings.simplefilter("ignore", FutureWarning)
        base.model.gradient_checkpointing_enable()
    attach(base, [rig.aligner])


def encoder_aligner(rig: Rig) -> None:
    attach(rig.encoder, [rig.aligner])


def four_dimensional_mask(rig: Rig) -> None:
    with rig.attach():
        rig.base.model(rig.ids, attention_mask=torch.ones(2, 1, 9, 9, dtype=torch.bool))


def packed(rig: Rig) -> None:
    with rig.attach():
        rig.base.model(rig.ids[:1], position_ids=torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3]]))


def chat_beams(rig: Rig) -> None:
    rig.base.chat([Message("user", "hi")], num_beams=2)


@dataclass(frozen=True)
class Way:
    """One row: a way of running a base, whether it works, the check, what the docs add, what a refusal says."""

    name: str
    supported: bool
    check: Callable[[Rig], None]
    note: str
    message: str = ""


SUPPORTED = [
    Way(
        "sampling, `num_return_sequences`",
        True,
        sampling,
        "`attachment.request(copies=n)`: strengths and gates go with each copy of a row",
    ),
    Way(
        "beam search, fixed strength",
        True,
        beams,
        "one strength, or one for each row with `attachment.request(copies=num_beams)`",
    ),
    Way("prompt-lookup decoding", True, prompt_lookup, "the same text as greedy decoding"),
    Way(
        "assisted (speculative) decoding", True, assisted, "the draft model runs without adapters; the text is the same"
    ),
    Way("chunked prefill", True, chunked_prefill, "a gate decides when the prompt's end is reached"),
    Way("`DynamicCache`", True, own_and_lazy_caches, "the one `generate` makes, or your own; crop, copy and re-use it"),
    Way("`inputs_embeds`", True, embeddings, ""),
    Way("transformers pipelines", True, pipelines, "pass `base.model` and `base.tokenizer`"),
    Way("`return_dict=False`", True, tuple_output, ""),
    Way("`device_map` on one device", True, one_device_map, ""),
    Way(
        "weight-only quantised base", True, int8_weights, "checked with int8 weights; the adapters keep their own dtype"
    ),
    Way("a PEFT LoRA on the base", True, lora, "it shifts what guards read, and every verdict says so"),
    Way("encoder bases", True, encoder_guards, "guards only"),
    Way(
        "beam search, gated strength", False, gated_beams, "use a fixed strength, or sampling", "Beam search with a st"
    ),
    Way("beams or samples in `Base.chat`", False, chat_beams, "call `base.model.generate`", "gives one answer a row"),
    Way("static cache", False, static_cache, "leave `cache_implementation` unset", "A StaticCache is refused"),
    Way("a `StaticCache` of yours", False, static_cache_by_hand, "pass a `DynamicCache`", "A StaticCache is refused"),
    Way("quantised cache", False, quantised_cache, "pass a `DynamicCache`", "A QuantizedCache is refused"),
    Way("offloaded cache", False, offloaded_cache, "pass a `DynamicCache`", "An offloaded DynamicCache is refused"),
    Way("a compiled base", False, compiled_in_place, "attach to the uncompiled model", "torch.compile"),
    Way("a base with a compiled block", False, compiled_block, "attach to the uncompiled model", "torch.compile"),
    Way("code compiled before `attach`", False, compiled_before, "run the uncompiled model", "torch.compile of an att"),
    Way("`torch.compile` after `attach`", False, compiled_after, "run the uncompiled model", "torch.compile of an att"),
    Way("`device_map` on several devices", False, several_devices, "load the base on one device", "on several devices"),
    Way("CPU or disk offload", False, cpu_offload, "load the base on one device", "CPU offload"),
    Way("weights on the meta device", False, meta_weights, "load the base on one device", "meta parameters"),
    Way(
        "gradient checkpointing", False, checkpointing, "a frozen base stores no activations", "gradient checkpointing"
    ),
    Way("an aligner on an encoder", False, encoder_aligner, "an encoder has no next token", "is an encoder"),
    Way(
        "4-D attention masks", False, four_dimensional_mask, "pass (batch, tokens)", "attention_mask of shape (batch, t"
    ),
    Way("packed sequences, continuous batching", False, packed, "one row for each text", "Packed sequences"),
]


@pytest.mark.parametrize("way", SUPPORTED, ids=lambda way: way.name)
def test_way_of_running_a_base(rig: Rig, way: Way) -> None:
    with torch.no_grad():
        if way.supported:
            way.check(rig)
        else:
            with pytest.raises(UnsupportedError) as caught:
                way.check(rig)
            assert way.message in str(caught.value)
    assert rig.base.attachment is None


def test_every_refusal_says_which_and_each_way_stands_once() -> None:
    assert all(way.message for way in SUPPORTED if not way.supported)
    assert len({way.name for way in SUPPORTED}) == len(SUPPORTED)
    assert len({way.check for way in SUPPORTED}) == len(SUPPORTED)
