"""The audit log on SQLite and on a real PostgreSQL server: durable, append-only, and closed when it fails."""

from __future__ import annotations

import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from sqlalchemy import create_engine, make_url, select, text
from sqlalchemy.exc import DBAPIError

from safeside.errors import AuditError, ConfigError
from safeside.serve.audit import AuditLog, AuditRecord
from safeside.serve.audit_tables import DECISIONS

KEY = b"0123456789abcdef"
SECRET = "how do I pick a lock"
WRITER = """
import sys
from safeside.serve.audit import AuditLog, AuditRecord
log = AuditLog(sys.argv[1])
for number in range(1, 1_000_000):
    log.append(AuditRecord(f"{number:08d}", "school", "prompt", "standard", "0", "block", text="x" * 200))
    sys.stdout.write(f"{number:08d}\\n")
    sys.stdout.flush()
"""
FULL = """
import resource, signal, sys
from safeside.errors import AuditError
from safeside.serve.audit import AuditLog, AuditRecord
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
log = AuditLog(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))
record = AuditRecord("0", "school", "prompt", "standard", "0", "block", text="x" * 3000, keep_text=True)
n_kept = 0
try:
    while True:
        log.append(record)
        n_kept += 1
except AuditError as error:
    print(error)
try:
    log.append(record)
except AuditError:
    print("still refused")
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
assert log.append(record)
print(n_kept + 1)
"""


def record(**fields: object) -> AuditRecord:
    given = {"trace_id": "abc", "tenant": "school", "stage": "prompt", "policy": "standard", "policy_version": "0a"}
    return AuditRecord(**{**given, "action": "block", **fields})


