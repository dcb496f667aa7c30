"""From messages to token ids, so that text from a user can never become a control token.

A chat template and its special tokens are trusted; the contents of messages are not.  The rendered conversation is
tokenised whole, as the model was trained.  When a special token would cover any character of a content, the
conversation is tokenised in pieces instead and contents are encoded with special tokens switched off, so that a
content spelling ``<|assistant|>`` becomes ordinary text.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from safeside.errors import InputError
from safeside.types import Message

# The documented fallback for a tokenizer that has no chat template.
PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] | capitalize }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
_MARK_OPEN, _MARK_CLOSE = "\ue0f0", "\ue0f1"  # private-use characters that no template and no marker text contains
_LOCK = threading.Lock()  # a fast tokenizer switches special tokens off by state that all threads share
_ROLES = ("system", "user", "assistant")


@dataclass(frozen=True, slots=True)
class Encoded:
    """Ids of one conversation; ``answer_start`` is the index of the first token of the answer, if it holds one."""

    ids: tuple[int, ...]
    answer_start: int


@dataclass(frozen=True, slots=True)
class Piece:
    """A run of rendered text: from the template (trusted) or from a message's content (never special)."""

    text: str
    is_content: bool


def encode_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = True,
    is_encoder: bool = False,
) -> Encoded:
    """Token ids of a conversation.

    With ``add_generation_prompt`` the ids end where an answer begins.  A conversation that ends in an assistant's
    message is encoded as prompt plus answer: the prompt's ids are exactly those the model answers from.  Encoders get
    their own separators around each content.  An unknown role or no message at all is an InputError.
    """
    check_messages(messages)
    with _LOCK:
        return _encode(tokenizer, messages, add_generation_prompt, is_encoder)


def _encode(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], add_generation_prompt: bool, is_encoder: bool
) -> Encoded:
    if is_encoder:
        return _encode_for_encoder(tokenizer, messages)
    if messages[-1].role != "assistant":
        ids = tuple(_encode_pieces(tokenizer, render(tokenizer, messages, add_generation_prompt)))
        return Encoded(ids, len(ids))
    prompt = _encode_pieces(tokenizer, render(tokenizer, messages[:-1], True)) if len(messages) > 1 else []
    answer, closing = _answer_pieces(tokenizer, messages)
    return Encoded((*prompt, *_plain_ids(tokenizer, answer), *_template_ids(tokenizer, closing)), len(prompt))


def check_messages(messages: Sequence[Message]) -> None:
    """Raise an InputError unless there is at least one message and every role is known."""
    if not messages:
        raise InputError("A conversation needs at least one message; got none. Pass [Message('user', '...')].")
    for message in messages:
        if message.role not in _ROLES:
            raise InputError(f"Unknown role {message.role!r}; expected one of {', '.join(_ROLES)}.")
        if not isinstance(message.content, str):
            raise InputError(f"A message's content must be text; got {type(message.content).__name__}.")


def render(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], add_generation_prompt: bool
) -> list[Piece]:
    """The rendered conversation, cut where contents begin and end.

    A template may trim contents; it may not otherwise change them.  Where it does (or drops one), the content is put
    in as it is.
    """
    marked = [
        {"role": message.role, "content": f"{_MARK_OPEN}{index}{_MARK_CLOSE}"} for index, message in enumerate(messages)
    ]
    skeleton = _apply_template(tokenizer, marked, add_generation_prompt)
    plain = [{"role": message.role, "content": message.content} for message in messages]
    rendered = _apply_template(tokenizer, plain, add_generation_prompt)
    for trim in (str, str.strip, str.rstrip, str.lstrip):
        pieces = _fill(skeleton, [trim(message.content) for message in messages])
        if "".join(piece.text for piece in pieces) == rendered:
            return pieces
    return _fill(skeleton, [message.content for message in messages])


def _apply_template(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], generation: bool) -> str:
    template = tokenizer.chat_template
    if template is None:
        warnings.warn(
            "The tokenizer has no chat template; the plain one of safeside.chat.PLAIN_TEMPLATE is used "
            "('User: ...', 'Assistant:'). Set tokenizer.chat_template if the model was trained with another format.",
            stacklevel=2,
        )
        template = (tokenizer.bos_token or "").replace("{", "{{ '{' }}") + PLAIN_TEMPLATE
    return str(
        tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=generation
        )
    )


