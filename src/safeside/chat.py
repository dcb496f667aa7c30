"""From messages to token ids, so that text from a user can never become a control token.

A chat template and its control tokens are trusted; the contents of messages are not.  The rendered conversation is
tokenised whole, as the model was trained.  When a control token would cover any character of a content, the
conversation is tokenised in pieces instead and contents are encoded with control tokens switched off, so that a
content spelling ``<|assistant|>`` becomes ordinary text.  Control tokens are the special tokens and every other added
token that the template spells, such as ``<think>``, or puts together, such as ``'<|' + role + '|>'``.
"""

from __future__ import annotations

import threading
import warnings
import weakref
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from reprlib import repr as shortened

import torch
from jaxtyping import Bool, Int
from jinja2 import TemplateError
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
_CONTROL = weakref.WeakKeyDictionary[PreTrainedTokenizerBase, tuple[object, frozenset[int]]]()
_ROLES = ("system", "user", "assistant")


@dataclass(frozen=True, slots=True)
class Encoded:
    """Ids of one conversation."""

    ids: tuple[int, ...]
    """Token ids, template included."""
    answer_start: int
    """Index of the first token of the answer; the number of ids when there is none."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A run of rendered text: from the template (trusted) or from a message's content (never a control token)."""

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
    message is encoded as prompt plus answer: the prompt's ids are exactly those the model answers from, and the answer
    ends as one that a model writes does, with the control token behind it, whatever the template puts behind that.
    Encoders get their own separators around each content.  An unknown role or no message at all is an InputError.
    """
    check_messages(messages)
    with _LOCK:
        return _encode(tokenizer, messages, add_generation_prompt, is_encoder)


def _encode(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    add_generation_prompt: bool,
    is_encoder: bool,
) -> Encoded:
    if is_encoder:
        return _encode_for_encoder(tokenizer, messages)
    if messages[-1].role != "assistant":
        ids = tuple(_encode_pieces(tokenizer, render(tokenizer, messages, add_generation_prompt)))
        return Encoded(ids, len(ids))
    prompt, answer = _prompt_and_answer(tokenizer, messages)
    return _encode_parts(tokenizer, prompt, _until_ended(tokenizer, answer))


def _encode_parts(tokenizer: PreTrainedTokenizerBase, prompt: list[Piece], answer: list[Piece]) -> Encoded:
    start = _encode_pieces(tokenizer, prompt)
    whole = _encode_pieces(tokenizer, [*prompt, *answer])
    if whole[: len(start)] != start:  # a token would straddle the border, and no model can answer half a token
        whole = start + _encode_pieces(tokenizer, answer)
    return Encoded(tuple(whole), len(start))


def _until_ended(tokenizer: PreTrainedTokenizerBase, answer: list[Piece]) -> list[Piece]:
    """The answer without what follows its end: the first control token behind its content, where there is one."""
    n_kept = 1 + max((index for index, piece in enumerate(answer) if piece.is_content), default=-1)
    rest = "".join(piece.text for piece in answer[n_kept:])
    ids, spans = _tokenize(tokenizer, rest, is_content=False)
    control = _control_ids(tokenizer)
    ends = [last for token, (first, last) in zip(ids, spans, strict=True) if token in control and last > first]
    return [*answer[:n_kept], Piece(rest[: ends[0]] if ends else rest, False)]


def encode_begun(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> Encoded:
    """Ids of a conversation whose last message is an answer that has only begun: nothing of the template follows it."""
    check_messages(messages)
    if messages[-1].role != "assistant":
        raise InputError(f"A begun answer is of role 'assistant'; the last message is of {messages[-1].role!r}.")
    with _LOCK:
        prompt, answer = _prompt_and_answer(tokenizer, messages)
        n_kept = 1 + max((index for index, piece in enumerate(answer) if piece.is_content), default=-1)
        return _encode_parts(tokenizer, prompt, answer[:n_kept])


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> Encoded:
    """Ids of plain text that a base goes on with, behind the token that begins every text, where there is one.

    What spells a control token is ordinary text.  Nothing to read at all is an InputError.
    """
    check_messages([Message("user", text)])
    with _LOCK:
        begin = [tokenizer.bos_token_id]
        added = tokenizer("", add_special_tokens=True)["input_ids"] == begin
        ids = (*(begin if added else ()), *_plain_ids(tokenizer, text))
    if not ids:
        raise InputError("The prompt is empty, and the tokenizer has no token that begins a text. Send some text.")
    return Encoded(ids, len(ids))


def check_messages(messages: Sequence[Message]) -> None:
    """Raise an InputError unless these are Messages, at least one, and every role is known."""
    if not isinstance(messages, Sequence) or not all(isinstance(message, Message) for message in messages):
        raise InputError(
            f"A conversation is a list of Message(role, content); got {shortened(messages)}. "
            "Write [Message('user', '...')]."
        )
    if not messages:
        raise InputError("A conversation needs at least one message; got none. Pass [Message('user', '...')].")
    for message in messages:
        if message.role not in _ROLES:
            raise InputError(f"Unknown role {message.role!r}; expected one of {', '.join(_ROLES)}.")
        if not isinstance(message.content, str):
            raise InputError(f"A message's content must be text; got {type(message.content).__name__}.")
        try:
            message.content.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"A message's content is not valid Unicode: {error.reason} at character {error.start}. Remove it."
            ) from error


def render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], add_generation_prompt: bool) -> list[Piece]:
    """The rendered conversation, cut where contents begin and end.

    A template may trim contents; it may not otherwise change them.  Where it does (or drops one), the contents are put
    in as they are.
    """
    last = len(messages) - 1
    marked = [  # a template may leave out what surrounds an empty system message
        {"role": turn.role, "content": f"{_MARK_OPEN}{index}{_MARK_CLOSE}" if turn.content or index == last else ""}
        for index, turn in enumerate(messages)
    ]
    skeleton = _fill(_apply_template(tokenizer, marked, add_generation_prompt), [m.content for m in messages])
    plain = [{"role": message.role, "content": message.content} for message in messages]
    return _trimmed(skeleton, _apply_template(tokenizer, plain, add_generation_prompt)) or skeleton


def _trimmed(pieces: Sequence[Piece], rendered: str) -> list[Piece]:
    """``pieces`` with each content trimmed as it stands in ``rendered``; none when they differ in more than that."""
    result: list[Piece] = []
    position = 0
    for piece, following in pairwise([*pieces, Piece("", False)]):
        text, then = piece.text, "" if following.is_content else following.text
        trims = (text, text.strip(), text.rstrip(), text.lstrip()) if piece.is_content else (text,)
        fits = [trim for trim in trims if rendered.startswith(trim + then, position)]
        if not fits:
            return []
        position += len(fits[0])
        result.append(Piece(fits[0], piece.is_content))
    return result if position == len(rendered) else []


def _apply_template(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], generation: bool) -> str:
    if tokenizer.chat_template is None:
        warnings.warn(
            "The tokenizer has no chat template; the plain one of safeside.chat.PLAIN_TEMPLATE is used "
            "('User: ...', 'Assistant:'). Set tokenizer.chat_template if the model was trained with another format.",
            stacklevel=2,
        )
    try:
        return str(
            tokenizer.apply_chat_template(
                messages,
                chat_template=_template_of(tokenizer),
                tokenize=False,
                add_generation_prompt=generation,
            )
        )
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise InputError(
            f"The tokenizer's chat template refuses a conversation of {roles}: {error}. Send the turns that it expects."
        ) from error


def _template_of(tokenizer: PreTrainedTokenizerBase) -> str:
    if tokenizer.chat_template is None:
        return (tokenizer.bos_token or "").replace("{", "{{ '{' }}") + PLAIN_TEMPLATE
    return str(tokenizer.get_chat_template())


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
    """Whole-text ids when no control token touches a content, else ids piece by piece."""
    if tokenizer.is_fast:
        ids, spans = _tokenize(tokenizer, "".join(piece.text for piece in pieces), is_content=False)
        control = _control_ids(tokenizer)
        covered = [span for token, span in zip(ids, spans, strict=True) if token in control]
        if not any_overlap(_content_spans(pieces), covered):
            return ids
    return [
        token
        for piece in pieces
        for token in (
            _plain_ids(tokenizer, piece.text)
            if piece.is_content
            else _tokenize(tokenizer, piece.text, is_content=False)[0]
        )
    ]


def any_overlap(contents: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> bool:
    """Whether any of ``spans`` shares a character with one of ``contents``, which rise and never meet.

    Each span is looked up by bisection: a conversation of many turns has thousands of both.
    """
    filled = [(start, stop) for start, stop in contents if start < stop]
    stops = [stop for _, stop in filled]
    for first, last in spans:
        place = bisect_right(stops, first)
        if first < last and place < len(filled) and filled[place][0] < last:
            return True
    return False


def _content_spans(pieces: Sequence[Piece]) -> list[tuple[int, int]]:
    """Character ranges of the contents in the joined text."""
    spans, position = [], 0
    for piece in pieces:
        if piece.is_content:
            spans.append((position, position + len(piece.text)))
        position += len(piece.text)
    return spans


def _plain_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of untrusted text: no control token, whatever it spells (the unknown token may stand for odd characters).

    Where the vocabulary still makes a control token of a word, the text is cut behind the word's first character.
    """
    control = _control_ids(tokenizer)
    result: list[int] = []
    waiting = [text]
    while waiting:
        part = waiting.pop()
        ids, spans = _tokenize(tokenizer, part, is_content=True)
        cuts = [
            first + 1 for token, (first, last) in zip(ids, spans, strict=True) if token in control and last > first + 1
        ]
        if control.isdisjoint(ids):
            result += ids
        elif cuts:
            waiting += [part[first:last] for first, last in pairwise([0, *cuts, len(part)])][::-1]
        else:
            raise InputError(
                f"The tokenizer turns the plain text {part[:60]!r} into a control token; expected ordinary tokens. "
                "Remove that text, or use a tokenizer whose control tokens are not words of its vocabulary."
            )
    return result