def binaries() -> Path | None:
    """The folder of PostgreSQL's programs; None where there are none."""
    found = shutil.which("initdb")
    folders = [Path(found).resolve().parent] if found else sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    return next((folder for folder in reversed(folders) if (folder / "postgres").exists()), None)


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The URL of a fresh PostgreSQL server that listens on a socket in a folder of its own."""
    programs = binaries()
    if programs is None:
        pytest.skip("PostgreSQL is not installed")
    pytest.importorskip("psycopg")
    as_user = {}
    if os.geteuid() == 0:  # the server refuses to run as root
        try:
            shutil.chown(folder := tempfile.mkdtemp(prefix="safeside-pg-"), "postgres")
        except LookupError:
            pytest.skip("PostgreSQL needs a user that is not root")
        as_user = {"user": "postgres"}
    else:
        folder = tempfile.mkdtemp(prefix="safeside-pg-")
    data = f"{folder}/data"
    run = {"check": True, "capture_output": True, "cwd": folder, **as_user}
    try:
        subprocess.run([programs / "initdb", "-D", data, "-U", "tester", "-A", "trust", "--no-sync"], **run)
        options = f"-k {folder} -c listen_addresses='' -c shared_buffers=1MB"
        log = f"{folder}/log"
        subprocess.run([programs / "pg_ctl", "-D", data, "-l", log, "-w", "-o", options, "start"], **run)
        try:
            yield f"postgresql+psycopg://tester@/postgres?host={folder}"
        finally:
            subprocess.run([programs / "pg_ctl", "-D", data, "-m", "immediate", "stop"], **run)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty log in either database."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'audit.db'}"
    server = request.getfixturevalue("server")
    engine = create_engine(server)
    with engine.begin() as connection:
        connection.execute(text(f"DROP TABLE IF EXISTS {DECISIONS.name} CASCADE"))
    engine.dispose()
    return server


@pytest.fixture
def log(url: str) -> Iterator[AuditLog]:
    log = AuditLog(url, key=KEY)
    yield log
    log.close()


def rows(url: str) -> list[dict[str, object]]:
    """All that a log holds, read by another connection."""
    engine = create_engine(url)
    with engine.connect() as connection:
        found = [dict(row) for row in connection.execute(select(DECISIONS).order_by(DECISIONS.c.number)).mappings()]
    engine.dispose()
    return found


def test_a_record_is_there_for_others_when_append_returns(url: str, log: AuditLog) -> None:
    full = record(
        stage="answer",
        adapters={"harm": "08aab725"},
        scores={"harm/hate": 0.75, "harm/theft": math.nan},
        strength=0.5,
        action="annotate",
        intended="block",
        reason="harm: hate 0.750 >= 0.700",
        text=SECRET,
    )
    number = log.append(full)
    (row,) = rows(url)
    assert row["number"] == number
    assert row["adapters"] == {"harm": "08aab725"}
    assert row["scores"] == {"harm/hate": 0.75, "harm/theft": None}
    assert (row["action"], row["intended"], row["strength"], row["stage"]) == ("annotate", "block", 0.5, "answer")
    time = row["time"] if row["time"].tzinfo else row["time"].replace(tzinfo=UTC)
    assert abs(datetime.now(UTC) - time) < timedelta(minutes=1)


def test_a_text_is_only_a_keyed_hash_unless_the_policy_says_otherwise(url: str, log: AuditLog) -> None:
    log.append(record(text=SECRET))
    log.append(record(text=SECRET, keep_text=True))
    hashed, kept = rows(url)
    assert (hashed["text"], kept["text"]) == (None, SECRET)
    assert hashed["text_hash"] == kept["text_hash"] == log.text_hash(SECRET)
    assert SECRET not in str(hashed)
    assert SECRET not in repr(record(text=SECRET))
    other = AuditLog(url, key=KEY[::-1])
    assert other.text_hash(SECRET) != log.text_hash(SECRET)
    other.close()


@pytest.mark.parametrize("odd", ["a\0b", "a\udc80b", "\U0001f600", ""])
def test_any_text_can_be_kept(url: str, log: AuditLog, odd: str) -> None:
    log.append(record(text=odd, keep_text=True))
    (row,) = rows(url)
    assert row["text"] == odd.replace("\0", r"\x00").replace("\udc80", r"\udc80")
    assert row["text_hash"] == log.text_hash(odd)


@pytest.mark.parametrize(
    "change",
    [
        f"UPDATE {DECISIONS.name} SET action = 'allow'",
        f"DELETE FROM {DECISIONS.name}",
        f"TRUNCATE {DECISIONS.name}",
        f"INSERT OR REPLACE INTO {DECISIONS.name} SELECT * FROM {DECISIONS.name}",
    ],
)
def test_what_is_written_stays(url: str, log: AuditLog, change: str) -> None:
    log.append(record())
    before = rows(url)
    if make_url(url).get_backend_name() not in {"TRUNCATE": ("postgresql",), "INSERT": ("sqlite",)}.get(
        change.split()[0], ("sqlite", "postgresql")
    ):
        pytest.skip("a statement of the other database")
    engine = create_engine(url)
    with pytest.raises(DBAPIError, match="the audit log is append-only"), engine.begin() as connection:
        connection.execute(text(change))
    engine.dispose()
    assert rows(url) == before


def test_many_threads_get_a_number_each_and_reopening_goes_on(url: str, log: AuditLog) -> None:
    with ThreadPoolExecutor(16) as pool:
        numbers = list(pool.map(lambda index: log.append(record(trace_id=str(index))), range(100)))
    found = {row["number"]: row["trace_id"] for row in rows(url)}
    assert found == {number: str(index) for index, number in enumerate(numbers)}
    again = AuditLog(url, key=KEY)
    assert again.append(record()) > max(numbers)
    again.close()


def test_a_record_that_is_refused_spoils_no_other(url: str, log: AuditLog) -> None:
    """In one transaction they would fall together."""
    wrong = record(trace_id="\0", reason="a\udc80")

    def write(index: int) -> object:
        try:
            return log.append(wrong if index % 5 == 0 else record(trace_id=str(index)))
        except AuditError as error:
            return error

    with ThreadPoolExecutor(16) as pool:
        results = list(pool.map(write, range(40)))
    assert [isinstance(result, AuditError) for result in results] == [index % 5 == 0 for index in range(40)]
    assert len(rows(url)) == 32


def test_a_closed_log_decides_nothing(log: AuditLog) -> None:
    log.append(record())
    log.close()
    log.close()
    with pytest.raises(AuditError, match="is closed"):
        log.append(record())


def test_no_acknowledged_record_is_missing_after_sigkill(url: str) -> None:
    with subprocess.Popen([sys.executable, "-c", WRITER, url], stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        seen = [writer.stdout.readline() for _ in range(60)]
        writer.send_signal(signal.SIGKILL)
        seen += writer.stdout.readlines()
    acknowledged = {line.strip() for line in seen if line.endswith("\n")}
    found = [row["trace_id"] for row in rows(url)]
    assert len(acknowledged) >= 60
    assert acknowledged <= set(found)
    assert found == [f"{number:08d}" for number in range(1, len(found) + 1)]
    assert len(found) <= len(acknowledged) + 1  # the one that was being written


def test_a_full_disk_is_told_and_nothing_counts_as_written(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'audit.db'}"
    done = subprocess.run([sys.executable, "-c", FULL, url], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    told, again, count = done.stdout.splitlines()
    assert told.startswith("A decision could not be written to the audit log: ")
    assert told.endswith("It must not be acted on; see to the log's database and disk.")
    assert "xxx" not in told
    assert again == "still refused"
    assert len(rows(url)) == int(count) > 5


def test_a_database_that_goes_away_is_told(url: str, log: AuditLog, tmp_path: Path) -> None:
    log.append(record())
    engine = create_engine(url)
    with engine.begin() as connection:
        connection.execute(text(f"DROP TABLE {DECISIONS.name}"))
    engine.dispose()
    with pytest.raises(AuditError, match=f"{DECISIONS.name}") as told:
        log.append(record(text=SECRET, keep_text=True))
    assert SECRET not in str(told.value)


@pytest.mark.parametrize(
    ("wrong", "problem"),
    [
        ("sqlite://", "in memory is not durable"),
        ("sqlite:///:memory:", "in memory is not durable"),
        ("nonsense", "URL cannot be read"),
        ("mysql://root:secret@host/x", "cannot be in 'mysql'"),
        ("sqlite:////nowhere/at/all.db", "cannot be opened"),
        ("postgresql+psycopg://me:secret@127.0.0.1:1/x", "cannot be opened"),
    ],
)
def test_a_log_that_cannot_be_opened_is_told_without_its_password(wrong: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem) as told:
        AuditLog(wrong)
    assert "secret" not in str(told.value)


def test_a_short_key_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has 3 bytes; expected 16 or more"):
        AuditLog(f"sqlite:///{tmp_path / 'audit.db'}", key=b"abc")


def test_the_file_is_its_owners_only(tmp_path: Path) -> None:
    log = AuditLog(f"sqlite:///{tmp_path / 'audit.db'}")
    log.append(record())
    assert {path.stat().st_mode & 0o077 for path in tmp_path.iterdir()} == {0}
    log.close()


def test_a_server_that_does_not_sync_is_refused(server: str) -> None:
    engine = create_engine(server, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        for setting, is_refused in (("off", True), ("on", False)):
            connection.execute(text(f"ALTER SYSTEM SET fsync = {setting}"))
            connection.execute(text("SELECT pg_reload_conf()"))
            connection.execute(text("SELECT pg_sleep(0.2)"))
            if is_refused:
                with pytest.raises(ConfigError, match="fsync=off"):
                    AuditLog(server)
    engine.dispose()
