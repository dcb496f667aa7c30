"""Windows: each fits the context, and together they show every character of the text."""

from __future__ import annotations

import random
import string
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from safeside import Base, Message
from safeside.errors import InputError
from safeside.guards.windows import windows
from tiny import N_POSITIONS, SPECIAL
from tokenizers_for_tests import KINDS, shared_tokenizer

LONG = " ".join(f"{index} {string.ascii_letters[index % 52]}" for index in range(400))


def n_tokens(base: Base, messages: tuple[Message, ...]) -> int:
    return len(base.encode(messages).ids)


def is_covered(text: str, pieces: list[str]) -> bool:
    """Whether pieces, in their order, show every character of ``text`` but white space between them."""
    reached = 0
    for piece in pieces:
        start = text.rfind(piece, 0, reached + len(piece))  # as far on as it can stand without a gap
        if start < 0:
            start = text.find(piece, reached)
        if start < 0 or text[reached:start].strip():
            return False
        reached = max(reached, start + len(piece))
    return not text[reached:].strip()


@pytest.mark.parametrize("text", ["hi", "", "the cat " * 20])
def test_what_fits_is_one_window_as_it_is(tiny_base: Base, text: str) -> None:
    assert windows(tiny_base, [Message("user", text)]) == [(Message("user", text),)]


def test_a_long_text_is_cut_into_overlapping_windows_that_fit(tiny_base: Base) -> None:
    parts = windows(tiny_base, [Message("user", LONG)])
    pieces = [part[0].content for part in parts]
    assert len(parts) > 3
    assert is_covered(LONG, pieces)
    assert all(n_tokens(tiny_base, part) <= N_POSITIONS for part in parts)
    assert all(n_tokens(tiny_base, part) > 0.85 * N_POSITIONS for part in parts[:-1])  # no more windows than needed
    for before, after in pairwise(pieces):
        shared = max(size for size in range(len(before) + 1) if after.startswith(before[len(before) - size :]))
        assert 0.2 * len(before) < shared < 0.35 * len(before)


def test_a_limit_may_be_given(tiny_base: Base) -> None:
    parts = windows(tiny_base, [Message("user", LONG)], 64)
    assert all(n_tokens(tiny_base, part) <= 64 for part in parts)
    assert is_covered(LONG, [part[0].content for part in parts])


def test_only_the_longest_message_is_cut(tiny_base: Base) -> None:
    messages = [Message("system", "be kind"), Message("user", "tell me"), Message("assistant", LONG)]
    parts = windows(tiny_base, messages)
    assert {part[:2] for part in parts} == {tuple(messages[:2])}
    assert is_covered(LONG, [part[2].content for part in parts])
    assert all(n_tokens(tiny_base, part) <= N_POSITIONS for part in parts)
    first = windows(tiny_base, [Message("user", LONG), Message("assistant", "no")])
    assert {part[1] for part in first} == {Message("assistant", "no")}


def test_messages_that_leave_no_room_are_an_error(tiny_base: Base) -> None:
    many = [Message("user", LONG), *[Message("assistant", LONG)] * 3]
    with pytest.raises(InputError, match=r"for a context of 256, and its longest message cannot be cut small enough"):
        windows(tiny_base, many)
    with pytest.raises(InputError, match="Score its messages apart"):
        windows(tiny_base, [Message("user", LONG)], 34)


@pytest.mark.parametrize("lengths", [(1.0, 1.0), (1.0, 0.4), (0.3, 1.0), (0.4, 0.4, 1.0), (0.01, 0.5, 1.0)])
def test_of_a_long_question_with_a_long_answer_both_are_cut(tiny_base: Base, lengths: tuple[float, ...]) -> None:
    """As many windows as the longest needs; the short message stands in each."""
    roles = ("system", "user", "assistant")[-len(lengths) :]
    texts = [LONG[: int(len(LONG) * length)] for length in lengths]
    limit = N_POSITIONS - 10
    found = windows(tiny_base, [Message(role, text) for role, text in zip(roles, texts, strict=True)], limit)
    assert all(n_tokens(tiny_base, part) <= limit for part in found)
    assert [[turn.role for turn in part] for part in found] == [list(roles)] * len(found)
    by_message = [[part[place].content for part in found] for place in range(len(texts))]
    assert all(is_covered(text, pieces) for text, pieces in zip(texts, by_message, strict=True))
    if lengths[0] == 0.01:
        assert set(by_message[0]) == {texts[0]}
    share = limit / sum(length > 0.01 for length in lengths)
    longest = n_tokens(tiny_base, (Message("user", texts[-1 if lengths[-1] == 1.0 else 0]),))
    assert len(found) <= 1.8 * longest / share  # a quarter of overlap, and what templates take


