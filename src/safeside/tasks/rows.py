"""Rows of labelled text on disk, and how each kind becomes a conversation.

A row is one JSON object a line, in a ``.jsonl`` or ``.jsonl.gz`` file, in one of four shapes: ``{"prompt",
"response"?}``, ``{"text"}``, ``{"document", "summary"}`` or ``{"messages": [{"role", "content"}, ...]}``; plus
``"label"`` (0 or 1, a list of them, or an object from label to 0 or 1) and, for distillation, ``"soft"`` scores.  A row
whose object holds a label that was not asked for, with another value than 0 or null, is a bad row: it is no harmless
one.  An aligner's rows may also be preferences, ``{"prompt", "chosen", "rejected"}``, or ``{"chosen", "rejected"}``
that are whole conversations and differ in their last message, or ``{"prompt", "response_0", "response_1",
"safer_response_id"}`` (PKU-SafeRLHF): the safer response is the chosen one.
"""

from __future__ import annotations

import gzip
import json
import math
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from io import BufferedIOBase
from pathlib import Path
from reprlib import repr as shortened

from safeside.chat import check_messages
from safeside.content import is_seen
from safeside.errors import InputError
from safeside.types import Example, Message

_READ = (("messages",), ("prompt", "response"), ("text",), ("document", "summary"))  # by shape, in order of their rank
_SHAPES = '{"prompt", "response"?}, {"text"}, {"document", "summary"} or {"messages"}'


@dataclass(frozen=True, slots=True)
class BadRow:
    """A line that could not be used, and why."""

    line: int
    """Line number, from 1."""
    problem: str
    """What was wrong with it."""


def open_rows(path: str | Path) -> BufferedIOBase:
    """The lines of a ``.jsonl`` or ``.jsonl.gz`` file or pipe, not yet decoded; a missing file is an InputError."""
    path = Path(path)
    if not path.exists() or path.is_dir():
        what = f"{path} is a folder" if path.is_dir() else f"There is no file {path}"
        raise InputError(f"{what}; expected JSON lines (.jsonl or .jsonl.gz). Check the path.")
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")


def parse_rows(lines: Iterable[str | bytes], first: int = 1) -> Iterator[tuple[int, dict[str, object]] | BadRow]:
    """Each line's number (from ``first`` on) and object, or what is wrong with it.  Empty lines are passed over.

    A file that is damaged from some line on ends with a BadRow there.
    """
    number = first - 1
    try:
        for number, line in enumerate(lines, first):
            if line.strip():
                yield _parse(number, line)
    except (OSError, EOFError, zlib.error) as error:
        yield BadRow(number + 1, f"the file cannot be read from here on: {error}")


def _parse(number: int, line: str | bytes) -> tuple[int, dict[str, object]] | BadRow:
    try:
        values = json.loads(line.decode("utf-8-sig") if isinstance(line, bytes) else line)  # of bytes it would guess
    except UnicodeDecodeError as error:
        return BadRow(number, f"not UTF-8: {error.reason} at byte {error.start}")
    except (ValueError, RecursionError) as error:
        return BadRow(number, f"not JSON: {error}")
    return (number, values) if isinstance(values, dict) else BadRow(number, "not a JSON object")


def messages_of(values: Mapping[str, object]) -> tuple[Message, ...]:
    """The conversation of a row; an unknown shape, a missing or an empty text is an InputError.

    A ``response`` that is null or ``""`` means that there is no answer yet.
    """
    messages = _shaped(values)
    check_messages(messages)
    return messages


def columns_of(values: Mapping[str, object]) -> tuple[str, ...]:
    """Which columns of a row ``messages_of`` reads: the others may hold anything."""
    shape = next((names for names in _READ if names[0] in values), ())
    return tuple(name for name in shape if name in values)


def _shaped(values: Mapping[str, object]) -> tuple[Message, ...]:
    if "messages" in values:
        return _listed_messages(values["messages"])
    if "prompt" in values:
        prompt = Message("user", _text(values, "prompt"))
        is_answered = values.get("response") not in (None, "")
        return (prompt, Message("assistant", _text(values, "response"))) if is_answered else (prompt,)
    if "text" in values:
        return (Message("user", _text(values, "text")),)
    if "document" in values and "summary" in values:
        return (Message("user", _text(values, "document")), Message("assistant", _text(values, "summary")))
    raise InputError(f"no known shape: found {shortened(sorted(values))}; expected {_SHAPES}")


