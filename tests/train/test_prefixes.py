"""Guards that learn from every token of an answer: the loss by hand, and what it is good for."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from sklearn.metrics import roc_auc_score

from safeside import Base, Message, create_adapter, load_adapter
from safeside.errors import ConfigError
from safeside.tasks.learnt import are_learnt, load_learnt
from safeside.train.objectives import guard_logits, guard_objective
from safeside.train.recipe import Recipe
from safeside.train.run import run_recipe
from safeside.train.splits import encode_rows
from safeside.train.taps import LiveTaps
from safeside.types import Example
from twin import run_by_hand

SAME_SCORE = 1e-5  # see test_score.py
WORDS = ("cat", "sat", "then", "they", "said", "how", "be")


def recipe(targets: str) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "toy",
            "output": "unused",
            "data": {"train": ["train.jsonl"], "validation": ["validation.jsonl"]},
            "adapter": {"kind": "lst", "reduction": 2},
            "training": {"targets": targets, "epochs": 5, "batch_size": 16, "learning_rate": 0.01, "patience": 5},
        }
    )


def test_prefixes_are_learnt_as_by_hand(tiny_base: Base) -> None:
    """The loss of some rows is the mean over rows of each row's own, computed alone with loops over its tokens."""
    talks = [("how?", "the hat sat there"), ("and then the cat?", "no"), ("a hat", None)]
    examples = [
        Example((Message("user", ask), *([Message("assistant", answer)] if answer else [])), (float(row % 2),))
        for row, (ask, answer) in enumerate(talks)
    ]
    rows = encode_rows(tiny_base, examples)
    values = recipe("prefixes")
    guard = create_adapter(tiny_base, values.adapter_config(tiny_base), 3)
    with torch.no_grad():
        guard.head.linear.weight.mul_(4.0)
        found = guard_objective(tiny_base, LiveTaps(tiny_base, guard), rows, values)(range(3))
    total = 0.0
    for ids, start, label in zip(rows.ids, rows.answer_starts, rows.labels[:, 0].tolist(), strict=True):
        scores = run_by_hand(tiny_base, guard, torch.tensor([ids])).scores[0, :, 0].tolist()
        losses = [-math.log(score if label else 1 - score) for score in scores]
        counts = range(1, len(ids) - start + 1)
        rising = sum(count * loss for count, loss in zip(counts, losses[start:], strict=True)) / max(sum(counts), 1)
        total += 0.5 * losses[-1] + 0.5 * rising if start < len(ids) else losses[-1]
    assert found.item() == pytest.approx(total / 3, abs=SAME_SCORE)


def test_prefixes_are_for_guards_on_bases_that_read_forwards(tiny_family: Callable[[str], Base]) -> None:
    aligner = recipe("prefixes").model_dump(exclude_unset=True)
    aligner["adapter"]["role"] = "align"
    with pytest.raises(ValidationError, match="targets: for guards only"):
        Recipe.model_validate(aligner)
    encoder, values = tiny_family("bert"), recipe("prefixes")
    guard = create_adapter(encoder, values.adapter_config(encoder), 0)
    rows = encode_rows(encoder, [Example((Message("user", "how?"),), (1.0,))])
    with pytest.raises(ConfigError, match="needs a base that reads forwards"):
        guard_objective(encoder, LiveTaps(encoder, guard), rows, values)


def test_a_guard_that_learns_from_prefixes_sees_harm_early(tiny_base: Base, tmp_path: Path) -> None:
    """The hat stands first in the answer; a guard asked only at the end need not know it before."""
    for name, n, seed in (("train", 160, 1), ("validation", 80, 2)):
        generator, rows = random.Random(seed), []
        for _ in range(n):
            label, words = int(generator.random() < 0.5), generator.choices(WORDS, k=8)
            rows.append({"prompt": "how?", "response": " ".join([("hat" if label else "mat"), *words]), "label": label})
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    early = {}
    for targets in ("end", "prefixes"):
        done = run_recipe(recipe(targets), data_root=tmp_path, output=tmp_path / targets, base=tiny_base)
        assert done.outcome.best_metric > 0.9
        assert done.adapter.config.modes["answer"].n_consecutive is None
        stream = load_adapter(done.folder, tiny_base).config.modes.get("stream")
        assert (stream is not None and stream.n_consecutive == 8) == (targets == "prefixes")
        assert are_learnt(done.train.examples, load_learnt(done.folder)) == [True] * len(done.train.examples)
        places = (done.validation.ids, done.validation.answer_starts)
        prefixes = [ids[: start + 3] for ids, start in zip(*places, strict=True)]
        cut = replace(done.validation, ids=prefixes)
        logits = guard_logits(tiny_base, LiveTaps(tiny_base, done.adapter), cut)[:, 0]
        early[targets] = roc_auc_score(done.validation.labels[:, 0], logits)
    assert early["prefixes"] > 0.95
    assert early["prefixes"] > early["end"]
