#!/usr/bin/env python3
"""Chat pairs made from templates (everyday, harmless), read in the chat phase only; run it to see some.

They give a tiny model the shape of a chat: greet, answer in a full sentence, take up the topic of the
question, give steps, list things, tell a very short story.  No refusals and no safety answers, on purpose.
"""

import random
from collections import Counter

from synth_answers import arithmetic, description, examples, fact, small_talk
from synth_howto import howto
from synth_writing import letter, poem, story, word_game

Conversation = list[tuple[str, str]]

# How often each kind is drawn, out of 107.
WEIGHTS = {
    howto: 30,
    fact: 22,
    description: 8,
    small_talk: 13,
    examples: 9,
    arithmetic: 8,
    story: 7,
    word_game: 6,
    poem: 2,
    letter: 2,
}
MAX_COPIES = 4


def conversation(rng: random.Random) -> Conversation:
    """One exchange, or two or three in one of six conversations."""
    n_exchanges = 1 if rng.random() < 0.84 else rng.randint(2, 3)
    turns = []
    for _ in range(n_exchanges):
        kind = rng.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
        question, answer = kind(rng)
        turns += [("user", question), ("assistant", answer.strip())]
    return turns


def synth(count: int = 24000, seed: int = 7) -> list[Conversation]:
    """``count`` conversations, less those of which ``MAX_COPIES`` came before."""
    rng = random.Random(seed)
    copies: Counter[str] = Counter()
    kept = []
    for _ in range(count):
        turns = conversation(rng)
        copies[str(turns)] += 1
        if copies[str(turns)] <= MAX_COPIES:
            kept.append(turns)
    return kept


def main() -> None:
    """Print 25 conversations."""
    for turns in random.Random(0).sample(synth(), 25):
        for role, text in turns:
            print(f"{role.upper()}: {text}")
        print("--")


if __name__ == "__main__":
    main()
