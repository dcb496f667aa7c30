"""The bench of needles: they stand where they should, in texts of the length that was asked for."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest

import needle
from benchmarks.made_rows import sentence
from parts import read_parts
from safeside.base.model import Base
from safeside.guards.windows import windows
from safeside.types import Example, Message


@pytest.fixture
def made(tiny_base: Base) -> list[needle.Needle]:
    prompts = [Example((Message("user", f"needle {row}"),), (float(row % 2),)) for row in range(8)]
    long = Example((Message("user", "far too long " * 60),), (1.0,))
    generator = random.Random(0)
    return needle.needles_of(tiny_base, [*prompts, long], [sentence(generator, False) for _ in range(20)], 3)


def test_a_needle_stands_in_its_place_and_the_text_around_is_the_same(made: list[needle.Needle]) -> None:
    assert [one.example.labels for one in made] == [(0.0,)] * 3 + [(1.0,)] * 3
    for one in made:
        word = one.example.messages[0].content
        texts = {place: one.at("windowed", place).messages[0].content for place in needle.PLACES}
        assert texts["start"].startswith(word)
        assert texts["end"].endswith(word)
        assert 0.3 < texts["middle"].index(word) / len(texts["middle"]) < 0.7
        assert len({" ".join(text.replace(word, "").split()) for text in texts.values()}) == 1
        assert one.at("inside", "end").labels == one.example.labels


def test_a_needle_is_a_turn_of_a_conversation(made: list[needle.Needle], tiny_base: Base) -> None:
    for one in made:
        n_around = len(one.around["turns"])
        for place, turn in {"start": 0, "middle": n_around // 2, "end": n_around}.items():
            messages = one.at("turns", place).messages
            assert [message.role for message in messages] == [*["user", "assistant"] * n_around, "user"]
            assert messages[2 * turn] == one.example.messages[0]
            others = [message.content for message in messages[::2] if message != one.example.messages[0]]
            assert tuple(others) == one.around["turns"]


def test_texts_fit_the_context_or_ask_for_windows(made: list[needle.Needle], tiny_base: Base) -> None:
    for one in made:
        for place in needle.PLACES:
            assert len(windows(tiny_base, one.at("inside", place).messages)) == 1
            assert len(windows(tiny_base, one.at("turns", place).messages)) == 1
            assert len(windows(tiny_base, one.at("windowed", place).messages)) >= 3


def test_it_writes_figures_for_every_place(
    small_tasks: Path, tiny_folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"prompt": sentence(random.Random(row), False), "label": 0} for row in range(30)]
    (small_tasks / "benign.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.setattr(needle, "TEXT", "benign.jsonl")
    monkeypatch.setattr(needle, "TAUGHT_TEXT", "benign.jsonl")
    monkeypatch.setattr(needle, "LONGEST", 0.6)  # of a context of 256 bytes
    monkeypatch.setattr(needle, "LENGTHS", {"inside": 0.5, "windowed": 4.0, "turns": 0.2})
    words = ["--data", str(small_tasks), "--base", str(tiny_folder("llama")), "--task", "bench/prompts"]
    small = ["--limit", "64", "--evaluation-limit", "100", "--epochs", "1", "--seeds", "0", "--needles", "5", "--also"]
    small += ["--texts", "inside", "windowed", "turns"]
    result = read_parts(needle.main([*words, *small, "--output", str(tmp_path / "results")]))["needle"]
    found = {(row["method"], row["text"], row["place"], row["metric"]): row for row in result["rows"]}
    places = [
        ("alone", "alone"),
        *((text, place) for text in ("inside", "windowed") for place in needle.PLACES),
        *((text, place) for place in needle.PLACES for text in ("turns", "each_turn")),
    ]
    assert list(found) == [
        (method, *place, metric)
        for method in ("lst", "lst_needles")
        for place in places
        for metric in ("auroc", "tpr", "fpr")
    ]
    assert {row["n"] for row in result["rows"]} == {10}
    counts = result["notes"]["bases"]["llama"]["rows"]
    assert counts["lst_needles"]["train"] == counts["lst"]["train"] + 10
    assert len({row["config_hash"] for row in result["rows"]}) == 2


def test_the_riskiest_of_the_whole_and_of_each_turn_counts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    harms = {"one": 0.1, "two": 0.9, "three": math.nan}

    def scored(lesson: object, guards: Mapping[int, object], examples: Sequence[Example]) -> dict[int, needle.Judged]:
        scores = [harms[example.messages[0].content] if len(example.messages) == 1 else 0.5 for example in examples]
        return {seed: needle.Judged(np.array(scores) * seed, np.zeros(len(scores))) for seed in guards}

    def asked(*texts: str) -> Example:
        turns = [turn for text in texts for turn in (Message("user", text), Message("assistant", "a"))]
        return Example(tuple(turns[:-1]), (1.0,))

    monkeypatch.setattr(needle.Judged, "by", staticmethod(scored))
    examples = [asked("one", "one"), asked("two", "one"), asked("one", "one", "two"), asked("one", "three")]
    whole = {seed: needle.Judged(np.full(4, 0.5 * seed), np.ones(4)) for seed in (1, 2)}
    found = needle.by_turns(None, {1: None, 2: None}, examples, whole)  # type: ignore[arg-type, dict-item]
    assert found[1].scores.tolist()[:3] == [0.5, 0.9, 0.9]
    assert found[2].scores.tolist()[:3] == [1.0, 1.8, 1.8]
    assert math.isnan(found[1].scores[3])  # fails closed
    assert found[1].labels.tolist() == [1.0] * 4
