"""Guarding a stream of JSON lines: one line out for each row in, in order, in flat memory."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from itertools import islice
from pathlib import Path

from safeside.adapters.adapter import Adapter
from safeside.base.model import Base
from safeside.errors import InputError
from safeside.guards.score import judge
from safeside.tasks.rows import BadRow, messages_of, open_rows, parse_rows
from safeside.types import Message, Verdict

_CHUNK = 64

Line = dict[str, object]


def guard_lines(base: Base, guards: Sequence[Adapter], file: str | Path | None) -> Iterator[tuple[Line, str | None]]:
    """For each row of ``file`` (standard input if None) ``{"line", "verdicts"}``, and what was wrong with it, if so.

    A row that cannot be read or scored fails closed: every guard flags it, with a null score and the reason.
    """
    with nullcontext(sys.stdin) if file is None else open_rows(file) as handle:
        rows = parse_rows(handle)
        while chunk := list(islice(rows, _CHUNK)):
            yield from _judge_chunk(base, guards, chunk)


def _judge_chunk(
    base: Base, guards: Sequence[Adapter], chunk: Iterable[tuple[int, dict[str, object]] | BadRow]
) -> Iterator[tuple[Line, str | None]]:
    read = [_read(base, row) for row in chunk]
    good = [messages for _, messages, problem in read if problem is None]
    verdicts = iter(judge(base, guards, good) if good else [])
    for number, _, problem in read:
        found = [_fields(verdict) for verdict in next(verdicts)] if problem is None else _closed(guards, problem)
        yield {"line": number, "verdicts": found}, problem


def _read(base: Base, row: tuple[int, dict[str, object]] | BadRow) -> tuple[int, tuple[Message, ...], str | None]:
    if isinstance(row, BadRow):
        return row.line, (), row.problem
    try:
        return row[0], messages_of(row[1]), None
    except InputError as error:
        return row[0], (), str(error)


def _fields(verdict: Verdict) -> Line:
    fields = asdict(verdict)
    score = fields["score"]
    return {
        "task": fields["task"],
        "score": score if score == score else None,  # NaN is not JSON
        "threshold": fields["threshold"],
        "flagged": fields["flagged"],
        "reason": fields["reason"],
    }


def _closed(guards: Sequence[Adapter], problem: str) -> list[Line]:
    return [
        {
            "task": guard.name,
            "score": None,
            "threshold": max(guard.thresholds),
            "flagged": True,
            "reason": f"not scored, failing closed: {problem}",
        }
        for guard in guards
    ]
