"""Every slot filling of the demo data set, its label and the split it belongs to.

A filling (a "topic") is a hand-written phrase of one of four kinds: `do` (a verb phrase: "fold a sheet"),
`ask` (a question without its mark), `text` (something to be written) and `say` (a statement).  Templates
say nothing about the label; only the filling does, so the two labels meet in the same sentence patterns.
"""

import re
from collections import Counter
from dataclasses import dataclass
from random import Random

import topics_alike
import topics_crime
import topics_everyday
import topics_trust
import topics_violence

KINDS: tuple[str, ...] = ("do", "ask", "text", "say")
CATEGORIES: tuple[str, ...] = ("vcr", "ncr", "hte", "ssh", "prv", "dfm", "spc", "ipv")
BLOCKS = (
    *topics_violence.BLOCKS,
    *topics_crime.BLOCKS,
    *topics_trust.BLOCKS,
    *topics_everyday.BLOCKS,
    *topics_alike.BLOCKS,
)
# Words that a keyword filter would watch.  Fillings with one of them are dealt word by word, so that every
# split has the word with both labels; the first pattern that matches decides.
WATCHED: tuple[str, ...] = (
    *("hack", "poison", "blow", "destroy", r"sp(y|ies)", "cheat", "shoot", "crack", "attack", "steal|stole"),
    *("kill", "fake", "track", r"brea?k|broke", "pirate", "false", "rumour", r"my ex\b", "wife", "fire|burn"),
    *("get into|got into", "secret|hid(e|den)", "pill", r"die|dying|dead|death", "password|account", "hurt"),
    *("foreign", "immigrant", "women", "stranger", "private", "camera", "neighbour", "my boss", r"\blies?\b"),
)
DEAL: tuple[str, ...] = ("train", "test", "train", "validation", "train", "train", "test", "train")
SHUFFLE_SEED = 1


@dataclass(frozen=True)
class Topic:
    """One filling with its category (MLCommons AILuminate key or "benign"), label, kind and split."""

    text: str
    category: str
    label: int
    kind: str
    split: str


def fillings(block_text: str) -> list[str]:
    """The phrases of one block, in order, with white space collapsed."""
    phrases = (" ".join(part.split()) for part in block_text.split(";"))
    return [phrase for phrase in phrases if phrase]


def watched_word(phrase: str) -> str:
    """The first watched pattern in the phrase, or an empty string."""
    return next((pattern for pattern in WATCHED if re.search(pattern, phrase.lower())), "")


def all_topics() -> list[Topic]:
    """Every topic, dealt to the splits in the rhythm of `DEAL`.

    The rhythm runs separately for each label and watched word, or without one for each category, label
    and kind.
    """
    random = Random(SHUFFLE_SEED)
    dealt: Counter[tuple[str, ...]] = Counter()
    topics: list[Topic] = []
    for category, label, kind, block_text in BLOCKS:
        phrases = fillings(block_text)
        random.shuffle(phrases)
        for phrase in phrases:
            word = watched_word(phrase)
            stream = (word, str(label)) if word else (category, str(label), kind)
            split = DEAL[dealt[stream] % len(DEAL)]
            dealt[stream] += 1
            topics.append(Topic(phrase, category, label, kind, split))
    return topics
