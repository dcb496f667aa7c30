"""The core's promises on all 18 families, each against the slow twin of ``twin.py``."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from safeside import Adapter, Base, attach, fixed
from safeside.base.families import locate
from tiny import FAMILY_NAMES, N_TOKENS, SPECIAL
from twin import (
    SAME,
    SAME_BFLOAT16,
    base_states,
    close,
    hash_of,
    mixed_logits,
    pad,
    positions_of,
    run_by_hand,
)

STRENGTH = 0.7
LENGTH = 14  # past every sliding window, which holds 8


@dataclass
class Rig:
    """A tiny base, one adapter of each role, and a batch of two prompts."""

    base: Base
    guard: Adapter
    aligner: Adapter
    ids: Tensor

    @property
    def keep(self) -> Tensor:
        return torch.ones_like(self.ids, dtype=torch.bool)


@pytest.fixture(scope="module", params=[*FAMILY_NAMES, "cohere2"])
def rig(request, tiny_family, random_guard, random_aligner) -> Rig:
    base = tiny_family(request.param)
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(len(SPECIAL), N_TOKENS, (2, LENGTH), generator=generator)
    return Rig(base, random_guard(base, readout="attention"), random_aligner(base), ids)


@pytest.fixture(autouse=True)
def no_gradients(rig: Rig):
    with torch.no_grad():
        yield
    if rig.base.attachment is not None:
        rig.base.attachment.detach()


def attached(rig: Rig, strength: object = STRENGTH):
    return attach(rig.base, aligners=[rig.aligner], guards=[rig.guard], strength=strength)


def test_mixed_states_are_mixed_logits(rig: Rig) -> None:
    expected = mixed_logits(rig.base, rig.ids, [(rig.aligner, STRENGTH)])
    plain = rig.base.model(rig.ids).logits
    scores = run_by_hand(rig.base, rig.guard, rig.ids).scores
    with attached(rig) as attachment:
        found = rig.base.model(rig.ids).logits
        close(attachment.record.scores["harm"], scores)
    close(found, expected)
    assert (found - plain).abs().max() > 1000 * SAME  # the aligner does something


def test_taps_are_the_hidden_states(rig: Rig) -> None:
    states, _ = base_states(rig.base, rig.ids)
    seen: dict[int, Tensor] = {}
    trunk = rig.aligner.trunk
    read, trunk.read = trunk.read, lambda tape, layer, hidden: (seen.update({layer: hidden}), read(tape, layer, hidden))
    try:
        with attached(rig):
            rig.base.model(rig.ids)
    finally:
        del trunk.read
    assert sorted(seen) == list(range(rig.base.n_layers + 1))
    for layer, state in enumerate(states):
        assert torch.equal(seen[layer], state), layer
    norm = locate(rig.base.decoder, rig.base.family.norm)
    assert torch.equal(norm(seen[rig.base.n_layers]), base_states(rig.base, rig.ids)[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strength_0_and_detached_are_the_base_bit_for_bit(rig: Rig, dtype: torch.dtype) -> None:
    rig = copy.deepcopy(rig)  # bfloat16 would round the shared one, its rotary buffers included
    for module in (rig.base.model, rig.aligner, rig.guard):
        module.to(dtype)
    expected = rig.base.model(rig.ids).logits
    with attached(rig, 0.0):
        assert torch.equal(rig.base.model(rig.ids).logits, expected)
    with attached(rig, fixed([0.0, 1.0])):
        rows = rig.base.model(rig.ids).logits
    assert torch.equal(rows[0], expected[0])
    assert not torch.equal(rows[1], expected[1])
    assert torch.equal(rig.base.model(rig.ids).logits, expected)
    if dtype == torch.bfloat16:
        close(rows[1:], mixed_logits(rig.base, rig.ids, [(rig.aligner, 1.0)])[1:], SAME_BFLOAT16)


def test_cached_steps_are_the_whole_text(rig: Rig) -> None:
    """Prefill and single steps, and a prefill in two chunks, against one pass without a cache."""
    with attached(rig) as attachment:
        whole = rig.base.model(rig.ids, use_cache=False).logits
        scores = attachment.record.scores["harm"]
        for chunks in ([LENGTH - 4, 1, 1, 1, 1], [5, LENGTH - 5]):
            cache, logits, heard = DynamicCache(), [], []
            for part in rig.ids.split(chunks, dim=1):
                logits.append(rig.base.model(part, past_key_values=cache).logits)
                heard.append(attachment.record.scores["harm"])
            close(torch.cat(logits, 1), whole)
            close(torch.cat(heard, 1), scores)


def test_greedy_text_is_the_same_with_and_without_a_cache(rig: Rig) -> None:
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    plain = rig.base.model.generate(rig.ids, **options)
    with attached(rig, 1.0):
        own = rig.base.model.generate(rig.ids, **options)
        lazy = rig.base.model.generate(rig.ids, past_key_values=DynamicCache(), **options)
        without = rig.base.model.generate(rig.ids, use_cache=False, **options)
    assert own.tolist() == lazy.tolist() == without.tolist()
    assert own.tolist() != plain.tolist()


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_changes_nothing(rig: Rig, side: str) -> None:
    rows = [rig.ids[0].tolist(), rig.ids[1, :9].tolist()]
    ids, keep = pad(rows, side)
    with attached(rig) as attachment:
        logits = rig.base.model(ids, attention_mask=keep.long(), position_ids=positions_of(keep)).logits
        scores = attachment.record.scores["harm"]
        for row, tokens in enumerate(rows):
            close(logits[row, keep[row]], rig.base.model(torch.tensor([tokens])).logits[0])
            close(scores[row, keep[row]], attachment.record.scores["harm"][0])


def test_training_reaches_the_adapter_and_no_byte_of_the_base(rig: Rig) -> None:
    before = hash_of(rig.base.model)
    adapters = torch.nn.ModuleList([rig.aligner, rig.guard])
    weights = {name: tensor.clone() for name, tensor in adapters.state_dict().items()}
    with torch.enable_grad(), attached(rig) as attachment:
        optimiser = torch.optim.SGD(adapters.parameters(), lr=0.1)
        loss = rig.base.model(rig.ids, labels=rig.ids).loss + attachment.record.logits["harm"].square().mean()
        loss.backward()
        optimiser.step()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in adapters.parameters())
    changed = [name for name, tensor in adapters.state_dict().items() if not torch.equal(tensor, weights[name])]
    adapters.load_state_dict(weights)
    assert len(changed) == len(weights)
    assert all(parameter.grad is None for parameter in rig.base.model.parameters())
    assert hash_of(rig.base.model) == before


def test_beams_are_the_same_with_and_without_a_cache(rig: Rig) -> None:
    options = {"num_beams": 2, "do_sample": False, "max_new_tokens": 5, "min_new_tokens": 5, "pad_token_id": 0}
    with attached(rig, fixed([0.0, STRENGTH])) as attachment, attachment.request(copies=2):
        cached = rig.base.model.generate(rig.ids, attention_mask=rig.keep, **options)
        again = rig.base.model.generate(rig.ids, attention_mask=rig.keep, use_cache=False, **options)
    assert cached.tolist() == again.tolist()
    plain = rig.base.model.generate(rig.ids, attention_mask=rig.keep, **options)
    assert cached[0].tolist() == plain[0].tolist()  # the row at strength 0
