"""An LST guard of one task, trained on stored states: what the benches of streaming, presets, needles and interception
measure.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from cells import narrowed
from guard_cells import BATCH_SIZE, LEARNING_RATES, LST
from safeside.adapters.adapter import Adapter
from safeside.adapters.sizing import flops_share
from safeside.artifact import create_adapter
from safeside.base.model import Base, load_base
from safeside.guards.calibrate import fit_calibration
from safeside.provenance import config_hash
from safeside.tasks.task import load_task
from safeside.train.loop import Loop
from safeside.train.objectives import guard_logits, guard_metric, guard_objective
from safeside.train.recipe import Recipe
from safeside.train.rows import Rows
from safeside.train.splits import encode_rows
from safeside.train.taps import StoredTaps, TapStore, make_batch
from safeside.types import Example
from tidy import RESULTS


@dataclass(frozen=True, slots=True)
class Sizes:
    """At most so many rows, and passes over the training rows."""

    train: int = 1500
    evaluation: int = 2000
    epochs: int = 6


@dataclass(frozen=True, slots=True)
class Lesson:
    """A task's rows, encoded for one base, whose states are kept in ``folder``."""

    base: Base
    task: str
    splits: dict[str, Rows]
    folder: Path
    sizes: Sizes
    counts: dict[str, int] = field(default_factory=dict)
    method: str = "lst"
    """What figures of its guards are called."""

    @classmethod
    def read(cls, place: tuple[str, Path], task: str, folder: Path, sizes: Sizes) -> Lesson:
        """``place`` is the base's name and the folder of the data sets.  Rows beyond the context are counted."""
        base, found = load_base(place[0], dtype="float32"), load_task(task, place[1])
        splits = {
            "train": encode_rows(base, found.of("train"), sizes.train),
            "validation": encode_rows(base, drawn(found.of("validation"), sizes.evaluation)),
            "test": encode_rows(base, drawn(found.of("test"), sizes.evaluation)),
        }
        counts = {split: len(rows.ids) for split, rows in splits.items()}
        counts |= {f"{split}_too_long": rows.n_too_long for split, rows in splits.items()}
        counts |= {f"{split}_bad": len(rows.bad) for split, rows in splits.items()}
        return cls(base, task, splits, folder, sizes, counts)

    def with_more(self, examples: Sequence[Example], method: str) -> Lesson:
        """The same lesson with further training rows, whose guards' figures are called ``method``."""
        train = encode_rows(self.base, [*self.splits["train"].examples, *examples])
        counts = {**self.counts, "train": len(train.ids)}
        return replace(self, splits={**self.splits, "train": train}, counts=counts, method=method)

    def recipe(
        self, seed: int, targets: Literal["end", "prefixes"] = "end", layers: Sequence[int] | None = None
    ) -> Recipe:
        """The guard's training, as the guards benchmark trains; it reads all layers unless told which."""
        return Recipe.model_validate(
            {
                "name": f"{self.task}-lst",
                "output": "none",
                "seed": seed,
                "base": {"name": Path(self.base.name).name},
                "data": {"task": self.task, "limit": self.sizes.train},
                "adapter": {**LST, "labels": ("risk",), "layers": layers},
                "training": {
                    "epochs": self.sizes.epochs,
                    "batch_size": BATCH_SIZE,
                    "learning_rate": LEARNING_RATES["lst"],
                    "targets": targets,
                    "checkpoint_seconds": 1e9,
                },
            }
        )

    def source(self, split: str, guard: Adapter) -> StoredTaps:
        """What ``guard`` reads of one split; the base runs on first use only, for guards of any layers."""
        store = TapStore.build(self.base, self.splits[split].ids, range(self.base.n_layers + 1), self.folder)
        return StoredTaps(narrowed(store, guard.config.layers), guard)

    def guard(self, recipe: Recipe) -> Adapter:
        """A trained guard, calibrated on the validation rows."""
        guard = create_adapter(self.base, recipe.adapter_config(self.base), recipe.seed)
        train, validation = self.splits["train"], self.splits["validation"]
        Loop(
            guard,
            train.lengths,
            guard_objective(self.base, self.source("train", guard), train, recipe),
            guard_metric(self.base, self.source("validation", guard), validation),
            recipe.training,
            seed=recipe.seed,
        ).run()
        guard.eval()
        logits = guard_logits(self.base, self.source("validation", guard), validation)
        guard.set_calibration(fit_calibration(logits, validation.labels.double().numpy()))
        return guard

    def guards(self, seeds: Sequence[int]) -> dict[int, Adapter]:
        """A guard for each seed, by a name of its own, so that one pass of the base serves them all."""
        trained = {seed: self.guard(self.recipe(seed)) for seed in seeds}
        for seed, guard in trained.items():
            guard.config = guard.config.model_copy(update={"name": f"{guard.name}_{seed}"})
        return trained

    def labels(self, split: str) -> np.ndarray:
        """(n,) 1 for harmful rows, 0 for harmless ones."""
        return self.splits[split].labels[:, 0].double().numpy()

    def token_scores(self, split: str, guard: Adapter) -> list[Tensor]:
        """Scores at every token of every row's answer, as ``score_answers`` gives them, from stored states."""
        rows = self.splits[split]
        result = [torch.empty(0)] * len(rows.ids)
        for places, scores in self._scored(split, guard):
            for place, row in enumerate(places):
                result[row] = scores[place, rows.answer_starts[row] : len(rows.ids[row])].clone()
        return result

    def last_scores(self, split: str, guard: Adapter) -> np.ndarray:
        """(n,) scores at the last tokens."""
        rows = self.splits[split]
        result = np.zeros(len(rows.ids))
        for places, scores in self._scored(split, guard):
            for place, row in enumerate(places):
                result[row] = float(scores[place, len(rows.ids[row]) - 1])
        return result

    @torch.no_grad()
    def _scored(self, split: str, guard: Adapter) -> Iterator[tuple[tuple[int, ...], Tensor]]:
        rows, source = self.splits[split].ids, self.source(split, guard)
        order = sorted(range(len(rows)), key=lambda row: len(rows[row]))
        for start in range(0, len(order), 64):
            batch = make_batch(self.base, rows, order[start : start + 64])
            scores = source(batch).output.scores
            assert scores is not None
            yield batch.rows, scores[:, :, 0].float().cpu()

    def costs(self, recipe: Recipe, guard: Adapter) -> dict[str, object]:
        """The columns of every figure of this guard."""
        described = [self.method, recipe.model_dump(), asdict(self.sizes)]
        return {"flops_share": flops_share(self.base, guard), "config_hash": config_hash(described)}

    def columns(self, seed: int) -> dict[str, object]:
        """What was measured, in the words of the guards benchmark."""
        return {"task": self.task, "base": Path(self.base.name).name, "method": self.method, "seed": seed}


def drawn(examples: Sequence[Example], limit: int) -> list[Example]:
    """At most ``limit`` of the rows, always the same ones."""
    return list(examples) if len(examples) <= limit else random.Random(0).sample(list(examples), limit)


def parser_of(description: str | None, evaluation_rows: int) -> argparse.ArgumentParser:
    """The options that benches of one task's guards share."""
    parser = argparse.ArgumentParser(description=(description or "").split("\n")[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of the data sets")
    parser.add_argument("--base", default="builtin", help="as for load_base")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--limit", type=int, default=600, help="training rows")
    parser.add_argument("--evaluation-limit", type=int, default=evaluation_rows, help="validation rows, and test rows")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the result file")
    parser.add_argument("--quick", action="store_true", help="prove that it works: few rows, one epoch, one seed")
    return parser
