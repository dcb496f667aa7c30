"""A LoRA inside the base: at scale 0, and once it is gone, the base is the base bit for bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from safeside import Adapter, Base, Message, attach, load_base
from safeside.base.families import has_lora
from safeside.errors import AttachmentError, ConfigError, FormatError, InputError, MismatchError
from safeside.lora import CONFIG_FILE, WEIGHTS_FILE, Lora, LoraShape, add_lora, linear_layers, load_lora, save_lora
from safeside.train.taps import make_batch
from twin import base_states, close

ROWS = [tuple(range(7 + row, 20 + 2 * row)) for row in range(3)]
QUESTION = [Message("user", "the cat sat on the mat")]


def moved(base: Base, **shape: object) -> Lora:
    """A LoRA whose updates are as large as the base's own weights."""
    lora = add_lora(base, LoraShape(**shape), seed=3)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for update in lora.updates:
            update.copy_(torch.randn(update.shape, generator=generator) / update.shape[1] ** 0.5)
    return lora


def logits(base: Base) -> torch.Tensor:
    batch = make_batch(base, ROWS, range(len(ROWS)))
    with torch.no_grad():
        return base.model(input_ids=batch.ids, attention_mask=batch.keep).logits


def test_scale_0_is_the_base_bit_for_bit(tiny_base: Base) -> None:
    plain = logits(tiny_base)
    with moved(tiny_base, rank=4) as lora:
        full = logits(tiny_base)
        assert not torch.allclose(full, plain, atol=0.1)
        with lora.scaled(0.0):
            assert torch.equal(logits(tiny_base), plain)
        assert torch.equal(logits(tiny_base), full)
    assert torch.equal(logits(tiny_base), plain)


@pytest.mark.parametrize("scale", [0.25, 1.0, 1.5])
def test_a_scale_multiplies_the_updates(tiny_base: Base, scale: float) -> None:
    """The oracle: the same base with ``scale * 2 * B A`` added to its weights by hand."""
    with moved(tiny_base, rank=4, alpha=8.0) as lora:
        names, updates = linear_layers_of(lora), list(lora.updates)
        added = {
            name: (scale * 2.0 * updates[2 * place + 1] @ updates[2 * place]).detach()
            for place, name in enumerate(names)
        }
        with lora.scaled(scale):
            found = logits(tiny_base)
    other = load_base(tiny_base.folder)
    with torch.no_grad():
        for name, delta in added.items():
            other.model.get_submodule(name).weight.add_(delta)
    close(found, logits(other), 1e-3)


def linear_layers_of(lora: Lora) -> list[str]:
    """Names of the layers in the order of their updates, which come in pairs of A and B."""
    names = [name.removeprefix("base_model.model.").partition(".lora_")[0] for name in lora.named_updates]
    return names[::2]


def test_scales_are_restored_after_an_error(tiny_base: Base) -> None:
    with moved(tiny_base) as lora:
        full = logits(tiny_base)
        with pytest.raises(KeyError), lora.scaled(0.0):
            raise KeyError
        assert torch.equal(logits(tiny_base), full)
        assert all(update.requires_grad for update in lora.updates), "it can still be trained"


@pytest.mark.parametrize("scale", [-0.1, 2.1, float("nan"), float("inf")])
def test_scales_that_cannot_be(tiny_base: Base, scale: float) -> None:
    with (
        add_lora(tiny_base) as lora,
        pytest.raises(InputError, match="between 0 and 2; got"),
        lora.scaled(scale),
    ):
        pass


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_at_the_top_it_leaves_the_lower_layers_alone(tiny_family: Callable[[str], Base], family: str) -> None:
    base = tiny_family(family)
    ids = torch.tensor([ROWS[0]])
    plain, final = base_states(base, ids)
    with moved(base, depth=1):
        found, changed = base_states(base, ids)
    for lower, other in zip(plain[:3], found[:3], strict=True):  # embedding and two blocks of three
        assert torch.equal(lower, other)
    assert not torch.allclose(final, changed, atol=1e-2)


@pytest.mark.parametrize("depth", [0, 4])
def test_depth_counts_blocks(tiny_base: Base, depth: int) -> None:
    with pytest.raises(ConfigError, match=rf"lies in 1\.\.3; got {depth}"):
        linear_layers(tiny_base, depth=depth)


