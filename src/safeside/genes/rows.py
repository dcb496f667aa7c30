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
from safeside.errors import InputError
from safeside.tasks.rows import load_examples
from safeside.types import Message

Conversation = Sequence[Message]


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


def read_conversations(paths: Iterable[Path]) -> list[Conversation]:
    """The conversations of several files of rows; a bad line is an InputError."""
    found: list[Conversation] = []
    for path in paths:
        examples, bad = load_examples(path, ())
        if bad:
            raise InputError(f"{path}: line {bad[0].line}: {bad[0].problem}. Mend it, or take it out.")
        found += [example.messages for example in examples]
    return found


def encode_texts(base: Base, conversations: Sequence[Conversation], name: str, *, answered: bool) -> Texts:
    """The conversations encoded for ``base``; those ``answered`` must end with an assistant's message.

    None at all, an empty prompt, a missing answer and a text beyond the base's context are an InputError.
    """
    if not conversations:
        raise InputError(f"There are no {name}; expected at least one. Add rows.")
    encoded = []
    for number, messages in enumerate(conversations, 1):
        where = f"Row {number} of the {name}"
        if not all(message.content.strip() for message in messages):
            raise InputError(f"{where} has an empty message; expected text. Take it out.")
        item = base.encode(messages)
        if answered and item.answer_start >= len(item.ids):
            raise InputError(f"{where} has no answer; expected a prompt and its answer. Add 'response'.")
        if len(item.ids) > base.max_tokens:
            raise InputError(
                f"{where} has {len(item.ids)} tokens, but {base.name} holds {base.max_tokens}; nothing is cut. "
                "Shorten it, or take it out."
            )
        encoded.append(item)
    return Texts(name, tuple(encoded))


def with_answers(base: Base, conversations: Sequence[Conversation], max_new_tokens: int) -> list[Conversation]:
    """The conversations, those without an answer with the base's own, greedily; an empty one stays out."""
    open_ended = [messages for messages in conversations if messages[-1:] and messages[-1].role != "assistant"]
    if not all(message.content.strip() for messages in open_ended for message in messages):
        raise InputError("A prompt is empty; expected text. Take it out.")
    answers: dict[tuple[Message, ...], str] = {}
    for start in range(0, len(open_ended), 32):
        some = open_ended[start : start + 32]
        found = base.chat_batch(some, max_new_tokens=max_new_tokens)
        answers |= {tuple(messages): item.text for messages, item in zip(some, found, strict=True)}
    result: list[Conversation] = []
    for messages in conversations:
        answer = answers.get(tuple(messages), "")
        if messages[-1:] and messages[-1].role == "assistant":
            result.append(messages)
        elif answer:
            result.append((*messages, Message("assistant", answer)))
    return result


def answer_loss(base: Base, batch: Batch) -> Float[Tensor, ""]:
    """Mean negative log-likelihood (nats) of the answers' tokens under the base as it is."""
    row, place = batch.answer_places
    states = batch.final_states(base)[row, place]
    return -token_log_probs(base, states, batch.ids[row, place + 1]).mean()