def _tokenize(
    tokenizer: PreTrainedTokenizerBase, text: str, *, is_content: bool
) -> tuple[list[int], list[tuple[int, int]]]:
    """Ids of ``text`` and the characters that each covers; special tokens are not looked for in a content.

    A slow tokenizer tells no offsets: its tokens cover their own spelling where that can be found.
    """
    options = {"add_special_tokens": False, "split_special_tokens": is_content, "verbose": False}
    if not tokenizer.is_fast:
        ids = list(tokenizer(text, **options)["input_ids"])
        return ids, _spelled_spans(text, tokenizer.convert_ids_to_tokens(ids))
    backend = tokenizer.backend_tokenizer
    before = backend.encode_special_tokens
    try:
        encoding = tokenizer(text, return_offsets_mapping=True, **options)
    finally:
        backend.encode_special_tokens = before
    return list(encoding["input_ids"]), list(encoding["offset_mapping"])


def _spelled_spans(text: str, tokens: Sequence[str]) -> list[tuple[int, int]]:
    """Where each token stands in ``text``, read from left to right; (0, 0) for one that is not spelled there."""
    spans, position = [], 0
    for token in tokens:
        found = text.find(token, position)
        spans.append((found, found + len(token)) if found >= 0 else (0, 0))
        position = max(position, spans[-1][1])
    return spans


