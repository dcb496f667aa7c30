"""Recipes end to end on the tiny base: rows in, a calibrated and saved adapter out, and the base as it was."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from recipes_for_tests import SAME_WEIGHTS, answer_rows, guard_rows, recipe, run_and_kill, weights, write, write_rows
from safeside import Adapter, Base, Message, attach, load_adapter, load_base
from safeside.artifact import CARD_FILE, CONFIG_FILE, PROVENANCE_FILE, WEIGHTS_FILE
from safeside.errors import ConfigError, InputError, NotFiniteError, UnknownNameError
from safeside.guards.calibrate import threshold_with_bound
from safeside.guards.score import score_conversations
from safeside.tasks.learnt import LEARNT_FILE
from safeside.tasks.rows import BadRow
from safeside.tasks.sources import Part, Source
from safeside.tasks.task import TASKS, Task, load_task, register_task
from safeside.train import objectives as module
from safeside.train.command import summary_of
from safeside.train.loop import CHECKPOINT, Progress
from safeside.train.recipe import Recipe
from safeside.train.rows import Rows
from safeside.train.run import TAPS, Run, run_recipe
from safeside.train.splits import encode_rows, load_splits
from safeside.types import Example
from twin import hash_of

ARTIFACT = {CARD_FILE, CONFIG_FILE, PROVENANCE_FILE, WEIGHTS_FILE, LEARNT_FILE}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def guard_run(session_base: Base, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run_recipe(recipe(), data_root=data, output=tmp_path_factory.mktemp("guard"), base=session_base)


@pytest.fixture(scope="module")
def aligner_run(session_base: Base, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run_recipe(recipe("answers"), data_root=data, output=tmp_path_factory.mktemp("answers"), base=session_base)


# ---- guards ----------------------------------------------------------------------------------------------------------


def test_a_guard_learns_its_rule(guard_run: Run) -> None:
    assert guard_run.validation_metric == "auroc"
    assert guard_run.outcome.best_metric > 0.95
    assert guard_run.outcome.best_metric == max(guard_run.outcome.history)
    assert not guard_run.adapter.training


def validation_scores(base: Base, guard: Adapter) -> tuple[np.ndarray, np.ndarray]:
    rows = guard_rows(80, 2)
    scored = score_conversations(base, [guard], [[Message("user", str(row["prompt"]))] for row in rows])
    return np.array([row.by_guard["toy"][0] for row in scored]), np.array([row["label"] for row in rows])


def test_the_artifact_scores_as_the_guard_in_memory(tiny_base: Base, guard_run: Run) -> None:
    loaded = load_adapter(guard_run.folder, tiny_base)
    assert torch.equal(weights(loaded), weights(guard_run.adapter))
    assert loaded.config == guard_run.adapter.config
    found, _ = validation_scores(tiny_base, loaded)
    expected, _ = validation_scores(tiny_base, guard_run.adapter)
    assert np.array_equal(found, expected)


def test_the_threshold_keeps_its_rate_where_it_was_set(tiny_base: Base, guard_run: Run) -> None:
    scores, labels = validation_scores(tiny_base, load_adapter(guard_run.folder, tiny_base))
    flagged = scores >= guard_run.adapter.thresholds[0]
    assert flagged[labels == 0].mean() <= 0.05
    assert flagged[labels == 1].mean() > 0.8
    assert scores[labels == 1].mean() > 0.8 > 0.2 > scores[labels == 0].mean()


def test_the_folder_says_where_it_came_from(guard_run: Run) -> None:
    stamp = json.loads((guard_run.folder / PROVENANCE_FILE).read_text())
    assert stamp["train_rows"] == "160"
    assert stamp["train_data"] == "guard_train.jsonl"
    assert stamp["seed"] == "0"
    assert float(stamp["train_seconds"]) > 0
    assert int(stamp["peak_bytes"]) > 0
    assert int(stamp["trainable_params"]) == weights(guard_run.adapter).numel()
    assert stamp["validation auroc"] == f"{guard_run.outcome.best_metric:.4f}"
    assert json.loads((guard_run.folder / CONFIG_FILE).read_text())["calibration"]["false_positive_rate"] == 0.05


def test_the_base_is_not_changed_by_a_byte(tiny_base: Base, data: Path, tmp_path: Path) -> None:
    before = hash_of(tiny_base.model)
    for kind in ("guard", "answers"):
        for cached in (True, False):
            short = recipe(kind, training={"epochs": 1, "cache_taps": cached}, limit=32)
            run_recipe(short, data_root=data, output=tmp_path / f"{kind}-{cached}", base=tiny_base)
    assert hash_of(tiny_base.model) == before
    assert all(parameter.grad is None for parameter in tiny_base.model.parameters())
    assert not any(parameter.requires_grad for parameter in tiny_base.model.parameters())


@pytest.mark.parametrize("kind", ["guard", "answers"])
def test_stored_and_live_states_train_the_same_adapter(tiny_base: Base, data: Path, tmp_path: Path, kind: str) -> None:
    runs = [
        run_recipe(
            recipe(kind, training={"epochs": 2, "cache_taps": cached}, limit=64),
            data_root=data,
            output=tmp_path / str(cached),
            base=tiny_base,
        )
        for cached in (True, False)
    ]
    assert (weights(runs[0].adapter) - weights(runs[1].adapter)).abs().max() < SAME_WEIGHTS
    assert runs[0].outcome.best_metric == pytest.approx(runs[1].outcome.best_metric, abs=1e-3)
    assert not (tmp_path / "False" / "taps").exists()


@pytest.mark.parametrize("kind", ["plr", "rtb"])
def test_other_architectures_learn_too(tiny_base: Base, data: Path, tmp_path: Path, kind: str) -> None:
    """Less well: the last state of a random base tells little of the words before."""
    values = {"kind": kind, "reduction": None, "readout": "attention"}
    done = run_recipe(recipe(adapter=values), data_root=data, output=tmp_path, base=tiny_base)
    assert done.outcome.history[0] < done.outcome.best_metric > 0.6


def test_an_encoder_carries_a_guard(tiny_family: Callable[[str], Base], data: Path, tmp_path: Path) -> None:
    base = tiny_family("bert")
    done = run_recipe(recipe(), data_root=data, output=tmp_path, base=base)
    assert done.outcome.history[0] < done.outcome.best_metric > 0.6  # its positions drown the words of 160 rows
    assert torch.equal(weights(load_adapter(tmp_path, base)), weights(done.adapter))


def test_bfloat16_soft_targets_and_class_weights_train(tiny_base: Base, data: Path, tmp_path: Path) -> None:
    """And what is stored in bfloat16 scores as it was calibrated."""
    training = {"precision": "bfloat16", "soft_weight": 0.5, "class_weights": "balanced", "accumulation": 2}
    done = run_recipe(
        recipe(training={**training, "batch_size": 8}, stored_dtype="bfloat16"),
        data_root=data,
        output=tmp_path,
        base=tiny_base,
    )
    assert done.outcome.best_metric > 0.9
    assert {tensor.dtype for tensor in load_file(tmp_path / WEIGHTS_FILE).values()} == {torch.bfloat16}
    found, labels = validation_scores(tiny_base, load_adapter(tmp_path, tiny_base))
    expected, _ = validation_scores(tiny_base, done.adapter)
    assert np.array_equal(found, expected)
    assert (found[labels == 0] >= done.adapter.thresholds[0]).mean() <= 0.05


def test_each_reading_mode_is_calibrated_by_its_validation_rows(tiny_base: Base, data: Path, tmp_path: Path) -> None:
    """And the presets by the harmless files of the recipe, where it names any."""
    seen = {row["prompt"] for row in guard_rows(64, 1)}  # neither those nor copies would buy a promise
    rows = list({row["prompt"]: row for row in guard_rows(120, 5) if row["prompt"] not in seen}.values())
    mixed = [row if index % 3 else {**row, "response": "they said so"} for index, row in enumerate(rows)]
    write(tmp_path / "guard_train.jsonl", guard_rows(64, 1))
    write(tmp_path / "guard_validation.jsonl", mixed)
    clean = [
        {"prompt": text} for text in dict.fromkeys(row["prompt"] for row in guard_rows(150, 6) if not row["label"])
    ]
    learnt = next(row["prompt"] for row in guard_rows(64, 1) if not row["label"])
    write(tmp_path / "clean.jsonl", [*clean, "{broken", {"prompt": f" {learnt.upper()}"}])
    short = {"training": {"epochs": 1}}
    plain = run_recipe(recipe(**short), data_root=tmp_path, output=tmp_path / "plain", base=tiny_base)
    named = recipe(**short, calibration={"benign": ["clean.jsonl"]})
    done = run_recipe(named, data_root=tmp_path, output=tmp_path / "named", base=tiny_base)
    n_harmless = {
        mode: sum(not row["label"] for row in mixed if ("response" in row) == (mode == "answer"))
        for mode in ("answer", "prompt")
    }
    assert {mode: fit.n_harmless for mode, fit in plain.adapter.config.modes.items()} == n_harmless
    assert {mode: list(fit.presets) for mode, fit in plain.adapter.config.modes.items()} == {"answer": [], "prompt": []}
    modes = done.adapter.config.modes
    assert (modes["answer"], modes["prompt"].maps) == (
        plain.adapter.config.modes["answer"],
        plain.adapter.config.modes["prompt"].maps,
    )
    assert modes["prompt"].n_harmless == len(clean) > 58
    assert list(modes["prompt"].presets) == ["strict"]
    assert done.adapter.config.calibration == plain.adapter.config.calibration
    loaded = load_adapter(done.folder, tiny_base).with_preset("strict")
    found = score_conversations(tiny_base, [loaded], [[Message("user", str(row["prompt"]))] for row in clean])
    scores = np.array([row.by_guard["toy"][0] for row in found])
    assert loaded.thresholds_in("prompt")[0] == pytest.approx(threshold_with_bound(scores, 0.05), abs=1e-4)
    assert [row.line for row in done.benign.bad] == [len(clean) + 1, len(clean) + 2]
    assert "a training row too" in done.benign.bad[1].problem
    assert summary_of(done, 0.01)["presets"] == {"answer": [], "prompt": ["strict"]}
    assert summary_of(done, 0.01)["bad_rows"] == 2


def test_benign_files_hold_harmless_rows_for_a_guard(tiny_base: Base, data: Path, tmp_path: Path) -> None:
    options = {"data_root": data, "output": tmp_path, "base": tiny_base}
    with pytest.raises(InputError, match="labelled harmful; expected harmless rows only"):
        run_recipe(recipe(calibration={"benign": ["guard_train.jsonl"]}), **options)
    with pytest.raises(ValidationError, match="an aligner has no thresholds"):
        recipe("answers", calibration={"benign": ["guard_train.jsonl"]})
    with pytest.raises(InputError, match="There is no file"):
        run_recipe(recipe(calibration={"benign": ["none.jsonl"]}), **options)


def test_several_labels_are_learnt_together(tiny_base: Base, tmp_path: Path) -> None:
    for name, n in (("guard_train", 160), ("guard_validation", 80)):
        rows = guard_rows(n, n)
        both = [{**row, "label": {"hat": row["label"], "cat": int("cat" in str(row["prompt"]))}} for row in rows]
        write(tmp_path / f"{name}.jsonl", [{key: row[key] for key in ("prompt", "label")} for row in both])
    labels = {"labels": ["hat", "cat"]}
    done = run_recipe(recipe(adapter=labels), data_root=tmp_path, output=tmp_path / "out", base=tiny_base)
    assert done.outcome.best_metric > 0.9
    assert len(done.adapter.thresholds) == 2


# ---- aligners --------------------------------------------------------------------------------------------------------


def test_an_aligner_learns_its_answers(tiny_base: Base, aligner_run: Run) -> None:
    assert aligner_run.validation_metric == "negative answer loss (nats)"
    first, last = aligner_run.outcome.history[0], aligner_run.outcome.best_metric
    assert first < last < 0
    loaded = load_adapter(aligner_run.folder, tiny_base)
    prompts = [[Message("user", str(row["prompt"]))] for row in guard_rows(4, 3)]
    before = [answer.text for answer in tiny_base.chat_batch(prompts, max_new_tokens=8)]
    with attach(tiny_base, [loaded]):
        aligned = [answer.text for answer in tiny_base.chat_batch(prompts, max_new_tokens=8)]
        unaligned = [answer.text for answer in tiny_base.chat_batch(prompts, strength=0.0, max_new_tokens=8)]
    with attach(tiny_base, [aligner_run.adapter]):
        assert [answer.text for answer in tiny_base.chat_batch(prompts, max_new_tokens=8)] == aligned
    assert unaligned == before
    assert all(text.startswith("no") for text in aligned)


def test_an_aligner_starts_at_the_base(tiny_base: Base, data: Path, tmp_path: Path) -> None:
    """The first loss is the base's own on the answers, token by token."""
    losses: list[Progress] = []
    run_recipe(
        recipe("answers", training={"epochs": 1, "batch_size": 160}),
        data_root=data,
        output=tmp_path,
        base=tiny_base,
        report=losses.append,
    )
    total, n_tokens = 0.0, 0
    for row in answer_rows(160, 1):
        encoded = tiny_base.encode([Message("user", str(row["prompt"])), Message("assistant", str(row["response"]))])
        with torch.no_grad():
            logits = tiny_base.model(torch.tensor([encoded.ids])).logits[0].log_softmax(-1)
        for place in range(encoded.answer_start, len(encoded.ids)):
            total -= float(logits[place - 1, encoded.ids[place]])
            n_tokens += 1
    assert losses[0].loss == pytest.approx(total / n_tokens, abs=1e-3)


