"""Public sets on the Hugging Face hub, at a pinned revision, through ``datasets``.

A copy on disk is taken first: a folder ``hub/owner/name/revision`` under the data root, as
``hf download owner/name --repo-type dataset --revision REVISION --local-dir FOLDER`` leaves it.  It is read by the same
call.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import datasets
from datasets.exceptions import DatasetsError

from safeside.errors import ConfigError, InputError

_PLACE = re.compile(r"hub:(?P<name>[\w.-]+/[\w.-]+)(:(?P<config>[\w.-]+))?@(?P<revision>[0-9a-f]{40})#(?P<split>\w+)")


def read_hub(place: str, root: Path) -> Iterator[tuple[int, dict[str, object]]]:
    """Rows of ``hub:owner/name:config@revision#split`` with their numbers, from 1.

    A place of another form is a ConfigError, for a branch can change; a set that cannot be had is an InputError.
    """
    match = _PLACE.fullmatch(place)
    if match is None:
        raise ConfigError(
            f"{place!r} names no pinned set; expected hub:owner/name@REVISION#split or "
            "hub:owner/name:config@REVISION#split with a commit of 40 hex digits. Copy it from the set's page."
        )
    copy = root / "hub" / match["name"] / match["revision"]
    name = str(copy) if copy.is_dir() else match["name"]
    try:
        rows = datasets.load_dataset(name, match["config"], split=match["split"], revision=match["revision"])
    except (OSError, ValueError, DatasetsError) as error:
        raise InputError(
            f"{place} cannot be read: {error}. Check name, split and network, or put a copy into {copy}."
        ) from error
    yield from enumerate((dict(row) for row in rows), 1)
