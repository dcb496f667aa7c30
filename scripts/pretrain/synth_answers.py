"""Small talk, facts, lists and sums; each function draws one question and its answer."""

import random
from collections.abc import Callable

from synth_questions import DESCRIPTIONS, FACTS, SMALL_TALK
from synth_tables import (
    CAPITALS,
    DAYS,
    EXAMPLES,
    HOMES,
    LEG_COUNTS,
    MONTHS,
    NAMES,
    NUMBER_WORDS,
    OPPOSITES,
    PAST_TENSES,
    PLURALS,
    SOUNDS,
    YOUNG,
    Pair,
    article,
    capitalised,
    numbered,
)

Kind = Callable[[random.Random], Pair]


def small_talk(rng: random.Random) -> Pair:
    """A greeting or a remark, with and without capitals and stops, and a reply."""
    question, answer = rng.choice(SMALL_TALK)
    if rng.random() < 0.3:
        question = question.lower()
    if rng.random() < 0.2 and question[-1].isalpha():
        question += rng.choice([".", "!"])
    return question, answer


def description(rng: random.Random) -> Pair:
    """A request to tell about a thing and two sentences about it."""
    topic, text = rng.choice(DESCRIPTIONS)
    questions = [
        "Tell me about {topic}.",
        "What do you know about {topic}?",
        "Describe {topic}.",
        "Write a short paragraph about {topic}.",
        "Can you tell me something about {topic}?",
        "Write about {topic}.",
        "Talk about {topic}.",
        "Explain {topic} to a child.",
        "Give me some information about {topic}.",
        "I want to know more about {topic}.",
    ]
    question = rng.choice(questions).format(topic=topic)
    return question, rng.choice(["", "", "", "Sure! ", "Of course. "]) + text


def fact(rng: random.Random) -> Pair:
    """A question with one right answer."""
    kinds: list[Kind] = [
        capital,
        capital,
        capital,
        opposite,
        grammar,
        animal,
        calendar,
        known_fact,
        known_fact,
    ]
    return kinds[rng.randrange(len(kinds))](rng)


def known_fact(rng: random.Random) -> Pair:
    """One of the fixed questions, sometimes typed carelessly."""
    question, answer = rng.choice(FACTS)
    if rng.random() < 0.15:
        question = question[:1].lower() + question[1:].rstrip("?")
    return question, answer


def capital(rng: random.Random) -> Pair:
    """A country's capital, or the country of a capital."""
    country, city = rng.choice(list(CAPITALS.items()))
    if rng.random() < 0.75:
        questions = [
            "What is the capital of {}?",
            "Tell me the capital of {}.",
            "Name the capital of {}.",
            "What's the capital city of {}?",
            "what is the capital of {}",
            "Which city is the capital of {}?",
        ]
        question = rng.choice(questions).format(country)
        answer = rng.choice([f"The capital of {country} is {city}.", f"{city} is the capital of {country}."])
        return question, answer.replace("D.C..", "D.C.")
    questions = [
        f"{city} is the capital of which country?",
        f"Which country has {city} as its capital?",
        f"In which country is {city}?",
    ]
    answers = [f"{city} is in {country}.", f"{city} is the capital of {country}."]
    return rng.choice(questions), rng.choice(answers)


def opposite(rng: random.Random) -> Pair:
    """A word and its opposite."""
    word, other = rng.choice(OPPOSITES)
    questions = [
        f"What is the opposite of {word}?",
        f"What is the opposite of '{word}'?",
        f"Give me the opposite of {word}.",
        f"What is the antonym of {word}?",
    ]
    return rng.choice(questions), f"The opposite of {word} is {other}."


def grammar(rng: random.Random) -> Pair:
    """A past tense or a plural."""
    if rng.random() < 0.6:
        word, other = rng.choice(PAST_TENSES)
        question = rng.choice([f"What is the past tense of {word}?", f"Give the past tense of '{word}'."])
        return question, f"The past tense of {word} is {other}."
    word, other = rng.choice(PLURALS)
    question = rng.choice([f"What is the plural of {word}?", f"Write the plural of '{word}'."])
    return question, f"The plural of {word} is {other}."


def animal(rng: random.Random) -> Pair:
    """The sound, the young, the legs or the home of an animal."""
    topic = rng.randrange(4)
    if topic == 0:
        name, sound = rng.choice(SOUNDS)
        question = rng.choice([f"What sound does a {name} make?", f"What does a {name} say?"])
        return question, f"A {name} {sound}."
    if topic == 1:
        name, young = rng.choice(YOUNG)
        question = rng.choice([f"What is a baby {name} called?", f"What do you call a young {name}?"])
        return question, f"A young {name} is called a {young}."
    if topic == 2:
        name, legs = rng.choice(LEG_COUNTS)
        one = f"{article(name)} {name}"
        return (
            f"How many legs does {one} have?",
            f"{capitalised(one)} has {NUMBER_WORDS[legs] if legs else 'no'} legs.",
        )
    name, home = rng.choice(HOMES)
    return rng.choice([f"Where does a {name} live?", f"Where do {name}s live?"]), f"A {name} lives {home}."