def _control_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids that only a template may write; remembered, for some tokenizers list thousands of added tokens."""
    template, names = _template_of(tokenizer), tuple(tokenizer.special_tokens_map.values())
    state = (template, names, len(tokenizer))
    if tokenizer not in _CONTROL or _CONTROL[tokenizer][0] != state:
        skeletons = "".join(_skeletons(tokenizer))
        written = {
            index
            for index, token in tokenizer.added_tokens_decoder.items()
            if token.special
            or (not token.content.isspace() and (token.content in template or token.content in skeletons))
        }
        # The unknown token may stand for odd characters, unless it has a second job, such as ending a text.
        unknown = {tokenizer.unk_token_id} if names.count(tokenizer.unk_token) == 1 else set()
        _CONTROL[tokenizer] = state, frozenset((written | set(tokenizer.all_special_ids)) - unknown)
    return _CONTROL[tokenizer][1]


def _skeletons(tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """What the tokenizer's own template writes around the contents of every role, where it takes the conversation."""
    if tokenizer.chat_template is None:
        return
    for roles in (("user",), ("user", "assistant"), ("system", "user"), ("system", "user", "assistant")):
        turns = [{"role": role, "content": _MARK_OPEN} for role in roles]
        for generation in (False, True):
            with suppress(InputError):
                yield _apply_template(tokenizer, turns, generation)


def _prompt_and_answer(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]
) -> tuple[list[Piece], list[Piece]]:
    """The prompt that the last message answers, and that answer with what the template puts around it."""
    whole = render(tokenizer, messages, False)
    index = max((index for index, piece in enumerate(whole) if piece.is_content), default=len(whole))
    answer = whole[index:] or [Piece(messages[-1].content, True)]
    if len(messages) == 1:
        return whole[:index], answer
    prompt = render(tokenizer, messages[:-1], True)
    asked, before = ("".join(piece.text for piece in pieces) for pieces in (prompt, whole[:index]))
    lead = before.removeprefix(asked) if before.startswith(asked) else ""
    return prompt, [Piece(lead, False), *answer]


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
