"""API keys: random, hashed at rest, compared in constant time.

A key is 256 random bits, so one round of SHA-256 is as good as a slow hash: there is nothing to guess.  The file holds
a hash, a tenant and rights, never a key.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Annotated

import yaml
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from safeside.errors import ConfigError, UnknownKeyError, problems_of
from safeside.serve.limits import NO_LIMITS, Limits
from safeside.serve.rules import Name
from safeside.serve.yaml_files import parse_record

_PREFIX = "safeside-"
_BEARER = "bearer "
_LONGEST_HEADER = 1024  # characters: longer ones are no key of ours


@dataclass(frozen=True, slots=True)
class Caller:
    """Who sent a request, and what its key allows."""

    tenant: str
    """Whose policy holds and whose name is in the audit log."""
    key: str = ""
    """The key's name in the file of keys: what its limits are counted by."""
    is_admin: bool = False
    """May load and unload adapters and read policies."""
    may_loosen: bool = False
    """May ask for less than its policy demands: for testers and operators."""
    limits: Limits = NO_LIMITS
    """Its rates and sizes."""


class KeyRecord(BaseModel):
    """One key in the file of keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
    """Hash of the whole key, in hexadecimal."""
    tenant: Name
    """Whose key it is."""
    is_admin: bool = False
    """May load and unload adapters."""
    may_loosen: bool = False
    """May ask for less than its policy demands."""
    limits: Limits = NO_LIMITS
    """Rates and sizes."""


class KeyFile(BaseModel):
    """The file of keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    keys: Annotated[dict[Name, KeyRecord], Field(min_length=1)]
    """By the key's name."""


class Keys:
    """The known keys, by name."""

    def __init__(self, records: Mapping[str, KeyRecord]) -> None:
        self._records = dict(records)

    @classmethod
    def load(cls, path: str | Path) -> Keys:
        """The keys of a YAML file; one that cannot be read or is not valid is a ConfigError."""
        found = parse_record(KeyFile, Path(path))
        hashes = [record.sha256 for record in found.keys.values()]
        if len(set(hashes)) < len(hashes):
            raise ConfigError(f"{path}: two names have the same key. Give each caller a key of its own.")
        return cls(found.keys)

    @property
    def tenants(self) -> dict[str, str]:
        """By the key's name, whose it is."""
        return {name: record.tenant for name, record in self._records.items()}

    def authenticate(self, header: str | None) -> Caller:
        """Who sent ``Authorization: Bearer KEY``; anybody else is an UnknownKeyError.

        Every known key is compared, in constant time, whatever was sent.
        """
        sent = _sha256(_key_of(header))
        found = None
        for name, record in self._records.items():
            if hmac.compare_digest(record.sha256, sent):
                found = name
        if found is None:
            raise UnknownKeyError("This needs a key that the server knows. Send 'Authorization: Bearer KEY'.")
        record = self._records[found]
        return Caller(record.tenant, found, record.is_admin, record.may_loosen, record.limits)


def new_key() -> tuple[str, str]:
    """A fresh key of 256 random bits, and the hash that goes into the file of keys."""
    key = _PREFIX + secrets.token_urlsafe(32)
    return key, _sha256(key)


def make_key(path: str | Path, name: str, rights: Mapping[str, object]) -> str:
    """Add a fresh key called ``name`` to the file (made if missing, for its owner only) and return it, once.

    ``rights`` holds the fields of KeyRecord but the hash.  A name that is taken, and one that cannot be, is a
    ConfigError.
    """
    path = Path(path)
    known = parse_record(KeyFile, path).keys if path.exists() else {}
    if name in known:
        raise ConfigError(f"{path} has a key called {name!r} already. Choose another name, or take that entry out.")
    key, sha256 = new_key()
    try:
        file = KeyFile.model_validate({"keys": {**known, name: {"sha256": sha256, **rights}}})
    except ValidationError as error:
        raise ConfigError(f"A key cannot be made: {problems_of(error)}") from error
    content = file.model_dump(mode="json", exclude_defaults=True)
    try:
        _write_private(path, yaml.safe_dump(content, sort_keys=False))
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}.") from error
    return key


def _write_private(path: Path, text: str) -> None:
    """Put a file in the place of another in one step; only its owner can read it, from the first byte on."""
    with NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.", delete=False, encoding="utf-8") as handle:
        temporary = Path(handle.name)
        try:
            handle.write(text)
            handle.flush()
            os.fsync(handle.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def _key_of(header: str | None) -> str:
    if header is None or len(header) > _LONGEST_HEADER or not header.lower().startswith(_BEARER):
        return ""
    return header[len(_BEARER) :].strip()


def _sha256(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()
