"""State lives with the request: threads, interleaved, cropped, copied and re-used caches."""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from safeside import Adapter, Base, attach, fixed, ramp, step
from safeside.attach import Attachment
from safeside.errors import AttachmentError, UnsupportedError
from safeside.request import Request, RequestLayer, history_of, request_layer
from twin import SAME, close

TEXT = torch.tensor([[11, 90, 40, 77, 200, 9, 131, 50, 23, 64, 118, 35]])
OTHER = torch.tensor([[70, 12, 150, 33, 99, 70, 12, 8, 201, 17, 45, 88]])
GREEDY = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}


@pytest.fixture(scope="module")
def aligner(session_base: Base, random_aligner) -> Adapter:
    return random_aligner(session_base)


@pytest.fixture(scope="module")
def guard(session_base: Base, random_guard) -> Adapter:
    return random_guard(session_base, readout="attention")


@pytest.fixture
def attachment(tiny_base: Base, aligner: Adapter, guard: Adapter) -> Attachment:
    return attach(tiny_base, [aligner], [guard], strength=1.0)


@torch.no_grad()
def run(attachment: Attachment, ids: Tensor, cache: DynamicCache | None = None, **options: object) -> Tensor:
    return attachment.base.model(ids, past_key_values=cache, **options).logits


def steps(attachment: Attachment, ids: Tensor, cache: DynamicCache, chunks: Sequence[int]) -> Tensor:
    return torch.cat([run(attachment, part, cache) for part in ids.split(list(chunks), 1)], 1)


def test_threads_with_their_own_settings_get_what_each_gets_alone(attachment: Attachment) -> None:
    settings = [(TEXT, 0.0), (TEXT, 1.0), (OTHER, ramp("harm", 0.1, 0.9, ceiling=2.0)), (OTHER, 0.4)]

    def answer(ids: Tensor, strength: object) -> list[int]:
        with attachment.request(strength=strength, prompt_end=[ids.shape[1]]):
            return attachment.base.model.generate(ids, **GREEDY)[0].tolist()

    alone = [answer(*setting) for setting in settings]
    found: list[list[int] | None] = [None] * len(settings)
    ready = threading.Barrier(len(settings))

    def work(index: int) -> None:
        ready.wait()
        found[index] = answer(*settings[index])

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(settings))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == alone
    assert len({tuple(ids) for ids in alone}) == len(alone)


def test_interleaved_caches_never_meet(attachment: Attachment) -> None:
    """Each goes on at the strength it began with, whichever ran last."""
    settings = [(TEXT, 0.3), (OTHER, 1.2), (OTHER, ramp("harm", 0.2, 0.8, ceiling=2.0))]
    caches, found, alone = [DynamicCache() for _ in settings], [[] for _ in settings], []
    for index, (ids, strength) in enumerate(settings):
        with attachment.request(strength=strength, prompt_end=[4]):
            alone.append(run(attachment, ids, use_cache=False))
            found[index].append(run(attachment, ids[:, :5], caches[index]))
    for start in range(5, 12):
        for index, (ids, _) in enumerate(settings):
            found[index].append(run(attachment, ids[:, start : start + 1], caches[index]))
    for index, expected in enumerate(alone):
        close(torch.cat(found[index], 1), expected)


def test_a_cache_keeps_the_settings_it_began_with(attachment: Attachment) -> None:
    """Outside the ``with`` block a started cache goes on as it began; another one takes the attachment's settings."""
    cache = DynamicCache()
    with attachment.request(strength=0.3, prompt_end=[4]):
        expected = run(attachment, TEXT, use_cache=False)
        found = [run(attachment, TEXT[:, :8], cache)]
    found.append(run(attachment, TEXT[:, 8:], cache))
    close(torch.cat(found, 1), expected)
    assert request_layer(cache).request.prompt_end == (4,)
    with attachment.request(strength=0.9):
        run(attachment, OTHER[:, :1], cache)
    assert request_layer(cache).request.prompt_end == (4,)
    assert attachment.verdicts(cache)[0][0].mode == "prompt"