def preference_of(values: Mapping[str, object]) -> tuple[tuple[Message, ...], Message]:
    """The conversation that ends with the chosen answer, and the rejected answer in its place.

    Answers that are missing, empty or the same, and conversations that differ before them, are an InputError.
    """
    missing = [name for name in ("chosen", "rejected") if name not in values]
    if missing:
        raise InputError(f"a preference without {' and '.join(map(repr, missing))}; expected both answers")
    if isinstance(values["chosen"], list) or isinstance(values["rejected"], list):
        chosen, rejected = _listed_messages(values["chosen"]), _listed_messages(values["rejected"])
        if chosen[:-1] != rejected[:-1]:
            raise InputError("'chosen' and 'rejected' differ before their last message; expected one prompt for both")
    else:
        if "prompt" not in values:
            raise InputError("a preference with no 'prompt'; expected one, or both answers as whole conversations")
        prompt = Message("user", _text(values, "prompt"))
        chosen, rejected = ((prompt, Message("assistant", _text(values, name))) for name in ("chosen", "rejected"))
    for messages in (chosen, rejected):
        check_messages(messages)
        if messages[-1].role != "assistant":
            raise InputError(f"a preference ends with a message of role {messages[-1].role!r}; expected 'assistant'")
    if not is_seen(chosen[-1].content) or not is_seen(rejected[-1].content):
        raise InputError("'chosen' or 'rejected' is an empty answer; expected two answers with text")
    if chosen[-1].content.strip() == rejected[-1].content.strip():
        raise InputError(f"'chosen' and 'rejected' are the same: {shortened(chosen[-1].content)}; expected two answers")
    return chosen, rejected[-1]


def _by_safety(values: Mapping[str, object]) -> dict[str, object]:
    """A preference of two numbered responses, of which the safer one is named."""
    safer = values["safer_response_id"]
    if safer not in (0, 1) or isinstance(safer, bool):
        raise InputError(f"'safer_response_id' is {shortened(safer)}; expected 0 or 1")
    answers = {"chosen": f"response_{safer}", "rejected": f"response_{1 - int(str(safer))}"}
    return {"prompt": values.get("prompt"), **{name: values.get(column) for name, column in answers.items()}}


def _listed_messages(listed: object) -> tuple[Message, ...]:
    if not isinstance(listed, list) or not all(isinstance(item, dict) and "role" in item for item in listed):
        raise InputError("messages must be a list of {'role', 'content'} objects")
    if not any(is_seen(str(item.get("content") or "")) for item in listed):
        raise InputError("messages hold no text; expected at least one content that is not empty")
    return tuple(Message(item["role"], item.get("content")) for item in listed)


def _text(values: Mapping[str, object], key: str) -> str:
    text = values[key]
    if not isinstance(text, str) or not is_seen(text):
        raise InputError(f"{key!r} must be text that is not empty; got {shortened(text)}")
    return text


def example_of(
    values: Mapping[str, object], labels: tuple[str, ...], line: int = 0, *, partial: bool = False
) -> Example:
    """The row as an Example.  With ``labels`` (K names) it must be labelled; without, ``label`` is not read.

    With ``partial`` an object of labels may leave some out, but not all: those are NaN.  An object that gives another
    label a value but 0 or None is an InputError.
    """
    if not labels and not {"chosen", "rejected", "safer_response_id"}.isdisjoint(values):
        messages, rejected = preference_of(_by_safety(values) if "safer_response_id" in values else values)
        return Example(messages, rejected=rejected, line=line)
    messages = messages_of(values)
    if not labels:
        return Example(messages, line=line)
    if "label" not in values:
        raise InputError(f"no 'label'; expected 0 or 1 for {', '.join(labels)}")
    soft = soft_of(values, labels) if values.get("soft") is not None else None
    label = values["label"]
    if isinstance(label, Mapping):
        _refuse_unknown(label, labels)
    if partial and isinstance(label, Mapping):
        return Example(messages, _known_values(label, labels), soft, line)
    return Example(messages, _values(label, labels, "label", binary=True), soft, line)


def soft_of(values: Mapping[str, object], labels: tuple[str, ...]) -> tuple[float, ...]:
    """The row's scores in [0, 1], one for each label; a row without is an InputError."""
    if values.get("soft") is None:
        raise InputError(f"no 'soft'; expected a score in [0, 1] for {', '.join(labels)}")
    return _values(values["soft"], labels, "soft")


def _refuse_unknown(found: Mapping[str, object], labels: tuple[str, ...]) -> None:
    """Raise an InputError where ``found`` names a label that is not among ``labels``, and not as harmless."""
    unknown = [name for name, value in found.items() if name not in labels and value not in (0, None)]
    if unknown:
        raise InputError(
            f"'label' names {', '.join(map(repr, unknown[:5]))}; expected {', '.join(labels)} only, or 0 for any other "
            "label. Correct the name, or take the row out"
        )


