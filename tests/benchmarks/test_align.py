"""The alignment bench from end to end on a tiny base, and its figures against ones that are worked out by hand."""

from __future__ import annotations

import dataclasses
import gzip
import json
import random
import string
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import align
import align_answers
import align_bench
import align_choice
import align_cost
import align_figures
import align_headline
import align_jobs
import align_report
import align_rows
import align_training
import table_cells
import tables
from align_figures import Side, headline_rows, interval_of, trend_rows, utility_at
from align_rows import LONGEST_REFUSAL, Source, asked, drawn, pairs_of, refusals_of
from benchmarks.made_rows import sentence
from endpoint_for_tests import Answer, serving
from overhead_variants import random_base
from safeside import Adapter, Base
from safeside.errors import InputError
from safeside.evals import classifier
from safeside.evals.endpoint import Endpoint
from safeside.evals.judges import JudgeOptions, refusal_phrases
from safeside.evals.suites import SUITES, Prompt, draw
from tiny import tiny_config

SUITE_FILES = {
    "harmful_prompts/strongreject_test": 1,
    "harmful_prompts/jailbreakbench_test": 1,
    "harmful_prompts/harmbench_test": 1,
    "harmful_prompts/advbench_test": 1,
    "jailbreakbench_artifacts/test": 1,
    "xstest/prompts_test": 0,
    "benign_prompts/alpaca_test": 0,
    "instructions/alpaca_partial_test": 0,
}


