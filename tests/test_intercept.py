"""Prompts that are blocked before the deeper blocks run."""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Callable

import pytest
import torch
from transformers import DynamicCache

from safeside import Adapter, Base, Message, attach, ramp
from safeside.adapters.config import Calibration
from safeside.errors import AttachmentError, BlockedError, InputError, UnsupportedError
from safeside.stopping import StopRule
from twin import SAME, count_hooks, pad, positions_of, run_by_hand

TALKS = [
    [Message("system", "be good"), Message("user", "how can this be?")],
    [Message("user", "the cat")],
    [Message("user", "and then the other cat sat there")],
    [Message("user", "a hat; 123")],
]
PLENTY = {"max_new_tokens": 5, "min_new_tokens": 5}


@pytest.fixture
def guard(tiny_base: Base, random_guard: Callable[..., Adapter]) -> Adapter:
    return random_guard(tiny_base, layers=(0, 1, 2))


def set_threshold(guard: Adapter, threshold: float) -> None:
    guard.set_calibration(Calibration(scale=(1.0,), bias=(0.0,), threshold=(threshold,)))


def prompt_score(base: Base, guard: Adapter, talk: list[Message]) -> float:
    return float(run_by_hand(base, guard, torch.tensor([base.encode(talk).ids])).scores[0, -1, 0])


def halve(base: Base, guard: Adapter) -> list[bool]:
    """Set a threshold that two of the prompts reach; which."""
    scores = [prompt_score(base, guard, talk) for talk in TALKS]
    low, high = sorted(scores)[1:3]
    assert high - low > 100 * SAME
    set_threshold(guard, (low + high) / 2)
    return [score >= high for score in scores]


class Blocks:
    """How often each block ran to its end."""

    def __init__(self, base: Base) -> None:
        self.runs = [0] * base.n_layers
        self.handles = [block.register_forward_hook(self._count(index)) for index, block in enumerate(base.blocks)]

    def _count(self, index: int) -> Callable[..., None]:
        def count(*_: object) -> None:
            self.runs[index] += 1

        return count

    def __enter__(self) -> Blocks:
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()


@pytest.mark.parametrize(
    ("options", "deepest"),
    [
        ({"layers": (0, 1, 2)}, 2),
        ({"layers": (0, 1), "readout": "attention"}, 1),
        ({"layers": (1,), "kind": "plr"}, 1),
        ({"layers": (0, 2), "kind": "rtb"}, 2),
        ({"layers": (0,), "kind": "plr"}, 0),
        ({}, 3),  # reads the last block: only head and answer are saved
    ],
)
@pytest.mark.parametrize("size", [1, 8])
def test_deeper_blocks_never_run(tiny_base: Base, random_guard, options: dict, deepest: int, size: int) -> None:
    guard, talks = random_guard(tiny_base, **options), (TALKS * 2)[:size]
    set_threshold(guard, 0.0)
    expected = [prompt_score(tiny_base, guard, talk) for talk in talks]
    before = count_hooks(tiny_base.model)
    with Blocks(tiny_base) as blocks, attach(tiny_base, intercept=guard):
        found = tiny_base.chat_batch(talks, **PLENTY)
    assert blocks.runs == [1] * deepest + [0] * (tiny_base.n_layers - deepest)
    assert count_hooks(tiny_base.model) == before
    for talk, completion, score in zip(talks, found, expected, strict=True):
        (verdict,) = completion.verdicts
        assert verdict.flagged
        assert verdict.task == "harm"
        assert verdict.score == pytest.approx(score, abs=SAME)
        assert (completion.text, completion.n_new_tokens, completion.finish_reason) == ("", 0, "blocked")
        assert completion.n_prompt_tokens == len(tiny_base.encode(talk).ids)


@pytest.mark.parametrize("size", [1, 8])
@pytest.mark.parametrize("readout", ["last", "attention"])
def test_allowed_prompts_are_bit_for_bit_the_same(tiny_base, random_guard, random_aligner, size, readout) -> None:
    guard = random_guard(tiny_base, layers=(0, 1), readout=readout)
    other, aligner = random_guard(tiny_base, "leak", seed=9), random_aligner(tiny_base)
    set_threshold(guard, 1.0)
    talks = (TALKS * 2)[:size]
    rows = [list(tiny_base.encode(talk).ids) for talk in talks]
    ids, keep = pad(rows, "left")
    outputs, answers = [], []
    for intercept in (None, guard):
        strength = ramp(other, 0.0, 1.0)
        with (
            torch.no_grad(),
            attach(tiny_base, [aligner], [other, guard], strength, intercept=intercept) as attachment,
            attachment.request(prompt_end=[len(row) for row in rows]),
        ):
            outputs.append(tiny_base.model(ids, attention_mask=keep, position_ids=positions_of(keep)).logits)
            answers.append(tiny_base.chat_batch(talks, **PLENTY))
    assert torch.equal(*outputs)
    assert answers[0] == answers[1]


