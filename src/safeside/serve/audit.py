"""The append-only log of decisions.

A record is durable when ``append`` returns.  One thread writes: what waits while it commits goes into its next
transaction, so that many requests share the price of one write to the disk.
"""

from __future__ import annotations

import hashlib
import hmac
import queue
import secrets
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Literal

from sqlalchemy import Connection, insert
from sqlalchemy.exc import SQLAlchemyError

from safeside.errors import AuditError, ConfigError
from safeside.moderation import finite
from safeside.serve.audit_tables import DECISIONS, WAIT_S, first_line, open_database
from safeside.serve.rules import Action, Stage

_SHORTEST_KEY = 16  # bytes: with fewer, the hash of a text that can be guessed is worth guessing
_MOST_AT_ONCE = 256
_Row = dict[str, object]
Subject = Stage | Literal["moderation"]
"""What was judged: of a moderation a text by itself, which nothing follows."""
Outcome = Action | Literal["failed", "abandoned"]
"""What was done; an answer that could not be given ``failed``, and one whose client left was ``abandoned``."""


@dataclass(frozen=True, slots=True)
class AuditRecord:
    """One decision: on a prompt, an answer or a text by itself; or how an answer ended without one."""

    trace_id: str
    """The request's, as in its response."""
    tenant: str
    """Whose request it was."""
    stage: Subject
    """What was judged."""
    policy: str
    """Names of the policies that held, joined by ``+``."""
    policy_version: str
    """Hash of the policy file's content."""
    action: Outcome
    """What was done."""
    adapters: Mapping[str, str] = field(default_factory=dict)
    """Fingerprint of each adapter by name."""
    scores: Mapping[str, float] = field(default_factory=dict)
    """By ``guard/label``; NaN where it could not be scored."""
    strength: float = 0.0
    """The highest strength in [0, 2]."""
    reason: str = ""
    """Why, without any of the user's words."""
    intended: Outcome | None = None
    """What would have been done if every rule acted, where that differs."""
    text: str = field(default="", repr=False)
    """What was judged: kept as a keyed hash, and as it is only where ``keep_text``."""
    keep_text: bool = False
    """The policy's ``audit_text``."""


class AuditLog:
    """An append-only table of decisions in a SQLite file or on a PostgreSQL server."""

    def __init__(self, url: str, *, key: bytes | None = None) -> None:
        """Open the log at ``url``, such as ``sqlite:///audit.db`` or ``postgresql+psycopg://user@host/name``.

        ``key`` is that of the hashes of texts; with one of this process only, which is what None means, they can be
        compared within one run.  A log that cannot be opened, and a key of under 16 bytes, is a ConfigError.
        """
        if key is not None and len(key) < _SHORTEST_KEY:
            raise ConfigError(f"The audit log's key has {len(key)} bytes; expected {_SHORTEST_KEY} or more.")
        self._key = key or secrets.token_bytes(32)
        self._engine = open_database(url)
        self._waiting: queue.SimpleQueue[tuple[_Row, Future[int]] | None] = queue.SimpleQueue()
        self._is_closed = False
        self._lock = threading.Lock()
        self._writer = threading.Thread(target=self._write, name="safeside-audit", daemon=True)
        self._writer.start()

    def append(self, record: AuditRecord) -> int:
        """The record's number, once it is durable; what cannot be made durable is an AuditError.

        Blocks for one write to the disk.  Any thread may call it.
        """
        (number,) = self.append_all([record])
        return number

    def append_all(self, records: Sequence[AuditRecord]) -> list[int]:
        """The numbers of several records, as by ``append``, in few writes; where one fails others may be written."""
        entries: list[tuple[_Row, Future[int]]] = [(self._row(record), Future()) for record in records]
        with self._lock:
            if self._is_closed:
                raise AuditError("The audit log is closed, so nothing may be decided any more. Open it again.")
            for entry in entries:
                self._waiting.put(entry)
        try:
            return [written.result(timeout=2 * WAIT_S) for _, written in entries]
        except TimeoutError as error:
            raise AuditError(
                f"The audit log has not answered for {2 * WAIT_S} s; the decision is not durable."
            ) from error

    def text_hash(self, text: str) -> str:
        """What the log keeps in place of a text: HMAC-SHA256 in hexadecimal."""
        return hmac.new(self._key, text.encode("utf-8", "surrogatepass"), hashlib.sha256).hexdigest()

    def close(self) -> None:
        """Write what waits and close every connection.  Safe to call twice."""
        with self._lock:
            if not self._is_closed:
                self._is_closed = True
                self._waiting.put(None)
        self._writer.join()
        self._engine.dispose()

    def _row(self, record: AuditRecord) -> _Row:
        return {
            "time": datetime.now(UTC),
            "trace_id": record.trace_id,
            "tenant": record.tenant,
            "stage": record.stage,
            "policy": record.policy,
            "policy_version": record.policy_version,
            "adapters": dict(record.adapters),
            "scores": {name: finite(score) for name, score in record.scores.items()},
            "strength": record.strength,
            "action": record.action,
            "intended": record.intended or record.action,
            "reason": record.reason,
            "text_hash": self.text_hash(record.text),
            "text": _storable(record.text) if record.keep_text else None,
        }

    def _write(self) -> None:
        """The writer's thread: one transaction after another until the log is closed."""
        while (first := self._waiting.get()) is not None:
            batch, is_last = [first], False
            while not self._waiting.empty() and len(batch) < _MOST_AT_ONCE:
                if (entry := self._waiting.get()) is None:
                    is_last = True
                    break
                batch.append(entry)
            self._commit(batch)
            if is_last:
                return

    def _commit(self, batch: Sequence[tuple[_Row, Future[int]]]) -> None:
        """Commit all in one transaction; where that fails, each in its own, so that none fails for another's sake."""
        try:
            with self._engine.begin() as connection:
                numbers = [_insert(connection, row) for row, _ in batch]
        except (SQLAlchemyError, ValueError, TypeError, OSError) as error:
            if len(batch) > 1:
                for entry in batch:
                    self._commit([entry])
                return
            problem = AuditError(
                f"A decision could not be written to the audit log: {first_line(error)}. It must not be acted on; see "
                "to the log's database and disk."
            )
            batch[0][1].set_exception(problem)
            return
        for number, (_, written) in zip(numbers, batch, strict=True):
            written.set_result(number)


def _insert(connection: Connection, row: _Row) -> int:
    key = connection.execute(insert(DECISIONS).values(row)).inserted_primary_key
    assert key is not None
    return int(key[0])


def _storable(text: str) -> str:
    """The text with what databases refuse, NUL and lone surrogates, spelled out."""
    return text.encode("utf-8", "backslashreplace").decode().replace("\0", r"\x00")
