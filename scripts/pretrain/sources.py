"""Reading and cleaning the sources, and the readers of plain text; the chat readers are in sources_chat.py.

Left out on purpose: every non-commercial source (Alpaca, LIMA, BeaverTails, PKU-SafeRLHF, DailyDialog,
EmpatheticDialogues ...), sources with unclear terms (Brown, movie reviews, SST-2, AG News, RTE, African
Storybook without a licence per story), every test or validation split, all evaluation prompts, and all
refusal or safety-tuning data: the model is meant to be an ordinary base that was not trained for safety.
"""

import gzip
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

Chat = list[tuple[str, str]]
Document = str | Chat
Row = dict[str, Any]

# Public-domain books in plain, fairly modern English: how their "author/title" begins.
BOOKS = tuple(
    re.split(
        r"\|\n?",
        """Hugh Lofting|Gertrude Chandler|Beatrix Potter|Carlo Collodi|L. Frank Baum|Edith Nesbit|
George MacDonald/The Princess|J. M. Barrie|Kenneth Grahame|Lewis Carroll|Hans Christian|The Brothers Grimm|
Lucy Maud|P.G. Wodehouse|Agatha Christie|Arthur Conan Doyle|Jerome K.|Jack London|Louisa May Alcott/Little|
H.G. Wells|H. Beam Piper|Isaac Asimov|Philip K. Dick|Mack Reynolds|Edward E. Smith|George O. Smith|
E. Everett|Andre Norton|Leigh Brackett|C.L. Moore|Robert Bloch|Richard Connell|John Buchan|Sinclair Lewis|
Zane Grey|Owen Wister|G.K. Chesterton|J.S. Fletcher|Freeman Wills|Edgar Wallace|B.M. Bower|
Grace Livingston|Christopher Morley|Ernest Hemingway|F. Scott|Willa Cather|Philip Wylie|Howard Pyle|
Booker T.|Jane Addams|Edgar Rice|Frances Hodgson|Edith Wharton/Summer|Mark Twain/The Prince|Karel Capek|
D.H. Lawrence/Sons|E.M. Forster|W. W. Jacobs|Jules Verne/Journey|Charlotte Perkins Gilman/Herland""",
    )
)
# Little but formulas is left of these once the mathematics has been removed.
OPENSTAX_SKIPPED = ("physics", "chemistry", "statistics")
TYPOGRAPHIC = {"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2026": "..."}
# A chat document is dropped when one of its questions occurs in one of these evaluation files.
EVALUATION_FILES = (
    "harmful_prompts/*",
    "mt_bench/*",
    "mmlu/*",
    "gsm8k/test*",
    "boolq/val*",
    "commonsense/*_test*",
    "do_not_answer/prompts*",
    "xstest/prompts*",
    "oktest/*",
    "hh_rlhf/*_test*",
    "hh_rlhf/*_val*",
    "hh_rlhf/harmless*",
    "jailbreakbench_artifacts/*",
    "instructions/alpaca_eval*",
    "instructions/dolly_partial_test*",
    "instructions/dolly_partial_val*",
    "instructions/user_oriented*",
)
EVALUATION_FIELDS = ("prompt", "question", "text", "goal", "instruction", "turns")
# Shorter questions ("what is it?") occur everywhere.
MIN_QUESTION_LETTERS = 20


@dataclass(frozen=True)
class Corpus:
    """The folder of labelled sets, the folder of pretraining text, and the share of documents held out."""

    data: Path
    text: Path
    validation_share: float

    def labelled(self, pattern: str) -> Iterator[Row]:
        """Rows of the labelled files whose path, less its ending, matches ``pattern``."""
        return read_rows(self.data, pattern)

    def training_text(self, name: str) -> Iterator[Row]:
        """Rows (title, text, source) of one source of pretraining text, its validation part excluded."""
        return read_rows(self.text, f"{name}_train_*")

    def holds_out(self, document: Document) -> bool:
        """Whether the document belongs to the validation files."""
        return document_key(document) % 10000 < self.validation_share * 10000


class Source(NamedTuple):
    """Where documents come from, their licence, and how much of them each phase may read."""

    read: Callable[[Corpus], Iterator[Document]]
    licence: str
    pretrain_mb: float
    anneal_mb: float = 0.0


def read_rows(folder: Path, pattern: str) -> Iterator[Row]:
    """Rows of the gzipped JSON-lines files that match, in the order of their names."""
    for path in sorted(folder.glob(f"{pattern}.jsonl.gz")):
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            for line in lines:
                yield json.loads(line)


