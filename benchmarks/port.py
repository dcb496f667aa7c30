"""How much of a guard's AUROC survives a port to another base, beside training there from scratch with labels.

    python benchmarks/port.py --data DATA                  between the built-in base and MiniLM
    python benchmarks/port.py --data DATA --also FOLDER    and a base of one's own

Every base has a source guard that learns labelled prompts of a task.  It is ported to every other base by each method,
on further prompts of the task's training split, without labels; ``scratch`` learns from these same prompts with their
labels, and ``distill_sized`` takes no more of the new base's compute than that.  All are measured on the task's test
rows; its validation rows choose the epochs of sources and of ``scratch``.
Writes the part ``port`` of guards.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

from guard_cells import BATCH_SIZE
from guard_rows import installed
from parts import FILE, write_part
from safeside.adapters.adapter import Adapter
from safeside.adapters.sizing import flops_share
from safeside.base.model import Base
from safeside.errors import InputError
from safeside.evals.metrics import auroc, bootstrap
from safeside.guards.score import score_conversations
from safeside.provenance import config_hash
from safeside.tasks.leakage import without_leaks
from safeside.tasks.task import load_task
from safeside.terminal import note
from safeside.train.port import port_adapter
from safeside.train.port_text import METHODS, PortSettings
from safeside.train.recipe import Recipe
from safeside.train.run import run_recipe
from safeside.types import Example
from task_guards import drawn
from tidy import RESULTS, Row, figure_row, result_of

SCRATCH = "scratch"
SIZED = "distill_sized"  # of at most as much compute as scratch


@dataclass(frozen=True, slots=True)
class Guarded:
    """A base, its guard and the guard's scores on the test rows."""

    base: Base
    guard: Adapter
    scores: np.ndarray


@dataclass(frozen=True, slots=True)
class Bench:
    """What all ports of a run share: rows of one task, no two parts of which share a text, or nearly."""

    labelled: list[Example]
    """Behind the sources."""
    text: list[Example]
    """Labelled: ports are shown it without."""
    validation: list[Example]
    test: list[Example]

    @classmethod
    def read(cls, task: str, options: argparse.Namespace) -> Bench:
        """At most as many rows of each part as the options say."""
        found = load_task(task, options.data)
        most = options.labelled + options.rows
        train = random.Random(0).sample(found.of("train"), min(most, len(found.of("train"))))
        labelled = train[: options.labelled]
        text, n_leaks = without_leaks(train[options.labelled :], labelled)
        if n_leaks:
            note(f"{n_leaks} rows of text are like labelled ones and were left out")
        validation, test = (drawn(found.of(split), options.test_rows) for split in ("validation", "test"))
        return cls(labelled, text, validation, test)

    @property
    def labels(self) -> np.ndarray:
        return np.array([example.labels[0] for example in self.test])

    def scores(self, base: Base, guard: Adapter) -> np.ndarray:
        """(n,) scores of the test rows."""
        scored = score_conversations(base, [guard], [example.messages for example in self.test])
        return np.array([row.by_guard[guard.name][0] for row in scored])

    def source(self, base: Base, seed: int) -> Guarded:
        """The guard of ``base`` that is ported."""
        guard = self.trained(base, seed, self.labelled)
        return Guarded(base, guard, self.scores(base, guard))

    def scratch(self, base: Base, seed: int) -> Adapter:
        """A fresh guard of ``base`` that learns from the text with its labels."""
        return self.trained(base, seed, self.text)

    def trained(self, base: Base, seed: int, rows: Sequence[Example]) -> Adapter:
        """A fresh guard of ``base`` that learns from ``rows``."""
        values: dict[str, object] = {"name": "harm", "output": "none", "seed": seed, "base": {"name": name_of(base)}}
        values["adapter"] = {"kind": "lst", "reduction": 4}
        values["training"] = {"epochs": 8, "batch_size": BATCH_SIZE, "checkpoint_seconds": 1e9}
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            files = [
                str(written(folder / file, some))
                for file, some in (("train.jsonl", rows), ("validation.jsonl", self.validation))
            ]
            values["data"] = {"train": files[:1], "validation": files[1:]}
            return run_recipe(Recipe.model_validate(values), output=folder / "guard", base=base).adapter

    def ports(self, source: Guarded, target: Base, scratch: Adapter, seed: int) -> Iterator[Row]:
        """The figures of one source on one target."""
        unlabelled = [replace(row, labels=()) for row in self.text]
        methods: dict[str, PortSettings] = {method: PortSettings(method=method) for method in METHODS}
        methods[SIZED] = PortSettings(method="distill", size=flops_share(target, scratch))
        for name, settings in methods.items():
            settings = replace(settings, seed=seed)
            done = port_adapter((source.base, source.guard), target, unlabelled, settings)
            seconds = round(done.seconds, 1)
            yield from self._rows(source, target, done.adapter, {"method": name, "seed": seed}, seconds)
        yield from self._rows(source, target, scratch, {"method": SCRATCH, "seed": seed}, None)

    def _hash(self, labels: dict[str, object]) -> str:
        return config_hash([labels, len(self.labelled), len(self.text), len(self.test)])

    def _rows(
        self, source: Guarded, target: Base, guard: Adapter, labels: dict[str, object], seconds: float | None
    ) -> Iterator[Row]:
        labels = {"source": name_of(source.base), "target": name_of(target), **labels}
        costs = {"n": len(self.test), "flops_share": flops_share(target, guard), "config_hash": self._hash(labels)}
        scores = self.scores(target, guard)
        places = np.arange(len(scores), dtype=np.float64)

        def kept(rows_labels: np.ndarray, rows: np.ndarray) -> float:
            index = rows.astype(int)
            return auroc(rows_labels, scores[index]) / auroc(rows_labels, source.scores[index])

        figure = bootstrap({"kept": kept}, self.labels, places)["kept"]
        note(f"{labels['source']} to {labels['target']}, {labels['method']}: {figure.value:.3f} kept")
        yield figure_row(labels, "kept_auroc", figure.value, (figure.low, figure.high), **costs)
        yield figure_row(labels, "auroc", auroc(self.labels, scores), **costs)
        yield figure_row(labels, "source_auroc", auroc(self.labels, source.scores), **costs)
        if seconds is not None:
            yield figure_row(labels, "seconds", seconds, **costs)


