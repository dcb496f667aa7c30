"""docs/reference/errors.md: the tree of errors, and the exit code of each."""

from __future__ import annotations

from collections.abc import Iterator

from docgen.markdown import code, fence, page, prose, table
from safeside.cli import _MISUSE
from safeside.errors import SafesideError


def errors_page() -> str:
    """The tree, and one row for each error."""
    rows = [
        [
            code(error.__name__),
            ", ".join(code(parent.__name__) for parent in error.__bases__),
            prose(str(error.__doc__)),
            "2" if issubclass(error, _MISUSE) else "1",
        ]
        for _, error in _walk(SafesideError)
    ]
    return page(
        "Errors",
        "Every error that safeside raises on purpose is a `SafesideError`. A message says what was wrong, what was "
        "expected and what to do, in that order. On the command line it is one line on standard error.",
        fence("\n".join(prefix + error.__name__ for prefix, error in _walk(SafesideError))),
        table(["error", "is also", "when", "exit code"], rows),
    )


def _walk(error: type[SafesideError], indent: str = "") -> Iterator[tuple[str, type[SafesideError]]]:
    """Each error with the branch that leads to it, in the order of the source."""
    if error is SafesideError:
        yield "", error
    children = [child for child in error.__subclasses__() if child.__module__ == SafesideError.__module__]
    for child in children:
        is_last = child is children[-1]
        yield indent + ("└── " if is_last else "├── "), child
        yield from _walk(child, indent + ("    " if is_last else "│   "))
