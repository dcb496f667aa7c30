"""Texts and rows for small data sets that stand in for the real ones."""

from __future__ import annotations

import random

import torch

from safeside.train.rows import Rows
from safeside.types import Example, Message

WORDS = tuple(
    f"{first}{last}" for first in ("ba", "ko", "mi", "tu", "re", "so") for last in ("n", "ll", "sk", "tra", "p")
)


def sentence(generator: random.Random, is_harmful: bool) -> str:
    """Words that anybody may say, or some that hold one of which a guard can tell."""
    words = generator.choices(WORDS, k=8)
    return " ".join([*words[:4], "bomb", *words[4:]] if is_harmful else words)


def rows_of(texts: list[str], start: int) -> Rows:
    """Encoded rows of three tokens from ``start`` on and one label, every other one harmful."""
    labels = torch.tensor([[float(place % 2)] for place in range(len(texts))])
    examples = [Example((Message("user", text),), (float(label),)) for text, label in zip(texts, labels, strict=True)]
    ids = [(start + place, start, start + 1) for place in range(len(texts))]
    return Rows(ids, [0] * len(texts), labels, None, examples=examples)
