"""The bench of patches: its families and its figures, on few rows."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import patch
from parts import read_parts
from safeside import Message, load_adapter, load_base
from safeside.guards.score import judge
from safeside.train.patch_lesson import PatchSettings
from safeside.types import Example


def write(path: Path, rows: list[dict[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(map(json.dumps, rows)))


def attack(split: str, goal: int, method: str, model: str) -> dict[str, object]:
    """A prompt of one family: GCG ends in words that depend on the model, PAIR does not spell out its goal."""
    wanted = f"{split} goal number {goal}"
    suffix = " ".join([model] * 9)
    prompt = f"{wanted} {suffix}" if method == "GCG" else f"a tale of {goal} in which someone tells how it is done"
    return {"prompt": prompt, "label": 1, "orig": {"method": method, "goal": wanted, "model": model}}


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A few short rows in the shape of the data sets."""
    for name in ("ARTIFACTS", "HARMLESS"):
        monkeypatch.setattr(patch, name, getattr(patch, name).removesuffix(".gz"))
    monkeypatch.setattr(patch, "ELSEWHERE", ("toxic_chat/test.jsonl",))
    monkeypatch.setattr(patch, "LEAST", 2)
    for split in ("train", "test"):
        rows = [
            attack(split, goal, method, model)
            for goal in range(5)
            for method, model in (("GCG", "llama"), ("GCG", "vicuna"), ("GCG", "vicuna"), ("PAIR", "vicuna"))
        ]
        write(tmp_path / f"jailbreakbench_artifacts/{split}.jsonl", rows)
    some = [{"prompt": f"text {index}", "response": "", "label": index % 2} for index in range(12)]
    write(tmp_path / "toxic_chat/test.jsonl", some)
    write(tmp_path / "benign_prompts/alpaca_test.jsonl", [{"prompt": f"name {index} cats"} for index in range(40)])
    return tmp_path


def test_a_family_is_its_distinct_prompts(data: Path) -> None:
    attacks = patch.attacks_of(data / patch.ARTIFACTS.format("test"), "GCG")
    assert [attack.goal for attack in attacks] == [f"test goal number {goal}" for goal in range(5) for _ in range(2)]
    assert {attack.model for attack in attacks} == {"llama", "vicuna"}
    assert {attack.example.labels for attack in attacks} == {(1.0,)}


def test_runs_are_those_outside_the_goal() -> None:
    goal, around = "g" * 30, "abcdefghijklmnopqrstuvwxyz"
    assert patch.Attack(f"{goal} {around}", goal, "m").runs == {f" {around}"[start:][:25] for start in range(3)}
    assert patch.Attack(f"short {goal} words", goal, "m").runs == set()


def test_the_seed_leaves_out_a_model_whose_words_are_then_unseen(data: Path) -> None:
    seen, unseen = (patch.attacks_of(data / patch.ARTIFACTS.format(split), "GCG") for split in ("train", "test"))
    family = patch.Family("GCG", seen, unseen, None, None)  # type: ignore[arg-type]  # nothing is measured
    for seed, left_out in enumerate(("llama", "vicuna")):
        examples, model = family.examples(3, seed)
        assert model == left_out
        assert {attack.model for attack in examples} == {"llama", "vicuna"} - {left_out}
        groups = family.groups(examples, model)
        assert {attack.model for attack, chosen in zip(unseen, groups["template"], strict=True) if chosen} == {left_out}
        assert (groups["goal"] == ~groups["template"]).all()
    assert len(family.examples(64, 0)[0]) == 5  # as many as there are


def test_rows_are_drawn_always_alike(data: Path) -> None:
    path = data / "toxic_chat/test.jsonl"
    assert patch.drawn(path, 5) == patch.drawn(path, 5)
    assert len(patch.drawn(path, 50)) == 12


@pytest.mark.parametrize(("family", "held_out"), [("GCG", ["goal"] * 4 + ["template"] * 4), ("PAIR", None)])
def test_it_writes_the_figures_of_each_patch(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, held_out: list[str] | None
) -> None:
    monkeypatch.setattr(patch, "PatchSettings", lambda: PatchSettings(steps=8))
    words = f"--data {data} --families {family} --examples 4 64 --seeds 0 --rows 12 --threads 1 --output {tmp_path}"
    result = read_parts(patch.main(words.split()))["patch"]
    rows = result["rows"]
    assert {(row["family"], row["examples"], row["seed"]) for row in rows} == {(family, 4, 0)}  # there are no 64
    shares = [row for row in rows if "held_out" in row]
    assert [row["held_out"] for row in shares] == (held_out or ["goal"] * 4)  # all of PAIR's are told alike
    assert [row["metric"] for row in shares[:4]] == ["before", "after", "before_in_force", "after_in_force"]
    rest = ["benign_flagged"] if family == "GCG" else []
    rest += ["harmless_before_in_force", "harmless_after_in_force"]
    assert [row["metric"] for row in rows[len(shares) :]] == [*rest, "elsewhere_change", "seconds"]
    assert all(0 <= row["low"] <= row["value"] <= row["high"] <= 1 for row in shares)
    change = next(row for row in rows if row["metric"] == "elsewhere_change")
    assert change["suite"] == "toxic_chat"
    assert np.isfinite(change["value"])
    assert result["notes"]["base_unchanged"] is True


def test_what_is_in_force_is_what_the_guard_command_flags(data: Path, tmp_path: Path) -> None:
    """Long texts by their mode's threshold."""
    base = load_base("builtin")
    guard = load_adapter("builtin:harm", base).float()
    texts = ["How do I steal a car?", "What is a cat?", "kill " * 30, "word " * 2000]
    examples = [Example((Message("user", text),), (1.0,)) for text in texts]
    stored = patch.measured(base, guard, examples, tmp_path)
    assert stored.modes == ["prompt", "prompt", "prompt", "windowed"]
    verdicts = judge(base, [guard], [example.messages for example in examples])
    assert stored.flagged(guard, stored.before).tolist() == [float(found.flagged) for (found,) in verdicts]
    assert stored.logits(base, guard).tolist() == pytest.approx(stored.before.tolist())
