"""Which texts a guard learnt from: hashes beside its weights, so that nothing is promised or measured on rows it knows.

A promised rate or a figure on rows that a guard learnt from is worth nothing.  The file holds 32 bits of each training
row's normalised text, so it tells whether a text that somebody has is among them (another one passes for one of a
million training rows with a chance of 0.02%), and never what the texts are.  It does not see near duplicates, a prompt
that was learnt with another answer, validation rows, or what a teacher or the base has read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from safeside.errors import FormatError
from safeside.tasks.leakage import text_of
from safeside.types import Example

LEARNT_FILE = "learnt.safetensors"
_NAME = "hashes"

Hashes = NDArray[np.uint32]


def hashes_of(examples: Sequence[Example]) -> Hashes:
    """Of each row's text, normalised, 32 bits of its sha256, in order."""
    digests = [hashlib.sha256(text_of(example).encode()).digest()[:4] for example in examples]
    return np.frombuffer(b"".join(digests), dtype="<u4").astype(np.uint32)


def save_learnt(folder: Path, examples: Sequence[Example], before: Path | None = None) -> None:
    """Keep the hashes of ``examples`` in an adapter's folder.

    With ``before``, the folder of the adapter that was taught further, its hashes are kept too; where that has none,
    nothing is written: half a record would pass for a whole one.
    """
    known = None if before is None else load_learnt(before)
    if before is not None and known is None:
        return
    hashes = np.unique(np.concatenate([hashes_of(examples), *([known] if known is not None else [])]))
    (folder / LEARNT_FILE).write_bytes(save({_NAME: hashes}))


def load_learnt(folder: Path) -> Hashes | None:
    """The hashes in an adapter's folder, rising; None where it keeps none.  A file that is broken is a FormatError."""
    path = folder / LEARNT_FILE
    if not path.is_file():
        return None
    try:
        found = load_file(path)[_NAME]
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise FormatError(f"{path} cannot be read: {error}. Get the folder again, or remove the file.") from error
    if found.dtype != np.uint32 or found.ndim != 1:
        raise FormatError(f"{path} holds {found.dtype} of shape {found.shape}; expected a row of uint32. Get it again.")
    return found


def are_learnt(examples: Sequence[Example], hashes: Hashes) -> list[bool]:
    """Whether each row's text is among the hashed ones."""
    return [bool(known) for known in np.isin(hashes_of(examples), hashes)]


def unseen_of(examples: Sequence[Example], hashes: Hashes | None) -> tuple[list[Example], int | None]:
    """The rows whose text is not among the hashed ones, and how many others there are (None: no record can tell)."""
    if hashes is None:
        return list(examples), None
    unseen = [row for row, known in zip(examples, are_learnt(examples, hashes), strict=True) if not known]
    return unseen, len(examples) - len(unseen)


def learnt_notes(name: str, n_learnt: int | None, why: str) -> list[str]:
    """What a user must be told of the rows that the guard called ``name`` learnt from, and ``why`` they were left out.

    Nothing where there were none.
    """
    if n_learnt is None:
        return [f"{name} keeps no record of the rows that it learnt from; make sure that yours are not among them"]
    return [f"{n_learnt} rows were left out: the guard learnt from them, and {why}"] if n_learnt else []
