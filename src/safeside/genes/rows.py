"""Rows that genes learn from: conversations, their token ids, and the places that predict an answer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from safeside.base.model import Base
from safeside.base.token_scores import token_log_probs
from safeside.chat import Encoded, pad_batch
from safeside.content import is_seen
from safeside.errors import InputError
from safeside.tasks.rows import load_examples
from safeside.types import Message

Conversation = Sequence[Message]
_ANSWERS = 32  # that are written in one batch


@dataclass(frozen=True, slots=True)
class Row:
    """A conversation that was read from a file, or answered by a model."""

    messages: Conversation
    """At least one."""
    where: str
    """What messages call it, such as ``harmful.jsonl: line 3``."""
    is_cut: bool = False
    """Whether the answer was cut at its greatest length: that it ends there is not learnt."""


Given = Conversation | Row
"""A conversation as it is given; one without a name is called by its number among those given."""


@dataclass(frozen=True, slots=True)
class Texts:
    """Encoded conversations of one kind."""

    name: str
    """What messages call them."""
    encoded: tuple[Encoded, ...]
    """At least one; each with room for an answer in the base's context."""

    def __len__(self) -> int:
        return len(self.encoded)

    def first(self, n_texts: int) -> Texts:
        """The first of them."""
        return replace(self, encoded=self.encoded[:n_texts])

    def batch(self, base: Base, places: Sequence[int], *, only_prompts: bool = False) -> Batch:
        """Some of them as one batch on the base's device; prompts alone on request."""
        some = [self.encoded[place] for place in places]
        starts = [item.answer_start for item in some]
        ids, keep = pad_batch([item.ids[: item.answer_start] if only_prompts else item.ids for item in some], 0)
        return Batch(ids.to(base.device), keep.to(base.device), torch.tensor(starts, device=base.device))

    def batches(self, base: Base, size: int, *, only_prompts: bool = False) -> Iterator[Batch]:
        """All of them in order."""
        for start in range(0, len(self), size):
            yield self.batch(base, range(len(self))[start : start + size], only_prompts=only_prompts)


@dataclass(frozen=True, slots=True)
class Batch:
    """Texts padded on the right."""

    ids: Int[Tensor, "B T"]
    keep: Bool[Tensor, "B T"]
    starts: Int[Tensor, " B"]
    """Index of each answer's first token."""

    def final_states(self, base: Base) -> Float[Tensor, "B T D"]:
        """Final normed states of one pass of the base as it is."""
        final: Tensor = base.decoder(input_ids=self.ids, attention_mask=self.keep, use_cache=False)[0]
        return final

    @property
    def answer_places(self) -> tuple[Int[Tensor, " N"], Int[Tensor, " N"]]:
        """Row and place of every state that predicts a token of an answer."""
        places = torch.arange(self.ids.shape[1], device=self.ids.device)
        lengths = self.keep.sum(1, keepdim=True)
        rows, columns = ((places >= self.starts[:, None] - 1) & (places < lengths - 1)).nonzero(as_tuple=True)
        return rows, columns


def read_rows(paths: Iterable[Path]) -> list[Row]:
    """The conversations of several files of rows, called by file and line; a bad line is an InputError."""
    found: list[Row] = []
    for path in paths:
        examples, bad = load_examples(path, ())
        if bad:
            raise InputError(f"{path}: line {bad[0].line}: {bad[0].problem}. Mend it, or take it out.")
        found += [Row(example.messages, f"{path}: line {example.line}") for example in examples]
    return found


def named(rows: Sequence[Given], name: str) -> list[Row]:
    """The rows, each with a name of its own, that of its number among the ``name`` unless it has one."""
    return [
        row if isinstance(row, Row) else Row(row, f"Row {place} of the {name}") for place, row in enumerate(rows, 1)
    ]


def encode_texts(base: Base, conversations: Sequence[Given], name: str, *, answered: bool) -> Texts:
    """The conversations encoded for ``base``; those ``answered`` must end with an assistant's message.

    None at all, an empty prompt, a missing answer and a text beyond the base's context are an InputError.  A cut answer
    has no end.
    """
    _check_some(conversations, name)
    encoded = []
    for row in named(conversations, name):
        _check_text(row)
        item = base.encode(row.messages, begun=row.is_cut)
        if answered and item.answer_start >= len(item.ids):
            raise InputError(f"{row.where} has no answer; expected a prompt and its answer. Add 'response'.")
        _check_length(base, row, len(item.ids))
        encoded.append(item)
    return Texts(name, tuple(encoded))


def check_rows(base: Base, rows: Sequence[Row], name: str, max_new_tokens: int) -> None:
    """Raise an InputError for rows that ``base`` cannot answer or read, before any of them is answered."""
    _check_some(rows, name)
    for row in rows:
        _check_text(row)
        _check_length(base, row, len(base.encode(row.messages).ids) + (0 if _has_answer(row) else max_new_tokens))


def with_answers(base: Base, rows: Sequence[Row], max_new_tokens: int) -> list[Row]:
    """The rows, those without an answer with the base's own, greedily; one with an empty answer stays out."""
    waiting = [place for place, row in enumerate(rows) if not _has_answer(row)]
    result: dict[int, Row] = {place: row for place, row in enumerate(rows) if _has_answer(row)}
    for start in range(0, len(waiting), _ANSWERS):
        places = waiting[start : start + _ANSWERS]
        found = base.chat_batch([rows[place].messages for place in places], max_new_tokens=max_new_tokens)
        for place, item in zip(places, found, strict=True):
            if item.text:
                answered = (*rows[place].messages, Message("assistant", item.text))
                result[place] = Row(answered, rows[place].where, item.finish_reason == "length")
    return [result[place] for place in sorted(result)]


def _check_some(rows: Sequence[Given], name: str) -> None:
    if not rows:
        raise InputError(f"There are no {name}; expected at least one. Add rows.")


def without_answers(rows: Sequence[Row]) -> list[Row]:
    """The rows up to the last thing that a user says."""
    return [Row(row.messages[:-1], row.where) if _has_answer(row) else row for row in rows]


def _has_answer(row: Row) -> bool:
    return len(row.messages) > 0 and row.messages[-1].role == "assistant"


def _check_text(row: Row) -> None:
    if not all(is_seen(message.content) for message in row.messages):
        raise InputError(f"{row.where} has an empty message; expected text. Take it out.")


def _check_length(base: Base, row: Row, n_tokens: int) -> None:
    if n_tokens > base.max_tokens:
        raise InputError(
            f"{row.where} has {n_tokens} tokens, its answer included, but {base.name} holds {base.max_tokens}; nothing "
            "is cut. Shorten it, or take it out."
        )


def answer_loss(base: Base, batch: Batch, n_first: int = 0) -> Float[Tensor, ""]:
    """Mean negative log-likelihood (nats) of the answers' first ``n_first`` tokens (0: all) under the base as it is."""
    row, place = batch.answer_places
    if n_first:
        is_first = place < batch.starts[row] - 1 + n_first
        row, place = row[is_first], place[is_first]
    states = batch.final_states(base)[row, place]
    return -token_log_probs(base, states, batch.ids[row, place + 1]).mean()