def calendar(rng: random.Random) -> Pair:
    """The day before or after a day, or the month after a month."""
    day = rng.randrange(7)
    if rng.random() < 0.5:
        return f"What day comes after {DAYS[day]}?", f"{DAYS[(day + 1) % 7]} comes after {DAYS[day]}."
    if rng.random() < 0.5:
        return f"What day comes before {DAYS[day]}?", f"{DAYS[day - 1]} comes before {DAYS[day]}."
    month = rng.randrange(12)
    return (
        f"What month comes after {MONTHS[month]}?",
        f"{MONTHS[(month + 1) % 12]} comes after {MONTHS[month]}.",
    )


def examples(rng: random.Random) -> Pair:
    """Some of a kind of thing, as a sentence or as a numbered list."""
    kind = rng.choice(list(EXAMPLES))
    count = rng.randint(2, min(6, len(EXAMPLES[kind])))
    named = rng.sample(EXAMPLES[kind], count)
    questions = [
        "Name {count} {kind}.",
        "List {count} {kind}.",
        "Give me {count} {kind}.",
        "Tell me {count} {kind}.",
        "Can you name {count} {kind}?",
        "Give me a list of {count} {kind}.",
        "What are {count} {kind}?",
        "Write down {count} {kind}.",
    ]
    question = rng.choice(questions).format(count=rng.choice([NUMBER_WORDS[count], count]), kind=kind)
    if rng.random() < 0.25:
        questions = ["What are some {}?", "Give me examples of {}.", "Name some {}."]
        question = rng.choice(questions).format(kind)
        named = rng.sample(EXAMPLES[kind], 3)
    number = NUMBER_WORDS[len(named)]
    if rng.random() < 0.4:
        opening = rng.choice([f"Here are {number} {kind}:\n", "Sure! Here is a list:\n", ""])
        return question, opening + numbered([capitalised(name) for name in named])
    opening = rng.choice([f"{capitalised(number)} {kind} are ", "", "Some examples are "])
    return question, opening + ", ".join(named[:-1]) + " and " + named[-1] + "."


def arithmetic(rng: random.Random) -> Pair:
    """A sum, a difference, a product or a word problem."""
    style = rng.random()
    left, right = rng.randint(0, 20), rng.randint(0, 20)
    if style < 0.4:
        question, terms = rng.choice(
            [
                (f"What is {left} + {right}?", f"{left} + {right}"),
                (f"What is {left} plus {right}?", f"{left} plus {right}"),
                (f"Add {left} and {right}.", f"{left} + {right}"),
            ]
        )
        total = left + right
        return question, rng.choice([f"{terms} is {total}.", f"{terms} = {total}", f"The answer is {total}."])
    if style < 0.65:
        left, right = max(left, right), min(left, right)
        rest = left - right
        questions = [
            f"What is {left} - {right}?",
            f"What is {left} minus {right}?",
            f"Subtract {right} from {left}.",
        ]
        return rng.choice(questions), rng.choice([f"{left} - {right} is {rest}.", f"The answer is {rest}."])
    left, right = rng.randint(0, 10), rng.randint(0, 10)
    if style < 0.85:
        product = left * right
        questions = [
            f"What is {left} times {right}?",
            f"What is {left} x {right}?",
            f"Multiply {left} by {right}.",
        ]
        answers = [f"{left} times {right} is {product}.", f"The answer is {product}."]
        return rng.choice(questions), rng.choice(answers)
    return word_problem(rng, left + 2)


def word_problem(rng: random.Random, owned: int) -> Pair:
    """A story in one sentence about ``owned`` things."""
    name, friend = rng.choice(NAMES), rng.choice(NAMES)
    things = rng.choice(["apples", "books", "coins", "cards", "balls", "cookies"])
    moved = rng.randint(1, owned)
    if rng.random() < 0.5:
        question = f"{name} has {owned} {things} and buys {moved} more. How many {things} does {name} have?"
        return question, f"{name} has {owned} + {moved} = {owned + moved} {things}."
    question = f"{name} has {owned} {things} and gives {moved} to {friend}. How many {things} are left?"
    return question, f"{name} has {owned} - {moved} = {owned - moved} {things} left."
