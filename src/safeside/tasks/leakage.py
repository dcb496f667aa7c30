"""Rows that stand in another split too: word for word after normalisation, or nearly.

Two texts are near duplicates when the Jaccard similarity of their shingles (every five bytes in a row) reaches 0.8.
The search is exact, and neither compares all pairs nor keeps more than the shingles of the smaller side: two sets that
are that similar must share one of the rarest fifth of the shingles of either (prefix filtering), so only rows that do
are compared.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import ceil

import numpy as np
from numpy.typing import NDArray

from safeside.types import Example

NEAR = 0.8  # of the shingles of both texts together, the share that they have in common
SHINGLE = 5  # bytes
_BUCKETS = 1 << 20  # for the order of shingles by rarity: two in one bucket only cost time
_BITS = 4096  # of the maps that screen pairs before their shingles are compared: fewer only cost time

Shingles = NDArray[np.uint64]


def normalise(text: str) -> str:
    """``text`` in one Unicode form, one case and one spacing (NFKC, casefold, single spaces)."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def text_of(example: Example) -> str:
    """All of a row's text, normalised."""
    return normalise("\n".join(message.content for message in example.messages))


def shingles_of(text: str) -> Shingles:
    """The set of a text's shingles, sorted: every five bytes of its UTF-8, each as one number; exact, not hashed."""
    codes = np.frombuffer(text.encode().ljust(SHINGLE, b"\0"), dtype=np.uint8).astype(np.uint64)
    n_shingles = len(codes) - SHINGLE + 1
    packed = np.zeros(n_shingles, dtype=np.uint64)
    for offset in range(SHINGLE):
        packed = (packed << np.uint64(8)) | codes[offset : offset + n_shingles]
    return np.unique(packed)


@dataclass(slots=True)
class Leaks:
    """Which rows of one side stand on the other."""

    exact: list[int]
    """Indices of rows whose normalised text is there."""
    near: list[int]
    """Indices of further rows that are near duplicates of one there."""


def find_leaks(texts: Sequence[str], others: Sequence[str], similarity: float = NEAR) -> Leaks:
    """The indices of normalised ``texts`` that are in ``others``, exactly or with at least this Jaccard similarity."""
    known = frozenset(others)
    index = _Index(sorted(known), similarity)
    leaks = Leaks([], [])
    for position, text in enumerate(texts):
        if text in known:
            leaks.exact.append(position)
        elif index.has_near(text):
            leaks.near.append(position)
    return leaks


def without_leaks(examples: Sequence[Example], seen: Sequence[Example]) -> tuple[list[Example], int]:
    """The rows of ``examples`` that are none of ``seen``, nor nearly, and how many were left out."""
    leaks = find_leaks([text_of(example) for example in examples], [text_of(example) for example in seen])
    known = {*leaks.exact, *leaks.near}
    kept = [example for position, example in enumerate(examples) if position not in known]
    return kept, len(known)


@dataclass(slots=True)
class _Index:
    """Texts by their rarest shingles."""

    texts: Sequence[str]
    similarity: float
    sets: list[Shingles] = field(init=False)
    sizes: NDArray[np.int64] = field(init=False)
    maps: NDArray[np.uint64] = field(init=False)
    counts: NDArray[np.int64] = field(init=False)
    rows_of: dict[int, list[int]] = field(init=False)

    def __post_init__(self) -> None:
        self.sets = [shingles_of(text) for text in self.texts]
        self.sizes = np.array([len(shingles) for shingles in self.sets], dtype=np.int64)
        self.maps = np.array([_bit_map(shingles) for shingles in self.sets], dtype=np.uint64).reshape(-1, _BITS // 64)
        self.counts = np.zeros(_BUCKETS, dtype=np.int64)
        for shingles in self.sets:
            np.add.at(self.counts, _bucket(shingles), 1)
        self.rows_of = {}
        for row, shingles in enumerate(self.sets):
            for shingle in self._prefix(shingles):
                self.rows_of.setdefault(shingle, []).append(row)

    def _prefix(self, shingles: Shingles) -> list[int]:
        """The rarest shingles: so many that a similar set cannot do without all of them."""
        n_kept = len(shingles) - ceil(self.similarity * len(shingles)) + 1
        return [int(shingle) for shingle in shingles[np.lexsort((shingles, self.counts[_bucket(shingles)]))[:n_kept]]]

    def has_near(self, text: str) -> bool:
        shingles = shingles_of(text)
        candidates = {row for shingle in self._prefix(shingles) for row in self.rows_of.get(shingle, ())}
        return any(self._is_near(shingles, row) for row in self._screened(shingles, candidates))

    def _screened(self, shingles: Shingles, candidates: set[int]) -> list[int]:
        """Those of the candidates whose sizes and bit maps allow that they are similar; all at once, for speed."""
        rows = np.fromiter(candidates, dtype=np.int64, count=len(candidates))
        n_both = len(shingles) + self.sizes[rows]
        differing = np.bitwise_count(self.maps[rows] ^ _bit_map(shingles)).sum(1, dtype=np.int64)
        least_apart = np.maximum(differing, abs(len(shingles) - self.sizes[rows]))  # a bit: only one of them has it
        most_common = (n_both - least_apart) // 2
        screened: list[int] = rows[most_common >= self.similarity * (n_both - most_common)].tolist()
        return screened

    def _is_near(self, first: Shingles, row: int) -> bool:
        second = self.sets[row]
        n_common = len(np.intersect1d(first, second, assume_unique=True))
        return n_common >= self.similarity * (len(first) + len(second) - n_common)


def _bit_map(shingles: Shingles) -> NDArray[np.uint64]:
    bits = np.zeros(_BITS, dtype=np.uint8)
    bits[_bucket(shingles) % _BITS] = 1
    return np.packbits(bits).view(np.uint64)


def _bucket(shingles: Shingles) -> NDArray[np.int64]:
    return ((shingles * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(44)).astype(np.int64)
