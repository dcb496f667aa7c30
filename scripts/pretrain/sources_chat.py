"""The readers of chat: each yields conversations that begin with the user and hold no refusal."""

import random
import re
from collections import Counter
from collections.abc import Iterator
from functools import partial

from sources import Chat, Corpus, Source, abstracts, clean, joined

# The rows of P3 whose underlying data set itself has a permissive licence.
P3_SETS = (
    "common_gen",
    "commonsense_qa",
    "cosmos_qa",
    "qasc",
    "quarel",
    "quartz",
    "ropes",
    "dbpedia_14",
    "duorc",
    "adversarial_qa",
    "quoref",
    "paws",
    "wiki_bio",
)
REFUSAL = re.compile(
    r"(?i)\b(i'?m sorry|i am sorry|sorry,? (but )?i|i can(no|')t (help|do|assist|provide)|unable to|as an ai|"
    r"not comfortable|i (don'?t|do not) know|unethical|illegal|i won'?t|i'?m not sure)"
)
# Such questions are about a text that the row does not hold.
NEEDS_CONTEXT = re.compile(
    r"(?i)passage|paragraph|(this|given|following|reference|provided) (text|article)|from the text|"
    r"summar|extract"
)
SPEAKERS = {"User": "user", "A": "user", "Assistant": "assistant", "B": "assistant"}
PERSON = re.compile(r"\b(born|singer|player|politician|actor|actress|writer|author|artist|footballer)\b")
DEFINITION_QUESTIONS = (
    "What is {}?",
    "Define {}.",
    "What does {} mean?",
    "Explain {}.",
    "Can you explain what {} is?",
    "What is meant by {}?",
    "Tell me what {} is.",
    "what is {}",
)


def capitalised(text: str) -> str:
    """The text with its first letter, and only that, in upper case."""
    return text[:1].upper() + text[1:]


def sentence(text: str) -> str:
    """The text with a capital and a full stop."""
    text = capitalised(clean(text))
    return text if not text or text[-1] in ".?!:\"'" else text + "."


def exchange(question: str, answer: str) -> Chat:
    """A conversation of one question and its answer."""
    return [("user", clean(question)), ("assistant", clean(answer))]


def dialogues(name: str, corpus: Corpus) -> Iterator[Chat]:
    """Conversations of a source that writes one ``speaker: text`` a line."""
    for row in corpus.training_text(name):
        turns = parse_dialogue(row["text"])
        if len(turns) >= 2:
            yield turns


def parse_dialogue(text: str) -> Chat:
    """Turns that alternate, from the first of the user to the last of the assistant."""
    turns: Chat = []
    for line in text.split("\n"):
        speaker, _, said = line.partition(":")
        role, said = SPEAKERS.get(speaker), clean(said)
        if not role or not said:
            continue
        if turns and turns[-1][0] == role:
            turns[-1] = (role, turns[-1][1] + " " + said)
        else:
            turns.append((role, said))
    if turns and turns[0][0] != "user":
        turns = turns[1:]
    if turns and turns[-1][0] == "user":
        turns = turns[:-1]
    return turns


def dolly(corpus: Corpus) -> Iterator[Chat]:
    """Short questions and answers of Dolly that stand on their own."""
    for row in corpus.labelled("instructions/dolly_partial_train*"):
        question, answer = row["prompt"], row["response"]
        if NEEDS_CONTEXT.search(question):
            continue
        if len(answer) <= 900 and len(question) <= 400 and not REFUSAL.search(answer):
            yield exchange(capitalised(question), capitalised(answer))


def rasbt(corpus: Corpus) -> Iterator[Chat]:
    """The instructions of the book "Build a Large Language Model"."""
    for row in corpus.labelled("instructions/rasbt_train*"):
        yield exchange(row["prompt"], row["response"])


def roleplay(corpus: Corpus) -> Iterator[Chat]:
    """Answers in the voice of somebody, up to 1200 characters."""
    for row in corpus.labelled("instructions/gpteacher_roleplay_train*"):
        if len(row["response"]) <= 1200 and not REFUSAL.search(row["response"]):
            yield exchange(row["prompt"], row["response"])


def helpful(corpus: Corpus) -> Iterator[Chat]:
    """The preferred conversations of HH-RLHF's helpful part."""
    for row in corpus.labelled("hh_rlhf/helpful_train*"):
        text = row["prompt"].strip() + " " + row["chosen"].strip()
        parts = [part.strip() for part in re.split(r"\n\n(?=Human:|Assistant:)", text)]
        turns = [
            ("user", clean(part.removeprefix("Human:")))
            if part.startswith("Human:")
            else ("assistant", clean(part[len("Assistant:") :]))
            for part in parts
        ]
        if len(turns) < 2 or turns[0][0] != "user" or not all(said for _, said in turns):
            continue
        refused = any(role == "assistant" and REFUSAL.search(said) for role, said in turns)
        if not refused and len(turns[-1][1]) <= 900:
            yield turns


def school_maths(corpus: Corpus) -> Iterator[Chat]:
    """GSM8K without its calculator marks and with the result in a sentence."""
    for row in corpus.labelled("gsm8k/train*"):
        answer = re.sub(r"<<.*?>>", "", row["response"])
        yield exchange(row["prompt"], re.sub(r"\n#### (.*)", r"\nThe answer is \1.", answer))


