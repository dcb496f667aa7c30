"""The book of policies: a YAML file, checked, versioned by its content, reloaded while the server runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Protocol

from pydantic import BaseModel, ConfigDict, Field

from safeside.adapters.adapter import Adapter
from safeside.serve.effective import EffectivePolicy
from safeside.serve.keys import Caller
from safeside.serve.rules import Name, Policy, PolicyMode

Place = Annotated[str, Field(min_length=1)]
Names = Annotated[tuple[Name, ...], Field(min_length=1)]


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
    include: tuple[str, ...] = ()
    """Further files of policies, relative to this one."""
    policies: dict[Name, Policy] = {}
    """By name."""
    deployment: Names
    """Policies that hold for everybody."""
    tenants: dict[Name, Names] = {}
    """By tenant, policies that hold for its requests as well."""


class PolicyBook:
    """The policies in force.  Every method may be called from any thread."""

    @classmethod
    def load(cls, path: str | Path) -> PolicyBook:
        """The book of a YAML file; what is wrong with it is a ConfigError."""
        raise NotImplementedError

    @property
    def version(self) -> str:
        """12 hexadecimal digits of the hash of the files' contents."""
        raise NotImplementedError

    @property
    def adapters(self) -> Mapping[str, str]:
        """By name, where the deployment's guards and aligners are."""
        raise NotImplementedError

    @property
    def policies(self) -> Mapping[str, Policy]:
        """By name, every policy of the book."""
        raise NotImplementedError

    def bind(self, guards: Mapping[str, Adapter], aligners: Sequence[str], genes: Sequence[str] = ()) -> None:
        """Use these adapters from now on: call it at the start, and after every load or unload.

        A policy that names one that is missing, a label or preset that it does not have, or a gene, is a ConfigError,
        and the adapters before stay: so an adapter that a policy needs cannot be unloaded.
        """
        raise NotImplementedError

    def reload(self) -> str:
        """Read the file again and return the new version; when it is broken, a ConfigError, and the old one stays."""
        raise NotImplementedError

    def resolve(self, caller: Caller, safety: RequestSafety | None = None) -> EffectivePolicy:
        """What holds for one request: the strictest of deployment, tenant and request.

        A request that asks for less is an AccessError unless its key may loosen; an unknown policy is an
        UnknownNameError, a strength out of bounds an InputError.
        """
        raise NotImplementedError
