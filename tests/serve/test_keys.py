"""Keys: hashed at rest, compared in constant time, made once."""

from __future__ import annotations

import hashlib
import hmac
import stat
from pathlib import Path

import pytest

from safeside.errors import ConfigError, UnknownKeyError
from safeside.serve import keys as module
from safeside.serve.keys import Caller, Keys, make_key, new_key
from safeside.serve.limits import Limits


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keys.yaml"


def test_a_key_that_was_made_is_known(file: Path) -> None:
    limits = {"requests_per_minute": 5, "tokens_per_minute": None}
    key = make_key(file, "alice", {"tenant": "school", "may_loosen": True, "limits": limits})
    admin = make_key(file, "bob", {"tenant": "school", "is_admin": True})
    known = Keys.load(file)
    assert known.authenticate(f"Bearer {key}") == Caller(
        "school", "alice", may_loosen=True, limits=Limits(requests_per_minute=5)
    )
    assert known.authenticate(f"bearer  {admin} ").is_admin


def test_the_file_holds_hashes_and_is_its_owners_only(file: Path) -> None:
    key = make_key(file, "alice", {"tenant": "school"})
    text = file.read_text()
    assert key not in text
    assert hashlib.sha256(key.encode()).hexdigest() in text
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert [path.name for path in file.parent.iterdir()] == [file.name]  # nothing half-written stays


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "Bearer",
        "Bearer ",
        "Bearer wrong",
        "Basic {key}",
        "{key}",
        "Bearer {key}x",
        "Bearer " + "x" * 5000,
        "Bearer \u00fc\udc80",
    ],
)
def test_anything_else_is_refused(file: Path, header: str | None) -> None:
    key = make_key(file, "alice", {"tenant": "school"})
    with pytest.raises(UnknownKeyError, match="needs a key") as told:
        Keys.load(file).authenticate(header.format(key=key) if header is not None else None)
    assert key not in str(told.value)


def test_every_key_is_compared_whole(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = [make_key(file, name, {"tenant": "school"}) for name in ("alice", "bob", "carol")]
    known, compared, compare_digest = Keys.load(file), [], hmac.compare_digest

    def compare(first: str, second: str) -> bool:
        compared.append((first, second))
        return compare_digest(first, second)

    monkeypatch.setattr(module.hmac, "compare_digest", compare)
    for header in (f"Bearer {made[0]}", f"Bearer {made[2]}"):
        known.authenticate(header)
    with pytest.raises(UnknownKeyError):
        known.authenticate("Bearer x")
    assert len(compared) == 9
    assert {len(text) for pair in compared for text in pair} == {64}


def test_keys_are_long_and_never_the_same() -> None:
    made = [new_key() for _ in range(50)]
    assert len({key for key, _ in made}) == 50
    assert min(len(key) for key, _ in made) >= 43  # 256 bits in base64
    assert all(hashlib.sha256(key.encode()).hexdigest() == digest for key, digest in made)


@pytest.mark.parametrize(
    ("name", "rights", "problem"),
    [
        ("alice", {"tenant": "x"}, "has a key called 'alice' already"),
        ("b b", {"tenant": "x"}, "A key cannot be made: keys"),
        ("bob", {"tenant": ""}, "tenant"),
        ("bob", {"tenant": "x", "limits": {"tokens_per_minute": 0}}, "tokens_per_minute"),
    ],
)
def test_a_key_that_cannot_be_made_leaves_the_file_as_it_was(
    file: Path, name: str, rights: dict[str, object], problem: str
) -> None:
    make_key(file, "alice", {"tenant": "school"})
    before = file.read_bytes()
    with pytest.raises(ConfigError, match=problem):
        make_key(file, name, rights)
    assert file.read_bytes() == before


def test_a_folder_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be written: No such file"):
        make_key(tmp_path / "none" / "keys.yaml", "alice", {"tenant": "x"})


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("keys: {}", "keys"),
        ("keys: {a: {sha256: abc, tenant: t}}", "keys.a.sha256"),
        ("keys: {a: {key: secret, tenant: t}}", "keys.a"),
        (
            f"keys: {{a: {{sha256: '{'0' * 64}', tenant: t}}, b: {{sha256: '{'0' * 64}', tenant: u}}}}",
            "have the same key",
        ),
    ],
)
def test_a_file_that_is_not_valid_is_told(file: Path, text: str, problem: str) -> None:
    file.write_text(text)
    with pytest.raises(ConfigError, match=problem):
        Keys.load(file)
