"""Every error that safeside raises on purpose.

SafesideError
├── ConfigError           (ValueError)     a recipe, policy or adapter configuration is not valid
├── UnknownNameError      (KeyError)       a name is not registered; the message suggests neighbours
├── InputError            (ValueError)     rows, messages, masks or strengths that cannot be used
├── UnsupportedError      (RuntimeError)   a way of running the base that is refused by name
├── AttachmentError       (RuntimeError)   attach, detach or a cache used in the wrong order
├── BlockedError          (RuntimeError)   a prompt was blocked before the base had read it to the end
├── NotFiniteError        (ArithmeticError) an aligner returned NaN or infinity
├── AccessError           (PermissionError) a caller may not do what was asked
│   └── UnknownKeyError                    the key is missing or unknown
├── LimitError            (RuntimeError)   a caller asked for more than its share
├── AuditError            (OSError)        a decision could not be made durable, so it must not be acted on
├── ServingError          (RuntimeError)   the server cannot answer now
│   └── DeadlineError                      the answer was not ready in time
├── ArtifactError         (ValueError)     an adapter folder cannot be used
│   ├── MismatchError                      it belongs to another base
│   └── FormatError                        it is damaged, unsafe or from a newer version
└── MissingExtraError     (ImportError)    an optional dependency is not installed

Messages say what was wrong, what was expected and what to do, in that order.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import ValidationError

from safeside.types import Verdict


class SafesideError(Exception):
    """Root of all errors raised by safeside."""


class ConfigError(SafesideError, ValueError):
    """A recipe, policy or adapter configuration is not valid."""


class UnknownNameError(SafesideError, KeyError):
    """A name is not registered."""

    def __str__(self) -> str:
        """The message as written (KeyError would show its repr)."""
        return str(self.args[0])


class InputError(SafesideError, ValueError):
    """Rows, messages, masks or strengths that cannot be used."""


class UnsupportedError(SafesideError, RuntimeError):
    """A way of running the base that is refused by name."""


class AttachmentError(SafesideError, RuntimeError):
    """Attach, detach or a cache used in the wrong order."""


class BlockedError(SafesideError, RuntimeError):
    """Every prompt of a batch was blocked by ``attach(intercept=...)``; ``Base.chat`` turns it into completions."""

    def __init__(self, message: str, verdicts: Sequence[Verdict] = ()) -> None:
        super().__init__(message)
        self.verdicts = tuple(verdicts)
        """The guard's verdict on each prompt."""


class NotFiniteError(SafesideError, ArithmeticError):
    """An aligner returned NaN or infinity."""


class AccessError(SafesideError, PermissionError):
    """A caller may not do what was asked."""


class UnknownKeyError(AccessError):
    """The key is missing or unknown."""


class LimitError(SafesideError, RuntimeError):
    """A caller asked for more than its share."""

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        """Seconds after which the same request would be admitted."""


class AuditError(SafesideError, OSError):
    """A decision could not be made durable, so it must not be acted on."""


class ServingError(SafesideError, RuntimeError):
    """The server cannot answer now."""


class DeadlineError(ServingError):
    """The answer was not ready in time."""


class ArtifactError(SafesideError, ValueError):
    """An adapter folder cannot be used."""


class MismatchError(ArtifactError):
    """The adapter belongs to another base."""


class FormatError(ArtifactError):
    """The adapter folder is damaged, unsafe or from a newer version."""


class MissingExtraError(SafesideError, ImportError):
    """An optional dependency is not installed."""


def problems_of(error: ValidationError) -> str:
    """What was wrong with the values, on one line: by field, and without the values, which may be a user's text."""
    found = [(".".join(map(str, problem["loc"])), _in_words_of_files(problem["msg"])) for problem in error.errors()]
    return "; ".join(": ".join(filter(None, told)) for told in found)


def _in_words_of_files(message: str) -> str:
    """Without pydantic's own prefix, and with lists for tuples, which TOML, JSON and YAML do not know."""
    plain = message.removeprefix("Value error, ")
    return plain.replace("a valid tuple", "a valid list").replace("Tuple should", "List should")
