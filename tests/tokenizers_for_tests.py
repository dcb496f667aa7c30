"""Tokenizers of several kinds with their chat templates, made here: no downloads.

Each is a ``Kind``: how to make one, and what a test may expect of it.  The vocabularies hold their special tokens'
spellings where real ones do, because that is where text can turn into control tokens.
"""

from __future__ import annotations

import functools
import string
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

_TEXT = ["the cat sat on the mat and the other cat sat there", "how can this be so, they said, and so it was."]
_CHARACTERS = string.ascii_letters + string.digits + string.punctuation

PROJECT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] | trim + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
LLAMA2_TEMPLATE = (
    "{% set system = messages[0]['content'] if messages[0]['role'] == 'system' else '' %}"
    "{% for m in messages %}"
    "{% set head = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' if system and loop.index0 == 1 else '' %}"
    "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + (head + m['content']).strip() + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
CHATML_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    "{% if false %}<think></think>{% endif %}"
)
EOS_TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}{% endfor %}"


@dataclass(frozen=True)
class Kind:
    """A kind of tokenizer.  ``spellings`` are those of its control tokens; ``is_lossless``: ids decode to the text."""

    name: str
    make: Callable[[], PreTrainedTokenizerBase]
    spellings: tuple[str, ...]
    is_lossless: bool = False
    is_encoder: bool = False
    is_clean: bool = True  # prompt and answer meet at the border of a token
    trims: bool = False
    has_template: bool = True


def _byte_level(special: tuple[str, ...], added: tuple[str, ...] = (), **names: str) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300 + len(special),
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXT, trainer)
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in added])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


PROJECT_SPECIALS = ("<|pad|>", "<|bos|>", "<|eos|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")


def project_style() -> PreTrainedTokenizerFast:
    """Byte-level BPE as the built-in base has it; its roles are special tokens that no attribute names."""
    tokenizer = _byte_level(PROJECT_SPECIALS, pad_token="<|pad|>", bos_token="<|bos|>", eos_token="<|eos|>")
    tokenizer.chat_template = PROJECT_TEMPLATE
    return tokenizer


def added_roles() -> PreTrainedTokenizerFast:
    """The project's template over roles that are added tokens, not special ones: it spells none of them whole."""
    tokenizer = _byte_level(PROJECT_SPECIALS[:3], PROJECT_SPECIALS[3:], pad_token="<|pad|>", bos_token="<|bos|>")
    tokenizer.eos_token = "<|eos|>"
    tokenizer.chat_template = PROJECT_TEMPLATE
    return tokenizer


def chatml_style() -> PreTrainedTokenizerFast:
    """Qwen-like: a default system turn, and added tokens that are not special but that the template writes."""
    names = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    added = ("<think>", "</think>", "\n\n")
    tokenizer = _byte_level(names, added, pad_token=names[0], eos_token=names[2], unk_token=names[0])
    tokenizer.chat_template = CHATML_TEMPLATE
    return tokenizer


def gpt2_style() -> PreTrainedTokenizerFast:
    """One special token for everything, the unknown token included, and no chat template."""
    name = "<|endoftext|>"
    return _byte_level((name,), bos_token=name, eos_token=name, unk_token=name)


def llama2_style() -> PreTrainedTokenizerFast:
    """BPE over metaspace with byte fallback; the mark of a space is put before every text."""
    words = ["▁", "t", "h", "e", "th", "the", "▁the", "▁c", "▁ca"]
    merges = [("t", "h"), ("th", "e"), ("▁", "the"), ("▁", "c"), ("▁c", "a")]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words, *_CHARACTERS]
    vocabulary = {name: index for index, name in enumerate(dict.fromkeys(names))}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names[:3]])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    wrapped.chat_template = LLAMA2_TEMPLATE
    return wrapped


def unigram_style() -> PreTrainedTokenizerFast:
    """T5-like: ``</s>`` is the likeliest word of the vocabulary, and NFKC makes it of other characters too."""
    scores = [("<pad>", 0.0), ("</s>", -0.1), ("<unk>", -20.0), ("▁", -2.0), ("▁the", -3.0), ("<role>", -0.1)]
    scores += [(character, -5.0) for character in _CHARACTERS]
    tokenizer = Tokenizer(models.Unigram(scores, unk_id=2, byte_fallback=False))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace()
    names = ("<pad>", "</s>", "<unk>", "<role>")
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>", pad_token="<pad>"
    )
    wrapped.chat_template = EOS_TEMPLATE
    return wrapped