def test_a_mixed_batch_goes_on(tiny_base: Base, guard: Adapter) -> None:
    """Blocked rows get the verdict and no answer; the others answer as if nothing had happened."""
    harmful = halve(tiny_base, guard)
    with attach(tiny_base, guards=[guard]):
        plain = tiny_base.chat_batch(TALKS, **PLENTY)
    released: dict[int, list[int]] = {}
    with attach(tiny_base, intercept=guard):
        found = tiny_base.chat_batch(TALKS, release=lambda row, ids: released.setdefault(row, []).extend(ids), **PLENTY)
    for row, is_blocked in enumerate(harmful):
        if is_blocked:
            assert (found[row].text, found[row].finish_reason, found[row].n_new_tokens) == ("", "blocked", 0)
            assert [verdict.flagged for verdict in found[row].verdicts] == [True]
            assert not released.get(row)
        else:
            assert found[row] == plain[row]
            assert len(released[row]) == 5


def test_a_score_that_is_not_a_number_blocks(tiny_base: Base, guard: Adapter) -> None:
    guard.head.linear.bias.data.fill_(math.nan)
    with Blocks(tiny_base) as blocks, attach(tiny_base, intercept=guard):
        found = tiny_base.chat(TALKS[0])
    assert blocks.runs == [1, 1, 0]
    assert (found.finish_reason, found.verdicts[0].flagged) == ("blocked", True)
    assert "not a number" in found.verdicts[0].reason


@pytest.mark.parametrize("size", [1, 3, 7])
@torch.no_grad()
def test_prompts_in_chunks_are_blocked_at_their_end(tiny_base: Base, guard: Adapter, size: int) -> None:
    """Rows padded left that end in the same slot, and rows of which one ends a chunk before the other."""
    set_threshold(guard, 0.0)
    rows = [list(tiny_base.encode(talk).ids) for talk in TALKS]
    ids, keep = pad(rows, "left")
    for ends in ([len(row) for row in rows], [len(row) - 5 * (index == 0) for index, row in enumerate(rows)]):
        cache, n_run = DynamicCache(), 0
        blocked = pytest.raises(BlockedError)
        with attach(tiny_base, intercept=guard) as attachment, attachment.request(prompt_end=ends), blocked as caught:
            for start in range(0, ids.shape[1], size):
                stop = start + size
                tiny_base.model(
                    ids[:, start:stop],
                    attention_mask=keep[:, :stop],
                    position_ids=positions_of(keep)[:, start:stop],
                    past_key_values=cache,
                )
                n_run = stop
        assert n_run < ids.shape[1] <= n_run + size
        expected = [
            float(run_by_hand(tiny_base, guard, torch.tensor([row])).scores[0, end - 1, 0])
            for row, end in zip(rows, ends, strict=True)
        ]
        assert [verdict.score for verdict in caught.value.verdicts] == pytest.approx(expected, abs=SAME)


@pytest.mark.parametrize("options", [{"prefill_chunk_size": 4}, {"prompt_lookup_num_tokens": 3}])
def test_other_ways_of_generating(tiny_base: Base, guard: Adapter, options: dict[str, object]) -> None:
    set_threshold(guard, 1.0)
    with attach(tiny_base, intercept=guard):
        plain = tiny_base.chat(TALKS[0], stop=StopRule(1.0), **PLENTY)
        assert tiny_base.chat(TALKS[0], stop=StopRule(1.0), **PLENTY, **options).text == plain.text
        set_threshold(guard, 0.0)
        assert tiny_base.chat(TALKS[0], **PLENTY, **options).finish_reason == "blocked"


@pytest.mark.parametrize("layers", [(0, 1, 2), (0,)])
@torch.no_grad()
def test_the_half_read_cache_is_refused(tiny_base: Base, random_guard, layers: tuple[int, ...]) -> None:
    """Also where no block had run yet, after a copy and after a crop."""
    guard, cache = random_guard(tiny_base, layers=layers, kind="plr" if layers == (0,) else "lst"), DynamicCache()
    set_threshold(guard, 0.0)
    ids = torch.tensor([[11, 90, 40, 77]])
    with attach(tiny_base, intercept=guard) as attachment, attachment.request(prompt_end=[4]):
        tiny_base.model(ids[:, :2], past_key_values=cache)
        with pytest.raises(BlockedError, match=r"blocked every prompt of this batch after block \d; .* base\.chat"):
            tiny_base.model(ids[:, 2:], past_key_values=cache)
        for spoilt in (cache, copy.deepcopy(cache)):
            for words in ({}, {"attention_mask": torch.ones_like(ids)}):
                with pytest.raises(AttachmentError, match=r"were blocked before .* Start with a new DynamicCache"):
                    tiny_base.model(ids[:, 2:], past_key_values=spoilt, **words)
        set_threshold(guard, 1.0)
        assert tiny_base.model(ids, past_key_values=DynamicCache()).logits.isfinite().all()
    assert cache.get_seq_length() == 0  # without adapters it is a new one, not half a one
    new = tiny_base.model(ids, past_key_values=DynamicCache()).logits
    assert torch.equal(tiny_base.model(ids, past_key_values=cache).logits, new)


