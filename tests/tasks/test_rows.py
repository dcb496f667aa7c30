"""Rows on disk: every shape, every label, and every bad row by its line number."""

from __future__ import annotations

import gzip
import json
import math
import os
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safeside import Message
from safeside.errors import InputError
from safeside.tasks.rows import (
    BadRow,
    example_of,
    for_one_label,
    load_examples,
    load_kind,
    messages_of,
    open_rows,
    parse_rows,
    soft_of,
)

LABELS = ("harm", "hate")


def user(text: str) -> Message:
    return Message("user", text)


def assistant(text: str) -> Message:
    return Message("assistant", text)


def write(path: Path, *lines: str | bytes | dict[str, object]) -> Path:
    """One line each: objects as JSON, text and bytes as they are."""
    parts = [line if isinstance(line, (str, bytes)) else json.dumps(line) for line in lines]
    content = b"\n".join(part if isinstance(part, bytes) else part.encode() for part in parts)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def same(found: tuple[float, ...] | None, expected: tuple[float, ...]) -> bool:
    """Whether the values are equal, NaN being equal to NaN."""
    return found is not None and [str(value) for value in found] == [str(value) for value in expected]


# ---- shapes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"prompt": "a"}, (user("a"),)),
        ({"prompt": "a", "response": None}, (user("a"),)),
        ({"prompt": "a", "response": ""}, (user("a"),)),
        ({"prompt": "a", "response": "b"}, (user("a"), assistant("b"))),
        ({"text": " a\n"}, (user(" a\n"),)),
        ({"document": "a", "summary": "b"}, (user("a"), assistant("b"))),
        ({"messages": [{"role": "user", "content": "a"}]}, (user("a"),)),
        (
            {"messages": [{"role": "system", "content": ""}, {"role": "user", "content": "a", "name": "x"}]},
            (Message("system", ""), user("a")),
        ),
        ({"prompt": "a", "text": "b", "id": 3, "label": 9}, (user("a"),)),
    ],
)
def test_every_shape_is_a_conversation(row: dict[str, object], messages: tuple[Message, ...]) -> None:
    assert messages_of(row) == messages


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({}, "no known shape: found \\[\\]; expected"),
        ({"label": 1, "question": "a"}, "no known shape: found \\['label', 'question'\\]"),
        ({"document": "a"}, "no known shape"),
        ({"prompt": ""}, "'prompt' must be text that is not empty; got ''"),
        ({"prompt": " \n"}, "'prompt' must be text"),
        ({"prompt": None}, "'prompt' must be text that is not empty; got None"),
        ({"text": "\u200b\u2060"}, "'text' must be text that is not empty"),
        ({"messages": [{"role": "user", "content": "\ufeff"}]}, "messages hold no text"),
        ({"prompt": "a", "response": 0}, "'response' must be text"),
        ({"prompt": "a", "response": []}, "'response' must be text"),
        ({"prompt": "a", "response": "  "}, "'response' must be text"),
        ({"text": ["a"]}, "'text' must be text"),
        ({"document": "a", "summary": 3}, "'summary' must be text"),
        ({"messages": "a"}, "messages must be a list"),
        ({"messages": [{"content": "a"}]}, "messages must be a list"),
        ({"messages": ["a"]}, "messages must be a list"),
        ({"messages": []}, "messages hold no text"),
        ({"messages": [{"role": "user", "content": " "}]}, "messages hold no text"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "Unknown role 'tool'"),
        ({"messages": [{"role": {}, "content": "a"}]}, "Unknown role {}"),
        ({"messages": [{"role": "user", "content": 3}]}, "content must be text; got int"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant"}]}, "content must be text; got NoneType"),
        ({"prompt": "\ud800"}, "not valid Unicode"),
        ({"prompt": "a", "response": "\udfff"}, "not valid Unicode"),
        ({"document": "a", "summary": "b\udfff"}, "not valid Unicode"),
    ],
)
def test_what_is_no_conversation_is_an_error(row: dict[str, object], problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        messages_of(row)


# ---- labels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        ([1, 0], (1.0, 0.0)),
        ([True, False], (1.0, 0.0)),
        ([1.0, 0], (1.0, 0.0)),
        ({"hate": 1, "harm": 0}, (0.0, 1.0)),
        ({"hate": True, "harm": False, "other": 0, "third": None}, (0.0, 1.0)),
    ],
)
def test_several_labels_are_a_list_or_an_object(label: object, expected: tuple[float, ...]) -> None:
    assert example_of({"text": "a", "label": label}, LABELS).labels == expected


