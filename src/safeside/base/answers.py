"""Answers while they are written: which rows go on, and which tokens may be shown."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor
from transformers import DynamicCache, StoppingCriteria

from safeside.types import Stop, StrengthTrace, Verdict

Release = Callable[[int, list[int]], None]
"""Told a row of the batch and the next token ids of its answer, in order, as soon as they can be shown.

It is called for each row after every token, with no ids where none can be shown yet; what it raises ends the answers.
"""


class AnswerStanding(Protocol):
    """How one answer stands: see ``safeside.stopping.Standing``."""

    @property
    def n_clear(self) -> int: ...

    @property
    def stop(self) -> Stop | None: ...

    @property
    def is_blocked(self) -> bool: ...


class AttachedAdapters(Protocol):
    """What ``Base.chat`` asks of an attachment."""

    @property
    def guards(self) -> Mapping[str, object]: ...

    @property
    def intercept(self) -> object: ...

    def request(
        self, *, strength: object = None, prompt_end: Sequence[int] | None = None, stop: object = None
    ) -> contextlib.AbstractContextManager[None]: ...

    def verdicts(
        self, cache: DynamicCache, answer_lengths: Sequence[int] | None = None
    ) -> list[tuple[Verdict, ...]]: ...

    def traces(self, cache: DynamicCache) -> list[tuple[StrengthTrace, ...]]: ...

    def standings(self, cache: DynamicCache, answer_lengths: Sequence[int]) -> Sequence[AnswerStanding]: ...

    def standings_so_far(self, cache: DynamicCache, answer_lengths: Sequence[int]) -> Sequence[AnswerStanding]: ...


class Follower(StoppingCriteria):
    """Ends the rows of one ``generate`` that a guard stopped or blocked, and releases tokens once they are clear.

    ``n_prompt`` counts the slots of the padded prompts.
    """

    def __init__(
        self,
        attachment: AttachedAdapters | None,
        cache: DynamicCache,
        n_prompt: int,
        stop_ids: set[int],
        release: Release | None,
    ) -> None:
        self.attachment, self.cache = attachment, cache
        self.n_prompt, self.stop_ids = n_prompt, stop_ids
        self.release = release
        self.n_released: dict[int, int] = {}

    def __call__(self, input_ids: Tensor, scores: Tensor, **options: object) -> Tensor:
        """(B,) bool: the rows that end here."""
        answers = [cut(answer, self.stop_ids)[0] for answer in input_ids[:, self.n_prompt :].tolist()]
        if self.attachment is None:
            self._release(answers, [len(answer) for answer in answers])
            return torch.zeros(len(answers), dtype=torch.bool, device=input_ids.device)
        standings = self.attachment.standings_so_far(self.cache, [len(answer) for answer in answers])
        self._release(answers, [standing.n_clear for standing in standings])
        ended = [standing.is_blocked or standing.stop is not None for standing in standings]
        return torch.tensor(ended, device=input_ids.device)

    def finish(self, kept: Sequence[list[int]]) -> None:
        """Release what was held back of the tokens that stay."""
        self._release(kept, [len(answer) for answer in kept])

    def _release(self, answers: Sequence[list[int]], n_clear: Sequence[int]) -> None:
        if self.release is None:
            return
        for row, (answer, n) in enumerate(zip(answers, n_clear, strict=True)):
            start = self.n_released.get(row, 0)
            self.release(row, answer[start:n])
            self.n_released[row] = max(start, min(n, len(answer)))


def told_stop(verdicts: Sequence[Verdict], stop: Stop | None) -> tuple[Verdict, ...]:
    """The verdicts of a row; the stopping guard's last one, on the answer, is that of its rule and says where.

    It has mode ``stream``: the score and threshold are those of the rule, whose score no map makes a probability.
    """
    if stop is None:
        return tuple(verdicts)
    last = max(index for index, verdict in enumerate(verdicts) if verdict.task == stop.guard)
    reason = "; ".join(filter(None, [verdicts[last].reason, f"stopped at token {stop.token}"]))
    found = replace(
        verdicts[last],
        mode="stream",
        score=stop.score,
        threshold=stop.threshold,
        probability=stop.score,
        flagged=True,
        reason=reason,
    )
    return (*verdicts[:last], found, *verdicts[last + 1 :])


def cut(answer: list[int], stop_ids: set[int]) -> tuple[list[int], bool]:
    """The tokens before the first that ends an answer, and whether there was one."""
    stop = next((index for index, token in enumerate(answer) if token in stop_ids), None)
    return answer[:stop], stop is not None
