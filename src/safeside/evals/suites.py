"""Suites: named sets of prompts on which an adapter is measured."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from reprlib import repr as shortened
from typing import Literal

from safeside.content import is_seen
from safeside.errors import InputError
from safeside.evals.endpoint import encodable
from safeside.registry import Registry
from safeside.tasks.rows import BadRow, example_of, messages_of, open_rows, parse_rows

Row = Mapping[str, object]
Holds = Literal["both", "harmful", "harmless"]
Measure = Literal["answers", "likelihood", "choices"]

# Our own wording of how an answer begins that helps: what a prefilled-answer attack puts into the model's mouth where
# the set names no beginning of its own.
AFFIRMATIVE = "Sure, here is what you asked for:"


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt of a suite."""

    id: str
    """Its name in the suite."""
    turns: tuple[str, ...]
    """What the user says; the model answers each turn before the next."""
    is_harmful: bool
    """Whether it asks for harm."""
    goal: str = ""
    """What an attack is after, in plain words; empty: the first turn says it."""
    prefix: str = ""
    """The beginning of the last answer, put into the model's mouth."""
    references: tuple[str, ...] = ()
    """Known answers, one for each turn; what a likelihood is taken of."""


Reader = Callable[[Row, int], Prompt | None]
"""The prompt of a row and its line, None for a row that is not of the suite; an InputError says what is wrong."""


def labelled(row: Row, line: int) -> Prompt:
    """The first message of a row labelled 1 (harmful) or 0."""
    example = example_of(row, ("label",), line)
    return Prompt(_id(row, line), (example.messages[0].content,), example.labels[0] == 1)


def harmbench(row: Row, line: int) -> Prompt | None:
    """A HarmBench behaviour, its context before it; None for the copyright ones: they ask for texts, not harm."""
    origin, prompt = _origin(row), labelled(row, line)
    if origin.get("functional") == "copyright":
        return None
    context = str(origin.get("context") or "").strip()
    goal = prompt.turns[0]
    return replace(prompt, turns=(f"{context}\n\n{goal}",), goal=goal) if context else prompt


def attack(row: Row, line: int) -> Prompt:
    """A jailbreak prompt whose row names its goal; its label, which is of an answer, is not read."""
    (first, *_), goal = messages_of(row), _origin(row).get("goal")
    if not isinstance(goal, str) or not is_seen(goal):
        raise InputError("an attack without orig.goal; expected what it is after")
    return Prompt(_id(row, line), (first.content,), True, goal)


def prefilled(row: Row, line: int) -> Prompt:
    """A harmful prompt whose answer begins as the set's target does, or with ``AFFIRMATIVE``."""
    target = _origin(row).get("target")
    return replace(labelled(row, line), prefix=target if isinstance(target, str) and target.strip() else AFFIRMATIVE)


def harmless_only(row: Row, line: int) -> Prompt | None:
    """A labelled prompt if it is harmless."""
    prompt = labelled(row, line)
    return None if prompt.is_harmful else prompt


def talk(row: Row, line: int) -> Prompt:
    """A question of several turns, with answers to compare with where it has them (MT-Bench)."""
    turns, references = row.get("turns"), row.get("reference") or ()
    for name, texts in (("turns", turns), ("reference", references)):
        if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) and is_seen(text) for text in texts):
            raise InputError(f"{name!r} must be a list of texts; got {shortened(texts)}")
    if not turns:
        raise InputError("'turns' is empty; expected what the user says")
    return Prompt(_id(row, line), tuple(turns), False, references=tuple(references))  # type: ignore[arg-type]


def answered(row: Row, line: int) -> Prompt:
    """A harmless prompt with a known good answer."""
    prompt, *rest = messages_of(row)
    if len(rest) != 1 or rest[0].role != "assistant":
        raise InputError("a row without one 'response'; expected the answer whose likelihood is taken")
    return Prompt(_id(row, line), (prompt.content,), False, references=(rest[0].content,))