def test_an_aligners_steps_do_not_depend_on_how_they_are_split(tiny_base: Base, tmp_path: Path) -> None:
    """Answers of very different lengths: every token counts the same, in one batch or in four."""
    rows = [{"prompt": "how?", "response": "no " * (1 + 9 * (index % 4 == 0))} for index in range(32)]
    for split in ("train", "validation"):
        write(tmp_path / f"answers_{split}.jsonl", rows)
    found = []
    for batch_size in (32, 8):
        training = {"epochs": 2, "batch_size": batch_size, "accumulation": 32 // batch_size}
        output = tmp_path / str(batch_size)
        found.append(
            run_recipe(recipe("answers", training=training), data_root=tmp_path, output=output, base=tiny_base)
        )
    assert (weights(found[0].adapter) - weights(found[1].adapter)).abs().max() < SAME_WEIGHTS


# ---- killed, resumed, repeated ---------------------------------------------------------------------------------------


def test_a_killed_recipe_ends_at_the_same_artifact(tiny_base: Base, data: Path, tmp_path: Path) -> None:
    """Killed in the first epoch, at its end and in the second: after each kill it goes on."""
    values = recipe(training={"epochs": 2, "checkpoint_seconds": 0}, limit=64)
    whole = run_recipe(values, data_root=data, output=tmp_path / "whole", base=tiny_base)

    def kill_at(step: int) -> None:
        def kill(progress: Progress) -> None:
            if progress.step == step:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run_recipe(values, data_root=data, output=tmp_path, base=tiny_base, resume=step > 2, report=kill)

    for step in (2, 4, 7):
        kill_at(step)
        assert (tmp_path / TAPS).is_dir()
        assert (tmp_path / CHECKPOINT).is_file()
    done = run_recipe(values, data_root=data, output=tmp_path, base=tiny_base, resume=True)
    assert torch.equal(weights(done.adapter), weights(whole.adapter))
    assert done.adapter.config == whole.adapter.config
    assert {path.name for path in tmp_path.iterdir()} == {*ARTIFACT, "whole"}
    assert (tmp_path / WEIGHTS_FILE).read_bytes() == (whole.folder / WEIGHTS_FILE).read_bytes()


def test_other_rows_do_not_resume(tiny_base: Base, data: Path, tmp_path: Path) -> None:
    for split in ("train", "validation"):
        write(tmp_path / f"guard_{split}.jsonl", guard_rows(40, 7))
    short = recipe(training={"epochs": 1})
    run_and_kill(short, data_root=tmp_path, output=tmp_path / "out", base=tiny_base)
    assert (tmp_path / "out" / CHECKPOINT).is_file()
    swapped = [{**row, "prompt": str(row["prompt"]).replace("cat", "mat")} for row in guard_rows(40, 7)]
    write(tmp_path / "guard_train.jsonl", swapped)
    with pytest.raises(ConfigError, match="was made by another run"):
        run_recipe(short, data_root=tmp_path, output=tmp_path / "out", base=tiny_base, resume=True)


@pytest.mark.parametrize("change", ["labels", "validation labels", "head_dim", "label name"])
def test_a_run_that_teaches_something_else_does_not_resume(
    tiny_base: Base, data: Path, tmp_path: Path, change: str
) -> None:
    """Ids and shapes are the same in all of them: a checkpoint of the first must not go on as the second."""
    rows = guard_rows(40, 7)
    flipped = [{**row, "label": 1 - int(str(row["label"]))} for row in rows]

    def write_rows(train: list[dict[str, object]], validation: list[dict[str, object]]) -> None:
        write(tmp_path / "guard_train.jsonl", train)
        write(tmp_path / "guard_validation.jsonl", validation)

    write_rows(rows, rows)
    values = {"width": 64, "reduction": None, "head_dim": 32}
    run_and_kill(recipe(training={"epochs": 1}, adapter=values), data_root=tmp_path, output=tmp_path, base=tiny_base)
    if "labels" in change:
        write_rows(rows if "validation" in change else flipped, flipped if "validation" in change else rows)
    values |= {"head_dim": {"head_dim": 64}, "label name": {"labels": ["spam"]}}.get(change, {})
    with pytest.raises(ConfigError, match="was made by another run"):
        run_recipe(
            recipe(training={"epochs": 1}, adapter=values),
            data_root=tmp_path,
            output=tmp_path,
            base=tiny_base,
            resume=True,
        )


def test_the_seed_decides_weights_order_and_limit(tiny_base: Base, data: Path, tmp_path: Path) -> None:
    def trained(seed: int, place: str) -> tuple[torch.Tensor, list[tuple[int, ...]]]:
        values = recipe(training={"epochs": 1}, seed=seed, limit=40)
        done = run_recipe(values, data_root=data, output=tmp_path / place, base=tiny_base)
        return weights(done.adapter), done.train.ids

    first, again, other = trained(1, "a"), trained(1, "b"), trained(2, "c")
    assert len(first[1]) == 40
    assert torch.equal(first[0], again[0])
    assert first[1] == again[1] != other[1]
    assert not torch.equal(first[0], other[0])


@pytest.mark.parametrize("cache_taps", [True, False, "keep"])
def test_an_ended_run_leaves_the_adapter_alone(
    tiny_base: Base, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], cache_taps: bool | str
) -> None:
    """Unless the recipe keeps the stored states, whose size is told before they are stored."""
    values = recipe(training={"epochs": 1, "cache_taps": cache_taps}, limit=32)
    done = run_recipe(values, data_root=data, output=tmp_path, base=tiny_base)
    kept = {TAPS} if cache_taps == "keep" else set()
    assert {path.name for path in tmp_path.iterdir()} == ARTIFACT | kept
    said = " ".join(capsys.readouterr().err.split())
    if cache_taps:
        n_bytes = sum(map(sum, (done.train.lengths, done.validation.lengths))) * 4 * 64 * 4
        assert f"take {n_bytes / 1e6:,.0f} MB in" in said
    else:
        assert "MB" not in said
    if cache_taps == "keep":
        assert sum(path.stat().st_size for path in (tmp_path / TAPS).iterdir()) == n_bytes


