"""Rows that ask for what an evaluation asks for: no aligner and no judge may learn from them.

A row overlaps with a goal when one of its user's messages is that goal word for word (case, spacing and punctuation
aside), is a near duplicate of it (see ``safeside.tasks.leakage``), or contains it: attacks wrap a goal into other text.
Goals of fewer than six words are too common to be looked for inside other texts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from safeside.registry import Registry
from safeside.tasks.leakage import find_leaks, normalise
from safeside.types import Example

LEAST_WORDS = 6  # of a goal that is looked for inside other texts
_WORD = re.compile(r"\w+")

GoalFinder = Callable[[Sequence[str], Path | None], list[str]]
"""The goals of named sets of prompts, given the folder of local data."""
GOALS: Registry[GoalFinder] = Registry("finder of evaluation goals")
GOALS.register("suites", "safeside.evals.suites:goals_of")  # a recipe names suites; evaluations stand above training


@dataclass(frozen=True, slots=True)
class Overlap:
    """What was kept of some rows, and why the others were not."""

    kept: list[Example]
    """Rows that overlap with no goal, in order."""
    n_same: int
    """Rows left out: a message is a goal."""
    n_near: int
    """Further rows left out: a message is a near duplicate of one."""
    n_containing: int
    """Further rows left out: a message contains one."""

    @property
    def n_dropped(self) -> int:
        """All that were left out."""
        return self.n_same + self.n_near + self.n_containing

    def __str__(self) -> str:
        return (
            f"{self.n_dropped} of {self.n_dropped + len(self.kept)} rows overlap with evaluations and were left out: "
            f"{self.n_same} the same, {self.n_near} near duplicates, {self.n_containing} containing one"
        )


def words_of(text: str) -> str:
    """The words of ``text`` with single spaces, in one case, without punctuation."""
    return " ".join(_WORD.findall(normalise(text)))


def drop_overlap(examples: Sequence[Example], goals: Sequence[str]) -> Overlap:
    """The rows of ``examples`` that ask for none of ``goals``, and counts of the others."""
    asked = sorted({words for goal in goals if (words := words_of(goal))})
    said = [[words_of(message.content) for message in row.messages if message.role == "user"] for row in examples]
    texts = sorted({text for row in said for text in row if text})
    leaks = find_leaks(texts, asked)
    same, near = ({texts[index] for index in part} for part in (leaks.exact, leaks.near))
    by_start = _by_start(asked)
    containing = {text for text in texts if text not in same and text not in near and _contains(text, by_start)}
    kept, counts = [], [0, 0, 0]
    for row, example in zip(said, examples, strict=True):
        for index, known in enumerate((same, near, containing)):
            if not known.isdisjoint(row):
                counts[index] += 1
                break
        else:
            kept.append(example)
    return Overlap(kept, *counts)


def _by_start(goals: Sequence[str]) -> dict[tuple[str, ...], list[str]]:
    """Goals that are long enough, by their first words."""
    found: dict[tuple[str, ...], list[str]] = {}
    for goal in goals:
        words = goal.split()
        if len(words) >= LEAST_WORDS:
            found.setdefault(tuple(words[:LEAST_WORDS]), []).append(goal)
    return found


def _contains(text: str, by_start: dict[tuple[str, ...], list[str]]) -> bool:
    """Whether a goal stands in ``text``, from word to word."""
    words, padded = text.split(), f" {text} "
    starts = {tuple(words[index : index + LEAST_WORDS]) for index in range(len(words) - LEAST_WORDS + 1)}
    return any(f" {goal} " in padded for start in starts for goal in by_start.get(start, ()))
