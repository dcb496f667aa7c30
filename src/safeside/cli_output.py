"""How commands print, and what they say of an extra that is missing: shared by the files of the command line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager

from safeside.errors import MissingExtraError, SafesideError


@contextmanager
def extra(name: str) -> Iterator[None]:
    """A missing optional dependency becomes the line that installs it."""
    try:
        yield
    except ImportError as error:
        if isinstance(error, SafesideError):
            raise
        raise MissingExtraError(
            f"This command needs {error.name!r}, which is not installed. Run: pip install 'safeside[{name}]'"
        ) from error


def print_json(values: object) -> None:
    """Values as JSON on standard output."""
    print(json.dumps(values, indent=2))


def print_summary(values: dict[str, object], title: str, as_json: bool) -> None:
    """Facts of a finished command, as JSON or as a table."""
    if as_json:
        print_json(values)
    else:
        from safeside.terminal import table

        table(["fact", "value"], [[key, str(value)] for key, value in values.items()], title=title)


def print_rows(rows: list[dict[str, object]], title: str, as_json: bool) -> None:
    """Tidy rows, as JSON or as a table."""
    if as_json:
        print_json(rows)
    else:
        from safeside.terminal import table

        columns = list(rows[0])
        table(columns, [[cell(row[column]) for column in columns] for row in rows], title=title)


def cell(value: object) -> str:
    """What stands in a table for a value."""
    return f"{value:.4f}" if isinstance(value, float) else str(value)