def test_no_room_for_the_states_is_told_before_they_are_stored(
    tiny_base: Base, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr("safeside.train.run.shutil.disk_usage", lambda path: full)
    failing(tiny_base, data, recipe(), ConfigError, "has no room for .* Make room, or set cache_taps = false")


# ---- rows ------------------------------------------------------------------------------------------------------------


def test_bad_and_long_rows_are_left_out_and_counted(tiny_base: Base, tmp_path: Path) -> None:
    long = {"prompt": "the cat sat " * 300, "label": 1}
    write(
        tmp_path / "guard_train.jsonl", [*guard_rows(30, 1), "{broken", long, {"prompt": "x"}, *guard_rows(30, 2), long]
    )
    write(tmp_path / "guard_validation.jsonl", [*guard_rows(30, 3), {"prompt": 3, "label": 1}])
    done = run_recipe(recipe(training={"epochs": 1}), data_root=tmp_path, output=tmp_path / "out", base=tiny_base)
    assert (len(done.train.ids), done.train.n_too_long) == (60, 2)
    assert [row.line for row in done.train.bad] == [31, 33]
    assert all(row.problem.startswith("guard_train.jsonl: ") for row in done.train.bad)
    assert [row.line for row in done.validation.bad] == [31]


@pytest.fixture
def jokes(tmp_path: Path) -> Iterator[str]:
    for split, seed in (("train", 1), ("validation", 2), ("test", 3)):
        write(tmp_path / f"{split}.jsonl", [*guard_rows(120, seed), "{broken"])
    parts = [Part(f"{split}.jsonl") for split in ("train", "validation", "test")]
    register_task("tests/jokes", Task("tests/jokes", ("joke",), (Source("one", *parts),), windows="min"))
    yield "tests/jokes"
    TASKS.unregister("tests/jokes")


def test_a_task_is_trained_on_its_rows(tiny_base: Base, jokes: str, tmp_path: Path) -> None:
    run = run_recipe(recipe(data={"task": jokes}), data_root=tmp_path, output=tmp_path / "out", base=tiny_base)
    assert run.outcome.best_metric > 0.9
    assert (run.adapter.config.labels, run.adapter.config.windows) == (("joke",), "min")
    found = load_task(jokes, tmp_path)
    assert (len(run.train.ids), len(run.validation.ids)) == (len(found.of("train")), len(found.of("validation")))
    assert len(run.train.ids) < 120  # repeated rows are gone
    assert [row.problem.startswith("one: not JSON") for row in run.train.bad] == [True]
    loaded = load_adapter(tmp_path / "out", tiny_base)
    assert loaded.config.windows == "min"
    assert json.loads((tmp_path / "out" / PROVENANCE_FILE).read_text())["train_data"] == f"task {jokes}"


def test_what_a_task_leaves_out_is_told_where_one_trains(tiny_base: Base, jokes: str, tmp_path: Path) -> None:
    """In the summary, the provenance and the card; of files nothing is said, for nobody looked for leaks there."""
    sentence = "the cat said then that they be on the mat and the hat sat there"
    for split, text in (("train", f"{sentence}!"), ("train", f"{sentence} 12; 3"), ("test", f"{sentence} 12; 34")):
        with (tmp_path / f"{split}.jsonl").open("a") as handle:
            handle.write("\n" + json.dumps({"prompt": text, "label": 1}))
    values = recipe(data={"task": jokes}, training={"epochs": 1})
    run = run_recipe(values, data_root=tmp_path, output=tmp_path / "out", base=tiny_base)
    found = load_task(jokes, tmp_path)
    parts = [found.left_out_of("train"), found.left_out_of("validation")]
    assert [rows.left_out for rows in run.splits] == parts
    assert parts[0].near >= 1
    assert parts[0].exact > 0
    told = summary_of(run, 0.1)
    assert told["leaks_exact"] == sum(left.exact for left in parts)
    assert told["leaks_near"] == sum(left.near for left in parts)
    assert told["rows_repeated"] == sum(left.repeated for left in parts) > 0
    assert (told["label_conflicts"], told["rows_of_other_splits"]) == (0, 0)
    line = f"training: {parts[0].summary}; validation: {parts[1].summary}"
    assert json.loads((tmp_path / "out" / PROVENANCE_FILE).read_text())["task_left_out"] == line
    assert f"| task_left_out | {line} |" in (tmp_path / "out" / CARD_FILE).read_text()


def test_files_are_not_said_to_be_without_leaks(guard_run: Run) -> None:
    assert not [key for key in summary_of(guard_run, 0.1) if "leak" in key]
    assert "task_left_out" not in json.loads((guard_run.folder / PROVENANCE_FILE).read_text())


@pytest.mark.parametrize("kind", ["files", "task"])
def test_rows_of_the_test_sets_of_other_tasks_are_left_out(
    tiny_base: Base, jokes: str, tmp_path: Path, kind: str
) -> None:
    """Alike, or nearly, whether files or a task of one's own name the rows."""
    taken = guard_rows(120, 3)[:2]  # of the other task's test
    files = {split: f"own_{split}.jsonl" for split in ("train", "validation", "test")}
    for (split, name), some in zip(files.items(), ([taken[0]], [taken[1]], []), strict=True):
        write(tmp_path / name, [*guard_rows(80, len(split)), *some])
    own = Task("tests/own", ("joke",), (Source("own", *map(Part, files.values())),))
    register_task("tests/own", own)
    try:
        named = {split: [files[split]] for split in ("train", "validation")}
        data = named if kind == "files" else {"task": "tests/own"}
        plain = load_splits(tiny_base, recipe(data=data), tmp_path, ("joke",))
        values = recipe(data={**data, "against": [jokes]})
        found = load_splits(tiny_base, values, tmp_path, ("joke",))
        with pytest.raises(UnknownNameError, match="hats"):
            load_splits(tiny_base, recipe(data={**data, "against": ["hats"]}), tmp_path, ("joke",))
    finally:
        TASKS.unregister("tests/own")
    for before, after, row in zip(plain, found, taken, strict=True):
        texts = [{example.messages[0].content for example in rows.examples} for rows in (before, after)]
        assert row["prompt"] in texts[0] - texts[1]
        n_gone = len(before.examples) - len(after.examples)
        assert 0 < n_gone < len(before.examples)
        if kind == "files":
            assert (after.n_in_tests, after.left_out) == (n_gone, None), "nobody looked for repeated texts"
        else:
            assert n_gone == sum(leaks_of(after)) - sum(leaks_of(before))
            assert leaks_of(after)[0] > leaks_of(before)[0]


def leaks_of(rows: Rows) -> tuple[int, int]:
    assert rows.left_out is not None
    return rows.left_out.exact, rows.left_out.near


def test_rows_in_other_test_sets_are_told(tiny_base: Base, jokes: str, tmp_path: Path) -> None:
    """In summary and provenance, of benign rows too; where none is left the error says why."""
    test = [row for row in guard_rows(120, 3) if not row["label"]]
    for split in ("train", "validation"):
        write(tmp_path / f"own_{split}.jsonl", guard_rows(80, len(split)))
    write(tmp_path / "clean.jsonl", [*test[:3], *({"prompt": f"{n} ; said {n} {n}", "label": 0} for n in range(5))])
    data = {"train": ["own_train.jsonl"], "validation": ["own_validation.jsonl"], "against": [jokes]}
    values = recipe(data=data, training={"epochs": 1}, calibration={"benign": ["clean.jsonl"]})
    run = run_recipe(values, data_root=tmp_path, output=tmp_path / "out", base=tiny_base)
    counts = [rows.n_in_tests for rows in run.splits]
    assert counts[2] == 3
    assert summary_of(run, 0.1)["rows_in_tests"] == sum(counts)
    told = json.loads((tmp_path / "out" / PROVENANCE_FILE).read_text())["in_tests"]
    assert told == f"{counts[0]} training, {counts[1]} validation, 3 benign rows in the test sets of {jokes}"
    of_task = recipe(data={"task": jokes}, training={"epochs": 1}, calibration={"benign": ["clean.jsonl"]})
    run_recipe(of_task, data_root=tmp_path, output=tmp_path / "task", base=tiny_base)
    told = json.loads((tmp_path / "task" / PROVENANCE_FILE).read_text())["in_tests"]
    assert told == f"3 benign rows in the test sets of {jokes}", "those of the task are told as its leaks"
    write(tmp_path / "own_train.jsonl", test)
    with pytest.raises(ConfigError, match=rf"{len(test)} stand in the test sets that task or against names"):
        load_splits(tiny_base, values, tmp_path, ("harm",))
    with pytest.raises(ValidationError, match=r"data.against: for guards only"):
        recipe("answers", data={"against": [jokes]})


def test_no_promise_rests_on_training_rows(tiny_base: Base, tmp_path: Path) -> None:
    rows = guard_rows(400, 1)
    write(tmp_path / "train.jsonl", rows)
    write(tmp_path / "validation.jsonl", [*rows[:200], *guard_rows(200, 9)])
    data = {"train": ["train.jsonl"], "validation": ["validation.jsonl"]}
    made = recipe(training={"epochs": 1}, data=data)
    run = run_recipe(made, data_root=tmp_path, output=tmp_path / "out", base=tiny_base)
    learnt = {row["prompt"] for row in rows}
    unseen = {row["prompt"] for row in guard_rows(200, 9) if not row["label"]} - learnt
    assert run.adapter.config.modes["prompt"].n_harmless == len(unseen)
    assert summary_of(run, 0.1)["validation_rows_learnt"] == 400 - len(
        [row for row in guard_rows(200, 9) if row["prompt"] not in learnt]
    )


def test_what_a_task_cannot_teach_is_an_error(tiny_base: Base, jokes: str, tmp_path: Path) -> None:
    def train(**sections: object) -> None:
        run_recipe(recipe(data={"task": jokes}, **sections), data_root=tmp_path, output=tmp_path / "x", base=tiny_base)

    with pytest.raises(ConfigError, match=r"no risky and harmless rows for privacy in train and validation.*: joke\."):
        train(adapter={"labels": ["joke", "privacy"]})
    write(tmp_path / "validation.jsonl", [{"prompt": "one class only", "label": 1}] * 3)
    with pytest.raises(ConfigError, match="Validation needs both harmful and harmless rows"):
        train()
    write(tmp_path / "validation.jsonl", [{"prompt": "outside the set", "label": 2}] * 3)
    with pytest.raises(
        ConfigError, match="No usable row in validation of task 'tests/jokes'; the first bad row: line 1"
    ):
        train()


def test_rows_that_the_template_refuses_or_that_have_no_token_are_bad_rows(tiny_base: Base) -> None:
    examples = [
        Example((Message("user", "hi"),), (1.0,), None, 1),
        Example((Message("user", "\ud800"),), (1.0,), None, 2),
        Example((Message("user", ""),), (1.0,), None, 3),
    ]
    rows = encode_rows(tiny_base, examples)
    assert len(rows.ids) == len(rows.examples) == 1
    assert [row.line for row in rows.bad] == [2, 3]
    assert "makes no token of this conversation's text" in rows.bad[1].problem
    assert isinstance(rows.bad[0], BadRow)


def failing(base: Base, root: Path, values: Recipe, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        run_recipe(values, data_root=root, output=root / "out", base=base)
    assert not (root / "out" / WEIGHTS_FILE).exists()


def test_data_that_cannot_be_learnt_from_is_an_error(tiny_base: Base, tmp_path: Path) -> None:
    rows = {split: tmp_path / f"guard_{split}.jsonl" for split in ("train", "validation")}
    failing(tiny_base, tmp_path, recipe(), InputError, r"There is no file .*guard_train\.jsonl")
    write(rows["train"], ["{broken"])
    write(rows["validation"], guard_rows(20, 1))
    failing(
        tiny_base, tmp_path, recipe(), ConfigError, r"No usable row in guard_train\.jsonl; the first bad row: line 1"
    )
    write(rows["train"], [{"prompt": "the cat sat " * 300, "label": 1}])
    failing(tiny_base, tmp_path, recipe(), ConfigError, "1 are longer than max_tokens or the base's context")
    write(rows["train"], guard_rows(20, 1))
    write(rows["validation"], [{"prompt": "hi", "label": 0}] * 5)
    failing(tiny_base, tmp_path, recipe(), ConfigError, "Validation needs both harmful and harmless rows")
    write(rows["validation"], guard_rows(20, 1))
    write(rows["train"], [{key: row[key] for key in ("prompt", "label")} for row in guard_rows(20, 1)])
    failing(
        tiny_base, tmp_path, recipe(training={"soft_weight": 0.5}), ConfigError, "not every training row has 'soft'"
    )
    for split in rows:
        write(tmp_path / f"answers_{split}.jsonl", [*answer_rows(5, 1), {"prompt": "how?"}])
    failing(tiny_base, tmp_path, recipe("answers"), ConfigError, "every row needs 'prompt' and 'response'")


def test_a_guard_that_falls_apart_is_an_error(
    tiny_base: Base, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nothing(base: Base, source: object, rows: module.Rows, batch_size: int = 64) -> np.ndarray:
        return np.full(tuple(rows.labels.shape), np.nan)

    monkeypatch.setattr(module, "guard_logits", nothing)
    with pytest.raises(NotFiniteError, match="validation figure is nan"):
        run_recipe(recipe(training={"epochs": 1}), data_root=data, output=tmp_path, base=tiny_base)


def test_an_attached_base_is_refused(
    tiny_base: Base, data: Path, tmp_path: Path, random_aligner: Callable[..., Adapter]
) -> None:
    """With states kept on disk nothing of the attachment would be seen, and the wrong states would be learnt from."""
    with attach(replace(tiny_base), [random_aligner(tiny_base)]) as attachment:
        for cached in (True, False):
            with pytest.raises(RuntimeError, match=r"attach"):
                run_recipe(
                    recipe(training={"cache_taps": cached}), data_root=data, output=tmp_path, base=attachment.base
                )


def test_the_recipe_loads_its_own_base(tiny_folder: Callable[[str], Path], data: Path, tmp_path: Path) -> None:
    values = recipe(base={"name": str(tiny_folder("llama")), "dtype": "bfloat16"}, training={"epochs": 2})
    done = run_recipe(values.model_copy(update={"output": str(tmp_path)}), data_root=data)
    assert done.outcome.best_metric > 0.7
    base = load_base(tiny_folder("llama"), dtype="bfloat16")
    assert load_adapter(tmp_path, base).dtype == torch.bfloat16


def test_rows_beyond_the_context_calibrate_how_such_texts_are_read(tiny_base: Base, data: Path, tmp_path: Path) -> None:
    """Nobody learns from them; a guard that met none has no calibration for them."""
    generator = random.Random(5)
    long = [
        {"prompt": " ".join([*generator.choices(["cat", "dog", "sun"], k=300), "hat" * row]), "label": row}
        for row in [0] * 60 + [1] * 3
    ]
    rows = (data / "guard_validation.jsonl").read_text()
    (data / "long.jsonl").write_text("\n".join([rows, *map(json.dumps, long)]))
    made = recipe(training={"epochs": 1}, limit=32, data={"validation": ["long.jsonl"]})
    run = run_recipe(made, data_root=data, output=tmp_path / "long", base=tiny_base)
    assert run.validation.n_too_long == len(run.validation.beyond) == 63
    loaded = load_adapter(tmp_path / "long", tiny_base)
    assert set(loaded.config.modes) == {"prompt", "windowed"}
    assert loaded.config.modes["windowed"].n_harmless == 60
    assert "strict" in loaded.config.modes["windowed"].presets
    short = run_recipe(
        recipe(training={"epochs": 1}, limit=32), data_root=data, output=tmp_path / "short", base=tiny_base
    )
    assert set(short.adapter.config.modes) == {"prompt"}
    assert torch.equal(weights(short.adapter), weights(run.adapter))
