"""Guarding a stream of JSON lines: one line out for each row in, in order, in flat memory."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import dropwhile, islice
from pathlib import Path
from typing import Protocol

from safeside.adapters.adapter import Adapter
from safeside.base.model import Base
from safeside.errors import InputError
from safeside.guards.score import Conversation, Scores, score_conversations, unscored, verdicts_of
from safeside.tasks.rows import BadRow, messages_of, open_rows, parse_rows
from safeside.terminal import Advance
from safeside.types import Message, Verdict

_CHUNK = 64

Line = dict[str, object]
Row = tuple[int, dict[str, object]] | BadRow


class Scorer(Protocol):
    """Guards and whatever runs their base."""

    @property
    def guards(self) -> Sequence[Adapter]:
        """The guards, in the order of their verdicts."""
        ...

    def score(self, conversations: Sequence[Conversation]) -> Sequence[Scores]:
        """Scores in the order given; what cannot be scored has NaN and its ``problem``, and stops no other."""
        ...

    def verdicts(self, scores: Scores) -> Sequence[Verdict]:
        """One verdict of each guard on the conversation that ``scores`` belong to."""
        ...


@dataclass(frozen=True, slots=True)
class BaseScorer:
    """Guards on a base in this process."""

    base: Base
    """The base."""
    guards: Sequence[Adapter]
    """The guards, in the order of their verdicts."""

    def score(self, conversations: Sequence[Conversation]) -> list[Scores]:
        """Scores in the order given, by ``score_conversations``."""
        return score_conversations(self.base, self.guards, conversations)

    def verdicts(self, scores: Scores) -> tuple[Verdict, ...]:
        """One verdict of each guard on the conversation that ``scores`` belong to."""
        return verdicts_of(self.base, self.guards, scores)


def guard_lines(
    base: Base, guards: Sequence[Adapter], file: str | Path | None, *, after: int = 0
) -> Iterator[tuple[Line, str | None]]:
    """For each row of ``file`` (standard input if None) ``{"line", "verdicts"}``, and what was wrong with it, if so.

    A row that cannot be read or scored fails closed: every guard flags it, with a null score and the reason.  Rows up
    to line ``after`` are passed over.
    """
    scorer = BaseScorer(base, guards)
    with nullcontext(sys.stdin.buffer) if file is None else open_rows(file) as handle:
        rows = dropwhile(lambda row: _number(row) <= after, parse_rows(handle))
        while chunk := list(islice(rows, _CHUNK)):
            yield from judge_rows(scorer, chunk)


def keep_lines(
    base: Base, guards: Sequence[Adapter], file: Path, output: Path, advance: Advance
) -> Iterator[tuple[Line, str | None]]:
    """The lines of ``file`` that ``output`` lacks, each as soon as it is written there.

    So a run that was killed goes on: of a line that was cut short nothing is kept.  An output of other guards is an
    InputError.
    """
    last = _mended(guards, output)
    with open_rows(file) as handle:
        n_lines = sum(1 for _ in handle)
    advance(last, n_lines)
    with output.open("a", encoding="utf-8") as kept:
        for line, problem in guard_lines(base, guards, file, after=last):
            kept.write(json.dumps(line) + "\n")
            kept.flush()
            number = int(str(line["line"]))
            advance(number - last)
            last = number
            yield line, problem


def n_unscored(output: Path) -> int:
    """Lines of an output in which a guard has no score."""
    with output.open("rb") as handle:
        verdicts = [json.loads(line)["verdicts"] for line in handle]
    return sum(any(verdict["score"] is None for verdict in row) for row in verdicts)


def _mended(guards: Sequence[Adapter], output: Path) -> int:
    """The last line number that ``output`` holds; what a kill left of a line is cut off."""
    if not output.exists():
        return 0
    whole, last = 0, 0
    with output.open("rb") as handle:
        for text in handle:
            if not text.endswith(b"\n"):
                break
            try:
                line = json.loads(text)
                names = [verdict["task"] for verdict in line["verdicts"]]
                last = int(line["line"])
            except (ValueError, TypeError, KeyError) as error:
                raise InputError(f"{output} is no output of guard: {error}. Choose another file.") from error
            if names != [guard.name for guard in guards]:
                raise InputError(
                    f"{output} holds verdicts of {', '.join(names)}. Choose another file, or those guards."
                )
            whole += len(text)
    with output.open("r+b") as handle:
        handle.truncate(whole)
    return last


def _number(row: Row) -> int:
    return row.line if isinstance(row, BadRow) else row[0]


def judge_rows(scorer: Scorer, rows: Iterable[Row]) -> Iterator[tuple[Line, str | None]]:
    """For each of a few rows, scored together, ``{"line", "verdicts"}``, and what was wrong with it, if so."""
    read = [_read(row) for row in rows]
    good = [messages for _, messages, problem in read if problem is None]
    scored = iter(scorer.score(good) if good else [])
    for number, _, problem in read:
        scores = next(scored) if problem is None else unscored(scorer.guards, problem)
        verdicts = [_fields(verdict) for verdict in scorer.verdicts(scores)]
        yield {"line": number, "verdicts": verdicts}, scores.problem


def _read(row: Row) -> tuple[int, tuple[Message, ...], str | None]:
    if isinstance(row, BadRow):
        return row.line, (), row.problem
    try:
        return row[0], messages_of(row[1]), None
    except InputError as error:
        return row[0], (), str(error)


def _fields(verdict: Verdict) -> Line:
    return {
        "task": verdict.task,
        "score": verdict.score if math.isfinite(verdict.score) else None,  # NaN is not JSON
        "threshold": verdict.threshold,
        "flagged": verdict.flagged,
        "reason": verdict.reason,
    }
