"""The core benchmark on a few made-up rows and a tiny base: keys, caching, what is left out."""

from __future__ import annotations

import functools
import gzip
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import cells
import core
import core_data
import geometry
from safeside import Adapter, Base
from safeside.evals.metrics import bootstrap
from safeside.guards.score import score_conversations
from safeside.train.loop import Loop
from safeside.train.taps import StoredTaps
from workers import Workers

KEYS = {"benchmark", "commit", "seconds", "machine", "rows", "notes"}
LABELS = {"task", "base", "method", "seed"}
FIGURE = {"metric", "value", "low", "high", "n", "n_unscored", "flops_share", "config_hash"}
SAME_SCORE = 1e-5  # float32 in batches of another shape

Row = dict[str, object]


def write(path: Path, rows: Sequence[Row | str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)


def texts(n_rows: int, start: int = 0) -> list[Row]:
    return [
        {"text": f"row {start + index} is {'bad' if index % 2 else 'fine'}", "label": index % 2}
        for index in range(n_rows)
    ]


def answers(n_rows: int, start: int = 0) -> list[Row]:
    return [
        {"prompt": f"ask {start + index}", "response": "do harm" if index % 2 else "no", "label": index % 2}
        for index in range(n_rows)
    ]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Files of two tasks: one without a validation file, one with."""
    root = tmp_path / "data"
    write(root / "toxigen" / "train.jsonl.gz", texts(60))
    write(root / "toxigen" / "test.jsonl.gz", [*texts(11, 1000), {"text": "word " * 90, "label": 0}])
    for split, start in (("train", 0), ("val", 100), ("test", 200)):
        write(root / "beavertails" / f"{split}.jsonl.gz", answers(16, start))
    return root


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small base in place of the published ones, and few resamples."""
    monkeypatch.setattr(cells, "bootstrap", functools.partial(bootstrap, n_resamples=20))
    dimensions = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    published = {"Small": ("qwen2", {**dimensions, "intermediate_size": 256, "vocab_size": 500})}
    monkeypatch.setattr(geometry, "PUBLISHED", published)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each training run from now on."""
    counted: list[int] = []
    train = Loop.run

    def counting(self: Loop, resume: bool = False) -> object:
        counted.append(self.seed)
        return train(self, resume)

    monkeypatch.setattr(Loop, "run", counting)
    return counted


@pytest.fixture
def bench(data: Path, tmp_path: Path, tiny_folder: Callable[[str], Path]) -> Callable[..., dict[str, object]]:
    """``bench("--seeds", "0")`` runs the benchmark and returns what it wrote."""

    def run(*more: str) -> dict[str, object]:
        common = ["--data", str(data), "--base", str(tiny_folder("llama")), "--workers", "1", "--epochs", "1"]
        folders = ["--cells", str(tmp_path / "cells"), "--output", str(tmp_path / "out")]
        tasks = [] if "--tasks" in more else ["--tasks", "toxigen", "beavertails"]
        rates = [] if "--learning-rates" in more else ["--learning-rates", "1e-3"]
        seeds = [] if "--seeds" in more else ["--seeds", "0"]
        path = core.main([*common, *folders, *tasks, *rates, *seeds, *more])
        return dict(json.loads(path.read_text()))

    return run


def test_results_have_the_agreed_keys_and_labels(bench: Callable[..., dict[str, object]], tmp_path: Path) -> None:
    result = bench("--seeds", "0", "1")
    assert set(result) == KEYS
    assert result["benchmark"] == "core"
    rows = result["rows"]
    assert all(set(row) == LABELS | FIGURE for row in rows)
    found = {(row["task"], row["method"], row["seed"], row["metric"]) for row in rows if row["task"] != "geometry"}
    methods, metrics = ("plr", "rtb", "lst", "standalone"), ("auroc", "train_seconds", "trainable_params")
    assert found == {
        (task, method, seed, metric)
        for task in ("toxigen", "beavertails") for method in methods for seed in (0, 1) for metric in metrics
    }  # fmt: skip
    assert all(row["low"] <= row["value"] <= row["high"] for row in rows)
    shares = {row["method"]: row["flops_share"] for row in rows if row["task"] == "toxigen"}
    assert shares["standalone"] == pytest.approx(shares["lst"], rel=0.02)
    alone = json.loads((tmp_path / "out" / "geometry.json").read_text())
    assert alone["benchmark"] == "geometry"
    assert [{**row, "task": "geometry", "seed": 0} for row in alone["rows"]] == [
        row for row in rows if row["task"] == "geometry"
    ]
    assert {(row["base"], row["method"]) for row in alone["rows"]} == {
        ("Small", m) for m in ("base", *geometry.METHODS)
    }


def test_a_second_run_trains_nothing(
    bench: Callable[..., dict[str, object]], runs: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    first = bench()
    assert len(runs) == 4 + 2 * 4  # one learning rate to try, and one final cell a task and method
    assert "12 cells, 0 cached, 12 to do" in capsys.readouterr().err
    runs.clear()
    assert bench()["rows"] == first["rows"]
    assert runs == []
    assert "12 cells, 12 cached, 0 to do" in capsys.readouterr().err


def test_a_changed_data_file_invalidates_its_task(
    bench: Callable[..., dict[str, object]], runs: list[int], data: Path
) -> None:
    bench("--methods", "plr")
    runs.clear()
    write(data / "beavertails" / "test.jsonl.gz", answers(18, 300))
    result = bench("--methods", "plr")
    assert len(runs) == 1
    assert [row["n"] for row in result["rows"] if row["metric"] == "auroc"] == [12, 18]


def test_a_killed_run_goes_on(
    bench: Callable[..., dict[str, object]], runs: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_cell = core.run_cell

    def killed_at_third(*arguments: object) -> dict[str, object]:
        if len(runs) == 2:
            raise KeyboardInterrupt
        return run_cell(*arguments)

    monkeypatch.setattr(core, "run_cell", killed_at_third)
    with pytest.raises(KeyboardInterrupt):
        bench("--methods", "plr", "--seeds", "0", "1")
    monkeypatch.setattr(core, "run_cell", run_cell)
    bench("--methods", "plr", "--seeds", "0", "1")
    assert len(runs) == 1 + 2 * 2  # none twice


def test_the_learning_rate_is_chosen_on_validation_rows_of_one_task(
    bench: Callable[..., dict[str, object]], runs: list[int]
) -> None:
    result = bench("--methods", "plr", "--learning-rates", "1e-5", "1e-1", "1e-2")
    assert len(runs) == 3 + 2
    notes = result["notes"]
    tried = {float(title.split()[-1]): value for title, value in notes["tuning"].items()}
    assert set(tried) == {1e-5, 1e-2, 1e-1}
    assert tried[notes["learning_rates"]["plr"]] == max(tried.values())


def test_rows_that_cannot_be_used_are_counted(bench: Callable[..., dict[str, object]], data: Path) -> None:
    write(data / "toxigen" / "test.jsonl.gz", [*texts(10, 1000), "{broken", {"text": "  ", "label": 1}])
    result = bench("--methods", "plr", "--tasks", "toxigen")
    row = next(row for row in result["rows"] if row["metric"] == "auroc")
    assert (row["n"], row["n_unscored"]) == (10, 2)
    assert result["notes"]["rows"]["toxigen"]["test_bad_rows"] == 2


def test_conflicts_and_leaks_are_removed_and_counted(tmp_path: Path) -> None:
    folder = tmp_path / "pku_saferlhf_guard"
    leak = {"prompt": "Ask  200", "response": "NO", "label": 0}
    write(folder / "train.jsonl.gz", [*answers(6), leak, {**answers(1, 50)[0], "label_conflict": True}])
    write(folder / "val.jsonl.gz", [*answers(4, 100), *answers(1)])
    write(folder / "test.jsonl.gz", answers(4, 200))
    splits = core_data.read_splits(tmp_path, "pku_saferlhf_guard")
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (5, 5, 4)
    assert splits.counts["label_conflicts_dropped"] == 1
    assert splits.counts["train_rows_in_test_removed"] == 1
    assert splits.counts["train_rows_in_validation_removed"] == 1


def test_a_prompt_is_held_out_with_all_its_answers(tmp_path: Path) -> None:
    folder = tmp_path / "toxic_chat"
    rows = [{"prompt": f"ask {index // 4}", "response": f"{index}", "label": 0} for index in range(800)]
    write(folder / "train.jsonl.gz", rows)
    write(folder / "test.jsonl.gz", answers(2, 900))
    splits = core_data.read_splits(tmp_path, "toxic_chat")
    prompts = [{example.messages[0].content for example in rows} for rows in (splits.train, splits.validation)]
    assert not prompts[0] & prompts[1]
    assert len(prompts[1]) == pytest.approx(200 * core_data.HELD_OUT, abs=3 * math.sqrt(200 * 0.15 * 0.85))


def test_long_rows_score_as_a_guard_scores_them(
    tiny_base: Base, data: Path, tmp_path: Path, random_guard: Callable[..., Adapter]
) -> None:
    """Stored states of windows against the attached guard, the slow way."""
    write(data / "toxigen" / "test.jsonl.gz", [*texts(6, 1000), {"text": "a word or two " * 40, "label": 0}])
    setup = cells.Setup(data, str(tiny_base.folder), "f", tmp_path, 10, None, 1)
    cells.prepare.cache_clear()
    prepared = cells.prepare(setup, "toxigen")
    assert prepared.counts["test_rows_windowed"] == 1
    guard = random_guard(tiny_base)
    logits = cells.row_logits(prepared, StoredTaps(cells.store_of(setup, "toxigen", "test"), guard))
    examples = core_data.read_splits(data, "toxigen").test
    scored = score_conversations(tiny_base, [guard], [example.messages for example in examples])
    np.testing.assert_allclose(1 / (1 + np.exp(-logits)), [row.by_guard["harm"][0] for row in scored], atol=SAME_SCORE)


def test_a_probe_reads_one_layer_of_the_store(tiny_base: Base, data: Path, tmp_path: Path) -> None:
    setup = cells.Setup(data, str(tiny_base.folder), "f", tmp_path, 10, None, 1)
    cells.prepare.cache_clear()
    store = cells.store_of(setup, "toxigen", "train")
    narrow = cells.narrowed(store, (3,))
    assert narrow.states.shape == (*store.states[:, :1].shape[:2], tiny_base.d_model)
    assert narrow.states.equal(store.states[:, 3:])


def test_workers_run_every_job_once() -> None:
    with Workers(2, 1) as workers:
        assert dict(workers.run(math.factorial, [3, 4, 5])) == {3: 6, 4: 24, 5: 120}


@pytest.mark.parametrize(
    ("name", "billions"), [("Qwen2.5-7B", 7.616), ("Mistral-7B", 7.248), ("Gemma-2-9B", 9.242), ("Qwen2.5-14B", 14.770)]
)
def test_published_dimensions_give_the_published_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, billions: float
) -> None:
    monkeypatch.undo()
    base = geometry.empty_base(name, tmp_path)
    n_parameters = sum(parameter.numel() for parameter in base.model.parameters())
    assert n_parameters / 1e9 == pytest.approx(billions, abs=1e-3)