def written(path: Path, rows: Sequence[Example]) -> Path:
    """A file of labelled rows."""
    lines = [{"messages": [asdict(message) for message in row.messages], "label": int(row.labels[0])} for row in rows]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def name_of(base: Base) -> str:
    """The base's name without its folders."""
    return Path(base.name).name


def two_bases(names: Sequence[str]) -> list[Base]:
    """The bases by these names that are installed; fewer than two are an InputError."""
    bases = list(installed(names).values())
    if len(bases) < 2:
        raise InputError(f"A port needs two bases; found {', '.join(map(name_of, bases)) or 'none'}. Name one: --also.")
    return bases


def main(arguments: Sequence[str] | None = None) -> Path:
    """Parse, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--bases", nargs="+", default=["builtin", "minilm"], help="as for load_base")
    parser.add_argument("--also", nargs="+", default=[], help="further bases")
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--rows", type=int, default=1000, help="of text, without labels")
    parser.add_argument("--labelled", type=int, default=1000, help="rows behind a source")
    parser.add_argument("--task", default="prompt_harm", help="a task of prompts")
    parser.add_argument("--test-rows", type=int, default=600, help="and of validation")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the result file")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    started = time.perf_counter()
    bench = Bench.read(options.task, options)
    bases = two_bases([*options.bases, *options.also])
    path = options.output / FILE
    rows: list[Row] = []
    for seed in options.seeds:
        scratch = {name_of(base): bench.scratch(base, seed) for base in bases}
        guarded = [bench.source(base, seed) for base in bases]
        for source, target in itertools.permutations(guarded, 2):
            rows += bench.ports(source, target.base, scratch[name_of(target.base)], seed)
            notes = {
                "task": options.task,
                "sources": f"guards of {len(bench.labelled)} labelled training rows",
                "text": f"{len(bench.text)} further training rows, with labels for {SCRATCH} alone",
                "shares": "of a port's text three fifths teach, a fifth chooses epochs; scratch learns from all of it",
                "test": f"{len(bench.test)} rows",
                "bases": {
                    name_of(base): f"{base.n_layers} layers of width {base.d_model}, {len(base.tokenizer)} tokens"
                    for base in bases
                },
                "interval": "95% bootstrap over rows, both guards on the same ones",
            }
            path = write_part(options.output, result_of("port", time.perf_counter() - started, rows, notes))
    note(f"wrote {path}")
    return path


if __name__ == "__main__":
    main()
