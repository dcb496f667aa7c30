"""The text behind a port: rows that two bases can both read, and where they have read the same of it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from safeside.adapters.adapter import Adapter
from safeside.base.model import Base
from safeside.chat import Encoded
from safeside.content import refuse_empty
from safeside.errors import InputError
from safeside.guards.blank import BlankIds
from safeside.tasks.leakage import text_of
from safeside.train.offsets import characters_read, paired_positions
from safeside.train.rows import Rows
from safeside.train.taps import Batch, TapStore, make_batch
from safeside.types import Example, Message

Method = Literal["map", "distill", "both"]
METHODS: tuple[Method, ...] = ("map", "distill", "both")
_SHARE = 0.2  # of the text: once to choose and calibrate by, once to measure on
_LEAST_ROWS = 100  # so that either share is 20 rows


@dataclass(frozen=True, slots=True)
class PortSettings:
    """How to port."""

    method: Method = "both"
    """``map`` is a regression, ``distill`` trains from fresh weights, ``both`` trains from the maps."""
    epochs: int = 10
    """Most passes over the text."""
    learning_rate: float = 2e-3
    """Peak of AdamW's rate."""
    batch_size: int = 32
    """Rows of one step."""
    readout_weight: float = 1.0
    """Weight of the squared distance between the normed read-outs of both guards."""
    size: float | None = None
    """Most of the new base's compute (0.01 is 1%) for ``lst`` and ``lst_plus`` by ``distill``; as wide as the old one
    unless given, whatever share of the new base that is."""
    ridge: float = 1e-3
    """Penalty of the maps, over the mean variance of an input."""
    max_new_tokens: int = 32
    """Longest answer that an aligner's base writes to a prompt without one."""
    seed: int = 0
    """Of the first weights and of every draw."""


@dataclass(frozen=True, slots=True)
class PortText:
    """The usable rows, encoded for both bases: three fifths to learn from, then two fifths that are held out."""

    old: Rows
    """For the base that the adapter was made for."""
    new: Rows
    """For the base that it goes to."""
    pairs: list[list[tuple[int, int]]]
    """By row, (old, new) positions that have read the same characters; empty where no maps are wanted."""

    @property
    def n_rows(self) -> int:
        return len(self.old.ids)

    @property
    def n_learnt(self) -> int:
        """Rows to learn from, the first ones."""
        return self.n_rows - 2 * int(self.n_rows * _SHARE)

    @property
    def choosing(self) -> range:
        """The rows that choose the best epoch and calibrate a guard."""
        return range(self.n_learnt, self.n_rows - int(self.n_rows * _SHARE))

    @property
    def measured(self) -> range:
        """The rows that serve nothing but the figures of a finished port."""
        return range(self.choosing.stop, self.n_rows)


@dataclass(frozen=True, slots=True)
class Side:
    """One base with its adapter, the encoded text, and the base's states on it."""

    base: Base
    adapter: Adapter
    ids: Sequence[tuple[int, ...]]
    store: TapStore

    def batch(self, rows: Sequence[int]) -> Batch:
        return make_batch(self.base, self.ids, rows)


class Readers:
    """The old base and the new one, which are to read the same rows."""

    def __init__(self, old: Base, new: Base) -> None:
        self.bases = old, new
        self._blanks = BlankIds(old), BlankIds(new)

    def encode(self, messages: Sequence[Message], n_more: int = 0) -> tuple[Encoded, Encoded] | None:
        """A conversation for both; None where it holds no text or one has no room for it and ``n_more`` tokens.

        None too where one refuses it, or makes no token of its text.
        """
        old, new = self.bases
        try:
            refuse_empty(messages)
            both = old.encode(messages), new.encode(messages)
            for some, blank in zip(both, self._blanks, strict=True):
                blank.refuse(messages, some.ids)
        except InputError:  # a template may refuse roles, a tokenizer odd texts
            return None
        fits = (len(some.ids) + n_more <= base.max_tokens for some, base in zip(both, self.bases, strict=True))
        return both if all(fits) else None


def require_enough(n_usable: int, n_given: int) -> None:
    """Raise an InputError where fewer rows are left than a port needs."""
    if n_usable < _LEAST_ROWS:
        raise InputError(
            f"Both bases can read {n_usable} of {n_given} rows of text; expected at least {_LEAST_ROWS} (two fifths "
            "are held out), and several hundred for a good port. Give more text of the kind that the adapter reads."
        )


def read_text(old_base: Base, base: Base, text: Sequence[Example], settings: PortSettings) -> PortText:
    """``text`` in a random order for both bases.

    Rows without text, those that either base refuses or cannot read whole and copies of others are left out, and where
    maps are wanted those that cannot be traced from tokens to characters.
    """
    text = list(text)
    random.Random(settings.seed).shuffle(text)
    readers = Readers(old_base, base)
    encoded: list[tuple[Encoded, Encoded]] = []
    kept: list[Example] = []
    pairs: list[list[tuple[int, int]]] = []
    known: set[str] = set()
    for example in text:
        both = readers.encode(example.messages)
        if both is None or text_of(example) in known:
            continue
        known.add(text_of(example))
        if settings.method != "distill":
            read = [characters_read(some, example.messages) for some in (old_base, base)]
            if read[0] is None or read[1] is None:
                continue
            pairs.append(paired_positions(read[0], read[1]))
        encoded.append(both)
        kept.append(example)
    old, new = (_rows([both[side] for both in encoded], kept) for side in (0, 1))
    return PortText(old, new, pairs)


def _rows(encoded: Sequence[Encoded], examples: list[Example]) -> Rows:
    ids, starts = [item.ids for item in encoded], [item.answer_start for item in encoded]
    return Rows(ids, starts, torch.zeros(0), None, examples=examples)