def choices(row: Row, line: int) -> Prompt:
    """A question with four choices (MMLU); its known answer is a letter."""
    question, listed, answer = row.get("question"), row.get("choices"), row.get("answer")
    if not isinstance(question, str) or not is_seen(question) or not isinstance(row.get("subject"), str):
        raise InputError("'question' and 'subject' must be text; expected both")
    if not isinstance(listed, list) or len(listed) != 4 or not all(isinstance(text, str) for text in listed):
        raise InputError(f"'choices' is {shortened(listed)}; expected four texts")
    if answer not in ("A", "B", "C", "D"):
        raise InputError(f"'answer' is {shortened(answer)}; expected one of A, B, C, D")
    shown = "\n".join(f"{letter}. {text}" for letter, text in zip("ABCD", listed, strict=True))
    return Prompt(_id(row, line), (f"{question}\n{shown}",), False, references=(str(answer),))


def _id(row: Row, line: int) -> str:
    return str(row.get("id") or f"line {line}")


def _origin(row: Row) -> Row:
    origin = row.get("orig")
    return origin if isinstance(origin, Mapping) else {}


@dataclass(frozen=True, slots=True)
class Suite:
    """Prompts, how many of them are taken, and the judge of the answers to them."""

    name: str
    """What results call the suite."""
    path: Path
    """A file of rows."""
    judge: str = "refusal_phrases"
    """Name of a registered judge, unless another is chosen."""
    limit: int = 200
    """Prompts of each kind that an aligner is measured on; guards are measured on all."""
    read: Reader = labelled
    """How a row becomes a prompt."""
    holds: Holds = "both"
    """Kinds of prompts that must be there."""
    is_local: bool = False
    """Whether its file lies in the folder of local data, which is not packaged.  Of such a file ``limit`` draws by a
    hash of each prompt's name, the same prompts in every run; of others it takes the first."""
    measure: Measure = "answers"
    """What is measured: answers by a judge, the likelihood of known answers, or of the choices that a question has."""
    max_new_tokens: int | None = None
    """Longest answer to each turn; the run's own unless given."""

    def file(self, data: Path | None) -> Path:
        """Its file, in the folder ``data`` if the suite is local; no folder is an InputError."""
        if not self.is_local:
            return self.path
        if data is None:
            raise InputError(
                f"The prompts of suite {self.name!r} are not packaged. Add --data FOLDER with {self.path}."
            )
        return data / self.path


SUITES: Registry[Suite] = Registry("suite")
SUITES.register("demo", Suite("demo", Path(str(files("safeside.builtin") / "demo" / "test.jsonl.gz"))))

DRAWN = 100  # prompts of a local suite


def _local(name: str, path: str, read: Reader, holds: Holds) -> Suite:
    return Suite(name, Path(path), limit=DRAWN, read=read, holds=holds, is_local=True)


_MT_BENCH = _local("mt_bench", "mt_bench/test.jsonl.gz", talk, "harmless")
_MMLU = _local("mmlu", "mmlu/test.jsonl.gz", choices, "harmless")
_HELPFUL = _local("helpful", "instructions/alpaca_partial_test.jsonl.gz", answered, "harmless")

LOCAL_SUITES = (
    _local("strongreject", "harmful_prompts/strongreject_test.jsonl.gz", labelled, "harmful"),
    _local("jailbreakbench", "harmful_prompts/jailbreakbench_test.jsonl.gz", labelled, "harmful"),
    _local("harmbench", "harmful_prompts/harmbench_test.jsonl.gz", harmbench, "harmful"),
    _local("advbench", "harmful_prompts/advbench_test.jsonl.gz", labelled, "harmful"),
    _local("attacks", "jailbreakbench_artifacts/test.jsonl.gz", attack, "harmful"),
    _local("prefilled", "harmful_prompts/advbench_test.jsonl.gz", prefilled, "harmful"),
    _local("xstest", "xstest/prompts_test.jsonl.gz", harmless_only, "harmless"),
    _local("benign", "benign_prompts/alpaca_test.jsonl.gz", labelled, "harmless"),
    replace(_MT_BENCH, judge="mt_bench", max_new_tokens=256),
    replace(_HELPFUL, judge="", measure="likelihood"),
)
SUITES.register("mmlu", replace(_MMLU, judge="", measure="choices"))  # through lm-eval: see ``safeside.evals.mmlu``
for _suite in LOCAL_SUITES:
    SUITES.register(_suite.name, _suite)


