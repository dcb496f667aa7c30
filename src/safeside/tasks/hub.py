"""Public sets on the Hugging Face hub, at a pinned revision, through ``datasets``.

A copy on disk is taken first: a folder ``hub/owner/name/revision`` under the data root, as
``hf download owner/name --repo-type dataset --revision REVISION --local-dir FOLDER`` leaves it.  It is read by the same
call.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import datasets
from datasets.exceptions import DatasetsError

from safeside.errors import InputError
from safeside.tasks.sources import hub_place


def read_hub(place: str, root: Path) -> Iterator[tuple[int, dict[str, object]]]:
    """Rows of ``hub:owner/name:config@revision#split`` with their numbers, from 1.

    A place of another form is a ConfigError, for a branch can change; a set that cannot be had is an InputError.
    """
    found = hub_place(place)
    copy = found.copy_in(root)
    name = str(copy) if copy.is_dir() else found.name
    try:
        rows = datasets.load_dataset(name, found.config, split=found.split, revision=found.revision)
    except (OSError, ValueError, DatasetsError) as error:
        raise InputError(
            f"{place} cannot be read: {error}. Check name, split and network, or put a copy into {copy}."
        ) from error
    yield from enumerate((dict(row) for row in rows), 1)
