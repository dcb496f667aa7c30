"""How much of a guard's AUROC survives a port to another base, beside training there from scratch with labels.

    python benchmarks/port.py --data DATA                  between the built-in base and MiniLM
    python benchmarks/port.py --data DATA --also FOLDER    and a base of one's own

Every base has a source guard: ``builtin:harm``, elsewhere one that learns all labelled rows of the packaged demo set.
It is ported to every other base by each method, on prompts without labels that no source has learnt from; ``scratch``
learns from these same prompts with their labels.  All are measured on the demo set's test rows; its validation rows
choose the epochs of sources and of ``scratch``.
Writes the part ``port`` of guards.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from guard_cells import BATCH_SIZE
from guard_rows import installed, usable
from parts import FILE, write_part
from safeside.adapters.adapter import Adapter
from safeside.adapters.sizing import flops_share
from safeside.artifact import find_adapter, load_adapter
from safeside.base.model import BUILTIN_NAME, Base
from safeside.errors import InputError
from safeside.evals.metrics import auroc, bootstrap
from safeside.guards.score import score_conversations
from safeside.provenance import config_hash
from safeside.tasks.leakage import without_leaks
from safeside.tasks.learnt import are_learnt, load_learnt
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
PACKAGED = "builtin:harm"
TEXT = "guardreasoner_prompts5k/train.jsonl.gz"
LEARNT = ("demo:train.jsonl.gz", "demo:validation.jsonl.gz")  # by the sources, beside what builtin:harm learnt


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
    """Labelled: ports are shown it without."""
    test: list[Example]
    n_labelled: int
    """Most labelled rows behind a guard."""

    @property
    def labels(self) -> np.ndarray:
        return np.array([example.labels[0] for example in self.test])

    def scores(self, base: Base, guard: Adapter) -> np.ndarray:
        """(n,) scores of the test rows."""
        scored = score_conversations(base, [guard], [example.messages for example in self.test])
        return np.array([row.by_guard[guard.name][0] for row in scored])

    def source(self, base: Base, seed: int) -> Guarded:
        """The guard of ``base`` that is ported."""
        is_packaged = base.name == BUILTIN_NAME
        guard = load_adapter(PACKAGED, base) if is_packaged else self.trained(base, seed, LEARNT[0])
        return Guarded(base, guard, self.scores(base, guard))

    def scratch(self, base: Base, seed: int) -> Adapter:
        """A fresh guard of ``base`` that learns from the text with its labels."""
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "labelled.jsonl"
            lines = [{"text": row.messages[0].content, "label": int(row.labels[0])} for row in self.text]
            file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
            return self.trained(base, seed, str(file))

    def trained(self, base: Base, seed: int, train: str) -> Adapter:
        """A fresh guard of ``base`` that learns from a file."""
        values: dict[str, object] = {"name": "harm", "output": "none", "seed": seed, "base": {"name": name_of(base)}}
        values["data"] = {"train": (train,), "validation": (LEARNT[1],), "limit": self.n_labelled}
        values["adapter"] = {"kind": "lst", "reduction": 4}
        values["training"] = {"epochs": 8, "batch_size": BATCH_SIZE, "checkpoint_seconds": 1e9}
        with tempfile.TemporaryDirectory() as folder:
            return run_recipe(Recipe.model_validate(values), output=Path(folder), base=base).adapter

    def ports(self, source: Guarded, target: Base, scratch: Adapter, seed: int) -> Iterator[Row]:
        """The figures of one source on one target."""
        unlabelled = [replace(row, labels=()) for row in self.text]
        for method in METHODS:
            settings = PortSettings(method=method, seed=seed)
            done = port_adapter((source.base, source.guard), target, unlabelled, settings)
            seconds = round(done.seconds, 1)
            yield from self._rows(source, target, done.adapter, {"method": method, "seed": seed}, seconds)
        yield from self._rows(source, target, scratch, {"method": SCRATCH, "seed": seed}, None)

    def _hash(self, labels: dict[str, object]) -> str:
        return config_hash([labels, TEXT, len(self.text), len(self.test)])

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


def unseen(path: Path, limit: int, test: Sequence[Example]) -> list[Example]:
    """The first prompts of a file that no source has learnt from and no test row is like."""
    examples = usable(path, ("label",))
    known = [row for name in LEARNT for row in load_examples(find_data(name, Path()), ("harm",))[0]]
    hashes = load_learnt(find_adapter(PACKAGED))
    assert hashes is not None, f"{PACKAGED} keeps a record of what it learnt from"
    fresh = [row for row, is_known in zip(examples, are_learnt(examples, hashes), strict=True) if not is_known]
    return without_leaks(fresh, [*known, *test])[0][:limit]


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
    parser.add_argument("--rows", type=int, default=1000, help="of text")
    parser.add_argument("--labelled", type=int, default=2600, help="most labelled rows behind a guard")
    parser.add_argument("--test-rows", type=int, default=600)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the result file")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    started = time.perf_counter()
    test = load_examples(find_data("demo:test.jsonl.gz", Path()), ("harm",))[0][: options.test_rows]
    bench = Bench(unseen(options.data / TEXT, options.rows, test), test, options.labelled)
    bases = two_bases([*options.bases, *options.also])
    path = options.output / FILE
    rows: list[Row] = []
    for seed in options.seeds:
        scratch = {name_of(base): bench.scratch(base, seed) for base in bases}
        guarded = [bench.source(base, seed) for base in bases]
        for source, target in itertools.permutations(guarded, 2):
            rows += bench.ports(source, target.base, scratch[name_of(target.base)], seed)
            notes = {
                "text": f"{len(bench.text)} rows of {TEXT} that no source learnt from, with labels for {SCRATCH} alone",
                "shares": "of a port's text three fifths teach, a fifth chooses epochs; scratch learns from all of it",
                "sources": f"{PACKAGED}, the same for every seed; elsewhere guards of {options.labelled} demo rows",
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
