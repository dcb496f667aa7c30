"""Every command on the same bad rows: each is counted and told, the good ones go through, nothing is a traceback."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from command_line import Ran, texts, toy_recipe
from safeside import Base, load_adapter
from safeside.train.patch import PatchSettings

BROKEN = (
    b'{"text": "", "label": 0}',
    b'{"text": " \\n\\t ", "label": 0}',
    b'{"prompt": "how?", "response": 7, "label": 0}',
    b'{"text": "caf\xe9", "label": 0}',  # not UTF-8
    b'{"text": "\\ud800", "label": 0}',  # half a character
    b'{"text": "the cat"',
    b"[]",
)
LABELS = (b'{"text": "a", "label": 2}', b'{"text": "b", "label": "yes"}', b'{"text": "c", "label": null}')
PADDING = b'{"text": "<|pad|><|pad|>", "label": 0}'  # text that spells it is text
N_BAD = len(BROKEN) + len(LABELS)


def file_of(path: Path, n: int, bad: tuple[bytes, ...] = (), *, labels: tuple[int, ...] = (0, 1)) -> Path:
    rows = [json.dumps({"text": text, "label": labels[row % len(labels)]}) for row, text in enumerate(texts(n))]
    path.write_bytes(b"\n".join([*bad, *(row.encode() for row in rows), PADDING]))
    return path


def told(ran: Ran) -> str:
    return " ".join(ran.err.split())


def test_guard_flags_what_it_cannot_read(run: Callable[..., Ran], adapters: Path, tmp_path: Path) -> None:
    ran = run("guard", adapters / "harm", file_of(tmp_path / "rows.jsonl", 12, BROKEN))
    assert (ran.code, len(ran.lines)) == (1, len(BROKEN) + 13)
    assert all(line["verdicts"][0]["flagged"] and line["verdicts"][0]["score"] is None for line in ran.lines[:7])
    assert all(line["verdicts"][0]["score"] is not None for line in ran.lines[7:])
    for problem in ("must be text that is not empty", "not JSON", "not valid Unicode", "not a JSON object"):
        assert problem in told(ran)
    assert f"{len(BROKEN)} bad rows; each was flagged unscored" in told(ran)


def test_a_hundred_thousand_tokens_are_read_in_windows(
    run: Callable[..., Ran], adapters: Path, tiny_base: Base, tmp_path: Path
) -> None:
    """By a guard, all of them; training and porting leave such a row out and count it."""
    text = "the cat sat and then " * 25_000
    assert len(tiny_base.tokenizer(text)["input_ids"]) > 100_000
    path = file_of(tmp_path / "rows.jsonl", 100)
    path.write_bytes(path.read_bytes() + b"\n" + json.dumps({"text": text, "label": 1}).encode())
    recipe = toy_recipe(tmp_path, tiny_base)
    trained = run("train", recipe, "--output", tmp_path / "made", "--json")
    assert (trained.code, trained.json["rows_too_long"], trained.json["bad_rows"]) == (0, 2, 0)
    ported = run(
        "port", adapters / "harm", "--to", tiny_base.folder, "--text", path, "--output", tmp_path / "ported",
        "--method", "map", "--json",
    )  # fmt: skip
    assert (ported.code, ported.json["port rows left out"]) == (0, "2")  # and the padding
    (tmp_path / "long.jsonl").write_text(json.dumps({"text": text}))
    (line,) = run("guard", adapters / "harm", tmp_path / "long.jsonl").lines
    assert "windows" in line["verdicts"][0]["reason"]


def test_eval_counts_them(run: Callable[..., Ran], adapters: Path, tmp_path: Path) -> None:
    path = file_of(tmp_path / "rows.jsonl", 12, (*BROKEN, *LABELS))
    ran = run("eval", adapters / "harm", "--data", path, "--json")
    assert ran.code == 1
    assert {(row["n"], row["n_skipped"]) for row in ran.json} == {(13, N_BAD)}
    assert "expected 0 or 1" in told(ran)
    one_class = run("eval", adapters / "harm", "--data", file_of(tmp_path / "one.jsonl", 12, labels=(0,)))
    assert (one_class.code, "Figures need both harmful and harmless rows" in told(one_class)) == (2, True)


def test_training_counts_them_and_needs_both_classes(run: Callable[..., Ran], tiny_base: Base, tmp_path: Path) -> None:
    file_of(tmp_path / "rows.jsonl", 40, (*BROKEN, *LABELS))
    recipe = toy_recipe(tmp_path, tiny_base)
    ran = run("train", recipe, "--output", tmp_path / "made", "--json")
    assert (ran.code, ran.json["train_rows"], ran.json["bad_rows"]) == (1, 41, 2 * N_BAD)  # two splits
    assert (ran.json["validation_rows_learnt"], "41 of 41 validation rows are training rows too" in told(ran)) == (
        41,
        True,
    )
    load_adapter(tmp_path / "made", tiny_base)
    file_of(tmp_path / "one.jsonl", 20, labels=(1,))
    recipe.write_text(recipe.read_text().replace("validation = ['rows.jsonl']", "validation = ['one.jsonl']"))
    (tmp_path / "one.jsonl").write_bytes((tmp_path / "one.jsonl").read_bytes().replace(b'"label": 0', b'"label": 1'))
    one_class = run("train", recipe, "--output", tmp_path / "other")
    assert one_class.code == 2
    assert "Validation needs both harmful and harmless rows for every label" in told(one_class)
    assert "label 1 of 1 has no harmless row. Add some." in told(one_class)
    assert "Traceback" not in one_class.err
    recipe.write_text(recipe.read_text().replace("train = ['rows.jsonl']", "train = ['one.jsonl']"))
    learnt = run("train", recipe, "--output", tmp_path / "other")
    assert (learnt.code, "Training needs both harmful and harmless rows for every label" in told(learnt)) == (2, True)


@pytest.mark.parametrize("mode", ["prompt", "stream"])
def test_one_percent_of_broken_lines_does_not_stop_a_calibration(
    run: Callable[..., Ran], adapters: Path, tmp_path: Path, mode: str
) -> None:
    rows = [{"prompt": "how?", "response": text} if mode == "stream" else {"prompt": text} for text in texts(300)]
    lines = [json.dumps(row).encode() for row in rows]
    lines[50:50] = [b"{broken", b'{"prompt": "\xff"}', b'{"prompt": ""}']
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join(lines))
    words = ["calibrate", adapters / "harm", "--benign", path, "--fpr", 0.01, "--mode", mode]
    ran = run(*words, "--output", tmp_path / "mine", "--json")
    assert (ran.code, ran.json["n_skipped"]) == (1, 3)
    assert {row["n_harmless"] for row in ran.json["thresholds"]} == {300}
    twice = run(*words, "--harmful", path, "--output", tmp_path / "none")
    assert (twice.code, "is given as --benign and as --harmful" in told(twice)) == (2, True)


def test_a_patch_counts_them(
    run: Callable[..., Ran], adapters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("safeside.train.patch_command.PatchSettings", partial(PatchSettings, steps=4))
    examples = file_of(tmp_path / "new.jsonl", 8, (*BROKEN, *LABELS))
    replay = file_of(tmp_path / "replay.jsonl", 24, BROKEN)
    words = ["patch", adapters / "harm", "--examples", examples, "--output", tmp_path / "out", "--json"]
    ran = run(*words, "--replay", replay)
    assert (ran.code, ran.json["bad_rows"]) == (1, N_BAD + len(BROKEN))
    harmful = tmp_path / "harmful.jsonl"
    harmful.write_text("\n".join(json.dumps({"text": text, "label": 1}) for text in texts(20)))
    one_class = run("patch", adapters / "harm", "--examples", examples, "--replay", harmful, "--output", tmp_path / "o")
    assert (one_class.code, "hold no harmless one" in told(one_class)) == (2, True)


def test_a_port_counts_them(run: Callable[..., Ran], adapters: Path, tiny_base: Base, tmp_path: Path) -> None:
    text = file_of(tmp_path / "texts.jsonl", 100, (*BROKEN, *LABELS))  # labels are not read
    ran = run(
        "port", adapters / "harm", "--to", tiny_base.folder, "--text", text, "--output", tmp_path / "out",
        "--method", "map", "--json",
    )  # fmt: skip
    assert (ran.code, ran.json["bad_rows"], ran.json["port rows"]) == (1, len(BROKEN), "103")
    assert ran.json["port rows left out"] == "1"  # text that spells control tokens is not traced to characters


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xff\xfe\x00", b"{broken"])
@pytest.mark.parametrize("command", ["eval", "calibrate", "patch", "port", "train"])
def test_a_file_without_a_usable_row_is_told(
    run: Callable[..., Ran], adapters: Path, tiny_base: Base, tmp_path: Path, command: str, content: bytes
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    words = {
        "eval": ["eval", adapters / "harm", "--data", path],
        "calibrate": ["calibrate", adapters / "harm", "--benign", path, "--output", tmp_path / "out"],
        "patch": ["patch", adapters / "harm", "--examples", path, "--replay", path, "--output", tmp_path / "out"],
        "port": ["port", adapters / "harm", "--to", tiny_base.folder, "--text", path, "--output", tmp_path / "out"],
        "train": ["train", toy_recipe(tmp_path, tiny_base), "--output", tmp_path / "out"],
    }[command]
    ran = run(*words)
    assert ran.code == 2
    assert "usable row" in told(ran)
    assert "Traceback" not in ran.err
