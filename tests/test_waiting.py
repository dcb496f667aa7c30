"""Guards that judge an answer's tokens in groups give what guards give that judge each by itself, only later."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache

from safeside import Adapter, Base, Message, attach, ramp, step
from safeside.attach import Attachment
from safeside.base.taps import Tape
from safeside.errors import AttachmentError, BlockedError, InputError
from safeside.request import history_of, request_layer
from safeside.stopping import StopRule
from safeside.types import Completion
from safeside.waiting import Waiting
from twin import SAME, close, run_by_hand

TALKS = [
    [Message("system", "be good"), Message("user", "how can this be?")],
    [Message("user", "the cat")],
    [Message("user", "and then the other cat sat there")],
]
N_NEW = 13
PLENTY = {"max_new_tokens": N_NEW, "min_new_tokens": N_NEW}
KINDS = [
    {"kind": "lst"},
    {"kind": "lst", "readout": "attention"},
    {"kind": "lst_plus"},
    {"kind": "rtb"},
    {"kind": "plr"},
]


@pytest.fixture(scope="module")
def guard(session_base: Base, random_guard: Callable[..., Adapter]) -> Adapter:
    return random_guard(session_base, readout="attention")


def rounded(found: Completion) -> Completion:
    """Without what differs in its last bits: scores themselves."""
    verdicts = tuple(replace(verdict, score=0.0, probability=0.0) for verdict in found.verdicts)
    stop = replace(found.stop, score=0.0) if found.stop is not None else None
    return replace(found, verdicts=verdicts, stop=stop, traces=())


def same_answers(found: list[Completion], expected: list[Completion]) -> None:
    assert [rounded(one) for one in found] == [rounded(one) for one in expected]
    for one, other in zip(found, expected, strict=True):
        pairs = zip(one.verdicts, other.verdicts, strict=True)
        assert all(mine.score == pytest.approx(theirs.score, abs=SAME) for mine, theirs in pairs)


def middle_rules(base: Base, guard: Adapter) -> list[StopRule]:
    """Rules of which some stop some answers, from scores that are far from each other."""
    with attach(base, guards=[guard]) as attachment:
        cache = DynamicCache()
        ids = torch.tensor([base.encode(TALKS[0]).ids])
        with attachment.request(prompt_end=[ids.shape[1]]):
            base.model.generate(ids, past_key_values=cache, do_sample=False, **PLENTY)
        scores = sorted(set(history_of(cache).answer(0, ids.shape[1], N_NEW)[:, 0].tolist()))
    gaps = [(low + high) / 2 for low, high in itertools.pairwise(scores) if high - low > 100 * SAME]
    return [StopRule(threshold, n) for threshold in gaps[::3] for n in (1, 3)]


@pytest.mark.parametrize("options", KINDS, ids=lambda options: "-".join(options.values()))
@pytest.mark.parametrize("judge_every", [2, 4, 50])
def test_answers_are_those_of_a_guard_that_judges_every_token(
    tiny_base: Base, random_guard: Callable[..., Adapter], options: dict[str, str], judge_every: int
) -> None:
    guard = random_guard(tiny_base, **options)
    rules = [None, *middle_rules(tiny_base, guard)]
    reasons = set()
    for rule in rules:
        with attach(tiny_base, guards=[guard]):
            expected = tiny_base.chat_batch(TALKS, stop=rule, **PLENTY)
        with attach(tiny_base, guards=[guard], judge_every=judge_every):
            found = tiny_base.chat_batch(TALKS, stop=rule, **PLENTY)
        same_answers(found, expected)
        reasons |= {one.finish_reason for one in expected}
    assert reasons == {"length", "guard"}


def test_rows_that_end_early_are_judged_to_their_ends(tiny_base: Base, guard: Adapter) -> None:
    """At a stop token, which the other rows do not have there."""
    prompt = torch.tensor([tiny_base.encode(TALKS[0]).ids])
    answer = tiny_base.model.generate(prompt, do_sample=False, **PLENTY)[0, prompt.shape[1] :].tolist()
    lengths = set()
    for token in dict.fromkeys(answer):
        options = {"max_new_tokens": N_NEW, "eos_token_id": token}
        with attach(tiny_base, guards=[guard]):
            expected = tiny_base.chat_batch(TALKS, **options)
        with attach(tiny_base, guards=[guard], judge_every=4):
            same_answers(tiny_base.chat_batch(TALKS, **options), expected)
        lengths |= {one.n_new_tokens for one in expected}
    assert len(lengths) > 3


@pytest.mark.parametrize("judge_every", [1, 3, 8])
def test_a_guard_runs_once_a_group(tiny_base: Base, guard: Adapter, judge_every: int) -> None:
    """The prompt by itself, then groups, and what is left at the end."""
    lengths: list[int] = []
    handle = guard.register_forward_hook(lambda module, args, output: lengths.append(output.scores.shape[1]))
    with attach(tiny_base, guards=[guard], judge_every=judge_every):
        tiny_base.chat(TALKS[0], **PLENTY)
    handle.remove()
    n_groups, rest = divmod(N_NEW, judge_every)
    assert lengths[1:] == [judge_every] * n_groups + [rest] * (rest > 0)


@pytest.mark.parametrize("judge_every", [2, 5])
def test_nothing_that_waits_is_released(tiny_base: Base, guard: Adapter, judge_every: int) -> None:
    """What was shown is what stays, and while a rule is in force no token goes out before its group was judged."""
    n_stopped = 0
    for rule in middle_rules(tiny_base, guard):
        released: list[list[int]] = []
        with attach(tiny_base, guards=[guard], judge_every=judge_every):
            (found,) = tiny_base.chat_batch(
                TALKS[:1], stop=rule, release=lambda row, ids, told=released: told.append(ids), **PLENTY
            )
        shown = [token for ids in released for token in ids]
        text = tiny_base.tokenizer.decode(shown, skip_special_tokens=True).strip()
        assert (text, len(shown)) == (found.text, found.n_new_tokens)
        for n_made in range(1, len(released)):  # at a token's making all but itself were fed
            n_judged = (n_made - 1) // judge_every * judge_every
            assert sum(map(len, released[:n_made])) <= n_judged
        n_stopped += found.stop is not None
    assert n_stopped


def test_a_stop_costs_at_most_a_group_more(tiny_base: Base, guard: Adapter) -> None:
    rules = middle_rules(tiny_base, guard)
    passes: list[int] = []
    handle = tiny_base.decoder.register_forward_hook(lambda *_: passes.append(1))
    stopped = 0
    for rule in rules:
        counts = []
        for judge_every in (1, 4):
            passes.clear()
            with attach(tiny_base, guards=[guard], judge_every=judge_every):
                found = tiny_base.chat(TALKS[0], stop=rule, **PLENTY)
            counts.append(len(passes))
        stopped += found.stop is not None
        assert counts[0] <= counts[1] < counts[0] + 4
    handle.remove()
    assert stopped


def test_latched_strengths_do_not_wait_and_others_let_nothing_wait(
    tiny_base: Base, guard: Adapter, random_aligner: Callable[..., Adapter]
) -> None:
    aligner = random_aligner(tiny_base)
    lengths: list[int] = []
    handle = guard.register_forward_hook(lambda module, args, output: lengths.append(output.scores.shape[1]))
    for latched, longest in ((True, 4), (False, 1)):
        strength = step("harm", 0.5, latched=latched)
        with attach(tiny_base, [aligner], [guard], strength):
            expected = tiny_base.chat_batch(TALKS, **PLENTY)
        lengths.clear()
        with attach(tiny_base, [aligner], [guard], strength, judge_every=4):
            found = tiny_base.chat_batch(TALKS, **PLENTY)
        assert max(lengths[1:]) == longest
        same_answers(found, expected)
        assert [one.strength for one in found] == [one.strength for one in expected]
        assert [len(trace.scores) for one in found for trace in one.traces] == [N_NEW] * len(TALKS)
    handle.remove()


def test_prompts_are_intercepted_as_ever(tiny_base: Base, random_guard: Callable[..., Adapter]) -> None:
    guard = random_guard(tiny_base, layers=(0, 1))
    with attach(tiny_base, guards=[guard]):
        scores = sorted(one.verdicts[0].score for one in tiny_base.chat_batch(TALKS, **PLENTY))
    assert scores[0] < 0.5 < scores[-1], "one prompt is blocked and one is not"
    with attach(tiny_base, intercept=guard):
        expected = tiny_base.chat_batch(TALKS, **PLENTY)
    with attach(tiny_base, intercept=guard, judge_every=4):
        same_answers(tiny_base.chat_batch(TALKS, **PLENTY), expected)
    assert {one.finish_reason for one in expected} == {"blocked", "length"}


@torch.no_grad()
def feed(attachment: Attachment, ids: Tensor, cache: DynamicCache) -> None:
    attachment.base.decoder(input_ids=ids, past_key_values=cache, use_cache=True)


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("feed"), st.sampled_from([1, 1, 1, 1, 3])),
        st.tuples(st.just("crop"), st.integers(1, 5)),
        st.tuples(st.just("select"), st.lists(st.integers(0, 1), min_size=2, max_size=2)),
        st.tuples(st.just("reorder"), st.lists(st.integers(0, 1), min_size=2, max_size=2)),
        st.tuples(st.just("repeat"), st.none()),
        st.tuples(st.just("reset"), st.none()),
        st.tuples(st.just("copy"), st.none()),
        st.tuples(st.just("judge"), st.none()),
    ),
    max_size=14,
)


@settings(max_examples=60, deadline=None)
@given(operations=OPERATIONS, judge_every=st.sampled_from([2, 3, 5]))
def test_whatever_is_done_to_a_cache_its_scores_are_those_of_its_text(
    session_base: Base, guard: Adapter, operations: list[tuple[str, object]], judge_every: int
) -> None:
    """Against the text run whole by hand.  Both rows begin alike in length; any order of steps may follow."""
    generator = torch.Generator().manual_seed(len(operations))
    ids, cache = torch.randint(10, 200, (2, 4), generator=generator), DynamicCache()
    attachment = attach(session_base, guards=[guard], judge_every=judge_every)
    try:
        feed(attachment, ids, cache)
        for name, value in operations:
            if name == "feed":
                new = torch.randint(10, 200, (len(ids), value), generator=generator)
                feed(attachment, new, cache)
                ids = torch.cat([ids, new], 1)
            elif name == "crop":
                n_gone = min(value, ids.shape[1] - 1)
                cache.crop(-n_gone)
                ids = ids[:, : ids.shape[1] - n_gone]
            elif name == "select":
                cache.batch_select_indices(torch.tensor(value))
                ids = ids[value]
            elif name == "reorder":
                cache.reorder_cache(torch.tensor(value))
                ids = ids[value]
            elif name == "repeat":
                cache.batch_repeat_interleave(2)
                cache.batch_select_indices(torch.tensor([0, len(ids)]))  # a row of each
            elif name == "reset":
                cache.reset()
                feed(attachment, ids, cache)
            elif name == "copy":
                left, cache = cache, copy.deepcopy(cache)
                feed(attachment, ids[:, :1], left)  # what happens to the one is nothing to the other
            else:
                attachment.judge(cache)
        layer = request_layer(cache)
        assert layer is not None
        assert layer.get_seq_length() == ids.shape[1]
        assert len(layer.waiting) < judge_every
        assert history_of(cache).scores.shape[1] == ids.shape[1] - len(layer.waiting)
        attachment.judge(cache)
        found = history_of(cache).scores
    finally:
        attachment.detach()
    close(found, run_by_hand(session_base, guard, ids).scores)


def test_a_cache_is_widened_with_what_waits(tiny_base: Base, guard: Adapter) -> None:
    ids, cache = torch.tensor([[11, 90, 40, 77, 200, 9], [70, 12, 150, 33, 99, 8]]), DynamicCache()
    with attach(tiny_base, guards=[guard], judge_every=4) as attachment:
        for part in ids.split([4, 1, 1], 1):
            feed(attachment, part, cache)
        cache.batch_repeat_interleave(2)
        attachment.judge(cache)
        assert attachment.judge(cache) == {}, "nothing waits any more"
        found = history_of(cache).scores
    close(found, run_by_hand(tiny_base, guard, ids).scores.repeat_interleave(2, 0))


def test_a_reset_cache_has_nothing_waiting(tiny_base: Base, guard: Adapter) -> None:
    ids, cache = torch.tensor([[11, 90, 40, 77]]), DynamicCache()
    with attach(tiny_base, guards=[guard], judge_every=4) as attachment:
        for part in ids.split([3, 1], 1):
            feed(attachment, part, cache)
        cache.reset()
        feed(attachment, ids, cache)
        found = history_of(cache).scores
    close(found, run_by_hand(tiny_base, guard, ids).scores)


def test_a_prompt_that_comes_token_by_token_does_not_wait(tiny_base: Base, guard: Adapter) -> None:
    """Its end decides: every token up to it is judged in its own pass."""
    ids, cache = torch.tensor([[11, 90, 40, 77, 200, 9]]), DynamicCache()
    judged = []
    with (
        attach(tiny_base, guards=[guard], judge_every=4) as attachment,
        attachment.request(prompt_end=[4]),
    ):
        for part in ids.split(1, 1):
            feed(attachment, part, cache)
            judged.append(history_of(cache).scores.shape[1])
    assert judged == [1, 2, 3, 4, 4, 4]


def test_a_request_can_judge_each_token_where_the_attachment_does_not(tiny_base: Base, guard: Adapter) -> None:
    ids, cache = torch.tensor([[11, 90, 40, 77, 200, 9]]), DynamicCache()
    with attach(tiny_base, guards=[guard], judge_every=4) as attachment:
        for part in ids[:, :5].split([3, 1, 1], 1):
            feed(attachment, part, cache)
        assert attachment.record.scores == {}
        with attachment.request(judge_every=1):
            feed(attachment, ids[:, 5:], cache)
        assert attachment.record.scores["harm"].shape[1] == 1
        found = history_of(cache).scores
    close(found, run_by_hand(tiny_base, guard, ids).scores)


def test_verdicts_judge_what_waits_first(tiny_base: Base, guard: Adapter) -> None:
    ids, cache = torch.tensor([[11, 90, 40, 77, 200, 9]]), DynamicCache()
    with attach(tiny_base, guards=[guard], judge_every=8) as attachment, attachment.request(prompt_end=[3]):
        for part in ids.split([3, 1, 1, 1], 1):
            feed(attachment, part, cache)
        _, answer = attachment.verdicts(cache)[0]
    assert answer.score == pytest.approx(float(run_by_hand(tiny_base, guard, ids).scores[0, -1, 0]), abs=SAME)


def test_a_group_with_a_score_that_is_not_a_number_is_flagged(
    tiny_base: Base, random_guard: Callable[..., Adapter]
) -> None:
    guard = random_guard(tiny_base)
    guard.head.linear.bias.data.fill_(math.nan)
    with attach(tiny_base, guards=[guard], judge_every=4):
        found = tiny_base.chat(TALKS[0], stop=StopRule(1.0, 5), **PLENTY)
    assert found.stop is not None
    assert (found.text, found.finish_reason, found.stop.token) == ("", "guard", 0)
    assert found.verdicts[-1].flagged


@pytest.mark.parametrize("judge_every", [0, -1, 2.5, "8", None, True])
def test_a_group_is_a_number_of_tokens(tiny_base: Base, guard: Adapter, judge_every: object) -> None:
    with pytest.raises(InputError, match=r"judge_every is a number of tokens, 1 or more; got"):
        attach(tiny_base, guards=[guard], judge_every=judge_every)
    assert tiny_base.attachment is None


def test_what_waits_forgets_no_more_than_it_holds() -> None:
    keep = torch.ones(1, 3, dtype=torch.bool)
    waiting = Waiting()
    for _ in range(3):
        waiting.add({"harm": Tape(keep, 1)})
    waiting.drop(0)
    assert len(waiting) == 3
    waiting.drop(2)
    assert len(waiting) == 1
    waiting.drop(9)
    assert len(waiting) == 0


# ---- what may not go wrong while tokens wait -------------------------------------------------------------------------

IDS = torch.tensor([[11, 90, 40, 77, 200, 9, 33, 21, 60, 71]])


def by_hand(base: Base, guard: Adapter, n_tokens: int) -> list[float]:
    scores: list[float] = run_by_hand(base, guard, IDS[:, :n_tokens]).scores[0, :, 0].tolist()
    return scores


@pytest.mark.parametrize("n_new", [3, 13])
def test_without_a_guard_nothing_waits(tiny_base: Base, random_aligner: Callable[..., Adapter], n_new: int) -> None:
    options = {"max_new_tokens": n_new, "min_new_tokens": n_new}
    with attach(tiny_base, [random_aligner(tiny_base)], strength=0.7):
        expected = tiny_base.chat_batch(TALKS, **options)
    with attach(tiny_base, [random_aligner(tiny_base)], strength=0.7, judge_every=4):
        assert tiny_base.chat_batch(TALKS, **options) == expected


@pytest.mark.parametrize(("n_before", "n_after"), [(40, 10), (20, 40)])
@pytest.mark.parametrize("width", [32, 64])
def test_rows_leave_and_come_among_few_and_many(
    tiny_base: Base, random_guard: Callable[..., Adapter], n_before: int, n_after: int, width: int
) -> None:
    """Taps are read otherwise where a pass has few tokens; a group is read as its first token was."""
    guard, cache = random_guard(tiny_base, width=width), DynamicCache()
    with attach(tiny_base, guards=[guard], judge_every=4) as attachment:
        for part in IDS[:, :5].expand(n_before, -1).split([4, 1], 1):
            feed(attachment, part, cache)
        cache.batch_select_indices(torch.arange(n_after) % n_before)
        feed(attachment, IDS[:, 5:6].expand(n_after, -1), cache)
        attachment.judge(cache)
        found = history_of(cache).scores
    close(found, run_by_hand(tiny_base, guard, IDS[:, :6]).scores.expand_as(found))


@pytest.mark.parametrize("judge_every", [1, 4])
def test_a_new_prompt_that_comes_token_by_token_is_judged_at_its_end(
    tiny_base: Base, random_guard: Callable[..., Adapter], random_aligner: Callable[..., Adapter], judge_every: int
) -> None:
    guard, cache = random_guard(tiny_base), DynamicCache()
    strength = ramp("harm", 0.0, 1.0)
    with attach(tiny_base, [random_aligner(tiny_base)], [guard], strength, judge_every=judge_every) as attachment:
        with attachment.request(prompt_end=[4]):
            for part in IDS[:, :5].split([4, 1], 1):
                feed(attachment, part, cache)
        with attachment.request(prompt_end=[6]):
            feed(attachment, IDS[:, 5:6], cache)
            found = [float(attachment.record.strengths["refuse"][0, -1])]
            feed(attachment, IDS[:, 6:7], cache)
            found.append(float(attachment.record.strengths["refuse"][0, -1]))
    assert found == pytest.approx([by_hand(tiny_base, guard, 6)[-1]] * 2, abs=SAME)


@pytest.mark.parametrize("judge_every", [1, 4])
def test_an_intercepting_guard_sees_a_new_prompt_of_single_tokens(
    tiny_base: Base, random_guard: Callable[..., Adapter], judge_every: int
) -> None:
    guard, cache = random_guard(tiny_base, layers=(0, 1)), DynamicCache()
    guard.head.linear.bias.data.fill_(-50.0)
    with attach(tiny_base, intercept=guard, judge_every=judge_every) as attachment:
        with attachment.request(prompt_end=[4]):
            for part in IDS[:, :5].split([4, 1], 1):
                feed(attachment, part, cache)
        guard.head.linear.bias.data.fill_(50.0)
        with attachment.request(prompt_end=[7]):
            feed(attachment, IDS[:, 5:6], cache)
            with pytest.raises(BlockedError):
                feed(attachment, IDS[:, 6:7], cache)


@pytest.mark.parametrize("judge_every", [1, 4])
def test_a_prompt_whose_end_is_told_late_sets_the_strength(
    tiny_base: Base, random_guard: Callable[..., Adapter], random_aligner: Callable[..., Adapter], judge_every: int
) -> None:
    guard, cache = random_guard(tiny_base), DynamicCache()
    with attach(tiny_base, [random_aligner(tiny_base)], [guard], 0.3, judge_every=judge_every) as attachment:
        for part in IDS[:, :4].split([3, 1], 1):
            feed(attachment, part, cache)
        with attachment.request(prompt_end=[4], strength=ramp("harm", 0.0, 1.0)):
            feed(attachment, IDS[:, 4:5], cache)
            found = float(attachment.record.strengths["refuse"][0, -1])
    assert found == pytest.approx(by_hand(tiny_base, guard, 4)[-1], abs=SAME)


@pytest.mark.parametrize("kind", ["plr", "lst"])
@pytest.mark.parametrize("judge_every", [1, 4])
def test_a_pass_that_fails_leaves_what_was_before(
    tiny_base: Base,
    random_guard: Callable[..., Adapter],
    random_aligner: Callable[..., Adapter],
    kind: str,
    judge_every: int,
) -> None:
    guard, cache = random_guard(tiny_base, kind=kind), DynamicCache()
    off = step("harm", 1.0, 0.0, 1.0)
    with attach(tiny_base, [random_aligner(tiny_base)], [guard], off, judge_every=judge_every) as attachment:
        with attachment.request(prompt_end=[4]):
            for part in IDS[:, :6].split([4, 1, 1], 1):
                feed(attachment, part, cache)
        with attachment.request(prompt_end=[4], strength=1.0), pytest.raises(AttachmentError, match="off for good"):
            feed(attachment, IDS[:, 6:7], cache)
        attachment.verdicts(cache)
        found = history_of(cache).scores[0, :, 0].tolist()
    assert found == pytest.approx(by_hand(tiny_base, guard, 6), abs=SAME)


def test_what_waits_is_judged_by_its_own_attachment_alone(
    tiny_base: Base, random_guard: Callable[..., Adapter]
) -> None:
    cache = DynamicCache()
    with attach(tiny_base, guards=[random_guard(tiny_base)], judge_every=8) as one, one.request(prompt_end=[4]):
        for part in IDS[:, :6].split([4, 1, 1], 1):
            feed(one, part, cache)
    with (
        attach(tiny_base, guards=[random_guard(tiny_base, seed=9)], judge_every=8) as other,
        pytest.raises(AttachmentError, match="belongs to another attachment"),
    ):
        other.verdicts(cache)


def test_a_guard_that_fails_on_what_waited_ends_the_cache(
    tiny_base: Base, random_guard: Callable[..., Adapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    guard, cache = random_guard(tiny_base), DynamicCache()
    told = r"A guard failed on tokens of this cache that had waited for it\. Start with a new DynamicCache\(\)\."
    with attach(tiny_base, guards=[guard], judge_every=8) as attachment:
        for part in IDS[:, :6].split([4, 1, 1], 1):
            feed(attachment, part, cache)
        with monkeypatch.context() as patch:
            patch.setattr(guard.trunk, "forward", lambda *_: 1 // 0)
            with pytest.raises(ZeroDivisionError):
                attachment.judge(cache)
        with pytest.raises(AttachmentError, match=told):
            feed(attachment, IDS[:, 6:7], cache)
        assert not torch.isfinite(history_of(cache).scores[:, 4:]).any(), "unjudged is never a score"


def test_standings_are_of_the_whole_answer(tiny_base: Base, guard: Adapter) -> None:
    prompt = torch.tensor([tiny_base.encode(TALKS[0]).ids])
    found = []
    for judge_every in (1, 50):
        cache = DynamicCache()
        with (
            attach(tiny_base, guards=[guard], judge_every=judge_every) as attachment,
            attachment.request(prompt_end=[prompt.shape[1]], stop=StopRule(0.05, 1)),
        ):
            tiny_base.model.generate(prompt, past_key_values=cache, do_sample=False, **PLENTY)
            (standing,) = attachment.standings(cache, [N_NEW])
        assert standing.stop is not None
        found.append((standing.n_clear, standing.stop.token, standing.stop.n_kept))
    assert found[0] == found[1]


def test_a_failure_to_read_is_a_failure_of_the_group() -> None:
    keep, broken = torch.ones(2, 5, dtype=torch.bool), "ValueError"
    tapes = [Tape(keep, 1, hidden={0: torch.ones(2, 1, 4)}) for _ in range(3)]
    assert Tape.joined(tapes, keep).hidden[0].shape == (2, 3, 4)
    tapes[1].failure = broken
    assert Tape.joined(tapes, keep).failure == broken
    assert tapes[1].at_rows([1]).failure == broken
