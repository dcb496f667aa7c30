"""What the commands share: options, missing extras, and how results are printed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from safeside.errors import MissingExtraError, SafesideError
from safeside.types import Preset

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
BaseName = Annotated[str | None, typer.Option("--base", help="Base: 'builtin', a folder or a hub name.")]
PresetName = Annotated[Preset | None, typer.Option("--preset", help="The promised false-positive rate, by label.")]
Mismatch = Annotated[
    str | None, typer.Option(help="'weights' lets an adapter run on other weights, or with another chat template.")
]


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


def load_with_base(adapter: str, base_name: str | None, allow_mismatch: str | None = None) -> tuple[Any, Any]:
    """The adapter and its base; without ``--base`` the one that the adapter names."""
    from safeside.artifact import base_of, load_adapter

    base = base_of(adapter, base_name)
    return base, load_adapter(adapter, base, allow_mismatch=allow_mismatch)


def print_json(values: object) -> None:
    """Print plain values as JSON."""
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
    """A value as a table shows it."""
    return f"{value:.4f}" if isinstance(value, float) else str(value)
