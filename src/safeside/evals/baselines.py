"""Baselines that are fitted and not trained: words alone, and one linear layer on one state of the base.

``fit_keywords`` and ``fit_probe`` choose everything that they choose on validation rows, so that they get the care that
a guard gets; scores of test rows are asked for afterwards, once.  Trained baselines stand in ``safeside.train``, the
prompted base in ``safeside.evals.prompted``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from safeside.errors import ConfigError, InputError
from safeside.evals.metrics import auroc
from safeside.types import Example

Array = NDArray[np.float64]

KEYWORD_STRENGTHS = (0.25, 1.0, 4.0, 16.0, 64.0)
PROBE_STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)


@dataclass(frozen=True, slots=True)
class Keywords:
    """TF-IDF of words and pairs with logistic regression."""

    vectorizer: TfidfVectorizer
    model: LogisticRegression
    inverse_regularisation: float
    """scikit-learn's C, chosen on validation rows."""
    validation_auroc: float
    """Of the chosen model, so it is a little too high."""

    def scores(self, examples: Sequence[Example]) -> Array:
        """A score in [0, 1] for each row, in order; every text has one, an empty one too."""
        return _probabilities(self.model, self.vectorizer.transform([text_of(example) for example in examples]))


def fit_keywords(train: Sequence[Example], validation: Sequence[Example], seed: int = 0) -> Keywords:
    """Fit on ``train`` and choose the regularisation on ``validation``, by AUROC of the first label.

    A split with one kind of row only is a ConfigError.
    """
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
    words = vectorizer.fit_transform([text_of(example) for example in train])
    held_out = vectorizer.transform([text_of(example) for example in validation])
    model, strength, area = _choose(
        KEYWORD_STRENGTHS,
        lambda strength: LogisticRegression(max_iter=1000, C=strength, random_state=seed),
        (words, labels_of(train)),
        (held_out, labels_of(validation)),
    )
    return Keywords(vectorizer, model, strength, area)


@dataclass(frozen=True, slots=True)
class States:
    """States of the base for the rows of one split, by a name for where they were read (``layer 3, last token``)."""

    by_place: Mapping[str, Array]
    """Each (n, D), NaN in a row that has none."""
    labels: Array
    """(n,) in {0, 1}."""


@dataclass(frozen=True, slots=True)
class Probe:
    """Logistic regression on one state of the base: a dot product a row."""

    model: Pipeline
    place: str
    """Where it reads, chosen on validation rows."""
    inverse_regularisation: float
    """scikit-learn's C on standardised states, chosen on validation rows."""
    validation_auroc: float
    """Of the chosen model, so it is a little too high."""

    def scores(self, by_place: Mapping[str, Array]) -> Array:
        """A score in [0, 1] for each row, in order; NaN for a row whose state is not finite."""
        states = by_place[self.place]
        usable = np.isfinite(states).all(1)
        result = np.full(len(states), np.nan)
        if usable.any():
            result[usable] = _probabilities(self.model, states[usable])
        return result


def fit_probe(train: States, validation: States, seed: int = 0) -> Probe:
    """Fit on ``train`` at every place and regularisation, and keep the best on ``validation``, by AUROC.

    States come from ``TapStore.at_rows``.  Splits that were not read at the same places are an InputError; one with one
    kind of row only is a ConfigError.
    """
    if not train.by_place or set(train.by_place) != set(validation.by_place):
        raise InputError(
            f"Training states were read at {sorted(train.by_place)}, validation states at "
            f"{sorted(validation.by_place)}; expected the same places. Read both splits alike."
        )
    best: Probe | None = None
    for place in train.by_place:
        model, strength, area = _choose(
            PROBE_STRENGTHS,
            lambda strength: make_pipeline(
                StandardScaler(), LogisticRegression(max_iter=2000, C=strength, random_state=seed)
            ),
            _finite(train, place),
            _finite(validation, place),
        )
        if best is None or area > best.validation_auroc:
            best = Probe(model, place, strength, area)
    assert best is not None
    return best


def text_of(example: Example) -> str:
    """All of a conversation's contents, a line each."""
    return "\n".join(message.content for message in example.messages)


def labels_of(examples: Sequence[Example]) -> Array:
    """The first label of each row, (n,) in {0, 1}."""
    return np.array([example.labels[0] for example in examples], dtype=np.float64)


def _finite(states: States, place: str) -> tuple[Array, Array]:
    usable = np.isfinite(states.by_place[place]).all(1)
    return states.by_place[place][usable], states.labels[usable]


def _choose(
    strengths: Sequence[float],
    make: Callable[[float], LogisticRegression | Pipeline],
    train: tuple[object, Array],  # rows, dense or sparse, and labels
    validation: tuple[object, Array],
) -> tuple[LogisticRegression | Pipeline, float, float]:
    """The model that is best on ``validation``, its regularisation, and its AUROC there; ties keep the stronger one."""
    for name, (_, labels) in (("Training", train), ("Validation", validation)):
        if len(set(labels.tolist())) < 2:
            raise ConfigError(f"{name} needs both harmful and harmless rows; got one kind only. Add rows.")
    fitted = [(make(strength).fit(*train), strength) for strength in strengths]
    areas = [auroc(validation[1], _probabilities(model, validation[0])) for model, _ in fitted]
    best = int(np.argmax(areas))
    return (*fitted[best], areas[best])


def _probabilities(model: LogisticRegression | Pipeline, rows: object) -> Array:
    scores: Array = model.predict_proba(rows)[:, 1]
    return scores
