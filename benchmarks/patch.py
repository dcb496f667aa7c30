"""How well a guard learns a new family of jailbreaks from 16, 32 or 64 prompts of it, and what it forgets elsewhere.

    python benchmarks/patch.py --data DATA

Families are the attack methods of JailbreakBench's artifacts, never seen by builtin:harm.  Examples come from the
goals of the training split, measured prompts from those of the test split.  Before and after the patch: the share of
them that scores above all but 1% of harmless instructions, and AUROC on prompts of other sets.
Writes the part ``patch`` of guards.json.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from parts import FILE, write_part
from safeside.adapters.adapter import Adapter
from safeside.adapters.sizing import flops_share
from safeside.artifact import load_adapter
from safeside.base.model import Base, load_base
from safeside.errors import InputError
from safeside.evals.metrics import auroc, bootstrap
from safeside.guards.windows import windows
from safeside.provenance import config_hash
from safeside.tasks.rows import BadRow, load_examples, open_rows, parse_rows
from safeside.terminal import note
from safeside.train.objectives import guard_logits
from safeside.train.patch import PatchReport, PatchRows, PatchSettings, patch_guard
from safeside.train.patch_command import DEMO_REPLAY
from safeside.train.rows import Rows
from safeside.train.splits import find_data
from safeside.train.taps import StoredTaps, TapStore
from safeside.types import Example, Message
from tidy import RESULTS, Row, figure_row, result_of

FAMILIES = ("DSN", "GCG", "JBC", "PAIR", "prompt_with_random_search")
ARTIFACTS = "jailbreakbench_artifacts/{}.jsonl.gz"
HARMLESS = "benign_prompts/alpaca_test.jsonl.gz"
ELSEWHERE = "guardreasoner_prompts5k/test.jsonl.gz"
REPLAY = "guardreasoner_prompts5k/train.jsonl.gz"
FALSE_POSITIVES = 0.01


@dataclass(frozen=True, slots=True)
class Measured:
    """Some rows with the base's states, for scoring many guards without running the base again."""

    rows: Rows
    row_of_window: np.ndarray
    labels: np.ndarray
    store: TapStore

    def logits(self, base: Base, guard: Adapter) -> np.ndarray:
        """(n,) logits, of long rows the highest of their windows."""
        found = np.full(len(self.labels), -np.inf)
        scored = guard_logits(base, StoredTaps(self.store, guard), self.rows)[:, 0]
        np.maximum.at(found, self.row_of_window, scored)
        return found


def measured(base: Base, guard: Adapter, examples: Sequence[Example], folder: Path) -> Measured:
    """Encode ``examples`` and store the base's states on them."""
    parts = [windows(base, example.messages) for example in examples]
    ids = [base.encode(part).ids for row in parts for part in row]
    store = TapStore.build(base, ids, guard.config.layers, folder)
    places = np.array([row for row, some in enumerate(parts) for _ in some])
    labels = np.array([example.labels[0] for example in examples])
    return Measured(Rows(ids, [0] * len(ids), torch.zeros(len(ids), 1), None), places, labels, store)


def prompts_of(path: Path, family: str) -> list[Example]:
    """The distinct prompts of one attack, as they were sent; each of them asks for something harmful."""
    found: dict[str, None] = {}
    with open_rows(path) as handle:
        for row in parse_rows(handle):
            if isinstance(row, BadRow):
                raise InputError(f"{path}: line {row.line}: {row.problem}")
            values = row[1]
            details = values["orig"]
            if isinstance(details, dict) and details["method"] == family:
                found[str(values["prompt"])] = None
    return [Example((Message("user", prompt),), (1.0,)) for prompt in found]


def drawn(path: Path, n: int) -> list[Example]:
    """At most ``n`` usable rows, prompts only, always the same."""
    examples, _ = load_examples(path, ("label",))
    some = random.Random(0).sample(examples, min(n, len(examples)))
    return [Example(example.messages[:1], example.labels) for example in some]