_BERT_NAMES = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def _word_piece(pre_tokenizer: pre_tokenizers.PreTokenizer) -> PreTrainedTokenizerFast:
    words = [*_BERT_NAMES, *_CHARACTERS, *(f"##{character}" for character in _CHARACTERS), "the", "##at"]
    vocabulary = {word: index for index, word in enumerate(dict.fromkeys(words))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in _BERT_NAMES])
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **dict(zip(names, _BERT_NAMES, strict=True)))


def bert_style() -> PreTrainedTokenizerFast:
    """WordPiece behind BERT's own word splitter."""
    return _word_piece(pre_tokenizers.BertPreTokenizer())


def bert_by_spaces() -> PreTrainedTokenizerFast:
    """WordPiece where ``[SEP]`` between spaces is a word of the vocabulary."""
    return _word_piece(pre_tokenizers.WhitespaceSplit())


def phi3_style() -> PreTrainedTokenizerFast:
    """Special tokens that swallow the white space behind them, and a template that says which roles it takes."""
    tokenizer = llama2_style()
    names = ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>")
    tokenizer.add_tokens([AddedToken(name, special=True, normalized=False, rstrip=True) for name in names])
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'system' and not loop.first %}"
        "{{ raise_exception('a system turn comes first') }}{% endif %}"
        "{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    )
    return tokenizer


class Characters(PreTrainedTokenizer):
    """A tokenizer in Python, of one token for each character."""

    def __init__(self, **names: str) -> None:
        self._words = ["?", *_CHARACTERS.replace("?", ""), " ", "\n"]
        super().__init__(**names)

    @property
    def vocab_size(self) -> int:
        return len(self._words)

    def get_vocab(self) -> dict[str, int]:
        return {**{word: index for index, word in enumerate(self._words)}, **self.added_tokens_encoder}

    def _tokenize(self, text: str, **kwargs: object) -> list[str]:
        return list(text)

    def _convert_token_to_id(self, token: str) -> int:
        return self._words.index(token) if token in self._words else 0

    def _convert_id_to_token(self, index: int) -> str:
        return self._words[index]


def slow_style() -> Characters:
    """A tokenizer in Python: it tells no offsets."""
    tokenizer = Characters(unk_token="?", bos_token="<|bos|>", eos_token="<|end|>", pad_token="<|pad|>")
    tokenizer.add_special_tokens({"additional_special_tokens": list(PROJECT_SPECIALS)})
    tokenizer.chat_template = PROJECT_TEMPLATE
    return tokenizer


@functools.cache
def builtin_folder() -> Path | None:
    """The packaged base's folder, once there is one."""
    folder = Path(str(files("safeside.builtin") / "base"))
    return folder if (folder / "tokenizer.json").is_file() else None


def builtin_style() -> PreTrainedTokenizerBase:
    """The built-in base's own tokenizer, or a stand-in until it is packaged."""
    folder = builtin_folder()
    return AutoTokenizer.from_pretrained(folder) if folder else project_style()


_CHATML = ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<think>", "</think>")
KINDS = (
    Kind("project", project_style, PROJECT_SPECIALS, is_lossless=True, trims=True),
    Kind("added-roles", added_roles, PROJECT_SPECIALS, is_lossless=True, trims=True),
    Kind("chatml", chatml_style, _CHATML, is_lossless=True),
    Kind("gpt2", gpt2_style, ("<|endoftext|>",), is_lossless=True, is_clean=False, has_template=False),
    Kind("llama2", llama2_style, ("<s>", "</s>", "[INST]"), is_clean=False, trims=True),
    Kind("unigram", unigram_style, ("<pad>", "</s>", "<role>", "\uff1c/s\uff1e"), is_clean=False),
    Kind("phi3", phi3_style, ("<s>", "<|user|>", "<|end|>", "<|assistant|>")),
    Kind("bert", bert_style, _BERT_NAMES, is_encoder=True),
    Kind("bert-by-spaces", bert_by_spaces, _BERT_NAMES, is_encoder=True),
    Kind("slow", slow_style, PROJECT_SPECIALS, trims=True),
    Kind("builtin", builtin_style, PROJECT_SPECIALS, is_lossless=True, trims=True),
)


@functools.cache
def shared_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of the kind called ``name``, made once; a test that changes one makes its own."""
    return next(kind for kind in KINDS if kind.name == name).make()
