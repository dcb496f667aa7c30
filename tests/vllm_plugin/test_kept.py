"""Scores that stay in the worker by tag: each token's once, whatever passes were run for it, and nobody's twice."""

from __future__ import annotations

import math
import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from safeside.vllm_plugin.kept import READ, Drawn, Kept, WorkerExtension, kept_of, tag_of


def passed(kept: Kept, drawn: list[Drawn], values: torch.Tensor) -> None:
    kept.expect(drawn)
    kept.keep(values)


def test_each_token_has_the_scores_of_the_last_pass_that_drew_it() -> None:
    """The slow twin is a table by tag and step, over passes in which requests change rows and begin steps again."""
    kept, chance = Kept(8), random.Random(3)
    steps = dict.fromkeys("abc", 0)
    wanted: dict[str, list[list[float]]] = {tag: [] for tag in steps}
    for tag in steps:
        kept.begin(tag, is_back=False)
    for _ in range(300):
        tags = chance.sample(sorted(steps), chance.randint(1, 3))
        values = torch.rand(4, 2)
        rows = chance.sample(range(4), len(tags))
        passed(kept, [Drawn(row, tag, steps[tag]) for row, tag in zip(rows, tags, strict=True)], values)
        for row, tag in zip(rows, tags, strict=True):
            wanted[tag][steps[tag] :] = [values[row].tolist()]
            steps[tag] += chance.random() < 0.8  # else only a part of its prompt was read, and nothing drawn
        if chance.random() < 0.1:
            kept.begin(tags[0], is_back=True)
    assert min(steps.values()) > 128, "several blocks"
    for tag, rows_of_tag in wanted.items():
        found = kept.take(tag)
        assert found[: len(rows_of_tag)] == rows_of_tag
        assert all(math.isnan(value) for row in found[len(rows_of_tag) :] for value in row)


def test_taken_is_forgotten_and_passes_behind_it_begin_nothing() -> None:
    kept = Kept(8)
    kept.begin("a", is_back=False)
    passed(kept, [Drawn(0, "a", 0)], torch.tensor([[0.5]]))
    assert kept.take("a")[0] == [0.5]
    passed(kept, [Drawn(0, "a", 1)], torch.tensor([[0.6]]))  # of a request that ended meanwhile
    kept.leave("a")
    assert kept.take("a") == []
    assert not kept.running
    assert not kept.left


def test_values_that_nobody_waits_for_are_not_touched() -> None:
    kept = Kept(8)
    kept.keep(None)  # type: ignore[arg-type]
    kept.begin("a", is_back=False)
    passed(kept, [Drawn(0, "a", 0)], torch.tensor([[0.5]]))
    kept.keep(None)  # type: ignore[arg-type]  # log-probabilities of a prompt: no other pass was told of
    assert kept.take("a")[0] == [0.5]


def test_a_copy_is_kept() -> None:
    kept, values = Kept(8), torch.tensor([[0.5]])
    kept.begin("a", is_back=False)
    passed(kept, [Drawn(0, "a", 0)], values)
    values.fill_(0.0)
    assert kept.take("a")[0] == [0.5]


def test_those_that_left_first_are_pushed_out_and_have_no_scores_then() -> None:
    kept = Kept(2)
    for tag in "abc":
        kept.begin(tag, is_back=False)
        passed(kept, [Drawn(0, tag, 0)], torch.tensor([[0.5]]))
        kept.leave(tag)
    assert list(kept.left) == ["b", "c"]
    assert kept.take("a") == []
    kept.begin("a", is_back=True)  # it was preempted, and goes on
    passed(kept, [Drawn(0, "a", 1)], torch.tensor([[0.7]]))
    first, second, *_ = kept.take("a")
    assert math.isnan(first[0])
    assert second == pytest.approx([0.7])


def test_requests_in_the_batch_stay_whoever_leaves_it() -> None:
    """As when many clients leave beside an answer that goes on; one that waits for memory is not gone either."""
    kept = Kept(2)
    for tag in ("runs", "waits"):
        kept.begin(tag, is_back=False)
        passed(kept, [Drawn(0, tag, 0)], torch.tensor([[0.5]]))
    for index in range(20):
        kept.begin(f"left{index}", is_back=False)
        passed(kept, [Drawn(0, "runs", index + 1), Drawn(1, f"left{index}", 0)], torch.tensor([[0.25], [0.75]]))
        kept.leave(f"left{index}")
    kept.leave("waits")
    kept.begin("waits", is_back=True)
    assert [row[0] for row in kept.take("runs")[:21]] == [0.5] + [0.25] * 20
    assert kept.take("waits")[0] == [0.5]
    assert list(kept.left) == ["left19"]


def test_scores_of_two_requests_with_one_tag_are_nobodys() -> None:
    kept = Kept(8)
    for _ in range(2):
        kept.begin("a", is_back=False)
        passed(kept, [Drawn(0, "a", 0)], torch.tensor([[0.5]]))
    assert kept.take("a") == []


def test_workers_read_the_scores_of_their_engine() -> None:
    def config(name: str) -> Any:
        return SimpleNamespace(instance_id=name, scheduler_config=SimpleNamespace(max_num_seqs=2))

    one, other = config("kept-one"), config("kept-other")
    kept_of(one).begin("a", is_back=False)
    passed(kept_of(one), [Drawn(0, "a", 0)], torch.tensor([[0.5]]))
    worker = WorkerExtension()
    worker.vllm_config = other
    assert vars(WorkerExtension)[READ](worker, "a") == []
    worker.vllm_config = one
    assert worker.take_safeside_scores("a")[0] == [0.5]


def test_requests_without_a_tag() -> None:
    assert [tag_of(extra) for extra in (None, {}, {"safeside_strength": 1.0})] == [None] * 3
    assert tag_of({"safeside_tag": "a"}) == "a"
