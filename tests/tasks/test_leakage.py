"""Leakage: the same rows as the slow twin that compares every pair, and in time for real sets."""

from __future__ import annotations

import random
from math import ceil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safeside import Message
from safeside.tasks.leakage import NEAR, SHINGLE, Leaks, find_leaks, normalise, shingles_of, text_of, without_leaks
from safeside.types import Example

SENTENCE = "the quick brown fox jumps over the lazy dog while the cat sleeps on the warm mat near the old stove"


def slow_set(text: str) -> set[bytes]:
    """The shingles of a text as a set of bytes."""
    code = text.encode().ljust(SHINGLE, b"\0")
    return {code[start : start + SHINGLE] for start in range(len(code) - SHINGLE + 1)}


def slow_leaks(texts: list[str], others: list[str], similarity: float) -> Leaks:
    """Every text against every other one."""
    sets = [slow_set(other) for other in others]
    leaks = Leaks([], [])
    for position, text in enumerate(texts):
        own = slow_set(text)
        if text in others:
            leaks.exact.append(position)
        elif any(len(own & other) >= similarity * len(own | other) for other in sets):
            leaks.near.append(position)
    return leaks


def variant(text: str, generator: random.Random) -> str:
    """A text with a few characters changed, lost or added."""
    letters = list(text)
    for _ in range(generator.randint(0, 6)):
        place = generator.randrange(len(letters))
        letters[place : place + generator.randint(0, 1)] = generator.choice(["", "x", "yz"])
    return "".join(letters)


def test_the_index_finds_what_all_pairs_find() -> None:
    generator = random.Random(4)
    words = SENTENCE.split()
    texts = [" ".join(generator.choices(words, k=generator.randint(1, 30))) for _ in range(120)]
    others = [variant(generator.choice(texts), generator) for _ in range(150)]
    found = find_leaks(texts, others)
    assert found == slow_leaks(texts, others, NEAR)
    assert len(found.exact) > 10  # both kinds occur, and neither is everything
    assert len(found.near) > 10
    assert len(found.exact) + len(found.near) < len(texts) - 10


TEXTS = st.lists(st.text(st.sampled_from("ab \u00e9"), max_size=24), max_size=12)


@given(texts=TEXTS, others=TEXTS, similarity=st.sampled_from([0.5, 0.8, 1.0]))
def test_any_texts_give_what_all_pairs_give(texts: list[str], others: list[str], similarity: float) -> None:
    assert find_leaks(texts, others, similarity) == slow_leaks(texts, others, similarity)


@given(st.text(max_size=60))
def test_shingles_are_the_bytes_themselves(text: str) -> None:
    text = text.encode(errors="replace").decode()
    packed = {int(shingle).to_bytes(8, "big")[-SHINGLE:] for shingle in shingles_of(text)}
    assert packed == slow_set(text)


def test_the_border_is_inclusive() -> None:
    """Of n and m shingles in common just enough, or one too few."""
    text = "".join(chr(0x100 + index) for index in range(100))  # every shingle is another one
    size = len(shingles_of(text))
    n_enough = ceil(NEAR * size)
    at_border = text.encode()[: n_enough + SHINGLE - 1].decode(errors="ignore")
    n_common = len(shingles_of(at_border))
    assert find_leaks([text], [at_border], n_common / size).near == [0]
    assert find_leaks([text], [at_border], (n_common + 1) / size).near == []


@pytest.mark.parametrize(
    "texts", [("The  CAT\n sat", "the cat sat"), ("\uff26\uff2f\uff38", "fox"), ("Stra\u00dfe", "STRASSE")]
)
def test_case_spacing_and_form_do_not_matter(texts: tuple[str, str]) -> None:
    assert normalise(texts[0]) == normalise(texts[1])


def test_a_row_is_all_of_its_messages() -> None:
    talk = Example((Message("user", "How? "), Message("assistant", "Like  THIS")))
    assert text_of(talk) == "how? like this"


def test_nothing_leaks_from_nothing() -> None:
    assert find_leaks([], ["a"]) == find_leaks(["a"], []) == Leaks([], [])


def test_rows_that_were_seen_are_left_out_and_counted() -> None:
    def rows(*texts: str) -> list[Example]:
        return [Example((Message("user", text),), (0.0,)) for text in texts]

    seen = rows(SENTENCE, "How do I boil an egg?")
    kept, n_left_out = without_leaks(rows("how do I  boil an EGG?", f"{SENTENCE}!", "Where is the cat?"), seen)
    assert ([row.messages[0].content for row in kept], n_left_out) == (["Where is the cat?"], 2)
    assert without_leaks([], seen) == ([], 0)
