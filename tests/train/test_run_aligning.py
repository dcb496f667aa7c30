"""Recipes of aligners end to end: preferences, benign rows, every kind, and rows that cannot be used."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest
import torch

from recipes_for_tests import SAME_WEIGHTS, answer_rows, preference_rows, recipe, run_and_kill, weights, write
from safeside import Base, Message, attach, load_adapter
from safeside.artifact import read_provenance
from safeside.errors import ConfigError, InputError, UnknownNameError
from safeside.evals.suites import SUITES
from safeside.facts import adapter_facts
from safeside.tasks.task import TASKS
from safeside.train.alignment import AlignmentLoss
from safeside.train.command import summary_of
from safeside.train.recipe import TrainingSection
from safeside.train.run import TAPS, run_recipe
from safeside.train.splits import load_benign, load_splits
from safeside.train.taps import LiveTaps
from tasks.conformance import make_data, write_place
from tiny import N_POSITIONS

SHORT = {"epochs": 2, "batch_size": 8, "learning_rate": 0.01}
DPO = {**SHORT, "objective": "dpo", "beta": 0.2}
BENIGN = {"benign": ["benign.jsonl"]}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    for name, seed in (("train", 1), ("validation", 2)):
        write(root / f"preferences_{name}.jsonl", preference_rows(24, seed))
        answers = preference_rows(24, seed)
        write(root / f"answers_{name}.jsonl", [{"prompt": r["prompt"], "response": r["chosen"]} for r in answers])
    prompts = [{"prompt": row["prompt"]} for row in answer_rows(6, 3)]
    write(root / "benign.jsonl", [*prompts, *({**row, "response": "so they said"} for row in prompts)])
    return root


@pytest.mark.parametrize(
    "adapter",
    [
        {"kind": "lst_plus", "cross_attention": True},
        {"kind": "toplayers", "depth": 1, "reduction": None},
        {"kind": "toplayers", "depth": 2, "lora_rank": 4, "reduction": None},
        {"kind": "state_map", "bottleneck": 4, "reduction": None},
    ],
    ids=["lst_plus", "toplayers", "toplayers-lora", "state_map"],
)
def test_every_kind_learns_preferences(tiny_base: Base, data: Path, tmp_path: Path, adapter: dict[str, object]) -> None:
    values = recipe("preferences", adapter=adapter, training=DPO)
    run = run_recipe(values, data_root=data, output=tmp_path, base=tiny_base)
    assert run.validation_metric == "negative DPO loss"
    assert run.outcome.best_metric > -0.65, "a fresh aligner has -0.693"
    loaded = load_adapter(tmp_path, tiny_base)
    prompt = [Message("user", "the cat sat")]
    plain = tiny_base.chat(prompt, max_new_tokens=6).text
    for strength in (0.0, 1.0, 2.0):
        with attach(tiny_base, [loaded], strength=strength):
            found = tiny_base.chat(prompt, max_new_tokens=6).text
        with attach(tiny_base, [run.adapter], strength=strength):
            assert tiny_base.chat(prompt, max_new_tokens=6).text == found
        assert strength or found == plain
    facts = adapter_facts(str(tmp_path), str(tiny_base.folder))
    assert 0 < facts["flops_share"] < 1.5
    assert facts["provenance"]["objective"] == "dpo, beta 0.2"
    assert not (tmp_path / TAPS).exists()


def test_benign_rows_hold_an_aligner_near_the_base(tiny_base: Base, data: Path, tmp_path: Path) -> None:
    """The same run with and without: with, its divergence on held-out benign rows is smaller."""
    runs = {}
    for weight in (0.0, 20.0):
        options = {"data": BENIGN} if weight else {}
        values = recipe("preferences", training={**DPO, "kl_weight": weight}, **options)
        runs[weight] = run_recipe(values, data_root=data, output=tmp_path / str(weight), base=tiny_base)
    assert runs[20.0].benign is not None
    assert len(runs[20.0].benign.ids) == 12
    assert "KL to the base x 20 on 10 benign rows" in read_provenance(tmp_path / "20.0")["objective"]
    assert runs[20.0].validation_metric == "negative DPO loss, divergence included"
    found = []
    for run in runs.values():
        loss = AlignmentLoss(
            tiny_base, LiveTaps(tiny_base, run.adapter), runs[20.0].validation, TrainingSection(kl_weight=1.0)
        )
        with torch.no_grad():
            found.append(loss(range(loss.n_learnt, len(loss.weights))).item())
    assert found[1] < 0.7 * found[0]


def test_live_states_and_stored_ones_learn_the_same(tiny_base: Base, data: Path, tmp_path: Path) -> None:
    found = []
    for cache_taps in (True, False):
        training = {**DPO, "epochs": 1, "kl_weight": 0.5, "cache_taps": cache_taps}
        values = recipe("preferences", training=training, data=BENIGN)
        run = run_recipe(values, data_root=data, output=tmp_path / str(cache_taps), base=tiny_base)
        found.append(weights(run.adapter))
    torch.testing.assert_close(*found, rtol=0.05, atol=5 * SAME_WEIGHTS)


def test_a_killed_run_goes_on(tiny_base: Base, data: Path, tmp_path: Path) -> None:
    values = recipe("preferences", training={**DPO, "kl_weight": 0.5}, data=BENIGN)
    whole = run_recipe(values, data_root=data, output=tmp_path / "whole", base=tiny_base)
    run_and_kill(values, data_root=data, output=tmp_path / "killed", base=tiny_base)
    changed = recipe("preferences", training={**DPO, "kl_weight": 0.6}, data=BENIGN)
    with pytest.raises(ConfigError, match="made by another run"):
        run_recipe(changed, data_root=data, output=tmp_path / "killed", base=tiny_base, resume=True)
    resumed = run_recipe(values, data_root=data, output=tmp_path / "killed", base=tiny_base, resume=True)
    assert torch.equal(weights(resumed.adapter), weights(whole.adapter))


def test_sft_learns_the_chosen_answers(tiny_base: Base, data: Path, tmp_path: Path) -> None:
    found = []
    for kind in ("preferences", "answers"):  # the same answers
        run = run_recipe(recipe(kind, training=SHORT), data_root=data, output=tmp_path / kind, base=tiny_base)
        assert run.train.rejected is None
        found.append(weights(run.adapter))
    assert torch.equal(*found)


# ---- what cannot be used ---------------------------------------------------------------------------------------------


def test_bad_preferences_are_counted(tiny_base: Base, data: Path, tmp_path: Path) -> None:
    long = "cat " * N_POSITIONS
    bad = [
        {"prompt": "a", "chosen": "no", "rejected": "no "}, {"prompt": "a", "chosen": "no"},
        {"prompt": "a", "chosen": "", "rejected": "no"}, {"chosen": "no", "rejected": "yes"},
        {"prompt": "a", "chosen": "no", "rejected": long}, {"prompt": "a", "chosen": long, "rejected": "no"},
    ]  # fmt: skip
    write(data / "mixed_train.jsonl", [*preference_rows(24, 1), *bad])
    files = {"train": ["mixed_train.jsonl"], "validation": ["preferences_validation.jsonl"]}
    run = run_recipe(
        recipe("mixed", training={**DPO, "epochs": 1}, data=files), data_root=data, output=tmp_path, base=tiny_base
    )
    assert (len(run.train.ids), run.train.n_too_long) == (24, 2)
    problems = [row.problem for row in run.train.bad]
    for problem, expected in zip(
        problems, ["are the same: 'no'", "without 'rejected'", "'chosen' must be text", "no 'prompt'"], strict=True
    ):
        assert expected in problem
    assert (summary_of(run, 0.1)["bad_rows"], summary_of(run, 0.1)["rows_too_long"]) == (4, 2)


def test_rows_that_an_evaluation_asks_for_are_left_out_and_counted(tiny_base: Base, tmp_path: Path, data: Path) -> None:
    goal, other = "Then they said how the cat be on mat", "mat cat mat cat mat cat how"
    asked = [{"prompt": text, "chosen": "no", "rejected": "how"} for text in (f"be: {goal.upper()}!", goal, other)]
    for name, rows in (("train", asked), ("validation", asked[:2]), ("benign", [{"prompt": other}])):
        file = data / f"{'benign' if name == 'benign' else f'preferences_{name}'}.jsonl"
        (tmp_path / file.name).write_text(file.read_text() + "\n" + "\n".join(map(json.dumps, rows)))
    suite = SUITES.get("strongreject").path
    write_place(str(suite), [{"id": "a", "prompt": goal, "label": 1}], tmp_path)
    write(tmp_path / "goals.jsonl", [{"prompt": other}])
    names = ["strongreject", "goals.jsonl"]
    values = recipe("preferences", training={**DPO, "epochs": 1, "kl_weight": 1.0}, data={**BENIGN, "leave_out": names})
    run = run_recipe(values, data_root=tmp_path, output=tmp_path / "out", base=tiny_base)
    assert [rows.n_overlapping for rows in run.splits] == [3, 2, 1]
    assert [len(rows.ids) for rows in run.splits] == [24, 24, 12]
    assert summary_of(run, 0.1)["rows_overlapping"] == 6
    told = "3 training, 2 validation, 1 benign rows that overlap with strongreject, goals.jsonl"
    assert read_provenance(tmp_path / "out")["left_out"] == told
    plain = recipe("preferences", training={**DPO, "epochs": 1})
    run_recipe(plain, data_root=tmp_path, output=tmp_path / "plain", base=tiny_base)
    assert "left_out" not in read_provenance(tmp_path / "plain")


@pytest.mark.parametrize(
    ("name", "error", "problem"),
    [
        ("strongrejct", UnknownNameError, "Did you mean 'strongreject'"),
        ("strongreject", InputError, "There is no file"),
        ("gone.jsonl", InputError, "There is no file"),
        ("broken.jsonl", InputError, r"broken.jsonl: line 2: not JSON"),
        ("shapeless.jsonl", InputError, r"shapeless.jsonl: line 1: no known shape"),
    ],
)
def test_goals_that_cannot_be_read_stop_the_run(
    tiny_base: Base, data: Path, tmp_path: Path, name: str, error: type[Exception], problem: str
) -> None:
    (data / "broken.jsonl").write_text('{"prompt": "a"}\n{broken')
    (data / "shapeless.jsonl").write_text('{"goal": "a"}')
    values = recipe("preferences", training=DPO, data={"leave_out": [name]})
    with pytest.raises(error, match=problem):
        run_recipe(values, data_root=data, output=tmp_path, base=tiny_base)


def test_a_set_of_nothing_but_goals_is_refused(tiny_base: Base, data: Path, tmp_path: Path) -> None:
    values = recipe("preferences", training=DPO, data={"leave_out": ["preferences_train.jsonl"]})
    with pytest.raises(ConfigError, match="24 overlap with what leave_out names"):
        run_recipe(values, data_root=data, output=tmp_path, base=tiny_base)


def test_rows_of_a_task_are_left_out_too(tiny_base: Base, tmp_path: Path) -> None:
    make_data(TASKS.get("hate"), tmp_path)
    whole, _ = load_splits(tiny_base, recipe(data={"task": "hate"}), tmp_path, ("hate",))
    write(tmp_path / "goals.jsonl", [{"prompt": whole.examples[0].messages[0].content}])
    values = recipe(data={"task": "hate", "leave_out": ["goals.jsonl"]})
    train, validation = load_splits(tiny_base, values, tmp_path, ("hate",))
    assert (train.n_overlapping, len(train.examples)) == (1, len(whole.examples) - 1)
    assert whole.examples[0] not in train.examples
    assert validation.n_overlapping == 0


def test_benign_rows_may_come_from_the_hub(
    tiny_base: Base, tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    place = f"hub:some/set@{'0123456789' * 4}#train"
    write_place(place, [{"prompt": "then they", "label": 0}, {"prompt": "said how", "label": 0}], tmp_path)
    values = recipe("preferences", training={**DPO, "kl_weight": 1.0}, data={"benign": [place]})
    found = load_benign(tiny_base, values, tmp_path, (), load_splits(tiny_base, values, data, ())[0])
    assert found is not None
    assert [example.messages[0].content for example in found.examples] == ["then they", "said how"]


def test_answers_are_no_preferences(tiny_base: Base, data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="every row needs 'prompt', 'chosen' and 'rejected'"):
        run_recipe(recipe("answers", training=DPO), data_root=data, output=tmp_path, base=tiny_base)


def test_a_mixed_set_is_refused(tiny_base: Base, data: Path, tmp_path: Path) -> None:
    write(data / "both_train.jsonl", [*preference_rows(4, 1), *answer_rows(2, 1)])
    files = {"train": ["both_train.jsonl"], "validation": ["preferences_validation.jsonl"]}
    with pytest.raises(ConfigError, match=r"4 rows are preferences and 2 are not \(line 5\); expected one kind"):
        run_recipe(recipe("both", training=DPO, data=files), data_root=data, output=tmp_path, base=tiny_base)


def test_one_benign_row_is_too_few(tiny_base: Base, data: Path, tmp_path: Path) -> None:
    write(data / "one.jsonl", [{"prompt": "cat"}])
    values = recipe("preferences", training={**DPO, "kl_weight": 1.0}, data={"benign": ["one.jsonl"]})
    with pytest.raises(ConfigError, match="1 usable row; expected 2 or more"):
        run_recipe(values, data_root=data, output=tmp_path, base=tiny_base)
