"""What people see in a terminal: tables on standard output, progress on standard error."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, Task, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

errors = Console(stderr=True, highlight=False, soft_wrap=True)


class RateColumn(TextColumn):
    """Items a second."""

    def __init__(self) -> None:
        super().__init__("")

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:,.1f} {task.fields['unit']}/s" if speed else "")


class Advance(Protocol):
    """Moves a bar on by ``count`` items; ``total`` tells how many there are, once that is known."""

    def __call__(self, count: int, total: int | None = None) -> None: ...


@contextlib.contextmanager
def progress_bars(*bars: tuple[str, int | None, str]) -> Iterator[list[Advance]]:
    """Bars (title, total, unit) with rate and time left on standard error; each shows from its first item on."""
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), RateColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    progress = Progress(*columns, console=errors)

    def bar(title: str, total: int | None, unit: str) -> Advance:
        task = progress.add_task(title, total=total, visible=total is not None, unit=unit)

        def advance(count: int, total: int | None = None) -> None:
            progress.start()
            progress.update(task, advance=count, total=total, visible=True)

        return advance

    try:
        yield [bar(*values) for values in bars]
    finally:
        if progress.live.is_started:  # else it would leave an empty line
            progress.stop()


@contextlib.contextmanager
def progress_bar(title: str, total: int | None, unit: str = "rows") -> Iterator[Advance]:
    """One such bar; yields the function that advances it."""
    with progress_bars((title, total, unit)) as (advance,):
        yield advance


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], title: str | None = None) -> None:
    """Print an aligned table to standard output; numbers stand right."""
    result = Table(title=title, title_justify="left", title_style="bold", header_style="bold")
    for index, column in enumerate(columns):
        is_number = bool(rows) and all(_is_number(row[index]) for row in rows)
        result.add_column(column, justify="right" if is_number else "left", overflow="fold")
    for row in rows:
        result.add_row(*(Text(cell) for cell in row))  # Text: user's brackets are not markup
    width = None if sys.stdout.isatty() else 120
    Console(file=sys.stdout, width=width, highlight=False).print(result)


def _is_number(text: str) -> bool:
    return bool(text) and text.replace(",", "").replace("%", "").replace("-", "").replace(".", "").isdigit()


def note(message: str) -> None:
    """A line for people on standard error."""
    errors.print(Text(message))
