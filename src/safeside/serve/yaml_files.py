"""YAML files into checked records; what is wrong is told with the file's name and the field's path."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from safeside.errors import ConfigError, problems_of

Record = TypeVar("Record", bound=BaseModel)
_LARGEST = 1 << 18  # bytes


class _StrictLoader(yaml.SafeLoader):
    """PyYAML's safe loader, which would let the last of two equal keys win in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[object] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(
                    None, None, f"a key must be text, put it in quotes; got {key!r}", key_node.start_mark
                )
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} stands twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def parse_record(kind: type[Record], path: Path, content: bytes | None = None) -> Record:
    """The record in a YAML file (or in its ``content``); anything that is not one is a ConfigError."""
    found = _parse(path, read_file(path) if content is None else content)
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: expected a mapping from names to values; got {type(found).__name__}.")
    try:
        return kind.model_validate(found)
    except ValidationError as error:
        raise ConfigError(f"{path}: {problems_of(error)}") from error


def read_file(path: Path) -> bytes:
    """The content of a file; one that cannot be read is a ConfigError."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from error


def _parse(path: Path, content: bytes) -> object:
    if len(content) > _LARGEST:
        raise ConfigError(f"{path} has {len(content):,} bytes; expected at most {_LARGEST:,}.")
    try:
        return yaml.load(content, _StrictLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # of dates and numbers that are none, too
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
