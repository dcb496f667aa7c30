"""Answers that a guard stops while they are written, against answers that were written to the end and cut by hand."""

from __future__ import annotations

import functools
import itertools
import math
import operator
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from safeside import Adapter, Base, Message, attach
from safeside.base.answers import cut
from safeside.errors import InputError, UnsupportedError
from safeside.stopping import StopRule
from twin import SAME, run_by_hand

TALKS = [
    [Message("system", "be good"), Message("user", "how can this be?")],
    [Message("user", "the cat")],
    [Message("user", "and then the other cat sat there")],
]
N_NEW = 12
PLENTY = {"max_new_tokens": N_NEW, "min_new_tokens": N_NEW}


@pytest.fixture(scope="module")
def guard(session_base: Base, random_guard: Callable[..., Adapter]) -> Adapter:
    """The first random guard whose scores of the answer set a record late, and that is no monotone ramp."""
    for seed in range(100):
        guard = random_guard(session_base, seed=seed)
        scores = written(session_base, TALKS[0], guard)[1]
        stops = [stop_by_hand(scores, StopRule(threshold, 2)) for threshold in between(scores)[::2]]
        if latest_record(scores) > 3 and len(set(stops)) > 2:
            return guard
    raise AssertionError("no seed gives such scores")


def latest_record(scores: list[float]) -> int:
    """The last token whose score is clearly above all before it."""
    margin = 100 * SAME
    return max(token for token in range(len(scores)) if all(scores[token] > score + margin for score in scores[:token]))


def written(base: Base, talk: list[Message], guard: Adapter) -> tuple[list[int], list[float]]:
    """The base's own answer, and the guard's score of every token of it, computed on the whole text."""
    prompt = list(base.encode(talk).ids)
    output = base.model.generate(torch.tensor([prompt]), do_sample=False, **PLENTY)
    return output[0, len(prompt) :].tolist(), run_by_hand(base, guard, output).scores[0, len(prompt) :, 0].tolist()


def stop_by_hand(scores: list[float], rule: StopRule) -> tuple[int, int] | None:
    """The token that stops, and how many tokens stay."""
    for token in range(rule.n_consecutive - 1, len(scores)):
        first = token - rule.n_consecutive + 1
        if all(score >= rule.threshold for score in scores[first : token + 1]):
            return token, first
    return None


def between(scores: list[float]) -> list[float]:
    """Thresholds between any two neighbouring scores, far from both."""
    rising = sorted(scores)
    return [(low + high) / 2 for low, high in itertools.pairwise(rising) if high - low > 100 * SAME]


@pytest.mark.parametrize("n_consecutive", [1, 2, 3])
def test_answers_stop_where_the_twin_says(tiny_base: Base, guard: Adapter, n_consecutive: int) -> None:
    answer, scores = written(tiny_base, TALKS[0], guard)
    stopped = set()
    with attach(tiny_base, guards=[guard]):
        for threshold in between(scores):
            rule = StopRule(threshold, n_consecutive)
            found = tiny_base.chat(TALKS[0], stop=rule, **PLENTY)
            expected = stop_by_hand(scores, rule)
            if expected is None:
                assert (found.finish_reason, found.stop, found.n_new_tokens) == ("length", None, N_NEW)
                continue
            token, n_kept = expected
            assert found.stop is not None
            assert (found.finish_reason, found.stop.guard) == ("guard", "harm")
            assert (found.stop.token, found.stop.n_kept, found.n_new_tokens) == (token, n_kept, n_kept)
            assert found.stop.score == pytest.approx(min(scores[n_kept : token + 1]), abs=SAME)
            assert found.text == tiny_base.tokenizer.decode(answer[:n_kept], skip_special_tokens=True).strip()
            verdict = found.verdicts[1]
            assert verdict.flagged
            assert verdict.reason.endswith(f"stopped at token {token}")
            assert (verdict.mode, verdict.threshold, verdict.score) == ("stream", rule.threshold, found.stop.score)
            assert found.stop.threshold == rule.threshold <= verdict.score
            stopped.add(token)
    assert len(stopped) > (n_consecutive < 3)  # longer runs are rare


def test_the_last_token_is_scored_too(tiny_base: Base, guard: Adapter) -> None:
    """``generate`` never feeds the last token: an answer that only it makes risky is stopped all the same."""
    _, scores = written(tiny_base, TALKS[0], guard)
    last = latest_record(scores)
    rule = StopRule((scores[last] + max(scores[:last])) / 2, 1)
    with attach(tiny_base, guards=[guard]):
        found = tiny_base.chat(TALKS[0], stop=rule, max_new_tokens=last + 1, min_new_tokens=last + 1)
        shorter = tiny_base.chat(TALKS[0], stop=rule, max_new_tokens=last, min_new_tokens=last)
    assert found.stop is not None
    assert (found.finish_reason, found.stop.token, found.n_new_tokens) == ("guard", last, last)
    assert (shorter.finish_reason, shorter.stop) == ("length", None)


def test_no_token_is_made_after_a_stop(tiny_base: Base, guard: Adapter) -> None:
    """The stopping token is fed in the pass that makes one more; behind it comes only the pass for the last token."""
    _, scores = written(tiny_base, TALKS[0], guard)
    rule = StopRule(between(scores)[-1], 1)
    expected = stop_by_hand(scores, rule)
    assert expected is not None
    passes: list[int] = []
    handle = tiny_base.decoder.register_forward_hook(lambda *_: passes.append(1))
    with attach(tiny_base, guards=[guard]):
        tiny_base.chat(TALKS[0], stop=rule, **PLENTY)
    handle.remove()
    assert len(passes) == 1 + (expected[0] + 1) + 1  # prompt, tokens up to the stop, the one more