def test_a_fresh_one_is_the_base(tiny_base: Base) -> None:
    plain = logits(tiny_base)
    with add_lora(tiny_base):
        assert torch.equal(logits(tiny_base), plain)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_its_folder_is_pefts(tiny_family: Callable[[str], Base], tmp_path: Path, family: str) -> None:
    """Saved by us it is loaded by peft, and the other way round, with the same logits."""
    base = tiny_family(family)
    with moved(base, rank=4, depth=2) as lora:
        expected = logits(base)
        save_lora(lora, tmp_path / "ours", {"seed": "3"})
    assert json.loads((tmp_path / "ours" / CONFIG_FILE).read_text())["peft_type"] == "LORA"
    assert json.loads((tmp_path / "ours" / "provenance.json").read_text())["seed"] == "3"
    assert len({file.stat().st_mode for file in (tmp_path / "ours").iterdir()}) == 1  # who may read one may read all

    other = load_base(base.folder)
    theirs = PeftModel.from_pretrained(other.model, str(tmp_path / "ours"))
    batch = make_batch(base, ROWS, range(len(ROWS)))
    with torch.no_grad():
        assert torch.equal(theirs(input_ids=batch.ids, attention_mask=batch.keep).logits, expected)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    for name in ("ours", "theirs"):
        with load_lora(tmp_path / name, base) as lora:
            assert torch.equal(logits(base), expected)
            assert not any(update.requires_grad for update in lora.updates)
    assert not has_lora(base.model)


def test_it_answers_and_the_base_is_back(tiny_base: Base, tmp_path: Path) -> None:
    plain = tiny_base.chat(QUESTION, max_new_tokens=8).text
    with moved(tiny_base) as lora:
        save_lora(lora, tmp_path)
    with load_lora(tmp_path, tiny_base) as lora:
        assert tiny_base.chat(QUESTION, max_new_tokens=8).text != plain
        with lora.scaled(0.0):
            assert tiny_base.chat(QUESTION, max_new_tokens=8).text == plain
    assert tiny_base.chat(QUESTION, max_new_tokens=8).text == plain


def test_what_cannot_be_loaded(tiny_base: Base, tiny_family: Callable[[str], Base], tmp_path: Path) -> None:
    with moved(tiny_base, rank=2) as lora:
        save_lora(lora, tmp_path)
    with pytest.raises(FormatError, match="has no adapter_config"):
        load_lora(tmp_path / "none", tiny_base)
    with pytest.raises(MismatchError, match="fingerprint"):
        load_lora(tmp_path, tiny_family("qwen2"))
    weights, config = load_file(tmp_path / WEIGHTS_FILE), (tmp_path / CONFIG_FILE).read_text()
    name, tensor = next(iter(weights.items()))
    for changed, message in (
        ({key: value for key, value in weights.items() if key != name}, "1 tensors are missing"),
        ({**weights, name: torch.full_like(tensor, float("nan"))}, "NaN or infinity"),
        ({**weights, name: tensor[:1].contiguous()}, "another shape"),
    ):
        save_file(changed, tmp_path / WEIGHTS_FILE)
        with pytest.raises(FormatError, match=message):
            load_lora(tmp_path, tiny_base)
        assert not has_lora(tiny_base.model), "a failed load leaves the base as it was"
    (tmp_path / WEIGHTS_FILE).write_bytes(b"pickle")
    with pytest.raises(FormatError, match="cannot be read as a LoRA"):
        load_lora(tmp_path, tiny_base)
    (tmp_path / CONFIG_FILE).write_text(config.replace('"LORA"', '"IA3"'))
    with pytest.raises(FormatError, match="holds a IA3 adapter"):
        load_lora(tmp_path, tiny_base)


def test_one_thing_at_a_time(tiny_base: Base, random_guard: Callable[..., Adapter]) -> None:
    with attach(tiny_base, guards=[random_guard(tiny_base)]), pytest.raises(AttachmentError, match="already"):
        add_lora(tiny_base)
    with add_lora(tiny_base) as lora, pytest.raises(AttachmentError, match="already"):
        add_lora(tiny_base)
    with pytest.raises(AttachmentError, match="was unloaded"), lora.scaled(1.0):
        pass
