"""Guarding lines: one out for each row in, in order; nothing is lost, and nothing bad passes."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from safeside import Adapter, Base, Message
from safeside.errors import InputError
from safeside.guards import lines as module
from safeside.guards.lines import guard_lines, keep_lines, n_unscored
from safeside.guards.score import judge

SAME_SCORE = 1e-5  # see test_score.py


@pytest.fixture(scope="module")
def guards(session_base: Base, random_guard: Callable[..., Adapter]) -> list[Adapter]:
    return [random_guard(session_base), random_guard(session_base, name="two", seed=5, labels=("a", "b"))]


def write(path: Path, *rows: str | dict[str, object]) -> Path:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


def test_every_row_gets_a_line_in_order(tiny_base: Base, guards: list[Adapter], tmp_path: Path) -> None:
    texts = [f"{'the cat ' * (index % 7)}{index}" for index in range(150)]  # more than two chunks, of any length
    path = write(tmp_path / "rows.jsonl", "", *({"text": text} for text in texts))
    found = list(guard_lines(tiny_base, guards, path))
    assert [line["line"] for line, _ in found] == list(range(2, 152))
    assert all(problem is None for _, problem in found)
    expected = judge(tiny_base, guards, [[Message("user", text)] for text in texts])
    for (line, _), verdicts in zip(found, expected, strict=True):
        for fields, verdict in zip(line["verdicts"], verdicts, strict=True):
            assert list(fields) == ["task", "score", "threshold", "flagged", "reason"]
            assert fields["task"] == verdict.task
            assert fields["score"] == pytest.approx(verdict.score, abs=SAME_SCORE)
            assert (fields["threshold"], fields["flagged"]) == (verdict.threshold, verdict.flagged)


def test_a_killed_run_goes_on_where_it_was(tiny_base: Base, guards: list[Adapter], tmp_path: Path) -> None:
    """The output is that of one run, whatever was cut short; bad rows of before are counted."""
    rows = [{"text": f"{index} cats"} if index % 9 else "{broken" for index in range(100)]
    path, output = write(tmp_path / "rows.jsonl", *rows), tmp_path / "out.jsonl"
    moves: list[tuple[int, int | None]] = []

    def advance(count: int, total: int | None = None) -> None:
        moves.append((count, total))

    whole = [line for line, _ in guard_lines(tiny_base, guards, path)]
    running = keep_lines(tiny_base, guards, path, output, advance)
    for _ in range(40):
        next(running)
    running.close()
    with output.open("a") as handle:
        handle.write('{"line": 41, "verd')
    moves.clear()
    rest = list(keep_lines(tiny_base, guards, path, output, advance))
    assert [line["line"] for line, _ in rest] == list(range(41, 101))
    assert moves[0] == (40, 100)
    assert sum(count for count, _ in moves) == 100
    kept = [json.loads(line) for line in output.read_text().splitlines()]
    assert [line["line"] for line in kept] == [line["line"] for line in whole]
    assert n_unscored(output) == sum(isinstance(row, str) for row in rows)
    assert list(keep_lines(tiny_base, guards, path, output, advance)) == []
    with pytest.raises(InputError, match="verdicts of harm, two"):
        list(keep_lines(tiny_base, guards[:1], path, output, advance))
    with pytest.raises(InputError, match="no output of guard"):
        list(keep_lines(tiny_base, guards, path, path, advance))


def test_rows_that_cannot_be_scored_fail_closed_and_are_reported(
    tiny_base: Base, guards: list[Adapter], tmp_path: Path
) -> None:
    long = "the cat sat on the mat and then " * 40
    path = write(
        tmp_path / "rows.jsonl",
        {"text": "hi"},
        "{broken",
        {"question": "hi"},
        {"prompt": "\ud800"},
        {"messages": [{"role": role, "content": long} for role in ("user", *["assistant"] * 3)]},
        {"prompt": "how?", "response": "so"},
    )
    found = list(guard_lines(tiny_base, guards, path))
    problems = [problem for _, problem in found]
    assert [line["line"] for line, _ in found] == [1, 2, 3, 4, 5, 6]
    assert problems[0] is problems[5] is None
    for problem, words in zip(problems[1:5], ("not JSON", "no known shape", "Unicode", "cannot be cut"), strict=True):
        assert words in str(problem)
    for line, problem in found[1:5]:
        for fields, guard in zip(line["verdicts"], guards, strict=True):
            assert fields["task"] == guard.name
            assert fields["score"] is None
            assert fields["flagged"] is True
            assert "failing closed" in fields["reason"]
            assert str(problem) in fields["reason"]
    for line, _ in found:
        json.loads(json.dumps(line, allow_nan=False))


def test_a_score_that_is_not_a_number_is_null_flagged_and_reported(
    tiny_base: Base, random_guard: Callable[..., Adapter], guards: list[Adapter], tmp_path: Path
) -> None:
    broken = random_guard(tiny_base, name="broken")
    with torch.no_grad():
        broken.head.linear.weight.fill_(math.nan)
    ((line, problem),) = guard_lines(tiny_base, [guards[0], broken], write(tmp_path / "rows.jsonl", {"text": "hi"}))
    sound, failed = line["verdicts"]
    assert isinstance(sound["score"], float)
    assert (failed["score"], failed["flagged"]) == (None, True)
    assert problem == "a score is not a number"


def test_standard_input_is_read_when_no_file_is_named(
    tiny_base: Base, guards: list[Adapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    content = b'{"text": "caf\xc3\xa9"}\n\xff\n{"text": "hi"}'
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))
    found = list(guard_lines(tiny_base, guards[:1], None))
    assert [(line["line"], problem is None) for line, problem in found] == [(1, True), (2, False), (3, True)]


def test_no_row_is_no_line_and_a_missing_file_is_an_error(
    tiny_base: Base, guards: list[Adapter], tmp_path: Path
) -> None:
    assert list(guard_lines(tiny_base, guards, write(tmp_path / "rows.jsonl", "", " "))) == []
    with pytest.raises(InputError, match="There is no file"):
        next(guard_lines(tiny_base, guards, tmp_path / "none.jsonl"))


def test_memory_stays_flat(tiny_base: Base, guards: list[Adapter], monkeypatch: pytest.MonkeyPatch) -> None:
    """No more than one chunk is read ahead of what was asked for, however long the input is."""
    n_read = 0

    def rows() -> Iterator[bytes]:
        nonlocal n_read
        while True:
            n_read += 1
            yield b'{"text": "hi"}'

    @contextmanager
    def endless(file: object) -> Iterator[Iterator[bytes]]:
        yield rows()

    monkeypatch.setattr(module, "open_rows", endless)
    found = guard_lines(tiny_base, guards[:1], "endless.jsonl")
    for n_asked in range(1, 2 * module._CHUNK):
        next(found)
        assert n_read <= n_asked + module._CHUNK