@pytest.mark.parametrize("label", [1, True, 1.0, [1], {"harm": 1}])
def test_one_label_is_a_number_too(label: object) -> None:
    assert example_of({"text": "a", "label": label}, ("harm",), line=4).labels == (1.0,)
    assert example_of({"text": "a", "label": label}, ("harm",), line=4).line == 4


def test_an_aligner_needs_no_label() -> None:
    assert example_of({"prompt": "a", "response": "b", "label": "?"}, ()).labels == ()


@pytest.mark.parametrize("value", [1, True, 7, 0.5, "yes", [0], math.nan])
@pytest.mark.parametrize("known", [{"harm": 0, "hate": 0}, {"harm": 1, "hate": 0}])
@pytest.mark.parametrize("partial", [False, True])
def test_a_label_outside_the_set_is_no_harmless_row(value: object, known: dict[str, object], partial: bool) -> None:
    row = {"text": "a", "label": {**known, "violence": value}}
    with pytest.raises(
        InputError, match="'label' names 'violence'; expected harm, hate only, or 0 for any other label"
    ):
        example_of(row, LABELS, partial=partial)


def test_rows_with_a_label_outside_the_set_are_counted(tmp_path: Path) -> None:
    """In a file of labelled rows, and in one of harmless rows alone."""
    fine = {"text": "a", "label": {"harm": 0, "hate": 0, "violence": 0}}
    path = write(tmp_path / "rows.jsonl", fine, {"text": "b", "label": {"harm": 0, "hate": 0, "violence": 1}})
    for examples, bad in (load_examples(path, LABELS), load_kind(path, LABELS, is_harmful=False)):
        assert [example.line for example in examples] == [1]
        assert [(row.line, "names 'violence'" in row.problem) for row in bad] == [(2, True)]


# ---- labels that are not known ---------------------------------------------------------------------------------------


def test_a_partial_row_knows_some_of_its_labels(tmp_path: Path) -> None:
    row = {"text": "a", "label": {"hate": 1}}
    with pytest.raises(InputError, match="expected 0 or 1"):
        example_of(row, LABELS)
    assert same(example_of(row, LABELS, partial=True).labels, (math.nan, 1.0))
    whole = {"text": "a", "label": {"hate": 1, "harm": 0, "other": 0}}
    assert example_of(whole, LABELS, partial=True).labels == (0.0, 1.0)
    path = write(tmp_path / "rows.jsonl", row, {"text": "b", "label": [1, 0]}, {"text": "c", "label": {"other": 0}})
    found, bad = load_examples(path, LABELS, partial=True)
    assert len(found) == 2
    assert [(item.line, "knows none of harm, hate" in item.problem) for item in bad] == [(3, True)]
    assert [item.line for item in load_examples(path, LABELS)[1]] == [1, 3]


@pytest.mark.parametrize("label", [{"hate": 2}, {"hate": None}, {"hate": "1"}, {"hate": math.nan}, {}, [1], 1, None])
def test_partial_labels_are_still_checked(label: object) -> None:
    with pytest.raises(InputError, match="label"):
        example_of({"text": "a", "label": label}, LABELS, partial=True)


def test_a_file_may_know_one_label() -> None:
    alone = example_of({"text": "a", "label": 1, "soft": 0.75}, ("hate",))
    widened = for_one_label(alone, "hate", LABELS)
    assert same(widened.labels, (math.nan, 1.0))
    assert same(widened.soft, (math.nan, 0.75))
    assert widened.messages == alone.messages
    unscored = for_one_label(example_of({"text": "a", "label": 0}, ("harm",)), "harm", LABELS)
    assert same(unscored.labels, (0.0, math.nan))
    assert unscored.soft is None


