"""Something that has to run in the engine's thread, between two passes."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Answer = TypeVar("Answer")


@dataclass(slots=True)
class Task(Generic[Answer]):
    """A function for the engine's thread, and what becomes of it."""

    run: Callable[[], Answer]
    is_exclusive: bool
    """Whether it waits until no answer is being written."""
    answer: Future[Answer] = field(default_factory=Future)

    def do(self) -> None:
        """Run it, unless whoever asked has given up."""
        if not self.answer.set_running_or_notify_cancel():
            return
        try:
            self.answer.set_result(self.run())
        except Exception as error:  # handed to whoever asked
            self.answer.set_exception(error)