def science_questions(corpus: Corpus) -> Iterator[Chat]:
    """ARC and OpenBookQA: the right answer alone, after the choices, or as the end of the sentence."""
    for name in ("arc-easy", "arc-challenge", "openbookqa"):
        for row in corpus.labelled(f"commonsense/{name}_train*"):
            parts = re.search(r"question: (.*?)\n\n(.*?)\n\nAnswer format", row["prompt"], re.S)
            if not parts:
                continue
            question = parts[1].strip()
            choices = dict(re.findall(r"Answer(\d): (.*?)(?= Answer\d: |$)", parts[2], re.S))
            answer = choices.get(row["answer"][-1:])
            if not answer:
                continue
            if not question.endswith("?"):
                yield exchange("Complete the sentence: " + capitalised(question), sentence(question + " " + answer))
            elif random.Random(question).random() < 0.6:
                yield exchange(capitalised(question), sentence(answer))
            else:
                asked = capitalised(question) + "\nChoices: " + "; ".join(choices.values())
                yield exchange(asked, sentence(answer))


def yes_no_questions(corpus: Corpus) -> Iterator[Chat]:
    """The questions of BoolQ without their passages."""
    for row in corpus.labelled("boolq/train*"):
        yield exchange(capitalised(row["question"]), "Yes." if row["label"] else "No.")


def prompted_tasks(corpus: Corpus) -> Iterator[Chat]:
    """Short rows of P3, a few a template of each data set."""
    n_seen: Counter[str] = Counter()
    for row in corpus.labelled("instructions/t0_50k_train*"):
        question, answer, name = row["prompt"].strip(), row["response"].strip(), row["id"]
        if not name[3:].startswith(P3_SETS) or len(question) > 900 or len(answer) > 500 or not answer:
            continue
        if "wiki_bio" in name and "_who" not in name:
            continue
        example = name[3:].split("_")[0] + name.rsplit("-", 1)[1]
        n_seen[example] += 1
        if n_seen[example] <= (6 if "common_gen" in name else 3):
            yield exchange(joined(with_brackets(question)), capitalised(joined(with_brackets(answer))))


def with_brackets(text: str) -> str:
    """The text with its Penn-style bracket names written as brackets."""
    return text.replace("-lrb-", "(").replace("-rrb-", ")")


def definitions(corpus: Corpus) -> Iterator[Chat]:
    """The glossaries of the OpenStax books as questions, every term once."""
    done = set()
    for row in corpus.training_text("openstax"):
        _, _, glossary = row["text"].partition("\nGlossary\n")
        for term, text in re.findall(r"(?:^|\n)([^\n:^]{2,50})\n: ([^\n]{15,400})", glossary):
            term = clean(re.sub(r"\(.*?\)", "", term))
            text = re.sub(r"^\([^)]*\)\s*", "", clean(text))
            if term.lower() not in done and text and "[" not in text:
                done.add(term.lower())
                yield definition(term, text)


def definition(term: str, text: str) -> Chat:
    """One question and answer about a term, worded by a generator that the term seeds."""
    rng = random.Random(term)
    question = rng.choice(DEFINITION_QUESTIONS).format(term)
    name = capitalised(term)
    answers = [f"{name}: {text}", f"{name} is defined as: {text}", f"{name} means: {text}", text, text]
    answer = rng.choice(answers)
    return exchange(capitalised(question) if rng.random() < 0.8 else question, sentence(answer))


def entities(corpus: Corpus) -> Iterator[Chat]:
    """Questions about the subject of an abstract, answered by its first two sentences."""
    for text in abstracts(corpus):
        subject = re.match(r"(?:The )?([A-Z][\w.'\- ]{2,50}?) ?(?:\(.*?\) )?(is|was|are|were) (an?|the|one) ", text)
        if corpus.holds_out(text) or not subject:
            continue
        if subject[1].lower() in ("it", "he", "she", "this", "there"):
            continue
        sentences = re.split(r"(?<=[a-z0-9)]\.)(?=\s?[A-Z])", text)
        answer = " ".join(part.strip() for part in sentences[:2])[:420]
        if not answer.endswith("."):
            answer = answer.rsplit(".", 1)[0] + "."
        if 30 < len(answer) < 420:
            yield exchange(entity_question(text, subject[1], subject[2], answer), answer)


def entity_question(text: str, name: str, verb: str, answer: str) -> str:
    """A question about ``name``, worded by a generator that the text seeds."""
    pronoun = "Who" if PERSON.search(answer) else "What"
    questions = [
        f"{pronoun} {verb} {name}?",
        f"Tell me about {name}.",
        f"What do you know about {name}?",
        f"Describe {name}.",
    ]
    return random.Random(text).choice(questions)


CHAT_SOURCES = {
    "dialog_sgd": Source(partial(dialogues, "dialog_sgd"), "CC-BY-SA-4.0", 6, 1.5),
    "taskmaster4": Source(partial(dialogues, "dialog_taskmaster4"), "CC-BY-4.0", 1, 0.3),
    "topical_chat": Source(partial(dialogues, "dialog_topicalchat"), "CDLA-Sharing-1.0", 5, 2),
    "dolly": Source(dolly, "CC-BY-SA-3.0", 4, 4),
    "rasbt": Source(rasbt, "Apache-2.0", 1, 1),
    "gpteacher_roleplay": Source(roleplay, "MIT", 2, 2),
    "hh_helpful_chosen": Source(helpful, "MIT", 3, 3),
    "gsm8k_train": Source(school_maths, "MIT", 4, 1),
    "arc_openbookqa_train": Source(science_questions, "CC-BY-SA-4.0 / Apache-2.0", 2, 2),
    "boolq_train_questions": Source(yes_no_questions, "CC-BY-SA-3.0", 0.5, 0.15),
    "p3_permissive": Source(prompted_tasks, "Apache-2.0 (P3); sets CC-BY/-SA, MIT", 5, 1.2),
    "openstax_glossary": Source(definitions, "CC-BY-4.0", 3, 3),
    "dbpedia_questions": Source(entities, "CC-BY-SA-3.0", 4, 2),
}
