"""The book of policies: a YAML file, checked, versioned by its content, reloaded while the server runs."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal, Protocol

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from safeside.adapters.adapter import Adapter
from safeside.errors import AccessError, ConfigError, InputError, UnknownNameError
from safeside.registry import did_you_mean
from safeside.serve.binding import check_binding
from safeside.serve.effective import EffectivePolicy
from safeside.serve.keys import Caller
from safeside.serve.merging import strictest
from safeside.serve.rules import DEFAULT_HOLD_BACK, DEFAULT_ON_ERROR, Name, Policy, PolicyMode
from safeside.serve.yaml_files import parse_record, read_file
from safeside.types import MAX_STRENGTH

_VERSION_DIGITS = 12
Place = Annotated[str, Field(min_length=1)]


def _as_tuple(value: object) -> object:
    return (value,) if isinstance(value, str) else value


Names = Annotated[tuple[Name, ...], Field(min_length=1), BeforeValidator(_as_tuple)]
"""One name, or a list of names."""


class RequestSafety(Protocol):
    """What a request may ask for: the wire's ``safety`` object, or anything with these three."""

    @property
    def policy(self) -> str | None:
        """A named policy, on top of those that hold anyway."""
        ...

    @property
    def strength(self) -> float | None:
        """The least strength; with a key that may loosen, the exact one."""
        ...

    @property
    def mode(self) -> PolicyMode | None:
        """``enforce`` lets every rule act; ``shadow`` none, and needs a key that may loosen."""
        ...


class PolicyFile(BaseModel):
    """The file that ``--policy`` names."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    adapters: dict[Name, Place] = {}
    """By name, the deployment's guards and aligners: a folder, a hub name or builtin:harm."""
    genes: dict[Name, Place] = {}
    """By name, the folders of genes that are live in the base for everybody, from the server's start on."""
    allow_mismatch: Literal["weights"] | None = None
    """``weights`` lets adapters run on other weights than theirs, by a gene too; then every verdict says so."""
    include: tuple[str, ...] = ()
    """Further files of policies, relative to this one."""
    policies: dict[Name, Policy] = {}
    """By name."""
    deployment: Names
    """Policies that hold for everybody."""
    tenants: dict[Name, Names] = {}
    """By tenant, policies that hold for its requests as well."""


class PolicyLibrary(BaseModel):
    """A file that others include."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    policies: dict[Name, Policy]
    """By name."""


@dataclass(frozen=True, slots=True)
class _Adapters:
    """What is loaded."""

    guards: Mapping[str, Adapter] = field(default_factory=dict)
    aligners: tuple[str, ...] = ()
    genes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Edition:
    """One content of the files."""

    file: PolicyFile
    policies: Mapping[str, Policy]
    version: str

    def merged(self, names: Sequence[str], mode: PolicyMode | None = None) -> Policy:
        """The strictest of them; what the deployment leaves out has its default, which the others cannot loosen."""
        policies = [self.policies[name] for name in names]
        if set(self.file.deployment) <= set(names):
            held = strictest([self.policies[name] for name in self.file.deployment])
            policies.append(
                Policy(
                    on_error=DEFAULT_ON_ERROR if held.on_error is None else None,
                    hold_back=DEFAULT_HOLD_BACK if held.hold_back is None else None,
                )
            )
        return strictest(policies, mode)

    def known_to(self, caller: Caller) -> tuple[str, ...]:
        own = self.names_for(caller.tenant)
        sees_all = caller.is_admin or caller.may_loosen or not caller.key
        others = {} if sees_all else self.file.tenants
        hidden = {name for names in others.values() for name in names} - set(own)
        return tuple(name for name in self.policies if name not in hidden)

    def names_for(self, tenant: str) -> tuple[str, ...]:
        return (*self.file.deployment, *self.file.tenants.get(tenant, ()))


class PolicyBook:
    """The policies in force.  Every method may be called from any thread."""

    def __init__(self, path: Path, edition: _Edition) -> None:
        self._path = path
        self._edition = edition
        self._adapters: _Adapters | None = None
        self._lock = threading.Lock()  # of those that change it; readers take the edition as it is

    @classmethod
    def load(cls, path: str | Path) -> PolicyBook:
        """The book of a YAML file; what is wrong with it is a ConfigError."""
        return cls(Path(path), _read(Path(path)))

    @property
    def version(self) -> str:
        """12 hexadecimal digits of the hash of the files' contents."""
        return self._edition.version

    @property
    def adapters(self) -> Mapping[str, str]:
        """By name, where the deployment's guards and aligners are."""
        return self._edition.file.adapters

    @property
    def genes(self) -> Mapping[str, str]:
        """By name, the folders of the deployment's genes."""
        return self._edition.file.genes

    @property
    def allow_mismatch(self) -> Literal["weights"] | None:
        """What ``load_adapter`` is told."""
        return self._edition.file.allow_mismatch

    @property
    def policies(self) -> Mapping[str, Policy]:
        """By name, every policy of the book."""
        return self._edition.policies

    @property
    def tenants(self) -> Mapping[str, tuple[str, ...]]:
        """By tenant, the policies that hold for it beside the deployment's."""
        return self._edition.file.tenants

    def bind(self, guards: Mapping[str, Adapter], aligners: Sequence[str], genes: Sequence[str] = ()) -> None:
        """Use these adapters from now on: call it at the start, and after every load or unload.

        A policy that names one that is missing, a label or preset that it does not have, or a gene, is a ConfigError,
        and the adapters before stay: so an adapter that a policy needs cannot be unloaded.
        """
        adapters = _Adapters(dict(guards), tuple(aligners), tuple(genes))
        with self._lock:
            _check(self._edition, adapters)
            self._adapters = adapters

    def reload(self) -> str:
        """Read the file again and return the new version; when it is broken, a ConfigError, and the old one stays."""
        edition = _read(self._path)
        with self._lock:
            if (edition.file.genes, edition.file.allow_mismatch) != (self.genes, self.allow_mismatch):
                raise ConfigError(f"{self._path}: genes and allow_mismatch hold from the start on. Restart the server.")
            if self._adapters is not None:
                _check(edition, self._adapters)
            self._edition = edition
        return edition.version

    def known_to(self, caller: Caller) -> tuple[str, ...]:
        """The policies that a caller is told of: those that hold for it, and those that are no tenant's.

        An administrator, a key that may loosen, and whoever asks a server without keys are told of all.
        """
        return self._edition.known_to(caller)

    def names_for(self, tenant: str) -> tuple[str, ...]:
        """The policies that hold for a tenant, the deployment's first."""
        return self._edition.names_for(tenant)

    def resolve(self, caller: Caller, safety: RequestSafety | None = None) -> EffectivePolicy:
        """What holds for one request: the strictest of deployment, tenant and request.

        A request that asks for less is an AccessError unless its key may loosen, which then gets what it asks for: the
        policy that it names and no other, its strength exactly, its mode.  Neither can have texts logged: that is the
        deployment's and the tenant's to say.  A policy that the caller does not know of is an UnknownNameError, a
        strength out of bounds, or one where no aligner is loaded, an InputError.
        """
        edition, adapters = self._edition, self._adapters or _Adapters()
        asked = safety.strength if safety is not None else None
        if asked and self._adapters is not None and not adapters.aligners:
            raise InputError("A strength was asked for, but no aligner is loaded here to have one. Leave it out.")
        names = _chosen(edition, caller, safety.policy if safety is not None else None)
        mode = safety.mode if safety is not None else None
        if mode == "shadow" and not caller.may_loosen:
            raise AccessError("Mode 'shadow' lets nothing act, which this key may not ask for. Leave it out.")
        try:
            policy = edition.merged(names, mode)
            if policy.audit_text and not edition.merged(edition.names_for(caller.tenant)).audit_text:
                policy = policy.model_copy(update={"audit_text": False})
            found = EffectivePolicy("+".join(names), edition.version, policy, adapters.guards, adapters.aligners)
            return _with_strength(found, caller, asked)
        except ConfigError as error:
            raise InputError(f"Policies {', '.join(names)} cannot hold together: {error}") from error


