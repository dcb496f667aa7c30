"""What of an answer may be shown while it is written: the incremental state against looking at everything again."""

from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from safeside.serve.stream import AnswerText, StreamGuard
from safeside.stopping import StopRule, standing_of
from tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
TEXTS = st.text(st.sampled_from("the cat sn€ß🙂\n"), max_size=30)
SCORES = st.lists(st.sampled_from([0.1, 0.4, 0.6, 0.9, math.nan]), max_size=12)


def written(text: str, stop: tuple[str, ...] = (), clear: int = 0) -> tuple[str, AnswerText]:
    """What is shown of ``text``, token by token, the last ``clear`` tokens held back until the end."""
    answer, shown = AnswerText(TOKENIZER, stop), []
    ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    for index, token in enumerate(ids):
        answer.add(token)
        shown.append(answer.show(max(0, index + 1 - clear)))
        assert "".join(shown) == answer.text[: len("".join(shown))], "what was shown is never taken back"
        if answer.is_stopped:
            break
    shown.append(answer.show(min(len(ids), index + 1) if ids else 0, is_last=True))
    return "".join(shown), answer


@given(TEXTS, st.integers(0, 3))
def test_the_pieces_are_the_text(text: str, clear: int) -> None:
    assert written(text, clear=clear)[0] == text


@given(TEXTS, st.lists(st.text(st.sampled_from("the cas"), min_size=1, max_size=4), max_size=3))
def test_a_stop_string_and_what_follows_is_never_shown(text: str, stop: list[str]) -> None:
    """The oracle looks at the whole text after each token."""
    ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    expected = text
    for length in range(1, len(ids) + 1):
        so_far = TOKENIZER.decode(ids[:length])
        places = [so_far.find(one) for one in stop if one in so_far]
        if places:
            expected = so_far[: min(places)]
            break
    shown, answer = written(text, tuple(stop))
    assert shown == expected
    assert answer.is_stopped == any(one in text for one in stop)


def test_half_a_character_waits_and_is_shown_broken_only_at_the_end() -> None:
    answer = AnswerText(TOKENIZER)
    first, *rest = TOKENIZER("🙂", add_special_tokens=False)["input_ids"]
    answer.add(first)
    assert answer.show(1) == ""
    assert answer.show(1, is_last=True) == "\ufffd"
    assert rest


def test_special_tokens_are_not_text() -> None:
    answer = AnswerText(TOKENIZER)
    for token in (TOKENIZER.eos_token_id, *TOKENIZER("cat", add_special_tokens=False)["input_ids"]):
        answer.add(token)
    assert answer.text == "cat"


@given(SCORES, SCORES, st.integers(1, 3), st.integers(1, 3), st.integers(0, 3))
def test_rules_score_by_score_are_the_rules_on_all_scores(
    harm: list[float], hate: list[float], n_harm: int, n_hate: int, window: int
) -> None:
    rules = {"harm": StopRule(0.5, n_harm), "hate": StopRule(0.7, n_hate)}
    guard, length = StreamGuard(rules, window), min(len(harm), len(hate))
    for token in range(length):
        stop = guard.add({"harm": harm[token], "hate": hate[token], "other": 1.0})
        scores = {"harm": torch.tensor(harm[: token + 1]), "hate": torch.tensor(hate[: token + 1])}
        slow = standing_of(rules, scores, token + 1)
        assert guard.n_clear == max(0, min(slow.n_clear, token + 1 - window))
        assert (stop is None) == (slow.stop is None)
        if stop is not None:
            assert slow.stop is not None
            assert (stop.guard, stop.token, stop.n_kept) == (slow.stop.guard, slow.stop.token, guard.n_clear)
            break


def test_nothing_is_held_without_a_rule() -> None:
    guard = StreamGuard({})
    assert guard.add({"harm": 0.9}) is None
    assert (guard.n_clear, guard.leak_bound) == (1, 0)


def test_the_leak_bound_is_the_slowest_rules() -> None:
    assert StreamGuard({"a": StopRule(0.5, 3), "b": StopRule(0.5, 1)}).leak_bound == 3
