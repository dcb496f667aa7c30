"""How much of a guard's AUROC survives a port to another base, beside training there from scratch with labels.

    python benchmarks/port.py                  between the built-in base and MiniLM
    python benchmarks/port.py --also FOLDER    and a base of one's own

Every base gets a guard, trained on labelled rows of the packaged demo set (for the built-in base it is builtin:harm),
which is ported to every other base by each method, on as many rows without their labels.
Writes the part ``port`` of guards.json.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from parts import FILE, write_part
from safeside.adapters.adapter import Adapter
from safeside.adapters.sizing import flops_share
from safeside.artifact import load_adapter
from safeside.base.model import BUILTIN_NAME, Base, load_base
from safeside.errors import InputError, MissingExtraError
from safeside.evals.metrics import auroc, bootstrap
from safeside.guards.score import score_conversations
from safeside.provenance import config_hash
from safeside.tasks.rows import load_examples
from safeside.terminal import note
from safeside.train.port import port_adapter
from safeside.train.port_text import METHODS, PortSettings
from safeside.train.recipe import Recipe
from safeside.train.run import run_recipe
from safeside.train.splits import find_data
from safeside.types import Example
from tidy import RESULTS, Row, figure_row, result_of

SCRATCH = "scratch"


@dataclass(frozen=True, slots=True)
class Guarded:
    """A base, its guard and the guard's scores on the test rows."""

    base: Base
    guard: Adapter
    scores: np.ndarray


@dataclass(frozen=True, slots=True)
class Bench:
    """What all ports of a run share."""

    text: list[Example]
    test: list[Example]

    @property
    def labels(self) -> np.ndarray:
        return np.array([example.labels[0] for example in self.test])

    def scores(self, base: Base, guard: Adapter) -> np.ndarray:
        """(n,) scores of the test rows."""
        scored = score_conversations(base, [guard], [example.messages for example in self.test])
        return np.array([row.by_guard[guard.name][0] for row in scored])

    def scratch(self, base: Base, seed: int) -> Adapter:
        """A fresh guard of ``base``, trained on as many labelled rows as there are rows of text."""
        values: dict[str, object] = {"name": "harm", "output": "none", "seed": seed, "base": {"name": name_of(base)}}
        values["data"] = {
            "train": ("demo:train.jsonl.gz",),
            "validation": ("demo:validation.jsonl.gz",),
            "limit": len(self.text),
        }
        values["adapter"] = {"kind": "lst", "reduction": 4}
        values["training"] = {"epochs": 8, "checkpoint_seconds": 1e9}
        with tempfile.TemporaryDirectory() as folder:
            return run_recipe(Recipe.model_validate(values), output=Path(folder), base=base).adapter

    def ports(self, source: Guarded, target: Base, scratch: Adapter, seed: int) -> Iterator[Row]:
        """The figures of one source on one target."""
        for method in METHODS:
            settings = PortSettings(method=method, seed=seed)
            done = port_adapter((source.base, source.guard), target, self.text, settings)
            seconds = round(done.seconds, 1)
            yield from self._rows(source, target, done.adapter, {"method": method, "seed": seed}, seconds)
        yield from self._rows(source, target, scratch, {"method": SCRATCH, "seed": seed}, None)

    def _hash(self, labels: dict[str, object]) -> str:
        return config_hash([labels, len(self.text), len(self.test)])

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


def name_of(base: Base) -> str:
    """The base's name without its folders."""
    return Path(base.name).name


def found_bases(names: Sequence[str]) -> list[Base]:
    """The bases by these names; one whose package is not installed is left out, fewer than two are an InputError."""
    bases = []
    for name in names:
        try:
            bases.append(load_base(name))
        except MissingExtraError as error:
            note(f"{name} is left out: {error}")
    if len(bases) < 2:
        raise InputError(f"A port needs two bases; found {', '.join(map(name_of, bases)) or 'none'}. Name one: --also.")
    return bases


def main(arguments: Sequence[str] | None = None) -> Path:
    """Parse, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--bases", nargs="+", default=["builtin", "minilm"], help="as for load_base")
    parser.add_argument("--also", nargs="+", default=[], help="further bases")
    parser.add_argument("--rows", type=int, default=1000, help="of text, and of labelled rows")
    parser.add_argument("--test-rows", type=int, default=600)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the result file")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    started = time.perf_counter()
    text = load_examples(find_data("demo:train.jsonl.gz", Path()), ())[0][: options.rows]
    test = load_examples(find_data("demo:test.jsonl.gz", Path()), ("harm",))[0][: options.test_rows]
    bench = Bench([replace(row, labels=()) for row in text], test)
    bases = found_bases([*options.bases, *options.also])
    path = options.output / FILE
    rows: list[Row] = []
    for seed in range(options.seeds):
        scratch = {name_of(base): bench.scratch(base, seed) for base in bases}
        guarded = []
        for base in bases:
            guard = load_adapter("builtin:harm", base) if base.name == BUILTIN_NAME else scratch[name_of(base)]
            guarded.append(Guarded(base, guard, bench.scores(base, guard)))
        for source, target in itertools.permutations(guarded, 2):
            rows += bench.ports(source, target.base, scratch[name_of(target.base)], seed)
            notes = {
                "text": f"{len(text)} rows of the demo set, without labels for ports, with labels for {SCRATCH}",
                "test": f"{len(test)} test rows of the demo set",
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
