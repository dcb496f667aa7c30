"""Baselines that need no base: what keywords alone can do."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from safeside.types import Example


def keyword_scores(train: Sequence[Example], test: Sequence[Example], seed: int = 0) -> NDArray[np.float64]:
    """Scores of TF-IDF (words and pairs) with logistic regression, fitted on ``train``, for ``test``."""
    model = make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True),
        LogisticRegression(max_iter=1000, C=4.0, random_state=seed),
    )
    model.fit([text_of(example) for example in train], [example.labels[0] for example in train])
    scores: NDArray[np.float64] = model.predict_proba([text_of(example) for example in test])[:, 1]
    return scores


def text_of(example: Example) -> str:
    """All of a conversation's contents, a line each."""
    return "\n".join(message.content for message in example.messages)
