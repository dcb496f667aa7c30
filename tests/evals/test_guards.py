"""Measuring a guard: every row is in a figure or counted as left out."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from safeside import Adapter, Base, Message, save_adapter
from safeside.adapters.config import Calibration, ModeCalibration, ProbabilityMap, Promise
from safeside.errors import InputError
from safeside.evals import guards as module
from safeside.evals.command import EvalOptions, evaluate_command, guard_rows
from safeside.evals.guards import evaluate_guard, report_on
from safeside.evals.metrics import expected_calibration_error, guard_figures, rates
from safeside.guards.score import Scores, judge
from safeside.tasks.learnt import hashes_of, save_learnt
from safeside.tasks.rows import load_examples, messages_of
from safeside.types import Example

LONG = "the cat sat on the mat and then " * 40


@pytest.fixture(scope="module")
def guard(session_base: Base, random_guard: Callable[..., Adapter]) -> Adapter:
    guard = random_guard(session_base)
    guard.set_calibration(Calibration(scale=(1.0,), bias=(0.0,), threshold=(0.45,)))
    return guard


def write(path: Path, rows: list[object]) -> Path:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


def rows(n: int = 20) -> list[object]:
    return [{"text": f"the cat sat {index * 7919}", "label": index % 2} for index in range(n)]


def test_figures_are_those_of_the_verdicts(tiny_base: Base, guard: Adapter, tmp_path: Path) -> None:
    told: list[int] = []
    report = evaluate_guard(tiny_base, guard, write(tmp_path / "rows.jsonl", rows()), advance=told.append)
    conversations = [[Message("user", str(row["text"]))] for row in rows()]
    verdicts = [verdict for (verdict,) in judge(tiny_base, [guard], conversations)]
    labels = np.array([float(row["label"]) for row in rows()])
    scores = np.array([verdict.score for verdict in verdicts])
    assert report.figures["harm"] == guard_figures(labels, report.scores[:, 0], 0.45)
    assert report.scores[:, 0] == pytest.approx(scores, abs=1e-5)
    assert report.figures["harm"]["tpr"].value == np.mean(
        [v.flagged for v, y in zip(verdicts, labels, strict=True) if y]
    )
    assert (report.n, report.n_skipped, report.n_unscored, report.n_windowed) == (20, 0, 0, 0)
    assert sum(told) == 20


def test_figures_stand_at_each_rows_own_threshold(tiny_base: Base, random_guard, tmp_path: Path) -> None:
    """By preset and reading mode, as in the verdicts; probabilities by the map of their mode."""
    both = random_guard(tiny_base)
    for mode, threshold, slope in (("prompt", 0.3, 2.0), ("answer", 0.7, 0.5)):
        promise = Promise(threshold=(threshold,), false_positive_rate=0.05)
        fit = ProbabilityMap(
            method="platt", slope=slope, error_before=0, error_after=0, n_harmless=30, n_harmful=30
        )  # fmt: skip
        both.set_mode(mode, ModeCalibration(n_harmless=60, presets={"strict": promise}, maps=(fit,)))
    strict = both.with_preset("strict")
    content = [
        {"prompt": f"the cat {index * 7919}", **({"response": "no"} if index % 3 else {}), "label": index % 2}
        for index in range(24)
    ]
    path = write(tmp_path / "rows.jsonl", list(content))
    report = evaluate_guard(tiny_base, strict, path)
    verdicts = [verdict for (verdict,) in judge(tiny_base, [strict], [messages_of(row) for row in content])]
    flagged = np.array([verdict.flagged for verdict in verdicts])
    labels = np.array([float(row["label"]) for row in content])
    assert {verdict.threshold for verdict in verdicts} == {0.3, 0.7}
    assert tuple(report.figures["harm"][name].value for name in ("f1", "tpr", "fpr")) == rates(labels, flagged)
    probabilities = np.array([verdict.probability for verdict in verdicts])
    assert report.figures["harm"]["ece"].value == pytest.approx(
        expected_calibration_error(labels, probabilities), abs=1e-5
    )
    rows, failed = evaluate_command(tiny_base, both, EvalOptions(path, preset="strict"), str(tmp_path))
    assert [row["value"] for row in rows] == [figure.value for figure in report.figures["harm"].values()]
    assert report.notes == []
    windowed = evaluate_guard(tiny_base, strict, write(path, [*content, {"prompt": LONG, "label": 1}]))
    assert windowed.notes == ["1 rows: no preset 'strict' for mode 'windowed': the guard's own threshold is used"]
    assert not failed


def test_every_row_that_is_left_out_is_counted_and_named(tiny_base: Base, guard: Adapter, tmp_path: Path) -> None:
    content = [
        *rows(6),
        "{broken",
        {"text": "hi"},
        {"text": LONG, "label": 1},
        {"messages": [{"role": role, "content": LONG} for role in ("user", *["assistant"] * 3)], "label": 1},
    ]
    report = evaluate_guard(tiny_base, guard, write(tmp_path / "rows.jsonl", content))
    assert (report.n, report.n_skipped, report.n_unscored, report.n_windowed) == (7, 2, 1, 1)
    assert [row.line for row in report.bad] == [7, 8, 10]
    assert "cannot be cut" in report.bad[2].problem
    assert report.scores.shape == (8, 1)
    for row in guard_rows(report):
        assert (row["n"], row["n_skipped"], row["n_windowed"]) == (7, 3, 1)


def examples_of(path: Path, content: list[object]) -> list[Example]:
    examples, _ = load_examples(write(path, content), ("harm",))
    return examples


def test_rows_that_the_guard_learnt_from_are_left_out(tiny_base: Base, guard: Adapter, tmp_path: Path) -> None:
    """Whatever their case and spacing; figures are those of the others alone, and other rows are left out as before."""
    content = rows()
    known = [{**row, "text": f" {row['text'].upper()}\n"} for row in content[4:12]]
    learnt = hashes_of(examples_of(tmp_path / "train.jsonl", [*known, {"text": "something else", "label": 1}]))
    path = write(tmp_path / "rows.jsonl", ["{broken", *content])
    report = evaluate_guard(tiny_base, guard, path, learnt=learnt)
    unseen = evaluate_guard(tiny_base, guard, write(tmp_path / "unseen.jsonl", [*content[:4], *content[12:]]))
    assert (report.n, report.n_learnt, report.n_skipped) == (12, 8, 1)
    assert report.figures == unseen.figures
    assert report.labels.tolist() == unseen.labels.tolist()
    assert {(row["n"], row["n_learnt"]) for row in guard_rows(report)} == {(12, 8)}
    assert evaluate_guard(tiny_base, guard, path, learnt=hashes_of([])).n_learnt == 0
    without = evaluate_guard(tiny_base, guard, path)
    assert (without.n, without.n_learnt) == (20, None)


def test_without_enough_unseen_rows_nothing_is_measured(tiny_base: Base, guard: Adapter, tmp_path: Path) -> None:
    examples = examples_of(tmp_path / "rows.jsonl", rows())
    with pytest.raises(InputError, match=r"learnt from every one of the 20 rows, .* Give rows that it has not seen"):
        report_on(tiny_base, guard, examples, learnt=hashes_of(examples))
    harmful = [example for example in examples if example.labels[0]]
    with pytest.raises(
        InputError,
        match=r"got 0 harmful and 10 harmless for 'harm', and 0 bad rows; 10 more were left out, for the guard learnt "
        r"from them\. Add rows of the other kind that it has not seen",
    ):
        report_on(tiny_base, guard, examples, learnt=hashes_of(harmful))


def test_the_command_reads_the_record_in_the_guards_folder(
    tiny_base: Base, guard: Adapter, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_adapter(guard, tmp_path / "mine", tiny_base)
    path = tmp_path / "rows.jsonl"
    examples = examples_of(path, rows())
    found, failed = evaluate_command(tiny_base, guard, EvalOptions(path), str(folder))
    assert ({(row["n"], row["n_learnt"]) for row in found}, failed) == ({(20, None)}, False)
    told = " ".join(capsys.readouterr().err.split())
    assert f"{folder} keeps no record of the rows that it learnt from; make sure that yours are not" in told
    save_learnt(folder, examples[:8])
    found, failed = evaluate_command(tiny_base, guard, EvalOptions(path), str(folder))
    assert ({(row["n"], row["n_learnt"]) for row in found}, failed) == ({(12, 8)}, False)
    told = " ".join(capsys.readouterr().err.split())
    assert "8 rows were left out: the guard learnt from them, and figures on them would flatter it" in told


def test_scores_that_are_no_numbers_are_unscored(
    tiny_base: Base, guard: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    def score(base: Base, guards: object, conversations: list[object], **options: object) -> list[Scores]:
        found = [Scores({"harm": (index / 10,)}) for index in range(len(conversations))]
        return [*found[:-1], Scores({"harm": (math.nan,)}, problem="a score is not a number")]

    monkeypatch.setattr(module, "score_conversations", score)
    examples = [Example((Message("user", "hi"),), (float(index > 4),), line=index + 1) for index in range(10)]
    report = report_on(tiny_base, guard, examples)
    assert (report.n, report.n_unscored) == (9, 1)
    assert [(row.line, row.problem) for row in report.bad] == [(10, "a score is not a number")]
    assert report.figures["harm"]["auroc"].value == 1.0


def test_rows_are_told_when_scores_leave_one_class_only(
    tiny_base: Base, guard: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    def score(base: Base, guards: object, conversations: list[object], **options: object) -> list[Scores]:
        return [Scores({"harm": (0.5,)}), Scores({"harm": (math.nan,)}, problem="a score is not a number")]

    monkeypatch.setattr(module, "score_conversations", score)
    examples = [Example((Message("user", "hi"),), (float(index),), line=index + 1) for index in range(2)]
    told: list[int] = []
    with pytest.raises(InputError, match="got 0 harmful and 1 harmless for 'harm', and 1 bad rows"):
        report_on(tiny_base, guard, examples, tell=lambda row: told.append(row.line))
    assert told == [2]


def test_every_label_has_its_figures(tiny_base: Base, random_guard: Callable[..., Adapter], tmp_path: Path) -> None:
    both = random_guard(tiny_base, labels=("a", "b"))
    content = [{"text": f"{index}", "label": {"a": index % 2, "b": int(index % 3 > 0)}} for index in range(12)]
    report = evaluate_guard(tiny_base, both, write(tmp_path / "rows.jsonl", list(content)))
    assert list(report.figures) == ["a", "b"]
    assert {row["label"] for row in guard_rows(report)} == {"a", "b"}
    assert report.labels[:, 1].tolist() == [float(index % 3 > 0) for index in range(12)]


def test_a_file_without_rows_is_an_error(tiny_base: Base, guard: Adapter, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no usable row"):
        evaluate_guard(tiny_base, guard, write(tmp_path / "rows.jsonl", []))
    with pytest.raises(InputError, match="The first problem of 1: line 1, no 'label'"):
        evaluate_guard(tiny_base, guard, write(tmp_path / "rows.jsonl", [{"text": "hi"}]))


def test_what_does_not_go_together_is_an_error(
    tiny_base: Base, guard: Adapter, random_aligner: Callable[..., Adapter], tmp_path: Path
) -> None:
    path = write(tmp_path / "rows.jsonl", rows())
    with pytest.raises(InputError, match="'refuse' is an aligner; measure it with --suite"):
        evaluate_command(tiny_base, random_aligner(tiny_base), EvalOptions(data=path), str(tmp_path))
    with pytest.raises(InputError, match="'harm' is a guard; --gate is for aligners"):
        evaluate_command(tiny_base, guard, EvalOptions(suite="demo", gate="builtin:harm"), str(tmp_path))