def test_a_gate_does_not_hold_for_a_turn_that_it_did_not_judge(attachment: Attachment) -> None:
    """Tokens of an answer may follow one by one; several at once are a new turn and need their own request."""
    cache = DynamicCache()
    with attachment.request(strength=step("harm", 1.0), prompt_end=[4]):
        run(attachment, TEXT[:, :6], cache)
    run(attachment, TEXT[:, 6:7], cache)
    with pytest.raises(
        AttachmentError, match="2 tokens follow a prompt that was judged already and set the strength of refuse"
    ):
        run(attachment, TEXT[:, 7:9], cache)


@pytest.mark.parametrize(
    "strength", [1.0, step("harm", 0.5, low=0.3, high=1.5), ramp("harm", 0.2, 0.8, latched=False)], ids=str
)
def test_a_cropped_cache_goes_on_like_a_fresh_one(attachment: Attachment, strength: object) -> None:
    for keep in (9, 4, 1):
        with attachment.request(strength=strength, prompt_end=[6]):
            cache = DynamicCache()
            run(attachment, TEXT, cache)
            cache.crop(keep - TEXT.shape[1])
            mended = torch.cat([TEXT[:, :keep], OTHER[:, keep:]], 1)
            found = steps(attachment, mended[:, keep:], cache, [1, 11 - keep])
            close(found, run(attachment, mended)[:, keep:])
            close(history_of(cache).scores[0], attachment.record.scores["harm"][0])


@pytest.mark.parametrize(
    "strength", [1.0, step("harm", 0.5, low=0.3, high=1.5), ramp("harm", 0.2, 0.8, latched=False)], ids=str
)
def test_a_second_turn_on_a_cache_is_a_fresh_run_over_everything(attachment: Attachment, strength: object) -> None:
    """Prompt of 5, answer to 8, second prompt to 16, answer to 20: the new prompt's end decides anew."""
    whole = torch.cat([TEXT, OTHER], 1)[:, :20]
    cache = DynamicCache()
    with attachment.request(strength=strength, prompt_end=[5]):
        steps(attachment, whole[:, :8], cache, [5, 1, 1, 1])
    with attachment.request(strength=strength, prompt_end=[16]):
        found = steps(attachment, whole[:, 8:], cache, [3, 5, 1, 1, 1, 1])
        close(found, run(attachment, whole)[:, 8:])
        fresh = DynamicCache()
        run(attachment, whole, fresh)
    for mine, theirs in zip(attachment.verdicts(cache)[0], attachment.verdicts(fresh)[0], strict=True):
        assert mine.score == pytest.approx(theirs.score, abs=SAME)
        assert (mine.mode, mine.reason) == (theirs.mode, theirs.reason)


def test_a_copied_cache_goes_its_own_way(attachment: Attachment) -> None:
    cache = DynamicCache()
    with attachment.request(strength=ramp("harm", 0.2, 0.8), prompt_end=[5]):
        run(attachment, TEXT[:, :6], cache)
        twin = copy.deepcopy(cache)
        assert request_layer(twin) is not request_layer(cache)
        assert request_layer(twin).owner is attachment
        branch = torch.cat([TEXT[:, :6], OTHER[:, 6:]], 1)
        found = [run(attachment, TEXT[:, 6:], cache), run(attachment, branch[:, 6:], twin)]
        close(found[0], run(attachment, TEXT)[:, 6:])
        close(found[1], run(attachment, branch)[:, 6:])
    assert history_of(cache).positions.shape == history_of(twin).positions.shape == (1, 12)


