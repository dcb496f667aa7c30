"""The table of the audit log, and the databases that can hold it durably."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from sqlalchemy import (
    JSON,
    BigInteger,
    Column,
    Connection,
    DateTime,
    Engine,
    Float,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    create_engine,
    event,
    make_url,
    text,
)
from sqlalchemy.engine import URL
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import ArgumentError, DBAPIError, SQLAlchemyError
from sqlalchemy.pool import ConnectionPoolEntry

from safeside.errors import ConfigError, MissingExtraError

WAIT_S = 10  # for a lock, for a server to answer

_metadata = MetaData()
DECISIONS = Table(
    "safeside_decisions",
    _metadata,
    Column("number", BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=True),
    Column("time", DateTime(timezone=True), nullable=False),
    Column("trace_id", String(64), nullable=False, index=True),
    Column("tenant", String(64), nullable=False),
    Column("stage", String(16), nullable=False),
    Column("policy", Text, nullable=False),
    Column("policy_version", String(64), nullable=False),
    Column("adapters", JSON, nullable=False),
    Column("scores", JSON, nullable=False),
    Column("strength", Float, nullable=False),
    Column("action", String(16), nullable=False),
    Column("intended", String(16), nullable=False),
    Column("reason", Text, nullable=False),
    Column("text_hash", String(64), nullable=False),
    Column("text", Text, nullable=True),
    sqlite_autoincrement=True,  # no number is used twice
)
"""One row for each decision; ``text`` is null unless the policy keeps it."""

_REFUSAL = "the audit log is append-only"
_SQLITE_TRIGGERS = [
    f"CREATE TRIGGER IF NOT EXISTS {DECISIONS.name}_{what.lower()} BEFORE {what} ON {DECISIONS.name} "
    f"BEGIN SELECT RAISE(ABORT, '{_REFUSAL}'); END"
    for what in ("UPDATE", "DELETE")
] + [
    # INSERT OR REPLACE would delete without firing the trigger of DELETE.
    f"CREATE TRIGGER IF NOT EXISTS {DECISIONS.name}_replace BEFORE INSERT ON {DECISIONS.name} "
    f"WHEN EXISTS (SELECT 1 FROM {DECISIONS.name} WHERE number = NEW.number) "
    f"BEGIN SELECT RAISE(ABORT, '{_REFUSAL}'); END"
]
_POSTGRESQL_TRIGGERS = [
    f"CREATE OR REPLACE FUNCTION {DECISIONS.name}_refuse() RETURNS trigger LANGUAGE plpgsql AS "
    f"$$ BEGIN RAISE EXCEPTION '{_REFUSAL}'; END $$",
    f"CREATE OR REPLACE TRIGGER {DECISIONS.name}_change BEFORE UPDATE OR DELETE ON {DECISIONS.name} "
    f"FOR EACH ROW EXECUTE FUNCTION {DECISIONS.name}_refuse()",
    f"CREATE OR REPLACE TRIGGER {DECISIONS.name}_truncate BEFORE TRUNCATE ON {DECISIONS.name} "
    f"FOR EACH STATEMENT EXECUTE FUNCTION {DECISIONS.name}_refuse()",
]


def open_database(url: str) -> Engine:
    """An engine on a database with the table and its triggers, made if missing.

    One that cannot be reached, is no SQLite file or PostgreSQL server, or would not be durable is a ConfigError.
    """
    parsed = _parse(url)
    try:
        if parsed.get_backend_name() == "sqlite":
            engine, triggers = _sqlite(parsed), _SQLITE_TRIGGERS
        else:
            engine, triggers = _postgresql(parsed), _POSTGRESQL_TRIGGERS
        return _prepared(engine, triggers)
    except (SQLAlchemyError, OSError) as error:
        shown = parsed.render_as_string(hide_password=True)
        raise ConfigError(f"The audit log {shown} cannot be opened: {first_line(error)}") from error
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"The audit log's database needs {error.name!r}, which is not installed. Run: pip install {error.name}"
        ) from error


def first_line(error: Exception) -> str:
    """What the database says, without the statement, whose parameters may hold texts."""
    cause = error.orig if isinstance(error, DBAPIError) and error.orig is not None else error
    return str(cause).strip().partition("\n")[0] or type(cause).__name__


def _parse(url: str) -> URL:
    try:
        parsed = make_url(url)
    except ArgumentError as error:  # its message would show a password
        raise ConfigError("The audit log's URL cannot be read; expected such as sqlite:///audit.db.") from error
    kind = parsed.get_backend_name()
    if kind not in ("sqlite", "postgresql"):
        raise ConfigError(f"The audit log cannot be in {kind!r}; expected sqlite:///FILE or postgresql+psycopg://...")
    if kind == "sqlite" and parsed.database in (None, "", ":memory:"):
        raise ConfigError("An audit log in memory is not durable; expected a file, such as sqlite:///audit.db.")
    return parsed


def _sqlite(url: URL) -> Engine:
    path = Path(str(url.database))
    os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))  # its owner's only, and so are the files beside it
    engine = create_engine(url, connect_args={"timeout": WAIT_S})

    @event.listens_for(engine, "connect")
    def _settings(connection: DBAPIConnection, entry: ConnectionPoolEntry) -> None:
        cursor = connection.cursor()
        cursor.execute("PRAGMA journal_mode = WAL")
        cursor.execute("PRAGMA synchronous = FULL")
        cursor.close()

    return engine


def _postgresql(url: URL) -> Engine:
    options = f"-c synchronous_commit=on -c statement_timeout={WAIT_S * 1000}"
    return create_engine(url, pool_pre_ping=True, connect_args={"connect_timeout": WAIT_S, "options": options})


def _prepared(engine: Engine, triggers: Sequence[str]) -> Engine:
    """The engine once table and triggers are there; where they cannot be, nothing of it stays open."""
    try:
        with engine.begin() as connection:
            _check_syncs(connection)
            _metadata.create_all(connection)
            for trigger in triggers:
                connection.execute(text(trigger))
    except BaseException:
        engine.dispose()
        raise
    return engine


def _check_syncs(connection: Connection) -> None:
    if connection.dialect.name == "postgresql" and connection.execute(text("SHOW fsync")).scalar_one() != "on":
        raise ConfigError("This PostgreSQL server runs with fsync=off and keeps nothing through a crash. Turn it on.")
