"""Fitted baselines: words alone, and one linear layer on one state."""

from __future__ import annotations

import numpy as np
import pytest

from safeside import Message
from safeside.errors import ConfigError, InputError
from safeside.evals.baselines import (
    KEYWORD_STRENGTHS,
    PROBE_STRENGTHS,
    States,
    fit_keywords,
    fit_probe,
    labels_of,
    text_of,
)
from safeside.evals.metrics import auroc
from safeside.types import Example


def examples(*rows: tuple[str, float]) -> list[Example]:
    return [Example((Message("user", text),), (label,)) for text, label in rows]


TRAIN = examples(
    *[(f"steal the {thing}", 1.0) for thing in "abcdefgh"], *[(f"paint the {thing}", 0.0) for thing in "abcdefgh"]
)


def test_keywords_decide() -> None:
    keywords = fit_keywords(TRAIN, TRAIN)
    scores = keywords.scores(examples(("steal a car", 1.0), ("paint a car", 0.0), ("zebra", 0.0), ("", 0.0)))
    assert scores.shape == (4,)
    assert ((scores >= 0) & (scores <= 1)).all()
    assert scores[0] > 0.5 > scores[1]
    assert keywords.inverse_regularisation == KEYWORD_STRENGTHS[0]  # all are perfect, and ties keep the stronger one


def test_pairs_of_words_count_too() -> None:
    rows = [("kill python", 0.0), ("kill him", 1.0), ("python kill", 1.0), ("him kill", 0.0)] * 6
    keywords = fit_keywords(examples(*rows), examples(*rows))
    assert ((keywords.scores(examples(*rows[:4])) > 0.5) == np.array([False, True, True, False])).all()


def test_the_same_rows_give_the_same_scores() -> None:
    assert np.array_equal(fit_keywords(TRAIN, TRAIN).scores(TRAIN), fit_keywords(TRAIN, TRAIN).scores(TRAIN))


def test_all_messages_are_read() -> None:
    talk = Example((Message("user", "how?"), Message("assistant", "like this")), (1.0,))
    assert text_of(talk) == "how?\nlike this"


def test_regularisation_of_keywords_is_the_best_on_validation_rows() -> None:
    generator = np.random.default_rng(0)
    words = [f"w{index}" for index in range(40)]

    def noisy(n_rows: int) -> list[Example]:
        rows = []
        for _ in range(n_rows):
            label = float(generator.integers(2))
            chosen = list(generator.choice(words, 6)) + (["bad"] if label and generator.random() < 0.6 else [])
            rows.append((" ".join(chosen), label))
        return examples(*rows)

    train, validation = noisy(60), noisy(200)
    keywords = fit_keywords(train, validation)
    assert keywords.validation_auroc == auroc(labels_of(validation), keywords.scores(validation))
    # Validation rows decide: turned round, the best model is another and its figure the complement's.
    turned = [Example(row.messages, (1.0 - row.labels[0],)) for row in validation]
    assert fit_keywords(train, turned).validation_auroc != keywords.validation_auroc


def states(n_rows: int, seed: int) -> States:
    """A place that tells the classes apart in one direction of 16, and one that is noise of another scale."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 2, n_rows).astype(float)
    good = generator.normal(size=(n_rows, 16))
    good[:, 3] += 3 * labels
    return States({"noise": 100 * generator.normal(size=(n_rows, 16)), "good": good}, labels)


def test_a_probe_finds_the_place_and_ranks_new_rows() -> None:
    train, validation, test = states(300, 1), states(100, 2), states(400, 3)
    probe = fit_probe(train, validation)
    assert probe.place == "good"
    assert probe.inverse_regularisation in PROBE_STRENGTHS
    assert probe.validation_auroc == auroc(validation.labels, probe.scores(validation.by_place))
    scores = probe.scores(test.by_place)
    assert scores.shape == (400,)
    assert auroc(test.labels, scores) > 0.95


def test_a_probe_leaves_rows_without_a_finite_state_unscored() -> None:
    train, validation, test = states(100, 1), states(100, 2), states(10, 3)
    train.by_place["good"][0, 0] = np.nan
    test.by_place["good"][[2, 5], 7] = np.nan, np.inf
    scores = fit_probe(train, validation).scores(test.by_place)
    assert np.flatnonzero(np.isnan(scores)).tolist() == [2, 5]
    assert np.isnan(fit_probe(train, validation).scores({"good": np.full((3, 16), np.nan)})).all()


def test_one_kind_of_row_is_refused() -> None:
    with pytest.raises(ConfigError, match="Training needs both harmful and harmless rows"):
        fit_keywords(TRAIN[:8], TRAIN)
    with pytest.raises(ConfigError, match="Validation needs both harmful and harmless rows"):
        fit_keywords(TRAIN, TRAIN[:8])
    flat = States(states(20, 1).by_place, np.ones(20))
    with pytest.raises(ConfigError, match="Validation needs both"):
        fit_probe(states(20, 1), flat)


def test_splits_read_at_other_places_are_refused() -> None:
    train, validation = states(20, 1), states(20, 2)
    del train.by_place["noise"]
    with pytest.raises(InputError, match=r"read at \['good'\], validation states at \['good', 'noise'\]"):
        fit_probe(train, validation)
