"""docs/reference/cli.md: what every command says of itself."""

from __future__ import annotations

import contextlib
import io

from typer.core import TyperGroup
from typer.main import get_command

from docgen.markdown import fence, page, prose
from docgen.source import module_doc
from safeside.cli import app

WIDTH = 110


def cli_page() -> str:
    """The help of ``safeside`` and of each command, in a terminal of one width."""
    parts = [prose(module_doc("safeside.cli")), _help([])]
    for name in command_names():
        parts += [f"## safeside {name}", _help(name.split())]
    return page("Command line", *parts)


def command_names() -> list[str]:
    """The commands, in the order of the help, each of a group after it."""
    names = []
    for name, command in get_command(app).commands.items():  # type: ignore[attr-defined]
        names.append(name)
        if isinstance(command, TyperGroup):
            names += [f"{name} {member}" for member in command.commands]
    return names


def _help(command: list[str]) -> str:
    """The console block of one ``--help``."""
    arguments = [*command, "--help"]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        get_command(app).main(arguments, prog_name="safeside", terminal_width=WIDTH, max_content_width=WIDTH)
    lines = (line.rstrip() for line in printed.getvalue().splitlines())
    return fence("\n".join([f"$ safeside {' '.join(arguments)}", *lines]), "console")
