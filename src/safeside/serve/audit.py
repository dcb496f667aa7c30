"""The append-only log of decisions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime


@dataclass(frozen=True, slots=True)
class AuditRecord:
    """One decision: on a prompt, or on an answer."""

    trace_id: str
    """The request's, as in its response."""
    tenant: str
    """Whose request it was."""
    stage: str
    """``prompt`` or ``answer``."""
    policy: str
    """Names of the policies that held, joined by ``+``."""
    policy_version: str
    """Hash of the policy file's content."""
    adapters: Mapping[str, str]
    """Fingerprint of each adapter by name."""
    scores: Mapping[str, float | None]
    """By ``guard/label``; None where it could not be scored."""
    strength: float
    """The highest strength in [0, 2]."""
    action: str
    """What was done."""
    reason: str = ""
    """Why, without any of the user's words."""
    intended: str = ""
    """What enforcement would have done, where the policy only watches; else the action."""
    text: str = field(default="", repr=False)
    """What was judged: kept as a keyed hash, or as it is where ``keep_text``."""
    keep_text: bool = False
    """The policy's ``audit_text``."""
    time: datetime | None = None
    """When, in UTC; now unless given."""


class AuditLog:
    """An append-only table of decisions in any database that SQLAlchemy speaks to."""

    def __init__(self, url: str, *, key: bytes) -> None:
        """``url`` such as ``sqlite:///audit.db`` or ``postgresql+psycopg://...``; ``key`` of the hashes of texts."""
        raise NotImplementedError

    def append(self, record: AuditRecord) -> int:
        """The record's number, once it is durable; what cannot be made durable is an AuditError.

        Blocks for one synchronous write; safe from several threads.
        """
        raise NotImplementedError

    def close(self) -> None:
        """Close every connection."""
        raise NotImplementedError
