"""What people see in a terminal: tables on standard output, progress on standard error."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

errors = Console(stderr=True, highlight=False, soft_wrap=True)


class RateColumn(TextColumn):
    """Items a second."""

    def __init__(self, unit: str) -> None:
        super().__init__("")
        self.unit = unit

    def render(self, task: object) -> Text:
        speed = task.finished_speed or task.speed  # type: ignore[attr-defined]
        return Text(f"{speed:,.1f} {self.unit}/s" if speed else "")


@contextlib.contextmanager
def progress_bar(title: str, total: int | None, unit: str = "rows") -> Iterator[Callable[[int], None]]:
    """A bar with rate and time left on standard error; yields a function that advances it."""
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), RateColumn(unit), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=errors) as bar:
        task: TaskID = bar.add_task(title, total=total)
        yield lambda count: bar.advance(task, count)


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