def test_a_row_of_scores_needs_them() -> None:
    assert soft_of({"soft": {"hate": 0.5, "harm": 1}}, LABELS) == (1.0, 0.5)
    for row in ({}, {"soft": None}, {"soft": {"hate": 0.5}}):
        with pytest.raises(InputError, match="soft"):
            soft_of(row, LABELS)


@pytest.mark.parametrize("soft", [[0.25, 1], {"hate": 1, "harm": 0.25}])
def test_soft_scores_travel_with_the_labels(soft: object) -> None:
    example = example_of({"text": "a", "label": [0, 1], "soft": soft}, LABELS)
    assert example.soft == (0.25, 1.0)
    assert example_of({"text": "a", "label": [0, 1], "soft": None}, LABELS).soft is None


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({}, "no 'label'; expected 0 or 1 for harm, hate"),
        ({"label": 1}, "'label' has 1 values; expected 2 \\(harm, hate\\)"),
        ({"label": [1, 0, 0]}, "'label' has 3 values"),
        ({"label": [1, 2]}, "expected 0 or 1"),
        ({"label": [1, 0.5]}, "expected 0 or 1"),
        ({"label": [1, "0"]}, "expected 0 or 1"),
        ({"label": [1, None]}, "expected 0 or 1"),
        ({"label": [1, float("nan")]}, "expected 0 or 1"),
        ({"label": [1, 10**400]}, "expected 0 or 1"),
        ({"label": [[1], 0]}, "expected 0 or 1"),
        ({"label": {"harm": 1}}, "expected 0 or 1"),
        ({"label": [1, 0], "soft": [0.5, 1.5]}, "expected a number in \\[0, 1\\]"),
        ({"label": [1, 0], "soft": [0.5, float("-inf")]}, "expected a number in \\[0, 1\\]"),
        ({"label": [1, 0], "soft": [0.5]}, "'soft' has 1 values"),
        ({"label": [1, 0], "soft": "high"}, "'soft' has 1 values"),
    ],
)
def test_bad_labels_and_soft_scores_are_errors(values: dict[str, object], problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        example_of({"text": "a", **values}, LABELS)


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_a_file_gives_its_rows_in_order_and_its_bad_ones_by_line(tmp_path: Path, name: str) -> None:
    good = {"text": "caf\u00e9", "label": 1}
    path = write(
        tmp_path / name,
        good,
        "",
        "   \t",
        "{broken",
        "[1, 2]",
        '"text"',
        b'{"text": "\xff\xfe", "label": 1}',
        {"text": "a"},
        {"text": "b", "label": 3},
        {"text": "\ud800", "label": 1},
        '{"text": "c", "label": ' + "[" * 100_000,
        '{"text": "d", "label": ' + "9" * 5000 + "}",
        {**good, "text": "last"},
    )
    examples, bad = load_examples(path, ("harm",))
    assert [(example.line, example.messages[0].content) for example in examples] == [(1, "caf\u00e9"), (13, "last")]
    assert [row.line for row in bad] == [4, 5, 6, 7, 8, 9, 10, 11, 12]
    problems = {row.line: row.problem for row in bad}
    assert problems[4].startswith("not JSON")
    assert problems[5] == problems[6] == "not a JSON object"
    assert problems[7] == "not UTF-8: invalid start byte at byte 10"
    assert problems[8].startswith("no 'label'")
    assert "Unicode" in problems[10]
    assert problems[11].startswith("not JSON: maximum recursion depth")


def test_line_ends_and_byte_order_marks_of_windows_are_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a", "label": 1}\r\n\r\n{"text": "b", "label": 0}\r\n')
    examples, bad = load_examples(path, ("harm",))
    assert [(example.line, example.messages[0].content) for example in examples] == [(1, "a"), (3, "b")]
    assert not bad


@pytest.mark.parametrize("keep", [40, -8])
def test_a_truncated_archive_ends_with_a_bad_row(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "rows.jsonl.gz"
    lines = "\n".join(json.dumps({"text": f"row {index} {index**9 % 10007}", "label": 1}) for index in range(200))
    path.write_bytes(gzip.compress(lines.encode())[:keep])
    examples, bad = load_examples(path, ("harm",))
    assert len(bad) == 1
    assert bad[0].problem.startswith("the file cannot be read from here on")
    assert bad[0].line == len(examples) + 1


@pytest.mark.parametrize("line", ['{"text": "a"}'.encode("utf-16"), '{"text": "\xe9"}'.encode("latin-1")])
def test_a_line_of_another_encoding_is_not_utf_8(line: bytes) -> None:
    (row,) = parse_rows([line])
    assert isinstance(row, BadRow)
    assert row.problem.startswith("not UTF-8: invalid ")


def test_what_is_no_archive_is_a_bad_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.gz"
    path.write_text('{"text": "a", "label": 1}\n')
    examples, (bad,) = load_examples(path, ("harm",))
    assert not examples
    assert bad.line == 1


@pytest.mark.parametrize("name", ["none.jsonl", "none.jsonl.gz", "."])
def test_a_missing_file_is_an_error(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="is a folder" if name == "." else "There is no file"):
        open_rows(tmp_path / name)


def test_pipes_and_devices_are_read_as_files_are(tmp_path: Path) -> None:
    """As ``safeside guard ADAPTER <(command)`` and ``/dev/stdin`` hand them over."""
    assert load_examples("/dev/null", ("harm",)) == ([], [])
    pipe = tmp_path / "rows"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_text, args=('{"text": "a", "label": 1}\n',), daemon=True)
    writer.start()
    examples, bad = load_examples(pipe, ("harm",))
    writer.join()
    assert [example.labels for example in examples] == [(1.0,)]
    assert bad == []


# ---- anything at all -------------------------------------------------------------------------------------------------

TEXT = st.text(st.characters(), max_size=8)  # lone surrogates too: JSON can spell them
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
KEYS = st.sampled_from(["prompt", "response", "text", "document", "summary", "messages", "label", "soft", "role"])
MESSAGES = st.lists(st.dictionaries(st.sampled_from(["role", "content"]), TEXT | JSON), max_size=3)
ROWS = st.dictionaries(KEYS, JSON | MESSAGES | st.sampled_from([0, 1, [0, 1], "user"]), max_size=5)


@given(value=JSON | ROWS, labels=st.sampled_from([(), ("harm",), LABELS]))
def test_any_json_becomes_a_row_or_a_bad_row(value: object, labels: tuple[str, ...]) -> None:
    (row,) = parse_rows([json.dumps(value)])
    if not isinstance(value, dict):
        assert row == BadRow(1, "not a JSON object")
        return
    assert not isinstance(row, BadRow)
    try:
        example = example_of(row[1], labels, row[0])
    except InputError as error:
        str(error).encode()  # it can be printed
        return
    assert all(label in (0.0, 1.0) for label in example.labels)
    assert len(example.labels) == len(labels)
    assert any(message.content.strip() for message in example.messages)


@given(line=st.binary(max_size=40) | st.text(st.characters(), max_size=40))
def test_any_line_is_read_or_refused(line: bytes | str) -> None:
    for row in parse_rows([line]):
        assert isinstance(row, BadRow) or isinstance(row[1], dict)


# ---- files of one kind -----------------------------------------------------------------------------------------------


def test_a_file_of_one_kind_needs_no_labels(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", {"text": "a"}, "{broken", {"text": "b", "label": [0, 0]}, {"query": "c"})
    examples, bad = load_kind(path, LABELS, is_harmful=False)
    assert [(example.line, example.labels) for example in examples] == [(1, (0.0, 0.0)), (3, (0.0, 0.0))]
    assert [row.line for row in bad] == [2, 4]
    assert all(row.problem.startswith("rows.jsonl: ") for row in bad)
    one, _ = load_kind(write(tmp_path / "one.jsonl", {"text": "a"}), ("harm",), is_harmful=True)
    assert one[0].labels == (1.0,)


def test_harmful_rows_of_several_labels_say_which(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", {"text": "a"}, {"text": "b", "label": {"harm": 0, "hate": 1}})
    examples, bad = load_kind(path, LABELS, is_harmful=True)
    assert [example.labels for example in examples] == [(0.0, 1.0)]
    assert "no 'label'" in bad[0].problem


@pytest.mark.parametrize(("is_harmful", "words"), [(False, "labelled harmful; expected harmless"), (True, "harmless;")])
def test_a_label_of_the_other_kind_is_refused(tmp_path: Path, is_harmful: bool, words: str) -> None:
    path = write(tmp_path / "rows.jsonl", *({"text": "a", "label": [value, value]} for value in (0, 1)))
    with pytest.raises(InputError, match=words):
        load_kind(path, LABELS, is_harmful=is_harmful)


def test_a_file_of_one_kind_without_a_usable_row_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no usable row\. The first problem: line 1, rows\.jsonl: not JSON"):
        load_kind(write(tmp_path / "rows.jsonl", "{broken"), LABELS, is_harmful=False)
    with pytest.raises(InputError, match=r"holds no usable row\.$"):
        load_kind(write(tmp_path / "rows.jsonl", ""), LABELS, is_harmful=False)


# ---- preferences -----------------------------------------------------------------------------------------------------


def listed(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(texts)]


@pytest.mark.parametrize(
    ("row", "messages", "rejected"),
    [
        ({"prompt": "p", "chosen": "c", "rejected": "r"}, (user("p"), assistant("c")), "r"),
        ({"chosen": listed("p", "c"), "rejected": listed("p", "r")}, (user("p"), assistant("c")), "r"),
        (
            {"prompt": "p", "chosen": listed("p", "a", "q", "c"), "rejected": listed("p", "a", "q", "r")},
            (user("p"), assistant("a"), user("q"), assistant("c")),
            "r",
        ),
        (
            {"prompt": "p", "response_0": "r", "response_1": "c", "better_response_id": 0, "safer_response_id": 1},
            (user("p"), assistant("c")),
            "r",
        ),
    ],
)
def test_a_preference_has_two_answers(row: dict[str, object], messages: tuple[Message, ...], rejected: str) -> None:
    example = example_of(row, ())
    assert (example.messages, example.rejected) == (messages, assistant(rejected))


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"prompt": "p", "chosen": "c"}, "without 'rejected'; expected both"),
        ({"prompt": "p", "rejected": "c"}, "without 'chosen'; expected both"),
        ({"prompt": "p", "chosen": "c", "rejected": " c\n"}, "are the same: 'c'; expected two answers"),
        ({"prompt": "p", "chosen": "c", "rejected": None}, "'rejected' must be text"),
        ({"prompt": "", "chosen": "c", "rejected": "r"}, "'prompt' must be text"),
        ({"chosen": "c", "rejected": "r"}, "with no 'prompt'"),
        ({"chosen": listed("p", "c"), "rejected": listed("q", "r")}, "differ before their last message"),
        ({"chosen": listed("p", "c"), "rejected": "r"}, "messages must be a list"),
        ({"chosen": listed("p"), "rejected": listed("q")}, "role 'user'; expected 'assistant'"),
        ({"prompt": "p", "response_0": "c", "response_1": "r", "safer_response_id": -1}, "is -1; expected 0 or 1"),
        ({"prompt": "p", "response_0": "c", "response_1": "r", "safer_response_id": True}, "is True; expected 0 or 1"),
        ({"prompt": "p", "response_0": "c", "safer_response_id": 0}, "'rejected' must be text"),
    ],
)
def test_what_is_no_preference_is_an_error(row: dict[str, object], problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        example_of(row, ())


def test_guards_do_not_read_preferences() -> None:
    example = example_of({"prompt": "p", "chosen": "c", "rejected": "c", "label": 1}, ("harm",))
    assert (example.messages, example.rejected) == ((user("p"),), None)