@torch.no_grad()
def test_the_prompts_end_must_be_known(tiny_base: Base, guard: Adapter) -> None:
    ids = torch.tensor([[11, 90, 40, 77]])
    with attach(tiny_base, intercept=guard) as attachment:
        with pytest.raises(AttachmentError, match="'harm' intercepts at the prompt's end, but prompt_end is not known"):
            tiny_base.model(ids)
        set_threshold(guard, 0.0)
        with attachment.request(prompt_end=[9]):
            tiny_base.model(ids)  # the prompt goes on in a later pass
        with attachment.request(prompt_end=[4]), pytest.raises(BlockedError):
            tiny_base.model(ids, use_cache=False)


def test_a_new_turn_on_a_judged_cache_needs_its_own_request(tiny_base: Base, random_guard) -> None:
    """Its prompt would be let through unjudged."""
    guard = random_guard(tiny_base, layers=(0, 1))
    guard.set_calibration(Calibration(scale=(1.0,), bias=(0.0,), threshold=(1.0,)))
    cache, ids = DynamicCache(), torch.tensor([[11, 90, 40, 11, 90, 77, 30]])
    with torch.no_grad(), attach(tiny_base, intercept=guard) as attachment:
        with attachment.request(prompt_end=[4]):
            tiny_base.model(ids[:, :4], past_key_values=cache)
        tiny_base.model(ids[:, 4:5], past_key_values=cache)
        with pytest.raises(AttachmentError, match="2 tokens follow a prompt that was judged already"):
            tiny_base.model(ids[:, 5:], past_key_values=cache)


def test_what_cannot_intercept_is_refused(tiny_base: Base, tiny_family, random_guard, random_aligner) -> None:
    with pytest.raises(InputError, match=r"'refuse' has role 'align' and cannot intercept; expected a guard"):
        attach(tiny_base, intercept=random_aligner(tiny_base))
    encoder = tiny_family("bert")
    with pytest.raises(UnsupportedError, match="is an encoder: it gives no answer"):
        attach(encoder, intercept=random_guard(encoder))
    with pytest.raises(InputError, match="names must differ"):
        attach(tiny_base, guards=[random_guard(tiny_base)], intercept=random_guard(tiny_base))
    assert tiny_base.attachment is None


def test_hooks_are_gone_after_a_block_and_the_next_pass_works(tiny_base: Base, guard: Adapter) -> None:
    before = count_hooks(tiny_base.model)
    ids, plain = torch.tensor([[11, 90, 40, 77]]), tiny_base.chat(TALKS[0], **PLENTY).text
    set_threshold(guard, 0.0)
    blocked = pytest.raises(BlockedError)
    with blocked, attach(tiny_base, intercept=guard) as attachment, attachment.request(prompt_end=[4]):
        tiny_base.model(ids)
    assert count_hooks(tiny_base.model) == before
    assert tiny_base.attachment is None
    with attach(tiny_base, intercept=guard):
        assert tiny_base.chat(TALKS[0], **PLENTY).finish_reason == "blocked"
        set_threshold(guard, 1.0)
        assert tiny_base.chat(TALKS[0], **PLENTY).text == plain


def test_threads_block_their_own_prompts(tiny_base: Base, guard: Adapter) -> None:
    harmful = halve(tiny_base, guard)
    with attach(tiny_base, guards=[guard]):
        plain = [tiny_base.chat(talk, **PLENTY) for talk in TALKS]
    found: list[list[str]] = [[] for _ in TALKS]

    def ask(row: int) -> None:
        for _ in range(4):
            found[row].append(tiny_base.chat(TALKS[row], **PLENTY).text)

    with attach(tiny_base, intercept=guard):
        threads = [threading.Thread(target=ask, args=(row,)) for row in range(len(TALKS))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for row, texts in enumerate(found):
        assert texts == ["" if harmful[row] else plain[row].text] * 4


def test_an_exception_of_the_guard_is_raised(tiny_base: Base, guard: Adapter) -> None:
    handle = guard.register_forward_hook(lambda *_: 1 / 0)
    with attach(tiny_base, intercept=guard):
        with pytest.raises(ZeroDivisionError):
            tiny_base.chat(TALKS[0])
        handle.remove()
        set_threshold(guard, 1.0)
        assert tiny_base.chat(TALKS[0], **PLENTY).finish_reason == "length"