def document_key(document: Document) -> int:
    """A number that depends on the text, or on the first turn, alone."""
    text = document if isinstance(document, str) else document[0][1]
    return int(hashlib.sha1(text.encode()).hexdigest()[:8], 16)


def clean(text: str) -> str:
    """ASCII quotes, single spaces, at most one empty line in a row."""
    for typographic, plain in TYPOGRAPHIC.items():
        text = text.replace(typographic, plain)
    text = re.sub(r"[ \t]+", " ", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def joined(text: str) -> str:
    """The text without the Penn-style spaces that sets derived from Wikipedia have."""
    for spaced, plain in ((" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", "."), ("( ", "("), (" )", ")")):
        text = text.replace(spaced, plain)
    text = re.sub(r" ('s|n't|'re|'ve|'ll|'d|'m)\b", r"\1", text)
    return re.sub(r" ([,.;:?!])", r"\1", text)


def letters_only(text: str) -> str:
    """Lower case with everything but letters and digits as single spaces, for comparing questions."""
    return re.sub(r"[^a-z0-9]+", " ", text.lower()).strip()


def evaluation_questions(corpus: Corpus) -> set[str]:
    """All questions of the evaluation files, as ``letters_only`` writes them."""
    questions = set()
    for pattern in EVALUATION_FILES:
        for row in corpus.labelled(pattern):
            for text in question_texts(row):
                for part in text.split("Human:"):
                    questions.add(letters_only(re.sub(r"^\s*Assistant:.*", "", part, flags=re.S)))
    return {question for question in questions if len(question) >= MIN_QUESTION_LETTERS}


def question_texts(row: Row) -> Iterator[str]:
    """The texts in the fields of a row that hold questions."""
    for field in EVALUATION_FIELDS:
        value = row.get(field)
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str):
                yield text


def books(corpus: Corpus) -> Iterator[str]:
    """Pieces of about 20,000 characters of the books in ``BOOKS``."""
    for row in corpus.training_text("classic_books"):
        if row["title"].startswith(BOOKS):
            yield clean(row["text"])


def textbooks(corpus: Corpus) -> Iterator[str]:
    """Sections of the OpenStax books without aims, summaries, questions, bullet points and notes."""
    for row in corpus.training_text("openstax"):
        if row["title"].split(":")[0] in OPENSTAX_SKIPPED:
            continue
        ends = r"\n(?:Glossary|Section Summary|Chapter Summary|Review Questions?|References)\n"
        text = re.split(ends, row["text"])[0]
        text = re.sub(r"^By the end of this section.*\n", "", text)
        text = re.sub(r"(?m)^\* .*\n?", "", text)
        text = re.sub(r"\[\d+\](: \S+)?", "", text)
        if len(text) > 300:
            yield clean(text)


def abstracts(corpus: Corpus) -> Iterator[str]:
    """First paragraphs of Wikipedia articles."""
    for row in corpus.training_text("dbpedia_abstracts"):
        yield joined(clean(row["text"]))


def wikipedia(corpus: Corpus) -> Iterator[str]:
    """Whole paragraphs of WikiText-2's training part in which no word is unknown."""
    for row in corpus.training_text("wikitext2_part"):
        if row["title"].startswith("train5k"):
            lines = row["text"].split("\n")
            text = "\n".join(line for line in lines if "<unk>" not in line and len(line) > 60)
            if text:
                yield joined(clean(text))


def simple_news(corpus: Corpus) -> Iterator[str]:
    """The elementary and intermediate versions of OneStopEnglish articles."""
    for row in corpus.training_text("onestop_english"):
        if "/Adv-Txt/" not in row["title"]:
            yield clean(row["text"])


def speeches(corpus: Corpus) -> Iterator[str]:
    """Pieces of 8000 characters of United States presidents' speeches."""
    for row in corpus.training_text("nltk_mix"):
        if row["title"].startswith(("state_union", "inaugural")):
            for start in range(0, len(row["text"]), 8000):
                yield clean(row["text"][start : start + 8000])


TEXT_SOURCES = {
    "classic_books": Source(books, "public domain", 30),
    "openstax": Source(textbooks, "CC-BY-4.0", 15),
    "dbpedia_abstracts": Source(abstracts, "CC-BY-SA-3.0", 4),
    "wikitext2_train": Source(wikipedia, "CC-BY-SA-3.0", 2),
    "onestop_english": Source(simple_news, "CC-BY-SA-4.0", 2),
    "us_speeches": Source(speeches, "public domain", 1),
}