def _known_values(found: Mapping[str, object], labels: tuple[str, ...]) -> tuple[float, ...]:
    """0 or 1 for each label that ``found`` has, NaN for the others."""
    known = tuple(label for label in labels if label in found)
    if not known:
        raise InputError(f"'label' knows none of {', '.join(labels)}; expected 0 or 1 for at least one")
    values = dict(zip(known, _values(found, known, "label", binary=True), strict=True))
    return tuple(values.get(label, math.nan) for label in labels)


def for_one_label(example: Example, label: str, labels: tuple[str, ...]) -> Example:
    """An example that was read with ``label`` alone as one of all ``labels``, the others unknown: NaN."""

    def widened(values: tuple[float, ...]) -> tuple[float, ...]:
        return tuple(values[0] if name == label else math.nan for name in labels)

    soft = None if example.soft is None else widened(example.soft)
    return replace(example, labels=widened(example.labels), soft=soft)


def _values(found: object, labels: tuple[str, ...], what: str, binary: bool = False) -> tuple[float, ...]:
    if isinstance(found, Mapping):
        found = [found.get(label) for label in labels]
    listed = found if isinstance(found, list) else [found]
    wanted = "0 or 1" if binary else "a number in [0, 1]"
    if len(listed) != len(labels):
        raise InputError(f"{what!r} has {len(listed)} values; expected {len(labels)} ({', '.join(labels)})")
    numbers = []
    for value in listed:  # NaN is in no range
        if not isinstance(value, (int, float)) or not 0 <= value <= 1 or (binary and value not in (0, 1)):
            raise InputError(f"{what!r} is {shortened(found)}; expected {wanted}")
        numbers.append(float(value))
    return tuple(numbers)


def load_examples(
    path: str | Path, labels: tuple[str, ...], *, partial: bool = False
) -> tuple[list[Example], list[BadRow]]:
    """All usable rows of a file in order, and the bad ones with their line numbers; ``partial`` as in example_of."""
    with open_rows(path) as handle:
        return examples_of(parse_rows(handle), labels, partial=partial)


def examples_of(
    rows: Iterable[tuple[int, dict[str, object]] | BadRow], labels: tuple[str, ...], *, partial: bool = False
) -> tuple[list[Example], list[BadRow]]:
    """All usable rows in order, and the bad ones with their line numbers; ``partial`` as in example_of."""
    examples: list[Example] = []
    bad: list[BadRow] = []
    for row in rows:
        if isinstance(row, BadRow):
            bad.append(row)
            continue
        try:
            examples.append(example_of(row[1], labels, row[0], partial=partial))
        except InputError as error:
            bad.append(BadRow(row[0], str(error)))
    return examples, bad


def load_kind(path: Path, labels: tuple[str, ...], *, is_harmful: bool) -> tuple[list[Example], list[BadRow]]:
    """Usable and bad rows of a file that holds one kind only, labelled or not: ``kind_of`` its rows."""
    with open_rows(path) as handle:
        return kind_of(parse_rows(handle), path, labels, is_harmful=is_harmful)


def kind_of(
    rows: Iterable[tuple[int, dict[str, object]] | BadRow],
    place: str | Path,
    labels: tuple[str, ...],
    *,
    is_harmful: bool,
) -> tuple[list[Example], list[BadRow]]:
    """Usable and bad rows of a place that holds one kind only, labelled or not.

    A row without a label is taken for what the place holds (harmful rows of several labels must say which).  A label of
    the other kind is an InputError, and so is a place without a usable row.
    """
    implied: dict[str, object] = {} if is_harmful and len(labels) > 1 else {"label": [float(is_harmful)] * len(labels)}
    examples: list[Example] = []
    bad: list[BadRow] = []
    name = place.name if isinstance(place, Path) else place
    for row in rows:
        if isinstance(row, BadRow):
            bad.append(BadRow(row.line, f"{name}: {row.problem}"))
            continue
        try:
            examples.append(example_of({**implied, **row[1]}, labels, row[0]))
        except InputError as error:
            bad.append(BadRow(row[0], f"{name}: {error}"))
    for example in examples:
        if any(example.labels) != is_harmful:
            kind, wrong = ("harmful", "harmless") if is_harmful else ("harmless", "harmful")
            raise InputError(f"{place}, line {example.line}: labelled {wrong}; expected {kind} rows only. Take it out.")
    if not examples:
        first = f" The first problem: line {bad[0].line}, {bad[0].problem}." if bad else ""
        raise InputError(f"{place} holds no usable row.{first}")
    return examples, bad