def _fill(skeleton: str, contents: Sequence[str]) -> list[Piece]:
    """Put each content where its mark stands in the skeleton; marks may be absent or repeated."""
    pieces: list[Piece] = []
    for part in skeleton.split(_MARK_OPEN):
        index, mark, text = part.partition(_MARK_CLOSE)
        if mark:
            pieces.append(Piece(contents[int(index)], True))
        else:
            text = part
        if text:
            pieces.append(Piece(text, False))
    return pieces


def _encode_pieces(tokenizer: PreTrainedTokenizerBase, pieces: Sequence[Piece]) -> list[int]:
    """Whole-text ids when no special token touches a content, else ids piece by piece."""
    if tokenizer.is_fast:
        text = "".join(piece.text for piece in pieces)
        encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        special = set(tokenizer.added_tokens_decoder)
        touched = [
            offsets
            for token, offsets in zip(encoding["input_ids"], encoding["offset_mapping"], strict=True)
            if token in special
        ]
        if not any(start < stop and first < stop and start < last for start, stop in _spans(pieces) for first, last in touched):
            return list(encoding["input_ids"])
    return [
        token
        for piece in pieces
        for token in (_plain_ids if piece.is_content else _template_ids)(tokenizer, piece.text)
    ]


def _spans(pieces: Sequence[Piece]) -> list[tuple[int, int]]:
    """Character ranges of the contents in the joined text."""
    spans, position = [], 0
    for piece in pieces:
        if piece.is_content:
            spans.append((position, position + len(piece.text)))
        position += len(piece.text)
    return spans


def _plain_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of untrusted text: no special token, whatever it spells (the unknown token may stand for odd characters)."""
    if not text:
        return []
    if tokenizer.is_fast:
        backend = tokenizer.backend_tokenizer
        before = backend.encode_special_tokens
        backend.encode_special_tokens = True
        try:
            ids = list(backend.encode(text, add_special_tokens=False).ids)
        finally:
            backend.encode_special_tokens = before
    else:
        ids = list(tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True))
    if (set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}).isdisjoint(ids):
        return ids
    return _broken_ids(tokenizer, text)


def _broken_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """For a vocabulary that holds a special token's spelling as a word: cut every spelling at its first character."""
    for token in tokenizer.all_special_tokens:
        head, found, _ = text.partition(token)
        if found and len(token) > 1:
            cut = len(head) + 1
            return _plain_ids(tokenizer, text[:cut]) + _plain_ids(tokenizer, text[cut:])
    raise InputError(
        f"The tokenizer turns the plain text {text[:60]!r} into a special token; expected ordinary tokens. "
        "Remove that text, or use a tokenizer whose special tokens are not words of its vocabulary."
    )


def _template_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False)) if text else []


def _answer_pieces(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> tuple[str, str]:
    """The last message's text as the template writes it, and what the template puts behind it."""
    pieces = render(tokenizer, messages, False)
    index = max((i for i, piece in enumerate(pieces) if piece.is_content), default=len(pieces))
    if index == len(pieces):
        return messages[-1].content, ""
    return pieces[index].text, "".join(piece.text for piece in pieces[index + 1 :])


def _encode_for_encoder(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> Encoded:
    parts = [_plain_ids(tokenizer, message.content) for message in messages]
    start = tokenizer.cls_token_id if tokenizer.cls_token_id is not None else tokenizer.bos_token_id
    stop = tokenizer.sep_token_id if tokenizer.sep_token_id is not None else tokenizer.eos_token_id
    ids = [] if start is None else [int(start)]
    answer_start = len(ids)
    for part in parts:
        answer_start = len(ids)
        ids += part + ([] if stop is None else [int(stop)])
    return Encoded(tuple(ids), answer_start if messages[-1].role == "assistant" else len(ids))


def pad_batch(
    rows: Sequence[Sequence[int]], pad_id: int, side: str = "right"
) -> tuple[Int[Tensor, "B S"], Bool[Tensor, "B S"]]:
    """Ids (B, S) and keep mask (B, S, True = keep) of rows of different lengths."""
    longest = max(len(row) for row in rows)
    ids = torch.full((len(rows), longest), pad_id, dtype=torch.long)
    keep = torch.zeros((len(rows), longest), dtype=torch.bool)
    for index, row in enumerate(rows):
        place = slice(longest - len(row), longest) if side == "left" else slice(0, len(row))
        ids[index, place] = torch.tensor(row, dtype=torch.long)
        keep[index, place] = True
    return ids, keep
