"""Which tokens of two bases have read the same text: positions are matched through character offsets."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate, groupby

from safeside.base.model import Base
from safeside.chat import Piece, render
from safeside.errors import UnsupportedError
from safeside.types import Message


def characters_read(base: Base, messages: Sequence[Message]) -> list[int] | None:
    """For each token of ``base.encode(messages)``, how many characters of the contents end with it or before it.

    White space is not counted: templates trim it and tokenizers put it into either neighbour.  None where the tokens
    cannot be traced to characters (a content that spells control tokens), and where a template leaves contents out or
    repeats them: then as many characters are not the same ones.  A tokenizer in Python tells no offsets and is an
    UnsupportedError.
    """
    if not base.tokenizer.is_fast:
        raise UnsupportedError(
            f"The tokenizer of {base.name} is written in Python and tells no character offsets. Port by distillation: "
            "--method distill."
        )
    encoded = base.encode(messages).ids
    if base.is_encoder:
        ids, read = _read_by_encoder(base, messages)
    else:
        pieces = render(base.tokenizer, messages, messages[-1].role != "assistant")
        if _bare(piece.text for piece in pieces if piece.is_content) != _bare(turn.content for turn in messages):
            return None
        ids, read = _read_by_decoder(base, pieces)
    return read[: len(encoded)] if tuple(ids[: len(encoded)]) == encoded else None


def paired_positions(old: Sequence[int], new: Sequence[int]) -> list[tuple[int, int]]:
    """(old, new) indices of tokens behind which the same characters were read, rising.

    Behind one character several tokens may end, a template's among them: as many on both sides are paired one by one,
    of other numbers only the first and the last.
    """
    behind_old, behind_new = _by_count(old), _by_count(new)
    pairs: list[tuple[int, int]] = []
    for count in sorted(behind_old.keys() & behind_new.keys()):
        first, second = behind_old[count], behind_new[count]
        if len(first) == len(second):
            pairs += zip(first, second, strict=True)
        else:
            pairs += sorted({(first[0], second[0]), (first[-1], second[-1])})
    return pairs


def _by_count(read: Sequence[int]) -> dict[int, list[int]]:
    """By number of characters read, the tokens behind them."""
    groups = groupby(range(len(read)), key=lambda index: read[index])
    return {count: list(indices) for count, indices in groups}


def _bare(texts: Iterable[str]) -> str:
    """All characters that are counted."""
    return "".join("".join(texts).split())


def _read_by_decoder(base: Base, pieces: Sequence[Piece]) -> tuple[list[int], list[int]]:
    text = "".join(piece.text for piece in pieces)
    counts = [piece.is_content and not character.isspace() for piece in pieces for character in piece.text]
    ids, ends = _tokens(base, text)
    before = [0, *accumulate(counts)]
    return ids, list(accumulate((before[end] for end in ends), max))


def _read_by_encoder(base: Base, messages: Sequence[Message]) -> tuple[list[int], list[int]]:
    tokenizer = base.tokenizer
    start = tokenizer.cls_token_id if tokenizer.cls_token_id is not None else tokenizer.bos_token_id
    stop = tokenizer.sep_token_id if tokenizer.sep_token_id is not None else tokenizer.eos_token_id
    ids, read = ([], []) if start is None else ([int(start)], [0])
    so_far = 0
    for message in messages:
        before = [0, *accumulate(not character.isspace() for character in message.content)]
        some, ends = _tokens(base, message.content)
        ids += some
        read += [so_far + before[end] for end in ends]
        so_far += before[-1]
        if stop is not None:
            ids.append(int(stop))
            read.append(so_far)
    return ids, list(accumulate(read, max))


def _tokens(base: Base, text: str) -> tuple[list[int], list[int]]:
    """Ids of ``text`` as it stands, and the character behind which each ends."""
    encoding = base.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return list(encoding["input_ids"]), [end for _, end in encoding["offset_mapping"]]
