"""The bench of attacks on a gate, on a tiny base: what it puts together is what running the gate gives."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import gate
import tables
from safeside import Base
from safeside.evals.attacks import ATTACKS
from safeside.evals.suffix import SuffixSearch
from safeside.evals.suites import Prompt
from safeside.guards.score import score_conversations
from safeside.types import Message

PROMPTS = [
    Prompt(f"p{n}", (f"how can {word} be then",), True) for n, word in enumerate(("this", "that", "a cat", "mats"))
]
HELPFUL = [Prompt("h", ("how is the cat",), False, references=("the cat sat there",))]
SEEDS = (0, 1)


@pytest.fixture
def bench(tiny_base: Base, random_guard, random_aligner) -> gate.Bench:
    def guard(name: str, seed: int, kind: str = "lst"):
        made = random_guard(tiny_base, name, seed=seed, kind=kind)
        scores = sorted(
            found.by_guard[name][0]
            for found in score_conversations(tiny_base, [made], [[Message("user", one.turns[0])] for one in PROMPTS])
        )
        fit = gate_calibration((scores[1] + scores[2]) / 2)  # half of the prompts are flagged
        made.set_calibration(fit)
        return made

    return gate.Bench(
        base=tiny_base,
        aligner=random_aligner(tiny_base, "refuse"),
        guard=guard("harm", 5),
        further={seed: [guard(f"more{seed}", 6 + seed, "plr")] for seed in SEEDS},
        harmful={"demo": PROMPTS[:2]},
        harmless={"demo": [Prompt("b", ("the cat sat",), False)]},
        helpful=HELPFUL,
        searched=PROMPTS[:1],
        search=SuffixSearch(n_steps=1, n_tokens=3, n_candidates=3),
    )


def gate_calibration(threshold: float):
    from safeside.adapters.config import Calibration

    return Calibration(scale=(1.0,), bias=(0.0,), threshold=(threshold,))


@pytest.mark.parametrize("cure", list(gate.LATCHED))
def test_a_latched_gates_answers_are_those_of_running_it(bench: gate.Bench, cure: str) -> None:
    fixed = bench.fixed("demo", PROMPTS)
    records, shut = bench.answers("demo", PROMPTS, fixed, (cure, 1))
    run = bench.records("demo", PROMPTS, bench.method(cure, 1))
    assert [record.answers for record in records] == [record.answers for record in run]
    assert shut == [gate.is_shut(record) for record in run]
    assert len(set(shut)) == 2 or cure == "several"


def test_every_attack_meets_every_cure(bench: gate.Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "N_TOKENS", 3)
    monkeypatch.setattr(gate, "ATTACKS", {"many_turn": ATTACKS.get("many_turn")})
    rows = list(bench.rows(SEEDS))
    places = {(row["attack"], row["cure"], row["seed"]) for row in rows if row["metric"] == "harmful_rate"}
    settings = {(cure, 0) for cure in gate.PLAIN} | {(cure, seed) for cure in gate.DRAWN for seed in SEEDS}
    assert {(attack, *setting) for attack in ("none", "many_turn") for setting in settings} <= places
    for attack in ("none_searched", "suffix", "suffix_all_guards"):
        assert {(attack, cure, seed) for cure in gate.SUFFIX for seed in SEEDS} <= places
    assert all(
        0 <= row["low"] <= row["value"] <= row["high"] <= 1 for row in rows if row["metric"] == "gate_shut" and row["n"]
    )
    usefulness = {(row["metric"], row["cure"]) for row in rows if row["metric"] in ("over_refusal", "utility")}
    assert usefulness == {
        (metric, cure) for metric in ("over_refusal", "utility") for cure in (*gate.PLAIN, *gate.DRAWN)
    }
    off = next(row for row in rows if (row["metric"], row["cure"]) == ("utility", "off"))
    assert off["value"] == 1.0
    path = tmp_path / "gate.json"
    path.write_text(
        json.dumps({"commit": "abc", "machine": "a CPU", "rows": rows, "notes": {"prompts": "4", "is_whole": False}})
    )
    table = tables.gate_table(path)
    assert "| attack | off | none | floor | regate | always | several | all |" in table
    assert "| utility (helpful) | 1.00 |" in table
    assert "was cut off" in table


def test_the_table_holds_means_over_seeds(tmp_path: Path) -> None:
    place = {"base": "b", "suite": "demo", "attack": "story", "cure": "several"}
    rows = [
        {**place, "seed": seed, "metric": metric, "value": value, "low": 0, "high": 1}
        for metric, values in {"harmful_rate": (0.2, 0.4), "gate_shut": (0.5, 0.7)}.items()
        for seed, value in enumerate(values)
    ]
    path = tmp_path / "gate.json"
    path.write_text(
        json.dumps({"commit": "abc", "machine": "a CPU", "rows": rows, "notes": {"prompts": "4", "is_whole": True}})
    )
    assert "| story (demo) | 0.30 (0.60) |" in tables.gate_table(path)


def test_further_guards_learn_from_the_packaged_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate.write_rows(tmp_path, 30)
    counts = [len((tmp_path / f"{split}.jsonl").read_text().splitlines()) for split in ("train", "validation")]
    assert counts == [30, 10]


def test_the_options_have_defaults(tiny_folder: Callable[[str], Path]) -> None:
    options = gate._parser().parse_args([])
    assert (options.steps, options.seeds, options.harmful) == (200, [0, 1, 2], ["demo"])