def talk(n_exchanges: int, size: int = 3) -> list[Message]:
    """A conversation of many short turns, each unlike the others."""
    return [
        Message(role, " ".join(f"{word}{index}" for word in "abcdefgh"[:size]))
        for index in range(n_exchanges)
        for role in ("user", "assistant")
    ]


@pytest.mark.parametrize("system", [[], [Message("system", "be kind")]])
def test_a_long_conversation_is_cut_between_exchanges(tiny_base: Base, system: list[Message]) -> None:
    turns = talk(60)
    parts = windows(tiny_base, [*system, *turns, Message("user", "and now?")])
    assert len(parts) > 4
    assert all(n_tokens(tiny_base, part) <= N_POSITIONS for part in parts)
    assert all(list(part[: len(system)]) == system for part in parts)
    bodies = [part[len(system) :] for part in parts]
    assert all(body[0].role == "user" for body in bodies)
    for before, after in pairwise(bodies):
        n_shared = next(size for size in range(len(before), -1, -1) if before[len(before) - size :] == after[:size])
        assert 0.1 * len(before) < n_shared < 0.4 * len(before)
    assert list(dict.fromkeys(turn for body in bodies for turn in body)) == [*turns, Message("user", "and now?")]


def cut_slowly(base: Base, turns: list[Message], limit: int) -> list[tuple[Message, ...]]:
    """Windows of whole exchanges, each lengthened by one exchange as long as it fits."""
    exchanges = [turns[place : place + 2] for place in range(0, len(turns), 2)]

    def joined(start: int, stop: int) -> tuple[Message, ...]:
        return tuple(turn for exchange in exchanges[start:stop] for turn in exchange)

    found, start, stop = [], 0, 0
    while stop < len(exchanges):
        if n_tokens(base, joined(start, stop + 1)) > limit:
            start = stop
        stop += 1
        while stop < len(exchanges) and n_tokens(base, joined(start, stop + 1)) <= limit:
            stop += 1
        found += windows(base, joined(start, stop), limit)
        start = max(start + 1, stop - max(1, round((stop - start) / 4)))
    return found


@pytest.mark.parametrize(("seed", "limit"), list(enumerate((90, 256))))
def test_windows_of_turns_are_those_of_the_slow_way(tiny_base: Base, seed: int, limit: int) -> None:
    """Turns of all lengths, some of them too long for a window of their own."""
    draws = random.Random(seed)
    sizes = [draws.choice((1, 2, 5, 9, draws.choice((3, 60)))) for _ in range(60)]
    turns = [turn for size in sizes for turn in (Message("user", "a b " * size), Message("assistant", "no"))]
    assert windows(tiny_base, turns, limit) == cut_slowly(tiny_base, turns, limit)