@pytest.mark.parametrize("size", [3, 8])
def test_rows_stop_each_by_its_own_scores(tiny_base: Base, guard: Adapter, size: int) -> None:
    talks = (TALKS * 3)[:size]
    strongest = []
    for talk in TALKS:
        scores = written(tiny_base, talk, guard)[1]
        strongest.append(max(map(min, scores, scores[1:])))
    rule = StopRule(between(strongest)[0], 2)  # some answers meet it and some do not
    with attach(tiny_base, guards=[guard]):
        together = tiny_base.chat_batch(talks, stop={"harm": rule}, **PLENTY)
        alone = [tiny_base.chat(talk, stop=rule, **PLENTY) for talk in talks]
    for mine, theirs in zip(together, alone, strict=True):
        assert (mine.text, mine.finish_reason, mine.n_new_tokens) == (
            theirs.text,
            theirs.finish_reason,
            theirs.n_new_tokens,
        )
        assert (mine.stop is None) == (theirs.stop is None)
        if mine.stop is not None and theirs.stop is not None:
            assert replace(mine.stop, score=0.0) == replace(theirs.stop, score=0.0)
    assert {found.finish_reason for found in together} == {"guard", "length"}


def test_a_score_that_is_not_a_number_stops(tiny_base: Base, random_guard: Callable[..., Adapter]) -> None:
    guard = random_guard(tiny_base)
    guard.head.linear.bias.data.fill_(math.nan)
    with attach(tiny_base, guards=[guard]):
        found = tiny_base.chat(TALKS[0], stop=StopRule(1.0, 5), **PLENTY)
    assert found.stop is not None
    assert (found.text, found.finish_reason, found.stop.token) == ("", "guard", 0)
    assert math.isnan(found.stop.score)


def test_a_rule_that_never_fires_changes_nothing(tiny_base: Base, guard: Adapter) -> None:
    with attach(tiny_base, guards=[guard]):
        plain = tiny_base.chat_batch(TALKS, **PLENTY)
        assert tiny_base.chat_batch(TALKS, stop=StopRule(1.0, 1), **PLENTY) == plain
    assert all(found.stop is None for found in plain)


@pytest.mark.parametrize("n_consecutive", [1, 3])
def test_released_tokens_are_those_of_the_text(tiny_base: Base, guard: Adapter, n_consecutive: int) -> None:
    """And a token is released as soon as no run of risky ones can reach it."""
    answer, scores = written(tiny_base, TALKS[0], guard)
    for threshold in [*between(scores)[::3], 1.0]:
        released: list[tuple[int, list[int]]] = []
        rule = StopRule(threshold, n_consecutive)
        with attach(tiny_base, guards=[guard]):
            (found,) = tiny_base.chat_batch(
                TALKS[:1], stop=rule, release=lambda row, ids, told=released: told.append((row, ids)), **PLENTY
            )
        assert functools.reduce(operator.iadd, (ids for _, ids in released), []) == answer[: found.n_new_tokens]
        assert {row for row, _ in released} <= {0}
        assert all(len(ids) <= n_consecutive for _, ids in released)


def test_tokens_are_released_without_an_attachment_too(tiny_base: Base) -> None:
    released: dict[int, list[int]] = {0: [], 1: []}
    found = tiny_base.chat_batch(TALKS[:2], release=lambda row, ids: released[row].extend(ids), **PLENTY)
    for row, completion in enumerate(found):
        text = tiny_base.tokenizer.decode(released[row], skip_special_tokens=True).strip()
        assert (text, len(released[row])) == (completion.text, N_NEW)


def test_the_callers_own_stop_tokens_end_what_is_released(tiny_base: Base, guard: Adapter) -> None:
    """``eos_token_id`` replaces the base's: the text, the rules and what is released end before it."""
    answer, _ = written(tiny_base, TALKS[0], guard)
    place = max(place for place, token in enumerate(answer) if token not in answer[:place])
    assert place > 0
    released: list[int] = []
    with attach(tiny_base, guards=[guard]):
        (found,) = tiny_base.chat_batch(
            TALKS[:1],
            stop=StopRule(1.0, 1),
            max_new_tokens=N_NEW,
            release=lambda row, ids: released.extend(ids),
            eos_token_id=answer[place],
        )
        with pytest.raises(UnsupportedError, match="stopping_criteria"):
            tiny_base.chat(TALKS[0], stop=StopRule(1.0), stopping_criteria=[])
    assert released == answer[:place]
    assert (found.n_new_tokens, found.finish_reason) == (place, "stop")


def test_stop_rules_need_guards(tiny_base: Base, random_aligner: Callable[..., Adapter]) -> None:
    with pytest.raises(InputError, match=r"A stop rule was given but nothing is attached\. Call attach"):
        tiny_base.chat(TALKS[0], stop=StopRule(0.5))
    with attach(tiny_base, [random_aligner(tiny_base)]), pytest.raises(InputError, match="for 0 guards"):
        tiny_base.chat(TALKS[0], stop=StopRule(0.5))


def test_an_answer_is_cut_at_its_first_stop_token() -> None:
    assert cut([5, 6, 2, 7, 2], {2, 9}) == ([5, 6], True)
    assert cut([5, 6], {2}) == ([5, 6], False)
    assert cut([], {2}) == ([], False)
