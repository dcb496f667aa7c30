"""The bytes of tokens that are parts of characters."""

from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerBase

from safeside.serve.replies import bytes_of, logprobs_of
from safeside.serve.sampling import Token
from tokenizers_for_tests import KINDS

TEXT = "the cat \U0001f600 \u00e9\ufffd \u4e2d"


def ids_of(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return list(tokenizer(TEXT, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.is_lossless], ids=lambda kind: kind.name)
def test_the_bytes_of_all_tokens_are_those_of_the_text(kind) -> None:
    tokenizer = kind.make()
    found = [bytes_of(tokenizer, index) for index in ids_of(tokenizer)]
    assert None not in found
    assert bytes(byte for own in found for byte in own or ()).decode() == TEXT


def test_tokens_that_are_named_bytes_are_these_bytes() -> None:
    named = [(tokenizer, number) for kind in KINDS if (number := byte_token(tokenizer := kind.make())) is not None]
    assert named
    assert all(bytes_of(tokenizer, number) == [0xF0] for tokenizer, number in named)


def byte_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    return tokenizer.get_vocab().get("<0xF0>")


class Unknowable:
    """A tokenizer that says nothing of the bytes behind its tokens."""

    def decode(self, ids: list[int]) -> str:
        return "\ufffd"

    def convert_ids_to_tokens(self, index: int) -> str:
        return f"piece {index}"


def test_bytes_that_nobody_knows_are_null() -> None:
    told = logprobs_of("chat", [Token(5)], Unknowable())  # type: ignore[arg-type]
    assert told["content"][0]["bytes"] is None  # type: ignore[index]
