"""How-to questions, answered with steps in order."""

import random
from typing import NamedTuple

from synth_tables import Pair, numbered, phrases


class Skill(NamedTuple):
    """What a verb is done to, what that takes and its steps in order; ``{thing}`` is the object."""

    objects: list[str]
    needs: list[str]
    steps: list[str]


SKILLS = {
    "make": Skill(
        objects=phrases(
            "tea; coffee; soup; bread; pancakes; a sandwich; a salad; a cake; lemonade; pizza; cookies; "
            "pasta; an omelet; rice pudding; apple pie; hot chocolate; a fruit salad; jam; butter; popcorn",
            ";",
        ),
        needs=[
            "the right ingredients",
            "a clean kitchen",
            "a bowl, a spoon and a pan",
            "fresh ingredients and a little time",
        ],
        steps=[
            "Gather everything you need for {thing}.",
            "Read the recipe before you begin.",
            "Wash your hands and clean the table.",
            "Put the ingredients in a bowl.",
            "Mix everything well.",
            "Heat it slowly and watch it.",
            "Taste it and add a little salt or sugar.",
            "Let it rest for a few minutes.",
            "Serve {thing} while it is fresh.",
        ],
    ),
    "build": Skill(
        objects=phrases(
            "a birdhouse; a table; a bookshelf; a kite; a tree house; a fence; a model airplane; "
            "a paper boat; a snowman; a sand castle; a small boat; a chair; a dog house; a campfire; "
            "a raft; a simple radio",
            ";",
        ),
        needs=["wood, nails and a hammer", "good tools and a plan", "strong materials", "some simple parts"],
        steps=[
            "Draw a simple plan of {thing}.",
            "Collect the materials and tools.",
            "Measure each part with care.",
            "Cut the parts to the right size.",
            "Put the parts together one by one.",
            "Check that everything is strong.",
            "Paint {thing} or leave it plain.",
            "Test it before you use it.",
        ],
    ),
    "clean": Skill(
        objects=phrases(
            "a window; the kitchen; a carpet; my shoes; a bicycle; the oven; my room; a fish tank; "
            "a keyboard; the bathroom; a car; a wooden floor; a coffee stain",
            ";",
        ),
        needs=["warm water, soap and a soft cloth", "a bucket and a brush", "a little soap and some time"],
        steps=[
            "Remove the dust and loose dirt first.",
            "Mix warm water with a little soap.",
            "Rub {thing} gently with a soft cloth.",
            "Rinse with clean water.",
            "Dry it with a towel.",
            "Put everything back in its place.",
        ],
    ),
    "fix": Skill(
        objects=phrases(
            "a flat tire; a broken chair; a leaking tap; a slow computer; a torn shirt; a squeaky door; "
            "a broken toy; a loose button; a lamp; a clock; a printer",
            ";",
        ),
        needs=["a few simple tools", "some patience and the right parts"],
        steps=[
            "Look closely at {thing} to find the problem.",
            "Get the right tools.",
            "Turn it off or make it safe before you start.",
            "Take off the damaged part.",
            "Put in a new part or glue the old one.",
            "Test it to see if it works.",
        ],
    ),
    "learn": Skill(
        objects=phrases(
            "to swim; to cook; to dance; to draw; to drive; to play the guitar; to play chess; "
            "a new language; to type fast; to sing; to code; to ride a bicycle; mathematics; to paint; "
            "Spanish; French",
            ";",
        ),
        needs=["time, patience and practice", "a good teacher or a good book"],
        steps=[
            "Set a small goal.",
            "Find a good teacher, a book or a video.",
            "Practice a little every day.",
            "Start with the easy parts.",
            "Do not be afraid of mistakes.",
            "Ask for help when you are stuck.",
            "Be patient, because it takes time.",
        ],
    ),
    "grow": Skill(
        objects=phrases(
            "tomatoes; roses; an apple tree; potatoes; herbs; sunflowers; carrots; strawberries; beans; "
            "grass; an orange tree; mushrooms; onions",
            ";",
        ),
        needs=["good soil, water and sunlight", "seeds, soil and a pot"],
        steps=[
            "Choose a sunny place with good soil.",
            "Put the seeds in the soil.",
            "Water them often, but not too much.",
            "Pull out the weeds.",
            "Add some compost to feed the plants.",
            "Wait until {thing} are ready.",
        ],
    ),
    "write": Skill(
        objects=phrases(
            "a letter; a poem; a story; an essay; a speech; a report; a book review; a resume; a song; "
            "a diary; an email; a news article; a short play",
            ";",
        ),
        needs=["a pen, some paper and an idea", "a clear idea and a quiet place"],
        steps=[
            "Choose a topic.",
            "Think about who will read it.",
            "Make a short plan of {thing}.",
            "Write a first draft without stopping.",
            "Use simple and clear words.",
            "Read it again and fix the mistakes.",
            "Ask a friend to read it.",
        ],
    ),
    "find": Skill(
        objects=phrases(
            "a good job; a lost cat; a cheap hotel; new friends; a good doctor; an old friend; a good book; "
            "a place to live; a lost phone; a nice gift; information about history; a good restaurant",
            ";",
        ),
        needs=["some time and patience", "a phone or a computer"],
        steps=[
            "Think about what you really want.",
            "Ask your friends and family.",
            "Search on the internet or in the local newspaper.",
            "Make a list of the best choices.",
            "Call or visit each one.",
            "Choose the one you like best.",
        ],
    ),
    "take care of": Skill(
        objects=phrases(
            "a dog; a cat; a baby; a horse; my teeth; my skin; a rabbit; a garden; my health; a goldfish; "
            "an old person; house plants; my eyes; a parrot",
            ";",
        ),
        needs=["time, love and attention", "patience and a daily plan"],
        steps=[
            "Give attention to {thing} every day.",
            "Keep everything clean.",
            "Use good food and fresh water.",
            "Make sure there is enough rest.",
            "See a doctor or an expert when something is wrong.",
        ],
    ),
    "get to": Skill(
        objects=phrases(
            "the airport; the station; Paris; London; the beach; school; the museum; the city center; "
            "the library; the mountains; the moon; the hospital",
            ";",
        ),
        needs=["a map and a ticket", "some money and a map"],
        steps=[
            "Look at a map to see where it is.",
            "Choose between a bus, a train and a car.",
            "Buy a ticket if you need one.",
            "Leave early so that you are not late.",
            "Follow the signs to {thing}.",
            "Ask someone if you get lost.",
        ],
    ),
    "sell": Skill(
        objects=phrases(
            "a car; a house; old books; a bicycle; paintings; cookies; a phone; used clothes; furniture; a guitar",
            ";",
        ),
        needs=["good photos and a fair price"],
        steps=[
            "Clean {thing} and take good photos.",
            "Find out what a fair price is.",
            "Write a short and honest text.",
            "Put the text on the internet or in a shop.",
            "Answer questions quickly.",
            "Agree on a price and a place to meet.",
        ],
    ),
    "open": Skill(
        objects=phrases(
            "a jar; a bottle; a bank account; a small shop; a locked suitcase; a coconut; "
            "a window that is stuck; a zip file; a can; a restaurant; a wooden box",
            ";",
        ),
        needs=["a little strength and the right tool", "patience and some help"],
        steps=[
            "Look closely at {thing} first.",
            "Find the right tool or the right papers.",
            "Hold it firmly and go slowly.",
            "Turn or pull with a steady hand.",
            "Try warm water or ask for help if it does not work.",
        ],
    ),
    "stop": Skill(
        objects=phrases(
            "a nosebleed; hiccups; a baby from crying; a dog from barking; biting my nails; a leak; "
            "being late; wasting money; spam email; a noise in the car",
            ";",
        ),
        needs=["patience and a good plan"],
        steps=[
            "Find out what causes it.",
            "Stay calm and do not hurry.",
            "Change one small thing at a time.",
            "Try this for a few days.",
            "Ask an expert if nothing helps.",
        ],
    ),
    "prepare for": Skill(
        objects=phrases(
            "an exam; a job interview; a long trip; a storm; a party; a race; the winter; a wedding; "
            "a camping trip; a meeting; a speech",
            ";",
        ),
        needs=["a list and some time"],
        steps=[
            "Make a list of what you need for {thing}.",
            "Start early and do a little each day.",
            "Ask people who did it before.",
            "Put everything in one place.",
            "Get a good sleep the night before.",
        ],
    ),
}

