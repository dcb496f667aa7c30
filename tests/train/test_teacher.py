"""Soft targets: files of scores, and teachers that never score a row that they have seen."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from safeside import Base, Message
from safeside.errors import ConfigError
from safeside.train import teacher as module
from safeside.train.recipe import Recipe
from safeside.train.rows import Rows
from safeside.train.splits import encode_rows
from safeside.train.teacher import folds_of, out_of_fold, read_scores, teacher_scores, with_scores, write_scores
from safeside.types import Example
from twin import hash_of


def rows_of(base: Base, n_rows: int, seed: int = 0) -> Rows:
    """A text with a hat in it is harmful."""
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for row in range(n_rows):
        words = [("cat", "mat", "sat", "be")[place] for place in torch.randint(0, 4, (4,), generator=generator)]
        words += ["hat"] * (row % 2) + [("so", "then", "how")[row % 3]]
        examples.append(Example((Message("user", " ".join(words)),), (float(row % 2),), None, row + 1))
    return encode_rows(base, examples)


def recipe(**sections: object) -> Recipe:
    values = {"name": "toy", "output": "none", "data": {"train": ("toy",), "validation": ("toy",)}}
    training = {"soft_weight": 0.5}
    teacher = {"rank": 4, "epochs": 4, "learning_rate": 1e-2, "batch_size": 8}
    return Recipe.model_validate({**values, "training": training, "teacher": teacher, **sections})


# ---- files of scores -------------------------------------------------------------------------------------------------


def test_what_is_written_is_read(tiny_base: Base, tmp_path: Path) -> None:
    rows = rows_of(tiny_base, 6)
    scores = torch.rand(6, 2)
    write_scores(tmp_path / "scores.jsonl", rows, scores)
    read = read_scores(tmp_path / "scores.jsonl", ("a", "b"))
    assert [read[example.messages] for example in rows.examples] == [tuple(row) for row in scores.tolist()]
    assert torch.equal(with_scores(rows, read).soft, scores)


def test_rows_are_matched_by_their_text_whatever_the_order(tiny_base: Base, tmp_path: Path) -> None:
    rows = rows_of(tiny_base, 4)
    lines = [{"text": example.messages[0].content, "soft": place / 4} for place, example in enumerate(rows.examples)]
    path = tmp_path / "scores.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in [{"text": "not in training", "soft": 1}, *lines[::-1]]))
    assert with_scores(rows, read_scores(path, ("harm",))).soft[:, 0].tolist() == [0.0, 0.25, 0.5, 0.75]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"text": "x"}', "no 'soft'"),
        ('{"text": "x", "soft": 1.5}', r"expected a number in \[0, 1\]"),
        ('{"text": "x", "soft": NaN}', r"expected a number in \[0, 1\]"),
        ('{"text": "x", "soft": [0.5, 0.5]}', "has 2 values; expected 1"),
        ('{"soft": 0.5}', "no known shape"),
        ("{broken", "not JSON"),
        ('{"text": "a", "soft": 0.6}', "has other scores further up"),
    ],
)
def test_a_bad_line_of_scores_is_an_error(tmp_path: Path, line: str, problem: str) -> None:
    path = tmp_path / "scores.jsonl"
    path.write_text('{"text": "a", "soft": 0.5}\n' + line)
    with pytest.raises(ConfigError, match=f"line 2.*{problem}"):
        read_scores(path, ("harm",))


def test_a_row_without_a_score_is_an_error(tiny_base: Base) -> None:
    rows = rows_of(tiny_base, 4)
    known = {example.messages: (0.5,) for example in rows.examples[:2]}
    with pytest.raises(ConfigError, match="none for 2 of 4 training rows, the first in line 3"):
        with_scores(rows, known)


# ---- folds -----------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 9), min_size=1, max_size=40), st.integers(2, 4), st.integers(0, 9))
def test_folds_are_even_and_keep_equal_texts_together(texts: list[int], n_folds: int, seed: int) -> None:
    ids = [(text, text) for text in texts]
    shares = folds_of(ids, n_folds, seed)
    assert shares == folds_of(ids, n_folds, seed)
    by_text = {text: {share for share, own in zip(shares, texts, strict=True) if own == text} for text in texts}
    assert all(len(found) == 1 for found in by_text.values())
    sizes = [sum(found == {share} for found in by_text.values()) for share in range(n_folds)]
    assert max(sizes) - min(sizes) <= 1


def test_no_teacher_scores_a_row_that_it_has_seen(tiny_base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[list[tuple[int, ...]], list[tuple[int, ...]]]] = []

    def fold(base: Base, own: Recipe, splits: tuple[Rows, Rows], unseen: Rows) -> torch.Tensor:
        calls.append((splits[0].ids, unseen.ids))
        return torch.full(unseen.labels.shape, float(len(calls)))

    monkeypatch.setattr(module, "_fold_scores", fold)
    rows = rows_of(tiny_base, 20)
    scores = out_of_fold(tiny_base, recipe(), rows, rows)
    assert len(calls) == 2
    for seen, unseen in calls:
        assert not set(seen) & set(unseen)
        assert len(seen) + len(unseen) == 20
    for row, ids in enumerate(rows.ids):
        assert scores[row].item() == next(float(place) for place, call in enumerate(calls, 1) if ids in call[1])


def test_teachers_score_what_they_have_not_seen_well_and_leave_the_base(tiny_base: Base, tmp_path: Path) -> None:
    before = hash_of(tiny_base.model)
    train, validation = rows_of(tiny_base, 80), rows_of(tiny_base, 40, 1)
    scored = teacher_scores(tiny_base, recipe(), (train, validation), tmp_path)
    assert scored.soft is not None
    assert scored.ids == train.ids
    assert bool(((scored.soft >= 0) & (scored.soft <= 1)).all())
    harmful = train.labels[:, 0] == 1
    assert scored.soft[harmful].mean() > scored.soft[~harmful].mean() + 0.2
    assert hash_of(tiny_base.model) == before


def test_scores_are_kept_and_found_again(tiny_base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train, validation = rows_of(tiny_base, 20), rows_of(tiny_base, 20, 1)
    n_trained = 0

    def trained(base: Base, own: Recipe, rows: Rows, other: Rows) -> torch.Tensor:
        nonlocal n_trained
        n_trained += 1
        return torch.rand(rows.labels.shape)

    monkeypatch.setattr(module, "out_of_fold", trained)
    first = teacher_scores(tiny_base, recipe(), (train, validation), tmp_path)
    again = teacher_scores(tiny_base, recipe(), (train, validation), tmp_path)
    assert n_trained == 1
    assert torch.equal(first.soft, again.soft)
    teacher_scores(tiny_base, recipe(seed=1), (train, validation), tmp_path)
    teacher_scores(tiny_base, recipe(teacher={"rank": 3}), (train, validation), tmp_path)
    flipped = train.chosen(range(20))
    flipped.labels = 1 - flipped.labels
    teacher_scores(tiny_base, recipe(), (flipped, validation), tmp_path)
    assert n_trained == 4
    teacher_scores(tiny_base, recipe(training={"soft_weight": 0.5, "weight_decay": 0.5}), (train, validation), tmp_path)
    others = validation.chosen(range(20))
    others.labels = 1 - others.labels  # they choose the teachers' epochs
    teacher_scores(tiny_base, recipe(), (train, others), tmp_path)
    assert n_trained == 6
    other = {"soft_weight": 0.9, "epochs": 9, "checkpoint_seconds": 1.0}
    teacher_scores(tiny_base, recipe(training=other), (train, validation), tmp_path)
    assert n_trained == 6, "what a teacher does not learn by"
    cased = train.chosen(range(20))  # as rows are to a tokenizer that knows no case
    cased.examples = [replace(row, messages=(replace(row.messages[0], content="X"),)) for row in train.examples[:1]]
    cased.examples += train.examples[1:]
    teacher_scores(tiny_base, recipe(), (cased, validation), tmp_path)
    assert n_trained == 7


def test_too_few_rows_for_the_folds_are_an_error(tiny_base: Base) -> None:
    rows = rows_of(tiny_base, 1)
    with pytest.raises(ConfigError, match="too few for 2 folds"):
        out_of_fold(tiny_base, recipe(), rows, rows)
