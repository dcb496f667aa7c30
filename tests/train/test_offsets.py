"""Tokens of two bases that have read the same characters are found, whatever their tokenizers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from safeside import Base, Message
from safeside.chat import Encoded, encode_chat
from safeside.errors import UnsupportedError
from safeside.train.offsets import characters_read, paired_positions
from tokenizers_for_tests import KINDS, project_style, shared_tokenizer


@dataclass(frozen=True)
class OnlyTokenizer:
    """What offsets ask of a base."""

    tokenizer: PreTrainedTokenizerBase
    is_encoder: bool
    name: str

    def encode(self, messages: list[Message]) -> Encoded:
        return encode_chat(self.tokenizer, messages, is_encoder=self.is_encoder)


FAST = [kind for kind in KINDS if kind.name not in ("slow", "unigram")]
BASES = {kind.name: OnlyTokenizer(shared_tokenizer(kind.name), kind.is_encoder, kind.name) for kind in FAST}
CONVERSATIONS = (
    [Message("user", "the cat sat there")],
    [Message("user", "  how can this be?\n"), Message("assistant", "it was the cat.")],
    [Message("user", "a"), Message("assistant", "b"), Message("user", "the  é end")],
)


def n_characters(messages: list[Message]) -> int:
    return sum(not character.isspace() for message in messages for character in message.content)


@pytest.mark.filterwarnings("ignore:The tokenizer has no chat template")
@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("messages", CONVERSATIONS, ids=("one", "answered", "three"))
def test_counts_rise_from_nothing_to_everything(name: str, messages: list[Message]) -> None:
    read = characters_read(BASES[name], messages)
    if read is None:  # only where prompt and answer do not meet at the border of a token
        assert name == "phi3" or not next(kind for kind in KINDS if kind.name == name).is_clean
        return
    assert len(read) == len(BASES[name].encode(messages).ids)
    assert read == sorted(read)
    assert read[-1] == n_characters(messages)


@pytest.mark.filterwarnings("ignore:The tokenizer has no chat template")
@pytest.mark.parametrize(("old", "new"), [*product(("project", "chatml", "builtin"), ("gpt2", "bert", "builtin"))])
def test_pairs_have_read_the_same_characters(old: str, new: str) -> None:
    messages = CONVERSATIONS[0]
    read = [characters_read(BASES[name], messages) for name in (old, new)]
    assert read[0] is not None
    assert read[1] is not None
    pairs = paired_positions(*read)
    assert all(read[0][first] == read[1][second] for first, second in pairs)
    assert pairs[-1] == (len(read[0]) - 1, len(read[1]) - 1)
    assert len(pairs) >= 4  # the four words end together at the least


def test_contents_that_spell_control_tokens_are_not_traced() -> None:
    """They are encoded piece by piece; the plain text of the conversation has other tokens."""
    messages = [Message("user", "ignore <|assistant|> this")]
    assert characters_read(BASES["project"], messages) is None


@pytest.mark.parametrize(
    "body", ["{% if m['role'] != 'system' %}{{ m['content'] }}{% endif %}", "{{ m['content'] }} {{ m['content'] }}"]
)
def test_a_template_that_leaves_out_or_repeats_contents_is_not_traced(body: str) -> None:
    """As many characters would be others: those of another message."""
    tokenizer = project_style()
    tokenizer.chat_template = "{% for m in messages %}<|{{ m['role'] }}|>" + body + "<|end|>{% endfor %}"
    base = OnlyTokenizer(tokenizer, False, "leaves out")
    assert characters_read(base, [Message("system", "abcd"), Message("user", "wxyz efgh")]) is None
    plain = characters_read(base, [Message("user", "wxyz efgh")])
    assert (plain is None) == ("system" not in body)


def test_a_tokenizer_in_python_is_refused() -> None:
    base = OnlyTokenizer(shared_tokenizer("slow"), False, "slow")
    with pytest.raises(UnsupportedError, match="--method distill"):
        characters_read(base, CONVERSATIONS[0])


def pairs_by_hand(old: list[int], new: list[int]) -> list[tuple[int, int]]:
    """Every pair of equal counts that has as many of them before it on both sides, or as many behind it.

    Where both sides have as many, these are the same pairs; else only the first and the last of them.
    """
    found = set()
    for i, j in product(range(len(old)), range(len(new))):
        if old[i] == new[j]:
            same = old.count(old[i]) == new.count(new[j])
            before = old[:i].count(old[i]), new[:j].count(new[j])
            behind = old[i + 1 :].count(old[i]), new[j + 1 :].count(new[j])
            if before == (0, 0) or behind == (0, 0) or (same and before[0] == before[1]):
                found.add((i, j))
    return sorted(found)


counts = st.lists(st.integers(0, 12), min_size=1, max_size=12).map(sorted)


@given(counts, counts)
def test_pairs_are_those_found_by_hand(old: list[int], new: list[int]) -> None:
    assert paired_positions(old, new) == pairs_by_hand(old, new)


def test_real_bases_agree_with_their_own_encoding(tiny_family: Callable[[str], Base]) -> None:
    for family in ("llama", "bert"):
        base = tiny_family(family)
        read = characters_read(base, [Message("user", "the cat sat")])
        assert read is not None
        assert read[-1] == 9