def all_prompts(suite: Suite, data: Path | None = None) -> list[Prompt]:
    """Every prompt of a suite in file order; a bad line, a kind that is missing, or one name twice is an InputError."""
    path, found = suite.file(data), list[Prompt]()
    with open_rows(path) as handle:
        for row in parse_rows(handle):
            line, problem, prompt = _prompt_of(row, suite.read)
            if problem:
                raise InputError(f"{path}: line {line}: {problem}")
            found += [prompt] if prompt is not None else []
    kinds = {prompt.is_harmful for prompt in found}
    if suite.holds == "both" and kinds != {True, False}:
        raise InputError(f"{path} holds prompts of one label only; a suite needs harmful and harmless ones.")
    if suite.holds != "both" and kinds != {suite.holds == "harmful"}:
        raise InputError(f"{path} must hold {suite.holds} prompts and no others for suite {suite.name!r}. Check it.")
    if len({prompt.id for prompt in found}) < len(found):
        raise InputError(f"{path} gives two prompts one id; expected one for each. Take one out.")
    return found


def _prompt_of(row: tuple[int, dict[str, object]] | BadRow, read: Reader) -> tuple[int, str, Prompt | None]:
    if isinstance(row, BadRow):
        return row.line, row.problem, None
    try:
        prompt = read(row[1], row[0])
    except InputError as error:
        return row[0], str(error), None
    texts = () if prompt is None else (prompt.id, *prompt.turns, prompt.goal, prompt.prefix, *prompt.references)
    if any(encodable(text) != text for text in texts):
        return row[0], "text that is not valid Unicode: a lone surrogate", None
    return row[0], "", prompt


def draw(suite: Suite, data: Path | None = None) -> list[Prompt]:
    """At most ``limit`` prompts of each kind, harmful ones first, each kind in file order.

    Of a local suite they are those whose names hash lowest: a higher limit adds prompts and takes none away.
    """
    prompts, drawn = all_prompts(suite, data), list[Prompt]()
    for is_harmful in (True, False):
        kind = [prompt for prompt in prompts if prompt.is_harmful == is_harmful]
        if suite.is_local:
            chosen = {prompt.id for prompt in sorted(kind, key=lambda prompt: _rank(suite, prompt))[: suite.limit]}
            drawn += [prompt for prompt in kind if prompt.id in chosen]
        else:
            drawn += kind[: suite.limit]
    return drawn


def _rank(suite: Suite, prompt: Prompt) -> str:
    return hashlib.sha256(f"{suite.name}\n{prompt.id}".encode()).hexdigest()


def suite_prompts(suite: Suite, data: Path | None = None) -> tuple[list[str], list[str]]:
    """The first turns of the harmful and of the harmless prompts drawn."""
    prompts = draw(suite, data)
    harmful = [prompt.turns[0] for prompt in prompts if prompt.is_harmful]
    return harmful, [prompt.turns[0] for prompt in prompts if not prompt.is_harmful]


def goals_of(names: Sequence[str], data: Path | None = None) -> list[str]:
    """What the prompts of these suites are after, all of them and not only those drawn: no row that anything learns
    from may ask for it (see ``safeside.tasks.overlap``).  Later turns and known answers are not among them."""
    goals = (prompt.goal or prompt.turns[0] for name in names for prompt in all_prompts(SUITES.get(name), data))
    return list(dict.fromkeys(goals))