QUESTIONS = [
    "How do I {task}?",
    "How can I {task}?",
    "How to {task}?",
    "how do you {task}",
    "Tell me how to {task}.",
    "Explain how to {task}.",
    "Can you tell me how to {task}?",
    "What is the best way to {task}?",
    "Give me steps to {task}.",
    "I want to {task}. What should I do?",
    "Write a guide on how to {task}.",
    "Please explain how to {task}.",
    "Give me instructions to {task}.",
    "Write step by step instructions to {task}.",
    "Teach me how to {task}.",
]

OPENINGS = [
    "To {task}, you need {need}.",
    "Here is how to {task}.",
    "Sure! Here is how to {task}:",
    "Here are some steps to {task}:",
    "You can {task} in a few steps.",
    "To {task}, follow these steps:",
    "Of course. To {task}, you need {need}.",
    "Sure, here are the steps to {task}.",
]

STEP_WORDS = ["First, ", "Then ", "Next, ", "After that, "]


def in_order(steps: list[str]) -> str:
    """The steps as one paragraph that begins with "First" and ends with "Finally"."""
    openings = [*STEP_WORDS[: len(steps) - 1], "Finally, "]
    return " ".join(opening + step[:1].lower() + step[1:] for opening, step in zip(openings, steps, strict=True))


def known(thing: str) -> str:
    """The object as one speaks of it the second time: "the" for "a", "your" for "my"."""
    thing = thing.replace("my ", "your ")
    return "the " + thing.split(" ", 1)[1] if thing.startswith(("a ", "an ")) else thing


def howto(rng: random.Random) -> Pair:
    """A question for a way to do something and three to five steps."""
    verb = rng.choice(list(SKILLS))
    skill = SKILLS[verb]
    thing = rng.choice(skill.objects)
    task = f"{verb} {thing}" if verb != "learn" or thing.startswith("to ") else f"learn {thing}"
    count = min(rng.randint(3, 5), len(skill.steps))
    chosen = sorted(rng.sample(range(len(skill.steps)), count))
    steps = [skill.steps[index].format(thing=known(thing)) for index in chosen]
    style = rng.random()
    if style < 0.35:
        body = "\n" + numbered(steps)
    elif style < 0.8:
        body = " " + in_order(steps)
    else:
        body = " " + " ".join(steps)
    need = rng.choice(skill.needs)
    opening = rng.choice(OPENINGS).format(task=task.replace("my ", "your "), need=need)
    return rng.choice(QUESTIONS).format(task=task), opening + body