def test_a_reset_cache_is_a_new_one(attachment: Attachment) -> None:
    cache = DynamicCache(config=attachment.base.model.config)
    with attachment.request(strength=step("harm", 1.0, low=0.0, high=1.0), prompt_end=[3]):
        run(attachment, TEXT[:, :6], cache)
    assert request_layer(cache).skipped == {"refuse"}
    cache.reset()
    with attachment.request(strength=1.0):
        close(run(attachment, TEXT, cache), run(attachment, TEXT))


def test_a_cache_cropped_to_nothing_is_a_new_one(attachment: Attachment) -> None:
    cache = DynamicCache()
    with attachment.request(strength=step("harm", 1.0), prompt_end=[3]):
        run(attachment, TEXT[:, :6], cache)
    cache.crop(-6)
    with attachment.request(strength=1.0):
        close(run(attachment, TEXT, cache), run(attachment, TEXT))


def test_rows_of_a_cache_can_be_repeated_and_selected(attachment: Attachment) -> None:
    ids = torch.cat([TEXT, OTHER])
    with attachment.request(strength=[0.0, 1.0], prompt_end=[4, 7]):
        expected = run(attachment, ids)
        cache = DynamicCache()
        run(attachment, ids[:, :8], cache)
    cache.batch_repeat_interleave(2)
    close(run(attachment, ids[:, 8:].repeat_interleave(2, 0), cache), expected[:, 8:].repeat_interleave(2, 0))
    assert request_layer(cache).request.prompt_end == (4, 4, 7, 7)
    for chosen in (torch.tensor([3, 0]), torch.tensor([False, True, True, False])):
        twin = copy.deepcopy(cache)
        twin.batch_select_indices(chosen)
        rows = torch.arange(4)[chosen].tolist()
        assert request_layer(twin).request.prompt_end == tuple((4, 4, 7, 7)[row] for row in rows)
        assert request_layer(twin).request.policies["refuse"] == fixed([(0.0, 0.0, 1.0, 1.0)[row] for row in rows])


def test_a_cache_of_another_attachment_is_refused(attachment: Attachment, guard: Adapter) -> None:
    cache = DynamicCache()
    run(attachment, TEXT[:, :4], cache)
    attachment.detach()
    with attach(attachment.base, guards=[guard]) as other, pytest.raises(AttachmentError, match="another attachment"):
        run(other, TEXT[:, 4:], cache)


def test_a_cache_with_tokens_the_adapters_never_saw_is_refused(attachment: Attachment, tiny_base: Base) -> None:
    attachment.detach()
    before = DynamicCache()
    tiny_base.model(TEXT[:, :4], past_key_values=before)
    with attach(tiny_base, list(attachment.aligners.values())) as again:
        with pytest.raises(AttachmentError, match=r"holds 4 tokens but the adapters have seen 0.* new DynamicCache"):
            run(again, TEXT[:, 4:], before)
        with pytest.raises(AttachmentError, match="This cache was not filled under an attachment"):
            again.strengths(before)
        with pytest.raises(AttachmentError, match="Verdicts need the prompt's end"):
            again.verdicts(before)


def test_a_token_that_is_not_there_is_an_error(attachment: Attachment) -> None:
    cache = DynamicCache()
    with attachment.request(prompt_end=[7]):
        run(attachment, TEXT[:, :4], cache)
    with pytest.raises(AttachmentError, match="no token 6 in row 0; it was cropped or not run yet"):
        attachment.verdicts(cache)


def test_beams_may_not_trade_gates() -> None:
    layer = RequestLayer(None, Request({"refuse": ramp("harm", 0.2, 0.8, latched=False)}))
    with pytest.raises(UnsupportedError, match="Beam search with a strength that a guard sets is refused"):
        layer.reorder_cache(torch.tensor([1, 0]))
    layer = RequestLayer(None, Request({"refuse": fixed([0.1, 0.2])}, prompt_end=(3, 4)))
    layer.reorder_cache(torch.tensor([1, 1]))
    assert layer.request == Request({"refuse": fixed([0.2, 0.2])}, prompt_end=(4, 4))
