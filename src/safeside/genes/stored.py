"""Files of JSON that this package writes beside weights, each with the number of its format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from safeside.errors import FormatError, problems_of

Stored = TypeVar("Stored", bound=BaseModel)


def read_stored(path: Path, model: type[Stored], newest: int, what: str) -> Stored:
    """What a file holds; one that is missing or broken, and a ``format`` other than ``newest``, is a FormatError."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        found = values["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FormatError(f"{path} is not {what}: {error!r}. Get the folder again.") from error
    if found != newest:
        raise FormatError(f"{path} has format {found!r}; this safeside reads format {newest}. Update safeside.")
    try:
        return model.model_validate_json(json.dumps(values))
    except ValidationError as error:
        raise FormatError(f"{path} is not {what}: {problems_of(error)}. Get the folder again.") from error