def _chosen(edition: _Edition, caller: Caller, asked: str | None) -> tuple[str, ...]:
    """The policies that hold, each named once."""
    known = edition.known_to(caller)
    if asked is not None and asked not in known:
        raise UnknownNameError(did_you_mean("policy", asked, list(known)))
    if asked is not None and caller.may_loosen:
        return (asked,)
    names = edition.names_for(caller.tenant) + (() if asked is None else (asked,))
    return tuple(dict.fromkeys(names))


def _with_strength(found: EffectivePolicy, caller: Caller, asked: float | None) -> EffectivePolicy:
    found.strengths()  # rules that cannot meet are told now
    if asked is None:
        return found
    ceiling = MAX_STRENGTH if found.policy.ceiling is None else found.policy.ceiling
    if not 0.0 <= asked <= (MAX_STRENGTH if caller.may_loosen else ceiling):  # also refuses NaN
        raise InputError(f"A strength under policy {found.name} must lie in [0, {ceiling:g}]; got {asked}.")
    if caller.may_loosen:
        return replace(found, exact_strength=asked)
    if asked < found.policy.floor:
        raise AccessError(
            f"Strength {asked:g} is below the floor {found.policy.floor:g} of policy {found.name}, which this key may "
            "not loosen. Ask for more, or for none."
        )
    return replace(found, policy=found.policy.model_copy(update={"floor": asked}))


def _read(path: Path) -> _Edition:
    """The content of a file and of those that it includes."""
    content = read_file(path)
    file = parse_record(PolicyFile, path, content)
    digest = hashlib.sha256(content)
    policies = dict(file.policies)
    for name in file.include:
        other = path.parent / name
        more = read_file(other)
        digest.update(b"\0" + name.encode() + b"\0" + more)
        library = parse_record(PolicyLibrary, other, more)
        if twice := sorted(set(policies) & set(library.policies)):
            raise ConfigError(f"{other}: policy {', '.join(twice)} stands in another file already. Rename one.")
        policies |= library.policies
    edition = _Edition(file, policies, digest.hexdigest()[:_VERSION_DIGITS])
    _check_names(path, edition)
    return edition


def _check_names(path: Path, edition: _Edition) -> None:
    if twice := sorted(set(edition.file.adapters) & set(edition.file.genes)):
        raise ConfigError(f"{path}: {', '.join(twice)} is both an adapter and a gene. Give each a name of its own.")
    for names in (edition.file.deployment, *edition.file.tenants.values()):
        for name in names:
            if name not in edition.policies:
                raise ConfigError(f"{path}: {did_you_mean('policy', name, list(edition.policies))}")


def _check(edition: _Edition, adapters: _Adapters) -> None:
    """Every policy, and all that hold together for somebody, against what is loaded."""
    for name, policy in edition.policies.items():
        check_binding(name, policy, adapters.guards, adapters.aligners, adapters.genes)
    for tenant in ("", *edition.file.tenants):
        names = edition.names_for(tenant)
        found = EffectivePolicy("+".join(names), "", edition.merged(names), adapters.guards, adapters.aligners)
        found.strengths()
        found.stop_rules()