def weights_hash(base: Base) -> str:
    """sha256 of every tensor of the base as it is in memory."""
    hasher = hashlib.sha256()
    for name, tensor in sorted(base.model.state_dict().items()):
        hasher.update(name.encode() + tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return hasher.hexdigest()


@dataclass(frozen=True, slots=True)
class Bench:
    """What all patches of a run share."""

    base: Base
    data: Path
    replay: list[Example]
    harmless: Measured
    elsewhere: Measured
    folder: Path

    def rows(self, family: str, sizes: Sequence[int], seeds: Sequence[int], settings: PatchSettings) -> Iterator[Row]:
        """The figures of one family."""
        unseen = prompts_of(self.data / ARTIFACTS.format("test"), family)
        seen = prompts_of(self.data / ARTIFACTS.format("train"), family)
        old = load_adapter("builtin:harm", self.base).float()
        held_out = measured(self.base, old, unseen, self.folder)
        for size in sizes:
            for seed in seeds:
                examples = random.Random(seed).sample(seen, size)
                guard = load_adapter("builtin:harm", self.base)
                done = patch_guard(
                    self.base, guard, PatchRows(examples, self.replay, unseen), settings, dtype=torch.bfloat16
                )
                labels = {"task": "prompt_harm", "base": Path(self.base.name).name, "method": "patch"}
                yield from self._figures({**labels, "family": family, "examples": size, "seed": seed}, done, (
                    old, guard, held_out,
                ))  # fmt: skip

    def _figures(
        self, labels: dict[str, object], done: PatchReport, measured: tuple[Adapter, Adapter, Measured]
    ) -> Iterator[Row]:
        old, new, held_out = measured
        costs = {"flops_share": flops_share(self.base, new), "config_hash": config_hash(labels)}
        for metric, guard in (("before", old), ("after", new)):
            harmless = np.sort(self.harmless.logits(self.base, guard))[::-1]
            limit = harmless[int(FALSE_POSITIVES * len(harmless))]
            caught = (held_out.logits(self.base, guard) > limit).astype(float)
            figure = bootstrap({"tpr": lambda _, value: float(value.mean())}, np.ones(len(caught)), caught)["tpr"]
            yield figure_row(labels, metric, figure.value, (figure.low, figure.high), n=len(caught), **costs)
        both = [self.elsewhere.logits(self.base, guard) for guard in (old, new)]
        places = np.arange(len(both[0]), dtype=np.float64)

        def change(rows_labels: np.ndarray, rows: np.ndarray) -> float:
            index = rows.astype(int)
            return auroc(rows_labels, both[1][index]) - auroc(rows_labels, both[0][index])

        figure = bootstrap({"change": change}, self.elsewhere.labels, places)["change"]
        interval = (figure.low, figure.high)
        yield figure_row(labels, "elsewhere_change", figure.value, interval, n=len(places), **costs)
        yield figure_row(labels, "seconds", round(done.seconds, 1), **costs)
        note(
            f"{labels['family']} {labels['examples']} seed {labels['seed']}: {done.seconds:.0f} s, {figure.value:+.4f}"
        )


def main(arguments: Sequence[str] | None = None) -> Path:
    """Parse, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--families", nargs="+", default=FAMILIES, choices=FAMILIES)
    parser.add_argument("--examples", nargs="+", type=int, default=(16, 32, 64))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=600, help="harmless rows, and rows elsewhere")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the result file")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    started, base, settings = time.perf_counter(), load_base("builtin"), PatchSettings()
    guard, before = load_adapter("builtin:harm", base), weights_hash(base)
    replay = [*load_examples(find_data(DEMO_REPLAY, Path()), ("harm",))[0][:600], *drawn(options.data / REPLAY, 600)]
    rows: list[Row] = []
    path = options.output / FILE
    with tempfile.TemporaryDirectory() as name:
        harmless, elsewhere = (
            measured(base, guard, drawn_as(options.data / file, options.rows), Path(name))
            for file, drawn_as in ((HARMLESS, drawn_harmless), (ELSEWHERE, drawn))
        )
        bench = Bench(base, options.data, replay, harmless, elsewhere, Path(name))
        for family in options.families:
            rows += bench.rows(family, options.examples, range(options.seeds), settings)
            notes = {
                "goals": "examples and measured prompts of a family never share a goal",
                "before_and_after": f"TPR at {FALSE_POSITIVES:.0%} FPR on {len(harmless.labels)} rows of {HARMLESS}",
                "elsewhere": f"AUROC on {len(elsewhere.labels)} rows of {ELSEWHERE}, paired bootstrap over rows",
                "auroc_elsewhere_before": auroc(elsewhere.labels, elsewhere.logits(base, guard)),
                "replay": f"packaged demo rows and rows of {REPLAY}, {settings.replay_limit} at most",
                "base_unchanged": weights_hash(base) == before,
                "steps": settings.steps,
            }
            result = result_of("patch", time.perf_counter() - started, rows, notes)
            path = write_part(options.output, result)  # after every family: a run that is killed keeps what it has
    note(f"wrote {path}")
    return path


def drawn_harmless(path: Path, n: int) -> list[Example]:
    """At most ``n`` instructions of a set that has no labels because all are harmless."""
    examples, _ = load_examples(path, ())
    return [Example(example.messages[:1], (0.0,)) for example in random.Random(0).sample(examples, n)]


if __name__ == "__main__":
    main()
