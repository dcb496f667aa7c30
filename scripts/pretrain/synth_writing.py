"""Stories, poems, letters and games with words; each function draws one request and its answer."""

import random

from synth_tables import (
    ADJECTIVES,
    ANIMALS,
    NAMES,
    NOUNS,
    NUMBER_WORDS,
    PLACES,
    TOPICS,
    Pair,
    article,
    capitalised,
)

STORY_REQUESTS = [
    "Tell me a story about {one}.",
    "Write a short story about {one}.",
    "Tell me a short story about {one} and {the} {place}.",
    "Write a story about {one}.",
    "Tell a bedtime story about {one}.",
]
ANY_STORY = ["Tell me a story.", "Write a short story."]
BEGINNINGS = [
    "Once upon a time there was {one} who lived in a {place}.",
    "{name} lived in a {place} with {one}.",
    "One day {name} met {one} in the {place}.",
    "Long ago, in a quiet {place}, there lived a {adjective} {hero}.",
]
TROUBLES = [
    "The {hero} was lonely and wanted a friend.",
    "One morning the {hero} lost its way.",
    "The {hero} found a golden key under a tree.",
    "A great storm came and everyone was afraid.",
    "The {hero} was hungry, but there was no food.",
    "The {hero} heard a strange sound in the night.",
]
DEEDS = [
    "{name} helped the {hero} and gave it some food.",
    "A kind {helper} came and showed the way home.",
    "So the {hero} asked {friend} for help.",
    "Together they walked all day and all night.",
    "They worked hard and did not give up.",
]
ENDINGS = [
    "In the end they became good friends.",
    "From that day on, the {hero} was never alone.",
    "They went home and lived happily.",
    "Everyone in the village was glad.",
    "And the {hero} learned that it is good to help others.",
]

COUPLETS = [
    ("The day is bright, the sky is blue,", "I think of {topic} and think of you."),
    ("{Topic} is near and {topic} is far,", "It shines at night just like a star."),
    ("I walk along the quiet way,", "And think of {topic} every day."),
    ("The birds are singing in the tree,", "And {topic} means so much to me."),
    ("When evening comes and lights are low,", "I dream of {topic} and let it go."),
    ("Oh {topic}, so gentle and so free,", "You bring a quiet song to me."),
]

# The purpose of a letter: its text.
LETTERS = [
    ("ask for a day off", "I would like to take Friday off, because I have to visit my family."),
    ("say thank you", "Thank you very much for your help last week."),
    (
        "invite a friend to a party",
        "I am having a party on Saturday and I would be glad if you could come.",
    ),
    ("say sorry for being late", "I am sorry that I was late for our meeting."),
    ("ask for help with homework", "Could you help me with my homework this evening?"),
    ("ask for information", "Could you please send me more information about your course?"),
    (
        "tell a friend about a trip",
        "I am back from my trip. The weather was good and I saw many beautiful places.",
    ),
    ("congratulate a friend", "Congratulations on your new job! I am very happy for you."),
]


def story(rng: random.Random) -> Pair:
    """A story of four or five sentences about an animal."""
    name, friend, hero, place = rng.choice(NAMES), rng.choice(NAMES), rng.choice(ANIMALS), rng.choice(PLACES)
    details = {
        "name": name,
        "friend": friend,
        "hero": hero,
        "one": f"{article(hero)} {hero}",
        "place": place,
        "adjective": rng.choice(ADJECTIVES),
        "helper": rng.choice(ANIMALS),
        "the": "a" if rng.random() < 0.9 else "the",
    }
    requests = STORY_REQUESTS + (ANY_STORY if rng.random() < 0.3 else [])
    request = rng.choice(requests).format(**details)
    sentences = [rng.choice(BEGINNINGS), rng.choice(TROUBLES)]
    sentences += rng.sample(DEEDS, rng.randint(1, 2))
    sentences.append(rng.choice(ENDINGS))
    return request, " ".join(sentences).format(**details)


def poem(rng: random.Random) -> Pair:
    """One or two couplets on a topic."""
    topic = rng.choice(TOPICS)
    chosen = rng.sample(COUPLETS, rng.randint(1, 2))
    lines = [line.format(topic=topic, Topic=capitalised(topic)) for couplet in chosen for line in couplet]
    requests = [
        f"Write a poem about {topic}.",
        f"Write a short poem about {topic}.",
        f"Can you write a poem about {topic}?",
        f"Give me a poem about {topic}.",
    ]
    return rng.choice(requests), "\n".join(lines)


def letter(rng: random.Random) -> Pair:
    """A letter of one or two sentences."""
    reader, writer = rng.choice(NAMES), rng.choice(NAMES)
    purpose, text = rng.choice(LETTERS)
    form = rng.choice(["an email", "a letter", "a short message", "a short email"])
    requests = [
        f"Write {form} to {purpose}.",
        f"Help me write {form} to {purpose}.",
        f"Please write {form} to {purpose}.",
    ]
    return rng.choice(requests), f"Dear {reader},\n\n{text}\n\nBest wishes,\n{writer}"


def word_game(rng: random.Random) -> Pair:
    """Repeat a sentence, use a word, or look at the letters of words."""
    game = rng.randrange(6)
    noun, other = rng.choice(NOUNS), rng.choice(NOUNS)
    adjective, name = rng.choice(ADJECTIVES), rng.choice(NAMES)
    one = f"{article(adjective)} {adjective} {noun}"
    sentences = [
        f"The {adjective} {noun} is near the {other}.",
        f"{name} saw {one} yesterday.",
        f"My {noun} is very {adjective}.",
        f"We looked at the {noun} and the {other}.",
        f"{name} likes the {adjective} {noun}.",
        f"There is {one} in the {rng.choice(PLACES)}.",
    ]
    sentence = rng.choice(sentences)
    if game == 0:
        requests = ["Repeat after me: {}", "Repeat this sentence: {}", "Say this: {}"]
        return rng.choice(requests).format(sentence), sentence
    if game == 1:
        requests = [
            f"Write a sentence about a {noun}.",
            f"Use the word {noun} in a sentence.",
            f"Make a sentence with the word '{noun}'.",
        ]
        request, place = rng.choice(requests), rng.choice(PLACES)
        return request, rng.choice(
            [f"The {noun} is {adjective}.", f"{name} has {one}.", f"I saw {one} in the {place}."]
        )
    if game == 2:
        return spelling(rng, noun)
    if game == 3:
        requests = [f"What is the first letter of {noun}?", f"What letter does {noun} start with?"]
        return rng.choice(requests), f"The first letter of {noun} is {noun[0].upper()}."
    if game == 4:
        return f"Write this in capital letters: {noun} {other}", f"{noun.upper()} {other.upper()}"
    return length(noun, other)


def spelling(rng: random.Random, noun: str) -> Pair:
    """How a word is spelled."""
    request = rng.choice([f"How do you spell {noun}?", f"Spell the word {noun}."])
    return request, f"{capitalised(noun)} is spelled {'-'.join(noun.upper())}."


def length(noun: str, other: str) -> Pair:
    """Which word is longer, or how long both are."""
    if len(noun) == len(other):
        return f"How many letters are in {noun}?", f"There are {NUMBER_WORDS[len(noun)]} letters in {noun}."
    longer = max(noun, other, key=len)
    return f"Which word is longer, {noun} or {other}?", f"{capitalised(longer)} is longer."
