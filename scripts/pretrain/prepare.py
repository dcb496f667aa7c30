#!/usr/bin/env python3
"""Write the tokenizer and the token files that train.py reads, from permissively licensed text.

Output: tokenizer/ (Hugging Face format), {pretrain,anneal,val_text,val_chat}.bin (uint16 tokens) with *.w
(uint8, 1 at tokens that the assistant says) and meta.json (documents, bytes and tokens).  The same input
gives the same bytes: every source is shuffled by a seed of its own.
"""

import argparse
import json
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from sources import TEXT_SOURCES, Chat, Corpus, Document, document_key, evaluation_questions, letters_only
from sources_chat import CHAT_SOURCES
from synth import synth
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

MEGABYTE = 1_000_000
SPECIAL_TOKENS = ["<|pad|>", "<|bos|>", "<|eos|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('unknown role ' + m['role']) }}{% endif %}"
    "{{ '<|' + m['role'] + '|>' }}"
    "{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] | trim + '<|end|>' }}{% endgeneration %}"
    "{% else %}{{ m['content'] | trim + '<|end|>' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
SYSTEM_PROMPTS = [
    "You are a helpful assistant.",
    "You are a helpful, friendly assistant.",
    "Answer the user.",
    "You are an assistant. Give short answers.",
    "You are a chat assistant. Be brief and clear.",
]
# What the short chats of the second phase and of val_chat keep.
MAX_TURNS = 6
MAX_QUESTION_CHARACTERS = 500
MAX_VALIDATION_CHATS = 600
# Share of the pretraining documents from which the vocabulary is learnt.
VOCABULARY_SHARE = 0.6


@dataclass
class Splits:
    """The documents of each token file, and what is written about them in meta.json."""

    pretrain: list[Document] = field(default_factory=list)
    anneal: list[Document] = field(default_factory=list)
    val_text: list[Document] = field(default_factory=list)
    val_chat: list[Document] = field(default_factory=list)
    meta: dict[str, dict[str, Any]] = field(default_factory=dict)

    def files(self) -> dict[str, list[Document]]:
        """Documents by the name of their file."""
        return {
            "pretrain": self.pretrain,
            "anneal": self.anneal,
            "val_text": self.val_text,
            "val_chat": self.val_chat,
        }

    def describe(self, name: str, licence: str, pretrain: Sequence[Document], anneal: Sequence[Document]) -> None:
        """Note what one source gave; ``docs`` counts the larger pool."""
        self.meta[name] = {
            "licence": licence,
            "docs": len(pretrain or anneal),
            "pretrain_bytes": sum(map(n_bytes, pretrain)),
            "anneal_bytes": sum(map(n_bytes, anneal)),
        }


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of the labelled sets")
    parser.add_argument("--text", type=Path, default=Path("../shared/pretrain/text"), help="folder of plain text")
    parser.add_argument("--out", type=Path, default=Path("work"))
    parser.add_argument("--vocab", type=int, default=4096, help="size of a new vocabulary")
    parser.add_argument("--val", type=float, default=0.005, help="share of the documents held out for validation")
    parser.add_argument("--turn-chars", type=int, default=330, help="longest answer kept for the second phase")
    parser.add_argument("--synthetic", type=int, default=24000, help="conversations drawn from synth.py")
    parser.add_argument("--tokenizer", help="reuse this tokenizer folder instead of training a new one")
    return parser.parse_args(arguments)


def said(document: Document) -> Chat:
    """The turns of a document; plain text is one turn of the role ``text``."""
    return [("text", document)] if isinstance(document, str) else document


def n_bytes(document: Document) -> int:
    """Size of a document's text in UTF-8."""
    return sum(len(text.encode()) for _, text in said(document))


def sample(documents: Iterable[Document], name: str, megabytes: float) -> list[Document]:
    """Documents in an order that ``name`` seeds, as many as fit."""
    shuffled = list(documents)
    random.Random(name).shuffle(shuffled)
    kept, total = [], 0
    for document in shuffled:
        total += n_bytes(document)
        if total > megabytes * MEGABYTE:
            break
        kept.append(document)
    return kept


def with_system(chat: Chat, share: float = 0.12) -> Chat:
    """The chat, in ``share`` of the cases after a system prompt."""
    rng = random.Random(document_key(chat))
    return [("system", rng.choice(SYSTEM_PROMPTS)), *chat] if rng.random() < share else chat


def shortened(chats: Iterable[Chat], max_answer_characters: int) -> Iterator[Chat]:
    """The first turns of the chats whose question and answers are short."""
    for chat in chats:
        answers = chat[1:MAX_TURNS:2]
        if len(chat[0][1]) < MAX_QUESTION_CHARACTERS and all(
            len(answer) <= max_answer_characters for _, answer in answers
        ):
            yield chat[:MAX_TURNS]


def add_text(splits: Splits, corpus: Corpus) -> None:
    """Read the plain-text sources."""
    for name, source in TEXT_SOURCES.items():
        documents = sample(source.read(corpus), name, source.pretrain_mb)
        kept = [document for document in documents if not corpus.holds_out(document)]
        splits.pretrain += kept
        splits.val_text += [document for document in documents if corpus.holds_out(document)]
        splits.describe(name, source.licence, kept, [])


def add_chat(splits: Splits, corpus: Corpus, max_answer_characters: int) -> None:
    """Read the chat sources, less the chats that ask what an evaluation asks."""
    questions = evaluation_questions(corpus)
    for name, source in CHAT_SOURCES.items():
        chats = [chat for chat in source.read(corpus) if not asks_any(chat, questions)]
        kept = sample((chat for chat in chats if not corpus.holds_out(chat)), name, source.pretrain_mb)
        short = sample(shortened(kept, max_answer_characters), name, source.anneal_mb)
        held_out = [chat for chat in chats if corpus.holds_out(chat)]
        splits.pretrain += map(with_system, kept)
        splits.anneal += map(with_system, short)
        splits.val_chat += shortened(held_out, max_answer_characters)
        splits.describe(name, source.licence, kept, short)


def asks_any(chat: Chat, questions: set[str]) -> bool:
    """Whether the user asks one of ``questions``."""
    return any(role == "user" and letters_only(text) in questions for role, text in chat)


def collect(options: argparse.Namespace) -> Splits:
    """All documents, each file in its final order."""
    splits = Splits()
    corpus = Corpus(options.data, options.text, options.val)
    add_text(splits, corpus)
    add_chat(splits, corpus, options.turn_chars)
    synthetic = synth(options.synthetic)
    splits.anneal += [with_system(chat, 0.1) for chat in synthetic]
    splits.describe("synthetic_templates", "written for this model (synth.py)", [], synthetic)
    for seed, documents in enumerate(splits.files().values(), 1):
        random.Random(seed).shuffle(documents)
    del splits.val_chat[MAX_VALIDATION_CHATS:]
    empty = [name for name, documents in splits.files().items() if not documents]
    if empty:
        raise SystemExit(f"No documents for {', '.join(empty)}. Check --data and --text, or raise --val.")
    return splits


def train_tokenizer(documents: Sequence[Document], vocabulary_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that splits numbers into digits."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=SPECIAL_TOKENS,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    texts = ("\n".join(text for _, text in said(document)) for document in documents)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|bos|>",
        eos_token="<|eos|>",
        pad_token="<|pad|>",
        additional_special_tokens=SPECIAL_TOKENS[3:],
        model_max_length=512,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def make_tokenizer(options: argparse.Namespace, pretrain: Sequence[Document]) -> PreTrainedTokenizerFast:
    """The tokenizer of the command line, or a new one, with our chat template."""
    if options.tokenizer:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(options.tokenizer)
    else:
        tokenizer = train_tokenizer(pretrain[: int(len(pretrain) * VOCABULARY_SHARE)], options.vocab)
    if len(tokenizer) > np.iinfo(np.uint16).max + 1:
        raise SystemExit(f"The tokenizer has {len(tokenizer)} tokens; the token files hold at most 65536 (uint16).")
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def encode_texts(texts: Sequence[str], tokenizer: PreTrainedTokenizerFast) -> Iterator[list[int]]:
    """The tokens of each text, without special tokens."""
    backend = tokenizer.backend_tokenizer
    for start in range(0, len(texts), 4000):
        for encoding in backend.encode_batch(texts[start : start + 4000], add_special_tokens=False):
            yield encoding.ids


def encode(documents: Sequence[Document], tokenizer: PreTrainedTokenizerFast) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of all documents in a row, and 1 where the assistant speaks or ends its turn."""
    numbers = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    texts = [text for document in documents for _, text in said(document)]
    encoded = encode_texts(texts, tokenizer)
    tokens, weights = [], []
    for document in documents:
        row, row_weights = [numbers["<|bos|>"]], [0]
        for role, _ in said(document):
            ids = next(encoded)
            if role == "text":
                row += ids
                row_weights += [0] * len(ids)
            else:
                row += [numbers[f"<|{role}|>"], *ids, numbers["<|end|>"]]
                row_weights += [0, *[int(role == "assistant")] * (len(ids) + 1)]
        tokens.append(np.array([*row, numbers["<|eos|>"]], np.uint16))
        weights.append(np.array([*row_weights, 0], np.uint8))
    return np.concatenate(tokens), np.concatenate(weights)


def main(arguments: Sequence[str] | None = None) -> None:
    """Write everything under ``--out`` and print meta.json."""
    options = parse(arguments)
    splits = collect(options)
    tokenizer = make_tokenizer(options, splits.pretrain)
    options.out.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(options.out / "tokenizer")
    for name, documents in splits.files().items():
        tokens, weights = encode(documents, tokenizer)
        tokens.tofile(options.out / f"{name}.bin")
        weights.tofile(options.out / f"{name}.w")
        splits.meta["_" + name] = {
            "docs": len(documents),
            "tokens": len(tokens),
            "bytes": sum(map(n_bytes, documents)),
            "assistant_tokens": int(weights.sum()),
        }
    text = json.dumps(splits.meta, indent=1)
    (options.out / "meta.json").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