def test_many_turns_are_encoded_a_few_times_each(tiny_base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many fit in one window: not once for each turn that it is lengthened by."""
    encode, seen = Base.encode, []

    def counted(self: Base, messages: Sequence[Message]) -> object:
        seen.append(len(messages))
        return encode(self, messages)

    monkeypatch.setattr(Base, "encode", counted)
    seen_by_limit = {}
    for limit in (256, 1024):
        seen.clear()
        windows(tiny_base, talk(150), limit)
        seen_by_limit[limit] = sum(seen) / 300
    assert max(seen_by_limit.values()) < 10


def test_a_long_message_among_many_turns_is_cut_by_itself(tiny_base: Base) -> None:
    turns = [*talk(20), Message("user", LONG), Message("assistant", "no"), *talk(20)]
    parts = windows(tiny_base, turns)
    assert all(n_tokens(tiny_base, part) <= N_POSITIONS for part in parts)
    pieces = [
        turn.content for part in parts for turn in part if turn.content not in {turn.content for turn in talk(20)}
    ]
    assert is_covered(LONG, [piece for piece in pieces if piece != "no"])
    assert {turn for part in parts for turn in part} >= set(talk(20))


def test_a_claim_is_never_cut(tiny_base: Base) -> None:
    claim = Message("assistant", "the cat sat on a mat")
    document = Message("user", LONG)
    parts = windows(tiny_base, [document, claim], combine="min")
    assert len(parts) > 3
    assert {part[1] for part in parts} == {claim}
    assert is_covered(LONG, [part[0].content for part in parts])
    longer = Message("assistant", "word " * 30)
    parts = windows(tiny_base, [Message("user", LONG[:140]), longer], 200, "min")
    assert len(parts) > 1
    assert {part[1] for part in parts} == {longer}  # though it is the longest message
    assert windows(tiny_base, [Message("user", "a"), claim], combine="min") == [(Message("user", "a"), claim)]


def test_a_claim_that_leaves_no_room_is_an_error(tiny_base: Base) -> None:
    with pytest.raises(InputError, match="its longest message before the claim cannot be cut small enough"):
        windows(tiny_base, [Message("user", LONG), Message("assistant", LONG)], combine="min")
    with pytest.raises(InputError, match="Send the document as a message of its own before the claim"):
        windows(tiny_base, [Message("user", LONG)], combine="min")


def test_the_cost_is_linear_in_the_length(tiny_base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    """Characters that are encoded to cut a text: so many times the text, however long it is."""
    encode, seen = Base.encode, []

    def counted(self: Base, messages: Sequence[Message]) -> object:
        seen.append(sum(len(message.content) for message in messages))
        return encode(self, messages)

    monkeypatch.setattr(Base, "encode", counted)
    shares = []
    for n_times in (4, 16):
        seen.clear()
        windows(tiny_base, [Message("user", LONG * n_times)])
        shares.append(sum(seen) / (len(LONG) * n_times))
    assert shares[1] < 1.2 * shares[0] < 12


@pytest.mark.parametrize("spelling", SPECIAL)
def test_text_that_spells_control_tokens_still_fits(tiny_base: Base, spelling: str) -> None:
    """Such text takes many more tokens as plain text than as control tokens."""
    text = spelling * 300
    parts = windows(tiny_base, [Message("user", text)])
    assert len(parts) > 1
    assert all(n_tokens(tiny_base, part) <= N_POSITIONS for part in parts)
    assert len("".join(part[0].content for part in parts)) >= len(text)


def test_white_space_alone_takes_one_window(tiny_base: Base) -> None:
    text = "\n \t" * 300
    (part,) = windows(tiny_base, [Message("user", text)])
    assert n_tokens(tiny_base, part) <= N_POSITIONS
    padded = windows(tiny_base, [Message("user", text + "kill" + text)])
    assert any("kill" in part[0].content for part in padded)
    assert all(n_tokens(tiny_base, part) <= N_POSITIONS for part in padded)


@pytest.mark.parametrize("kind", [kind.name for kind in KINDS])
@pytest.mark.filterwarnings("ignore:The tokenizer has no chat template")
def test_every_kind_of_tokenizer_can_be_cut(tiny_base: Base, kind: str) -> None:
    """Slow ones too, which tell no offsets."""
    base = replace(tiny_base, tokenizer=shared_tokenizer(kind))
    parts = windows(base, [Message("user", LONG)], 100)
    assert len(parts) > 3
    assert all(n_tokens(base, part) <= 100 for part in parts)
    assert is_covered(LONG, [part[0].content for part in parts])


PIECES = st.sampled_from([*SPECIAL, " ", "\n", "the ", "caf\u00e9", "\U0001f600", "a" * 30, "?!", "\u4f60\u597d"])


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    parts=st.lists(PIECES | st.text(st.characters(codec="utf-8"), max_size=20), max_size=40), times=st.integers(1, 9)
)
def test_any_text_is_covered_by_windows_that_fit(tiny_base: Base, parts: list[str], times: int) -> None:
    text = "".join(parts) * times
    found = windows(tiny_base, [Message("user", text)], 80)
    assert found
    assert all(n_tokens(tiny_base, part) <= 80 for part in found)
    if text.strip():
        assert is_covered(text, [part[0].content for part in found])
