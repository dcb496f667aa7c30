"""The bench of stopping: stored scores are those of the live base, and figures are those of the rule."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import stream
from parts import read_parts
from safeside.errors import InputError
from safeside.guards.stream import StopRule, score_answers
from stream import Answers, chosen_rule, figures_of
from task_guards import Lesson, Sizes


@pytest.fixture
def lesson(small_tasks: Path, tiny_folder: Callable[[str], Path], tmp_path: Path) -> Lesson:
    place = (str(tiny_folder("llama")), small_tasks)
    return Lesson.read(place, "bench/answers", tmp_path / "taps", Sizes(train=64, evaluation=240, epochs=1))


def test_stored_token_scores_are_those_of_the_live_base(lesson: Lesson) -> None:
    guard = lesson.guard(lesson.recipe(0, "prefixes"))
    stored = lesson.token_scores("test", guard)
    messages = [row.messages for row in lesson.splits["test"].examples]
    live = score_answers(lesson.base, guard, messages)
    assert [len(some) for some in stored].count(0) == [len(some) for some in messages].count(1) == 1
    for ours, theirs in zip(stored, live, strict=True):
        torch.testing.assert_close(ours, theirs.scores, atol=1e-5, rtol=1e-4)  # other batches, other sums
    last = lesson.last_scores("test", guard)[[len(some) > 0 for some in stored]]
    answers = Answers.of(lesson, "test", guard)
    np.testing.assert_allclose(last, answers.last, atol=1e-6)
    assert len(answers.labels) == len(last)


def test_rows_are_counted_and_drawn_the_same_way_twice(lesson: Lesson, small_tasks: Path) -> None:
    assert {split: len(rows.ids) for split, rows in lesson.splits.items()} == {
        "train": 64,
        "validation": 240,
        "test": 240,
    }
    assert lesson.counts["test_too_long"] == 0
    again = Lesson.read((lesson.base.name, small_tasks), "bench/answers", lesson.folder, lesson.sizes)
    assert again.splits["test"].ids == lesson.splits["test"].ids


def test_a_rule_that_answers_are_too_short_for_is_no_candidate() -> None:
    validation = scored(*[([0.1, 0.2], 0)] * 80, ([0.9, 0.9], 1))
    assert chosen_rule(validation, 0.05, (1, 32)) == chosen_rule(validation, 0.05, (1,))
    with pytest.raises(InputError, match="fewer tokens than the stop rule asks for"):
        chosen_rule(validation, 0.05, (16, 32))


def scored(*answers: tuple[list[float], int]) -> Answers:
    labels = np.array([float(label) for _, label in answers])
    return Answers([torch.tensor(scores) for scores, _ in answers], labels, [str(row) for row in range(len(answers))])


TEST = scored(
    ([0.9, 0.9, 0.1, 0.1], 1),  # stopped at its half, and the whole answer passes
    ([0.1, 0.1, 0.9, 0.9], 1),  # stopped at its end
    ([0.1, 0.9, 0.1, 0.9], 1),  # the whole answer alone is flagged
    ([0.1, 0.1], 1),
    ([0.9, 0.9, 0.9, 0.1], 0),  # a false stop
    ([0.1, 0.1, 0.1, 0.9], 0),  # a false flag
    ([0.1, 0.1], 0),
    ([0.1, 0.1], 0),
)


def test_the_rule_that_stops_most_in_time_is_chosen() -> None:
    """One risky token is noise here; four in a row come late."""
    noisy = [([0.1, 0.9, 0.1, 0.1] + [0.1] * 8, 0)] * 30 + [([0.1] * 12, 0)] * 30
    harmful = [([0.1, 0.8, 0.8, 0.1] + [0.1] * 8, 1)] * 10 + [([0.1] * 8 + [0.8] * 4, 1)] * 3
    validation = scored(*noisy, *harmful)
    rule = stream.chosen_rule(validation, 0.1, (1, 2, 4))
    assert (rule.n_consecutive, rule.threshold < 0.8) == (2, True)
    assert stream.chosen_rule(validation, 0.1, (1, 4)).n_consecutive == 4  # late, but the other stops nothing
    assert stream.chosen_rule(scored(*noisy, *harmful[10:]), 0.1, (2, 4)).threshold < 0.8


def test_the_promise_of_the_chosen_rule_holds_for_all_candidates() -> None:
    """Each alone is as watchful as it may be when nothing is chosen; one of many is less so."""
    generator = np.random.default_rng(0)
    benign = scored(*((generator.random(6).tolist(), 0) for _ in range(200)), ([1.0] * 6, 1))
    alone, of_four = (stream.chosen_rule(benign, 0.05, candidates).threshold for candidates in ((1,), (1, 1, 1, 1)))
    assert of_four > alone


def test_a_threshold_of_a_share_is_reached_by_it() -> None:
    scores = np.array([0.1, 0.2, 0.3, 0.4])
    for share in (0.25, 0.5, 1.0):
        assert (scores >= stream._threshold_of_share(scores, share)).mean() == share
    assert stream._threshold_of_share(scores, 0.0) == math.inf


def test_figures_are_those_of_the_rule_on_the_answers() -> None:
    rows = list(figures_of(StopRule(0.5, 2), 0.5, TEST, {"seed": 0}, {"flops_share": 0.1}))
    values = {row["metric"]: row for row in rows if "written" not in row}
    assert values["detection"]["value"] == pytest.approx(0.5)
    assert values["whole_detection"]["value"] == pytest.approx(0.5)
    assert values["detected_share"]["value"] == pytest.approx(1.0)
    assert values["detected_share_equal"]["value"] == pytest.approx(1.0)  # at 0.9, which one of four reaches
    assert values["false_stops"]["value"] == values["whole_false_flags"]["value"] == pytest.approx(0.25)
    assert values["delay_tokens"]["value"] == pytest.approx(3.0)  # of 2 and 4
    assert values["delay_share"]["value"] == pytest.approx(0.75)
    assert {row["n"] for row in values.values()} == {4, 2}
    assert all(row["low"] <= row["value"] <= row["high"] and row["flops_share"] == 0.1 for row in rows)
    stopped = {row["written"]: row["value"] for row in rows if "written" in row}
    assert stopped == {share: (0.25 if share < 1 else 0.5) * (share >= 0.5) for share in stream.WRITTEN}


def test_a_rule_that_stops_nothing_has_no_delay() -> None:
    rows = list(figures_of(StopRule(1.0, 2), 1.0, TEST, {}, {}))
    values = {row["metric"]: row["value"] for row in rows if "written" not in row}
    assert values == {"detection": 0.0, "false_stops": 0.0, "whole_detection": 0.0, "whole_false_flags": 0.0}


def test_it_writes_figures_for_both_ways_of_learning(
    small_tasks: Path, tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    words = ["--data", str(small_tasks), "--base", str(tiny_folder("llama")), "--task", "bench/answers"]
    small = ["--limit", "128", "--evaluation-limit", "240", "--epochs", "2", "--seeds", "0", "--rates", "0.001", "0.2"]
    path = stream.main([*words, *small, "--output", str(tmp_path / "results")])
    result = read_parts(path)["stream"]
    assert {row["targets"] for row in result["rows"]} == {"end", "prefixes"}
    assert {row["false_positive_rate"] for row in result["rows"] if row["metric"] == "false_stops"} == {0.2}
    assert {row["rule"]: row["n_consecutive"] for row in result["rows"] if row["metric"] == "detection"}["kept"] == 8
    assert {row["rule"] for row in result["rows"] if row["metric"] != "auroc"} == {"kept", "chosen"}
    assert all(math.isfinite(row["value"]) for row in result["rows"])
    assert result["notes"]["benign_validation_rows"] < 299
    assert result["notes"]["rows_without_answer"] == 2
