"""Bad rows, bad settings, other bases, a full context, a silent hub: told in a line, never lost, never a traceback."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest
from huggingface_hub import HfApi
from safetensors.torch import load_file, save_file

from command_line import Ran, texts, write
from safeside import Base, Message, load_adapter, save_adapter
from safeside.errors import InputError
from safeside.evals.suites import SUITES, Suite
from safeside.train.patch import PatchSettings


def test_bad_rows_are_told_even_when_no_figure_can_be_made(
    run: Callable[..., Ran], adapters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def score(*words: object, **options: object) -> None:
        raise AssertionError("scored before the classes were looked at")

    monkeypatch.setattr("safeside.evals.guards.score_conversations", score)
    path = write(tmp_path / "rows.jsonl", [{"text": "hi", "label": 1}, "{broken", {"text": "ho", "label": 1}])
    ran = run("eval", adapters / "harm", "--data", path)
    assert ran.code == 2
    assert "line 2 was skipped: not JSON" in ran.err
    assert "got 2 harmful and 0 harmless for 'harm', and 1 bad rows" in " ".join(ran.err.split())
    whole = gzip.compress("\n".join(json.dumps({"text": text, "label": 1}) for text in texts(500)).encode())
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    cut = run("eval", adapters / "harm", "--data", tmp_path / "cut.jsonl.gz")
    assert "was skipped: the file cannot be read from here on" in cut.err


def test_a_suite_with_bad_rows_is_exit_1(
    run: Callable[..., Ran], adapters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [*({"text": text, "label": index % 2} for index, text in enumerate(texts())), "{broken"]
    monkeypatch.setitem(SUITES._items, "demo", Suite("demo", write(tmp_path / "rows.jsonl", rows)))
    ran = run("eval", adapters / "harm", "--suite", "demo", "--json")
    assert ran.code == 1
    assert {(row["n"], row["n_skipped"]) for row in ran.json} == {(12, 1)}
    assert "line 13 was skipped" in ran.err


@pytest.mark.parametrize("strengths", ["", "0,", "0,3", "-0.1", "nan", "0,inf", "0,much"])
def test_strengths_are_checked_before_anything_is_loaded(
    run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch, strengths: str
) -> None:
    def load(*words: object, **options: object) -> None:
        raise AssertionError("loaded before the strengths were checked")

    for module in ("conversation", "artifact", "base.model"):  # importing a module binds what is patched before it
        monkeypatch.setattr(f"safeside.{module}.load_base", load)
    for words in (["eval", "builtin:refuse", "--suite", "demo"], ["chat", "hi", "--aligner", "builtin:refuse"]):
        ran = run(*words, "--strengths", strengths)
        assert ran.code == 2
        assert "must lie in [0, 2]" in ran.err or "Strengths must be numbers" in ran.err


def test_a_session_outlives_lines_that_cannot_be_answered(run: Callable[..., Ran], tiny_base: Base) -> None:
    """The context is full at the third line, the fourth is too long for any conversation, the fifth is not UTF-8."""
    words = ("chat", "--base", tiny_base.folder, "--max-new-tokens", 5, "--json")
    long = "z" * 120
    ran = run(*words, stdin=f"how?\n{long}\n{long}\n{'z' * 300}\n\udcff\nwhy?\n")
    assert ran.code == 1
    assert [line["requested_strength"] for line in ran.lines] == [None] * 4
    alone = tiny_base.chat([Message("user", long)], max_new_tokens=5)
    assert ran.lines[2]["text"] == alone.text
    assert ran.lines[2]["n_prompt_tokens"] == alone.n_prompt_tokens
    last = tiny_base.chat([Message("user", "why?")], max_new_tokens=5)
    assert ran.lines[3]["n_prompt_tokens"] == last.n_prompt_tokens
    assert ran.err.count("a new conversation starts with this message") == 2
    assert "the message was left out" in ran.err
    assert "line 5 is not UTF-8 (invalid start byte at byte 0); it was left out" in " ".join(ran.err.split())
    assert "Traceback" not in ran.err


@pytest.fixture
def other_weights(adapters: Path, tiny_base: Base, tmp_path: Path) -> Path:
    """The tiny base with one weight changed: the adapters fit only with ``--allow-mismatch weights``."""
    folder = shutil.copytree(tiny_base.folder, tmp_path / "other")
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"] + 0.5
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.usefixtures("small_suite")
def test_every_command_can_allow_other_weights(run: Callable[..., Ran], adapters: Path, other_weights: Path) -> None:
    commands = (
        ["info", adapters / "harm"],
        ["chat", "hi", "--guard", adapters / "harm", "--max-new-tokens", 4],
        ["eval", adapters / "refuse", "--suite", "demo", "--strengths", "1", "--gate", adapters / "harm"],
    )
    for words in commands:
        refused = run(*words, "--base", other_weights)
        assert refused.code == 1
        assert "other weights" in refused.err
        assert run(*words, "--base", other_weights, "--allow-mismatch", "weights").code == 0


def test_the_recorded_revision_is_loaded(
    run: Callable[..., Ran], adapters: Path, tiny_base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[object, ...]] = []

    def load(*words: object) -> Base:
        asked.append(words)
        return tiny_base

    guard = load_adapter(adapters / "harm", tiny_base)
    reference = guard.config.base.model_copy(update={"name": "org/base", "revision": "v7"})
    guard.config = guard.config.model_copy(update={"base": reference})
    save_adapter(guard, tmp_path / "harm")
    monkeypatch.setattr("safeside.artifact.load_base", load)
    commands = (["info", tmp_path / "harm"], ["guard", tmp_path / "harm", "/dev/null"])
    for words in (*commands, ["chat", "hi", "--guard", tmp_path / "harm", "--max-new-tokens", 2]):
        assert run(*words).code == 0
    assert asked == [("org/base", "v7", "cpu")] * 3


def test_a_broken_provenance_is_one_line(run: Callable[..., Ran], adapters: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(adapters / "harm", tmp_path / "harm")
    (folder / "provenance.json").write_text("{broken")
    ran = run("info", folder)
    assert (ran.code, ran.err.count("\n")) == (1, 1)
    assert "provenance.json is not a JSON object" in ran.err
    (folder / "provenance.json").unlink()
    assert "provenance" not in run("info", folder, "--json").json


def test_a_hub_that_cannot_be_reached_is_one_line(
    run: Callable[..., Ran], adapters: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setattr("safeside.artifact.HfApi", partial(HfApi, endpoint="http://127.0.0.1:1", token="none"))
    ran = run("push", adapters / "harm", "org/harm")
    assert (ran.code, ran.out) == (1, "")
    assert "was not pushed to 'org/harm': the model hub gave: " in ran.err
    assert "Traceback" not in ran.err


def test_a_rollback_reads_nothing_else(run: Callable[..., Ran], adapters: Path) -> None:
    ran = run("patch", adapters / "harm", "--rollback", "--replay", "none.jsonl", "--base", "none", "--seed", 7)
    assert (ran.code, ran.out) == (2, "")
    assert "--rollback copies files and reads no --replay, --base, --seed" in " ".join(ran.err.split())


def patch_and_port(adapters: Path, tiny_base: Base, folder: Path, extra: Sequence[object] = ()) -> list[list[object]]:
    """Both commands on rows that they can use, and ``extra`` ones; each lacks its output."""
    rows = write(folder / "rows.jsonl", [{"text": f"{text}, too", "label": i % 2} for i, text in enumerate(texts(40))])
    used = write(folder / "used.jsonl", [*({"text": text, "label": 1} for text in texts(100)), *extra])
    return [
        ["patch", adapters / "harm", "--examples", used, "--replay", rows, "--output"],
        ["port", adapters / "harm", "--to", tiny_base.folder, "--text", used, "--method", "map", "--output"],
    ]


def test_an_output_under_a_file_is_refused_before_any_work(
    run: Callable[..., Ran], adapters: Path, tiny_base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*words: object, **options: object) -> None:
        raise AssertionError("loaded before the place was looked at")

    commands = patch_and_port(adapters, tiny_base, tmp_path)
    monkeypatch.setattr("safeside.artifact.load_base", load)
    for words in commands:
        ran = run(*words, tmp_path / "rows.jsonl" / "x")
        assert (ran.code, ran.out) == (2, "")
        assert "rows.jsonl is a file. Choose another place." in " ".join(ran.err.split())


def test_bad_rows_of_a_patch_or_port_are_exit_1(
    run: Callable[..., Ran], adapters: Path, tiny_base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("safeside.train.patch_command.PatchSettings", partial(PatchSettings, steps=4))
    for words in patch_and_port(adapters, tiny_base, tmp_path, ["{broken"]):
        ran = run(*words, tmp_path / str(words[0]), "--json")
        assert (ran.code, ran.json["bad_rows"]) == (1, 1)
        assert "line 101 was left out: not JSON" in " ".join(ran.err.split())


def test_a_patch_and_a_port_read_the_recorded_revision(
    run: Callable[..., Ran], adapters: Path, tiny_base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[object, ...]] = []

    def load(*words: object) -> Base:
        asked.append(words)
        raise InputError("enough: what follows is not looked at")

    guard = load_adapter(adapters / "harm", tiny_base)
    reference = guard.config.base.model_copy(update={"name": "org/base", "revision": "v7"})
    guard.config = guard.config.model_copy(update={"base": reference})
    save_adapter(guard, tmp_path / "adapters" / "harm")
    monkeypatch.setattr("safeside.artifact.load_base", load)
    for words in patch_and_port(tmp_path / "adapters", tiny_base, tmp_path):
        ran = run(*words, tmp_path / str(words[0]))
        assert (ran.code, "enough" in ran.err) == (2, True)
    assert asked == [("org/base", "v7", "cpu")] * 2
