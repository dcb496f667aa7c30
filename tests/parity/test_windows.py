"""Sliding windows: texts that run past them, on caches that keep the whole text and on caches that do not."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import DynamicCache

from safeside import attach, ramp
from safeside.request import history_of, request_layer
from tiny import WINDOW, WINDOWED
from twin import SAME, answer_by_hand, close

PROMPT = [11, 90, 40, 11, 90, 77, 200, 11, 90, 12, 150, 33]
N_NEW = 5
GREEDY = {"max_new_tokens": N_NEW, "min_new_tokens": N_NEW, "do_sample": False}


@pytest.fixture(params=WINDOWED)
def rig(request, tiny_family, random_guard, random_aligner):
    base = tiny_family(request.param)
    guard, aligner = random_guard(base), random_aligner(base)
    yield base, guard, aligner
    if base.attachment is not None:
        base.attachment.detach()


def test_texts_past_the_window_are_the_twins(rig) -> None:
    """With the windowed cache that generate makes, a lazy one, beams' copies and rollbacks of prompt lookup."""
    base, guard, aligner = rig
    expected = answer_by_hand(base, PROMPT, {aligner: lambda scores: 0.9}, [], N_NEW).ids
    ids = torch.tensor([PROMPT])
    assert len(PROMPT) > WINDOW
    with attach(base, [aligner], [guard], strength=0.9):
        for options in (
            {},
            {"past_key_values": DynamicCache()},
            {"past_key_values": DynamicCache(config=base.model.config)},
            {"prompt_lookup_num_tokens": 3},
            {"prefill_chunk_size": 5},
        ):
            assert base.model.generate(ids, **GREEDY, **options)[0, len(PROMPT) :].tolist() == expected, options
        cached = base.model.generate(ids, num_beams=2, **GREEDY)
        assert cached.tolist() == base.model.generate(ids, num_beams=2, use_cache=False, **GREEDY).tolist()


@torch.no_grad()
def test_a_windowed_cache_rolls_back_with_its_adapters(rig) -> None:
    base, guard, aligner = rig
    text = torch.tensor([[*PROMPT, 70, 12, 150, 33]])
    strength = ramp(guard, 0.0, 1.0, ceiling=2.0, latched=False)
    with attach(base, [aligner], [guard], strength=strength) as attachment:
        whole = base.model(text).logits
        scores = attachment.record.scores["harm"][0]
        cache = DynamicCache(config=base.model.config)
        cache.activate_past_recording()
        base.model(text[:, :12], past_key_values=cache)
        cache.crop(0)
        base.model(torch.tensor([[7, 8, 9]]), past_key_values=cache)
        cache.crop(-3)
        twin = copy.deepcopy(cache)
        close(base.model(text[:, 12:], past_key_values=cache).logits, whole[:, 12:])
        assert history_of(cache).scores[0, :, 0].tolist() == pytest.approx(scores[:, 0].tolist(), abs=SAME)
        assert request_layer(twin).get_seq_length() == 12
