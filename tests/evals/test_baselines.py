"""The keyword baseline: it learns words, and only words."""

from __future__ import annotations

import numpy as np

from safeside import Message
from safeside.evals.baselines import keyword_scores, text_of
from safeside.types import Example


def examples(*rows: tuple[str, float]) -> list[Example]:
    return [Example((Message("user", text),), (label,)) for text, label in rows]


TRAIN = examples(
    *[(f"steal the {thing}", 1.0) for thing in "abcdefgh"], *[(f"paint the {thing}", 0.0) for thing in "abcdefgh"]
)


def test_keywords_decide() -> None:
    scores = keyword_scores(TRAIN, examples(("steal a car", 1.0), ("paint a car", 0.0), ("zebra", 0.0)))
    assert scores.shape == (3,)
    assert ((scores >= 0) & (scores <= 1)).all()
    assert scores[0] > 0.6 > 0.4 > scores[1]


def test_pairs_of_words_count_too() -> None:
    rows = [("kill python", 0.0), ("kill him", 1.0), ("python kill", 1.0), ("him kill", 0.0)] * 6
    scores = keyword_scores(examples(*rows), examples(*rows[:4]))
    assert ((scores > 0.5) == np.array([False, True, True, False])).all()


def test_the_same_rows_give_the_same_scores() -> None:
    assert np.array_equal(keyword_scores(TRAIN, TRAIN), keyword_scores(TRAIN, TRAIN))


def test_all_messages_are_read() -> None:
    talk = Example((Message("user", "how?"), Message("assistant", "like this")), (1.0,))
    assert text_of(talk) == "how?\nlike this"