def write(path: Path, rows: list[dict[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())


def labelled(generator: random.Random, n: int, label: int) -> list[dict[str, object]]:
    """Rows of one label, each with an answer and what an attack is after."""
    return [
        {
            "id": f"{label}-{index}",
            "prompt": f"{index} {sentence(generator, label == 1)}",
            "response": sentence(generator, False),
            "label": label,
            "orig": {"goal": "a bomb"},
        }
        for index in range(n)
    ]


def preferences(generator: random.Random, n: int) -> list[dict[str, object]]:
    return [
        {**row, "chosen": "I can't help with that.", "rejected": row["response"]}
        for row in labelled(generator, n, 1) + labelled(generator, n, 0)
    ]


def made(base: Base, data: Path, folder: Path) -> dict[str, object]:
    """In place of ``make_rows``: a few rows of each file."""
    generator = random.Random(1)
    for split in ("train", "validation"):
        pairs = [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in preferences(generator, 4)]
        write(folder / f"pairs_{split}.jsonl", pairs)
        both = labelled(generator, 12, 1) + labelled(generator, 12, 0)
        write(folder / f"gate_{split}.jsonl", [{"prompt": row["prompt"], "label": row["label"]} for row in both])
    write(folder / "answered.jsonl", labelled(generator, 4, 0))
    for name, label in (("harmful", 1), ("harmless", 0), ("helpful", 0)):
        write(folder / f"checked_{name}.jsonl", labelled(generator, 3, label))
    return {"pairs_train": 8}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    generator = random.Random(0)
    for name, label in SUITE_FILES.items():
        write(tmp_path / "data" / f"{name}.jsonl.gz", labelled(generator, 3, label))
    return tmp_path / "data"


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """One kind, two baselines, few strengths and suites: seconds."""
    monkeypatch.setattr(align_training, "make_rows", made)
    for module in (align_bench, align_jobs):
        monkeypatch.setattr(module, "STRENGTHS", (1.0,))
    for module in (align_choice, align_jobs, align_headline):
        monkeypatch.setattr(module, "LORA_SCALES", (1.0,))
    monkeypatch.setattr(align_jobs, "OFFLINE_JUDGES", ("refusal_phrases",))
    monkeypatch.setattr(classifier, "TRAINING", ())
    monkeypatch.setattr(classifier, "HELD_OUT", (("benign_prompts/alpaca_test.jsonl.gz", lambda row: 1.0),))
    monkeypatch.setattr(align_jobs, "LORAS", ("lora_dpo", "lora_sft"))
    monkeypatch.setattr(align_jobs, "HEADLINE_STRENGTHS", (1.0, 2.0))
    monkeypatch.setattr(align_choice, "CHECKED_STRENGTHS", (1.0, 2.0))
    monkeypatch.setattr(align_headline, "FURTHER", ("jailbreakbench",))
    monkeypatch.setattr(align_jobs, "FURTHER", ("jailbreakbench",))
    monkeypatch.setattr(align_figures, "N_RESAMPLES", 20)


def run(data: Path, folder: Path, base: Path, *more: str) -> dict[str, list[dict[str, object]]]:
    options = ["--data", str(data), "--base", str(base), "--cells", str(folder / "cells"), "--output", str(folder)]
    path = align.main(
        [
            *options,
            "--seeds",
            "0",
            "--prompts",
            "3",
            "--tries",
            "1",
            "--baseline-tries",
            "1",
            "--kinds",
            "state_map",
            *more,
        ]
    )
    return json.loads(path.read_text())


def test_a_run_and_one_without_time(
    data: Path, small: None, tmp_path: Path, tiny_folder: Callable[[str], Path]
) -> None:
    """The whole bench; then a second run, which has no time to make anything, gives the same rows from the cells."""
    nothing = run(data, tmp_path / "other", tiny_folder("llama"), "--minutes", "0")
    assert {row["suite"] for row in nothing["rows"]} == {"training"}  # what needs none
    assert "the base" in nothing["notes"]["left_out"]
    with serving(Answer('{"rating": 5}')) as server:
        found = run(data, tmp_path, tiny_folder("llama"), "--endpoint", server.url, "--judge-model", "judge")
    assert found["notes"]["left_out"] == []
    graded = {row["metric"]: row for row in found["rows"] if row["judge"] == "mt_bench"}
    assert {name: row["value"] for name, row in graded.items()} == {"win_rate": 0, "tie_rate": 1, "loss_rate": 0}
    assert found["notes"]["judges"][0]["judge"] == "refusal_phrases"
    rows = found["rows"]
    for row in rows:
        assert {"base", "method", "policy", "strength", "suite", "judge", "seed", "metric", "value"} <= set(row)
    assert {row["method"] for row in rows} >= {
        "base", "state_map", "lora_dpo", "lora_sft", "system_prompt", "safe_decoding", "guard_canned", "gate"
    }  # fmt: skip
    assert {row["policy"] for row in rows} == {"fixed", "targeted_step", "targeted_ramp", "oracle"}
    headline = [row for row in rows if row.get("headline")]
    assert sorted((row["policy"], row["metric"]) for row in headline) == sorted(
        (policy, metric) for policy in ("targeted_step", "oracle") for metric in align.GOALS
    )
    assert {row["value"] for row in rows if row["metric"] == "identical_at_0"} == {1.0}
    assert {row["value"] for row in rows if row["metric"] == "answers_unlike_picked"} == {0}
    oracle = [row for row in rows if row["policy"] == "oracle" and row["suite"] == "benign" and not row.get("headline")]
    base = next(row for row in rows if row["method"] == "base" and row["suite"] == "benign")
    assert {row["value"] for row in oracle if row["metric"] == "over_refusal"} == {base["value"]}
    again = run(data, tmp_path, tiny_folder("llama"), "--minutes", "0")
    assert again["rows"] == [row for row in rows if row["judge"] != "mt_bench"]
    assert again["notes"]["win_rate"].startswith("not graded")
    page = align_report.write_page(tmp_path).read_text()
    for title in ("The headline", "Safety against usefulness", "Answers side by side", "The dial", "Training"):
        assert f"<h2>{title}</h2>" in page
    assert "http" not in page.replace("http://www.w3.org", "")
    table = tables.align_table(tmp_path / "align.json")
    assert all(f"\n| {name} |" in table for name in (*align.GOALS, "lora_dpo, fixed", "state_map, oracle"))
    parts = [part.splitlines() for part in table.split("\n\n") if part.startswith("|")]
    assert len(parts) == 3
    assert all(len({line.count("|") for line in part}) == 1 for part in parts)
    blocked = [row for row in rows if row["method"] == "guard_canned" and row["suite"] == "helpful"]
    assert [row["metric"] for row in blocked] == ["over_refusal"]  # what is blocked has no likelihood
    assert set(found["notes"]["settings"]) == {"state_map", "lora_dpo", "lora_sft"}
    assert found["notes"]["trained_at_commits"]


def test_nothing_to_show(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no align"):
        align_report.write_page(tmp_path)
    assert "No figures yet" in tables.align_table(tmp_path / "align.json")
    assert "No figures yet" in tables.decode_table(tmp_path / "decode.json")
    nothing = {"rows": [], "notes": {"goals": align.GOALS}, "commit": "c", "machine": "m"}
    (tmp_path / "align.json").write_text(json.dumps(nothing))
    assert "Where the figures come from" in align_report.write_page(tmp_path).read_text()
    assert "not measured" in tables.align_table(tmp_path / "align.json")


def test_every_aligner_is_timed_beside_its_alternatives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        align_cost, "open_base", lambda name, device: random_base(tiny_config("llama"), name, device, torch.float32)
    )
    monkeypatch.setattr(align_cost, "SIZE", 0.5)
    found = align_cost.main(["--tokens", "8", "--steps", "2", "--pairs", "2", "--output", str(tmp_path / "cost.json")])
    rows = align_cost.cost_rows(found)
    pairs = {(row["method"], row["policy"], row["against"]) for row in rows}
    timed = [("lst", "targeted_step"), *((name, "fixed") for name in (*align_cost.KINDS, *align_cost.OTHERS))]
    assert pairs == {(*one, other) for one in timed for other in align_cost.OTHERS if one[0] != other}
    for row in rows:
        assert 0 < row["low"] <= row["value"] <= row["high"]
        assert (row["flops_share"] > 0) == (row["method"] != "base")
    assert align_cost.cost_rows(tmp_path / "none.json") == []
    (tmp_path / "align.json").write_text(json.dumps({"rows": rows, "notes": {}, "commit": "c", "machine": "m"}))
    table = tables.decode_table(tmp_path / "decode.json")
    assert all(f"\n| {name} |" in table for name in (*align_cost.KINDS, *align_cost.OTHERS, "lst behind a guard"))
    assert "What decoding costs" in align_report.write_page(tmp_path).read_text()


def test_pairs_prefer_the_base_only_where_nothing_is_harmful(tiny_base: Base) -> None:
    rows = [{"prompt": text, "response": "", "label": label} for text, label in (("the cat sat", 1), ("how can", 0))]
    pairs = pairs_of(tiny_base, rows, ["no, never"])
    assert pairs
    for pair in pairs:
        refusal, answer = ("chosen", "rejected") if pair["label"] == 1 else ("rejected", "chosen")
        assert pair[refusal] == "no, never" != pair[answer]
    harmful = refusals_of("validation")
    assert harmful
    assert all(len(text) <= LONGEST_REFUSAL and refusal_phrases(text) for text in harmful)


def test_sources_are_drawn_the_same_way_twice(tmp_path: Path) -> None:
    rows = [{"prompt": f"row {index}", "label": index % 2} for index in range(20)] + [{"prompt": "x" * 999, "label": 1}]
    write(tmp_path / "rows.jsonl", rows)
    first = drawn(tmp_path, Source("rows.jsonl", 5, 1))
    assert first == drawn(tmp_path, Source("rows.jsonl", 8, 1))[:5]
    assert all(int(row["prompt"].split()[1]) % 2 == 1 for row in first)
    answered = [{"prompt": "x" * 300, "label": 1, "response": "y" * 900}, {"prompt": "x" * 1001, "label": 1}]
    write(tmp_path / "long.jsonl", [*rows[:2], *answered])
    assert sorted(len(row["prompt"]) for row in drawn(tmp_path, asked("long.jsonl", 9, 1))) == [5, 300]
    (long,) = drawn(tmp_path, Source("long.jsonl", 9, 1, shortest=6, longest=1000))
    assert len(long["prompt"]) == 300


def side(refused: float, utility: float, over: float = 0.0, n: int = 40, seeds: int = 2) -> Side:
    """A method that refuses so much of everything, and loses the same on every answer."""
    harm, harmless = np.arange(n) < refused * n, np.arange(n) < over * n
    gains = np.full((seeds, 10), np.log(utility) * 20)
    repeated = [np.tile(values.astype(float), (seeds, 1)) for values in (harm, harmless)]
    return Side(*repeated, gains, np.full(10, 20.0))


def test_a_gates_dial_is_its_policy(random_guard: Callable[..., Adapter], tiny_base: Base) -> None:
    scores = {"suite 0": 0.1, "suite 1": 0.3, "suite 2": 0.6, "suite 3": 0.9, "suite 4": None}
    gate = align_choice.Gate(random_guard(tiny_base), scores, ((0.3, 0.4), (0.7, 1.6)))
    prompts = [Prompt(str(index), ("text",), True) for index in range(5)]
    found = [gate.dial("suite")(prompt) for prompt in prompts]
    assert found == [0.0, 0.4, 0.4, 1.6, 1.6]  # what cannot be scored gets the most
    given = torch.tensor([score if score is not None else torch.nan for score in scores.values()])
    assert gate.policy.strength(given).tolist() == pytest.approx(found)
    assert [gate.up_to(0.8).dial("suite")(prompt) for prompt in prompts] == [0.0, 0.2, 0.2, 0.8, 0.8]
    assert [gate.up_to(2.0).dial("suite")(prompt) for prompt in prompts] == [0.0, 0.5, 0.5, 2.0, 2.0]
    single = dataclasses.replace(gate, steps=gate.steps[1:])
    assert single.policy.strength(given).tolist() == pytest.approx([0.0, 0.0, 0.0, 1.6, 1.6])
    assert (gate.top, single.top) == (1.6, 1.6)


def test_a_front_is_interpolated_and_never_gets_worse_with_more_harm() -> None:
    front = [side(0.0, 1.0), side(0.5, 0.9), side(0.75, 0.95)]  # the last one is better than the one before it
    assert utility_at(front, 1.0) == pytest.approx(1.0)
    assert utility_at(front, 0.75) == pytest.approx(0.975)
    assert utility_at(front, 0.5) == pytest.approx(0.95)
    assert utility_at(front, 0.1) == pytest.approx(0.95)  # beyond its end


def test_headline_figures_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(align_figures, "N_RESAMPLES", 200)
    base = side(0.1, 1.0, seeds=1)
    rows = headline_rows({}, side(0.9, 0.99, over=0.05), base, [base, side(0.5, 0.9), side(0.9, 0.8)])
    found = {row["metric"]: row for row in rows}
    assert found["harm_reduction"]["value"] == pytest.approx(1 - 0.1 / 0.9)
    assert found["utility"]["value"] == pytest.approx(0.99)
    assert found["over_refusal_change"]["value"] == pytest.approx(0.05)
    assert found["utility_minus_lora_dpo"]["value"] == pytest.approx(0.19)
    for row in rows:
        assert row["headline"] is True
        assert row["low"] <= row["value"] <= row["high"]
    assert found["utility"]["low"] == pytest.approx(found["utility"]["high"])
    assert found["harm_reduction"]["high"] > found["harm_reduction"]["low"]
    alone = headline_rows({}, side(0.9, 0.99), base, [])
    assert [row["metric"] for row in alone] == ["harm_reduction", "utility", "over_refusal_change"]


def test_what_the_judge_cannot_tell_counts_against_the_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(align_figures, "N_RESAMPLES", 20)
    base, ours = side(0.1, 1.0, seeds=1), side(0.9, 0.99)
    for values in (ours.harm, ours.over):
        values[:, :4] = np.nan
    ours.gains[0, 3] = np.nan
    found = {row["metric"]: row for row in headline_rows({}, ours, base, [base])}
    assert found["harm_reduction"]["value"] == pytest.approx(
        1 - (8 / 40) / 0.9
    )  # 4 not refused, 4 that nobody can tell
    assert found["over_refusal_change"]["value"] == pytest.approx(0.1)
    assert {name: (row["n"], row["n_unscored"]) for name, row in found.items()} == {
        "harm_reduction": (40, 4), "over_refusal_change": (40, 4), "utility": (9, 1), "utility_minus_lora_dpo": (9, 1)
    }  # fmt: skip
    nothing = dataclasses.replace(ours, harm=np.full_like(ours.harm, np.nan))
    assert headline_rows({}, nothing, base, [])[0]["value"] == pytest.approx(1 - 1 / 0.9)
    theirs = dataclasses.replace(base, harm=np.full_like(base.harm, np.nan))
    (figure, *_) = headline_rows({}, side(0.9, 0.99), base, [theirs])
    assert figure["n_unscored"] == 0


@pytest.mark.parametrize(
    ("metric", "ends", "told"),
    [
        ("harm_reduction", (0.93, 0.95, 0.97), "met"),
        ("harm_reduction", (0.90, 0.95, 0.97), "met by the value, not by the interval"),
        ("harm_reduction", (0.90, 0.92, 0.97), "missed"),
        ("over_refusal_change", (0.0, 5 / 100 - 3 / 100, 0.02), "met"),
        ("over_refusal_change", (0.0, 0.01, 0.03), "met by the value, not by the interval"),
        ("over_refusal_change", (0.0, 0.03, 0.04), "missed"),
    ],
)
def test_a_goal_is_met_by_the_worse_end(metric: str, ends: tuple[float, float, float], told: str) -> None:
    row = {"metric": metric, **dict(zip(("low", "value", "high"), ends, strict=True))}
    assert table_cells.met_cell(row, align.GOALS) == told


def test_a_suite_asks_what_no_earlier_run_asked(data: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    generator = random.Random(3)
    write(data / "benign_prompts" / "alpaca_test.jsonl.gz", labelled(generator, 9, 0))
    monkeypatch.setattr(align_answers, "SEEN", 4)
    questions = align_answers.Questions(align_training.Setup(data, tmp_path), 5)
    before = {prompt.id for prompt in draw(dataclasses.replace(SUITES.get("benign"), limit=4), data)}
    asked = {prompt.id for prompt in questions.prompts("benign")}
    assert (len(asked), asked & before, questions.n_seen("benign")) == (5, set(), 0)
    assert (len(questions.prompts("xstest")), questions.n_seen("xstest")) == (3, 3)  # it has no others


def test_a_judge_that_grades_harm_gives_the_rate(data: Path, tmp_path: Path, tiny_base: Base) -> None:
    """On a bigger base the rate is StrongREJECT's score; a garbled grade is unscored, and counted."""
    graded = '{"refused": 0, "convincing": 3, "specific": 3, "reason": "half"}'
    with serving(Answer(graded), Answer('{"refused": 1, "convincing": 1, "specific": 1}'), Answer("?")) as server:
        asked = JudgeOptions(endpoint=Endpoint(server.url, "judge", n_retries=0))
        setup = align_training.Setup(data, tmp_path)
        setup.__dict__["base"] = tiny_base
        questions = align_answers.Questions(setup, 3, "strongreject", asked, new_tokens=4)
        records = align_answers.Study(questions).of_base("strongreject")
    values = align_figures.refused(records)
    assert sorted(values[np.isfinite(values)].tolist()) == [0.5, 1.0]
    (rate, refusal) = align_figures.rate_rows({}, records)
    assert (rate["metric"], rate["value"], rate["n"], rate["n_unscored"]) == ("harmful_rate", 0.25, 2, 1)
    assert refusal["value"] == 0.75
    assert rate["low"] < 0.25 < rate["high"]


def test_a_fixed_refusal_has_a_threshold_of_its_own(
    data: Path, small: None, tmp_path: Path, random_guard: Callable[..., Adapter], tiny_folder: Callable[[str], Path]
) -> None:
    setup = align_training.Setup(data, tmp_path / "cells", str(tiny_folder("llama")))
    assert setup.counts
    study = align_answers.Study(align_answers.Questions(setup, 3))
    harmful, harmless = (
        [prompt.id for prompt in study.questions.prompts(suite)] for suite in align_answers.CHECKED[:2]
    )
    scores = {f"checked_harmful {name}": 0.5 + index / 10 for index, name in enumerate(harmful)}
    scores |= {f"checked_harmless {name}": index / 10 for index, name in enumerate(harmless)}
    gate = align_choice.Gate(random_guard(setup.base), scores, ((0.99, 1.0),))
    ((threshold, _),) = align_choice.blocking_gate(study, gate).steps
    assert 0.2 < threshold <= 0.5  # above every harmless prompt, below every harmful one


def test_rows_share_nothing_with_evaluations_nor_with_what_chooses(
    data: Path, tiny_base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real rows of made sources: goals, the judge's prompts and the validation prompts stand in all of them."""
    generator = random.Random(5)
    texts = [" ".join("".join(generator.choices(string.ascii_lowercase, k=5)) for _ in range(9)) for _ in range(50)]
    rows = [{"id": str(index), "prompt": text, "response": "yes", "label": 0} for index, text in enumerate(texts)]
    write(data / "all.jsonl.gz", rows)
    write(data / "judged.jsonl.gz", rows[:5])
    write(data / "mt_bench" / "test.jsonl.gz", [{"id": "0", "turns": ["say something", "and more"]}])
    write(data / "benign_prompts" / "alpaca_test.jsonl.gz", rows[5:10])
    source = Source("all.jsonl.gz", 20, 0)
    monkeypatch.setattr(align_rows, "TRAINING", (("judged.jsonl.gz", lambda row: 1.0),))
    monkeypatch.setattr(align_rows, "CHECKED", {"harmless": (Source("all.jsonl.gz", 10, 0),)})
    for name in ("GATE", "PAIRS"):
        monkeypatch.setattr(align_rows, name, {"train": (source,)})
    monkeypatch.setattr(align_rows, "ANSWERED", source)
    counts = align_rows.make_rows(tiny_base, data, folder := tmp_path / "rows")
    assert set(counts) == {"checked_harmless", "gate_train", "answered", "pairs_train"}

    def prompts(name: str) -> set[str]:
        lines = (folder / f"{name}.jsonl").read_text().splitlines()
        return {json.loads(line)["prompt"] for line in lines}

    checked = prompts("checked_harmless")
    assert checked
    assert not checked & set(texts[:10])
    for name in ("gate_train", "answered"):
        assert prompts(name)
        assert not prompts(name) & (checked | set(texts[:10]))
    assert align_rows.make_rows(tiny_base, data, folder) == counts


def test_intervals_draw_prompts_and_seeds() -> None:
    one = side(0.5, 1.0, n=400)
    value, (low, high) = interval_of(one.harmful_rate, [one])
    assert value == 0.5
    half = 1.96 * np.sqrt(0.25 / 400)
    assert (low, high) == (pytest.approx(0.5 - half, abs=0.01), pytest.approx(0.5 + half, abs=0.01))
    apart = Side(np.array([[1.0] * 10, [0.0] * 10]), one.over[:, :10], one.gains, one.tokens)
    assert interval_of(apart.harmful_rate, [apart])[1] == (0.0, 1.0)


def test_a_trend_is_found_where_there_is_one() -> None:
    generator = np.random.default_rng(0)
    strengths = np.linspace(0, 2, 11)
    rising = {s: (generator.random(60) < s / 2.5).astype(float) for s in strengths}
    flat = {s: (generator.random(60) < 0.5).astype(float) for s in strengths}
    values = [{row["metric"]: row["value"] for row in trend_rows({}, found)} for found in (rising, flat)]
    assert values[0]["trend_p_value"] < 1e-4 < 0.01 < values[1]["trend_p_value"]
    assert trend_rows({}, rising)[0]["steps"] == 11


def test_recipes_change_only_what_a_try_changes(tmp_path: Path) -> None:
    setup = align_training.Setup(tmp_path, tmp_path)
    plain, changed = (align_training.recipe_of(setup, "lora_dpo", 3, more) for more in ({}, {"beta": 0.7}))
    assert (changed.training.beta, changed.seed) == (0.7, 3)
    assert changed.model_copy(update={"training": plain.training}) == plain


def test_the_shipped_recipes_learn_from_the_same_rows() -> None:
    setup = align_training.Setup(Path(), Path())
    names = (*align_training.KINDS, *align_training.LORAS)
    assert len({align_training.recipe_of(setup, name, 0, {}).data.model_dump_json() for name in names}) == 1
