"""Guarding a stream of JSON lines: one line out for each row in, in order, in flat memory."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from itertools import islice
from pathlib import Path

from safeside.adapters.adapter import Adapter
from safeside.base.model import Base
from safeside.errors import InputError
from safeside.guards.score import score_conversations, unscored, verdicts_of
from safeside.tasks.rows import BadRow, messages_of, open_rows, parse_rows
from safeside.types import Message, Verdict

_CHUNK = 64

Line = dict[str, object]
Row = tuple[int, dict[str, object]] | BadRow


def guard_lines(base: Base, guards: Sequence[Adapter], file: str | Path | None) -> Iterator[tuple[Line, str | None]]:
    """For each row of ``file`` (standard input if None) ``{"line", "verdicts"}``, and what was wrong with it, if so.

    A row that cannot be read or scored fails closed: every guard flags it, with a null score and the reason.
    """
    with nullcontext(sys.stdin.buffer) if file is None else open_rows(file) as handle:
        rows = parse_rows(handle)
        while chunk := list(islice(rows, _CHUNK)):
            yield from _judge_chunk(base, guards, chunk)


def _judge_chunk(base: Base, guards: Sequence[Adapter], chunk: Iterable[Row]) -> Iterator[tuple[Line, str | None]]:
    read = [_read(row) for row in chunk]
    good = [messages for _, messages, problem in read if problem is None]
    scored = iter(score_conversations(base, guards, good) if good else [])
    for number, _, problem in read:
        scores = next(scored) if problem is None else unscored(guards, problem)
        verdicts = [_fields(verdict) for verdict in verdicts_of(base, guards, scores)]
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
