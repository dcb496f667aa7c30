"""Encoded rows of one split: what training and calibration read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from safeside.errors import ConfigError
from safeside.tasks.rows import BadRow
from safeside.tasks.task import LeftOut
from safeside.types import Example


@dataclass(slots=True)
class Rows:
    """Encoded rows of one split, and what could not be used."""

    ids: list[tuple[int, ...]]
    """Token ids of each row."""
    answer_starts: list[int]
    """Index of each row's first answer token."""
    labels: Tensor
    """(n, K), 0 or 1; NaN where a row does not know the label."""
    soft: Tensor | None
    """(n, K) soft targets in [0, 1]; None unless every row has them."""
    bad: list[BadRow] = field(default_factory=list)
    """Rows that could not be used, and why."""
    n_too_long: int = 0
    """Rows beyond the base's context."""
    beyond: list[Example] = field(default_factory=list)
    """Rows beyond the base's context as they were read, preferences apart: a guard judges such texts in windows."""
    n_overlapping: int = 0
    """Rows that ask for what an evaluation asks for, and were left out."""
    n_in_tests: int = 0
    """Rows of files that stand, or nearly, in a test set of the recipe's task or of those in ``against``: left out."""
    left_out: LeftOut | None = None
    """Of a task's split, what the task did not use, leaks among it; None where no task was read: nobody looked."""
    examples: list[Example] = field(default_factory=list)
    """The rows before they were encoded."""
    rejected: Rows | None = None
    """Of preferences: row by row the same prompt with the rejected answer."""
    benign: Rows | None = None
    """For aligners: harmless rows on which they are held near the base."""

    @property
    def parts(self) -> list[Rows]:
        """These rows, the rejected ones and the benign ones: those that there are."""
        return [part for part in (self, self.rejected, self.benign) if part is not None]

    @property
    def texts(self) -> list[tuple[int, ...]]:
        """Token ids of everything that the base has to read: the ids of all ``parts``, one after the other."""
        return [ids for part in self.parts for ids in part.ids]

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row."""
        return [len(row) for row in self.ids]

    def require_both_kinds(self, name: str) -> None:
        """A ConfigError that calls these rows ``name`` unless each label has rows that are 0 and rows that are 1."""
        for place, column in enumerate(self.labels.T.tolist(), 1):
            missing = [kind for value, kind in ((1.0, "harmful"), (0.0, "harmless")) if value not in column]
            if missing:
                raise ConfigError(
                    f"{name} needs both harmful and harmless rows for every label; label {place} of "
                    f"{self.labels.shape[1]} has no {' and no '.join(missing)} row. Add some."
                )

    def chosen(self, places: Sequence[int]) -> Rows:
        """Some of the rows, in the order of ``places``."""
        return Rows(
            ids=[self.ids[place] for place in places],
            answer_starts=[self.answer_starts[place] for place in places],
            labels=self.labels[list(places)],
            soft=None if self.soft is None else self.soft[list(places)],
            examples=[self.examples[place] for place in places] if self.examples else [],
            rejected=None if self.rejected is None else self.rejected.chosen(places),
        )
