"""Soft targets: scores of a bigger guard, from a file or from a LoRA guard that is trained first (distillation, DSA).

A teacher that has seen a row repeats its label and teaches nothing, so each row is scored by a teacher that was trained
on the others: rows are dealt to ``folds`` shares by the seed, equal texts to the same share.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

from safeside.base.model import Base
from safeside.errors import ConfigError, InputError
from safeside.lora import LoraShape
from safeside.provenance import config_hash
from safeside.tasks.rows import BadRow, messages_of, open_rows, parse_rows, soft_of
from safeside.train.loop import Loop, processes_on
from safeside.train.lora import create_lora
from safeside.train.objectives import guard_logits, guard_metric, guard_objective
from safeside.train.recipe import Recipe, TeacherSection, TrainingSection
from safeside.train.rows import Rows
from safeside.train.taps import key_of
from safeside.types import Message

Scores = Mapping[tuple[Message, ...], tuple[float, ...]]


def read_scores(path: Path, labels: tuple[str, ...]) -> Scores:
    """By conversation, the K scores in [0, 1] of a file of rows with ``soft``; a bad row is a ConfigError."""
    scores: dict[tuple[Message, ...], tuple[float, ...]] = {}
    with open_rows(path) as handle:
        for row in parse_rows(handle):
            if isinstance(row, BadRow):
                raise ConfigError(f"{path} line {row.line}: {row.problem}. A file of scores must be whole.")
            try:
                messages, soft = messages_of(row[1]), soft_of(row[1], labels)
            except InputError as error:
                raise ConfigError(f"{path} line {row[0]}: {error}. A file of scores must be whole.") from error
            if scores.setdefault(messages, soft) != soft:
                raise ConfigError(f"{path} line {row[0]}: the same text has other scores further up. Keep one of them.")
    return scores


def write_scores(path: Path, rows: Rows, scores: Tensor) -> None:
    """Write what ``read_scores`` reads: every row's messages and its scores (n, K)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".new")
    with temporary.open("w", encoding="utf-8") as handle:
        for example, soft in zip(rows.examples, scores.tolist(), strict=True):
            listed = [asdict(message) for message in example.messages]
            handle.write(json.dumps({"messages": listed, "soft": soft}, ensure_ascii=False) + "\n")
    temporary.replace(path)


def with_scores(rows: Rows, scores: Scores) -> Rows:
    """``rows`` with soft targets; a row whose text has none is a ConfigError."""
    missing = [example.line for example in rows.examples if example.messages not in scores]
    if missing:
        raise ConfigError(
            f"The file of scores has none for {len(missing)} of {len(rows.examples)} training rows, the first in line "
            f"{missing[0]} of its file. Score exactly these rows: texts are compared character by character."
        )
    return replace(rows, soft=torch.tensor([scores[example.messages] for example in rows.examples]))


def teacher_scores(base: Base, recipe: Recipe, splits: tuple[Rows, Rows], folder: Path) -> Rows:
    """The training rows with soft targets of the recipe's teacher; its scores are kept in ``folder`` and found again.

    ``splits`` are training and validation rows; the latter pick each teacher's best epoch.
    """
    train, validation = splits
    assert recipe.teacher is not None
    settings = _training_of(recipe).model_dump(exclude={"checkpoint_seconds", "cache_taps", "temperature"})
    texts = [[asdict(message) for message in example.messages] for example in train.examples]  # they find scores
    identity = [recipe.teacher.model_dump(), settings, recipe.seed, texts]
    both = [(key_of(base, rows.ids, ()), rows.labels.tolist()) for rows in splits]
    path = folder / f"teacher-{config_hash([identity, both])}.jsonl"
    processes = processes_on(base.device)
    if not path.is_file():
        scores = out_of_fold(base, recipe, train, validation)
        if processes.is_main_process:
            write_scores(path, train, scores)
        processes.wait_for_everyone()
    labels = tuple(str(index) for index in range(train.labels.shape[1]))
    return with_scores(train, read_scores(path, labels))


def out_of_fold(base: Base, recipe: Recipe, train: Rows, validation: Rows) -> Tensor:
    """(n, K) scores of the training rows, each by a teacher that did not see it."""
    teacher = recipe.teacher or TeacherSection()
    shares = folds_of(train.ids, teacher.folds, recipe.seed)
    scores = torch.zeros(train.labels.shape)
    for share in range(teacher.folds):
        unseen = [row for row, own in enumerate(shares) if own == share]
        seen = [row for row, own in enumerate(shares) if own != share]
        if not seen or not unseen:
            raise ConfigError(f"{len(train.ids)} training rows are too few for {teacher.folds} folds. Add rows.")
        scores[unseen] = _fold_scores(base, recipe, (train.chosen(seen), validation), train.chosen(unseen))
    return scores


def folds_of(ids: Sequence[tuple[int, ...]], n_folds: int, seed: int) -> list[int]:
    """Each row's share, of nearly equal sizes; equal texts are in the same one."""
    texts = sorted(set(ids))
    random.Random(seed).shuffle(texts)
    share_of = {text: place % n_folds for place, text in enumerate(texts)}
    return [share_of[row] for row in ids]


def _training_of(recipe: Recipe) -> TrainingSection:
    """How a recipe's teachers are trained: as the recipe says, but for what it says of the teacher alone."""
    fields = {"epochs", "learning_rate", "batch_size"}
    own = (recipe.teacher or TeacherSection()).model_dump(include=fields)
    return recipe.training.model_copy(update={**own, "accumulation": 1, "soft_weight": 0.0, "targets": "end"})


def _fold_scores(base: Base, recipe: Recipe, splits: tuple[Rows, Rows], unseen: Rows) -> Tensor:
    """(n, K) scores of ``unseen`` by a LoRA guard trained on the first split."""
    teacher, (train, validation) = recipe.teacher or TeacherSection(), splits
    settings = _training_of(recipe)
    own = recipe.model_copy(update={"training": settings})
    shape = LoraShape(teacher.rank, 2.0 * teacher.rank)
    with create_lora(base, train.labels.shape[1], shape, recipe.seed) as guard:
        objective = guard_objective(base, guard, train, own)
        Loop(guard, train.lengths, objective, guard_metric(base, guard, validation), settings, seed=recipe.seed).run()
        return torch.from_numpy(guard_logits(base, guard, unseen)).sigmoid().float()
