"""Texts for small data sets that stand in for the real ones."""

from __future__ import annotations

import random

WORDS = tuple(
    f"{first}{last}" for first in ("ba", "ko", "mi", "tu", "re", "so") for last in ("n", "ll", "sk", "tra", "p")
)


def sentence(generator: random.Random, is_harmful: bool) -> str:
    """Words that anybody may say, or some that hold one of which a guard can tell."""
    words = generator.choices(WORDS, k=8)
    return " ".join([*words[:4], "bomb", *words[4:]] if is_harmful else words)
