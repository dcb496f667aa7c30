"""A guard that blocks prompts after block k: what it finds, and what the base's prefill then costs.

    python benchmarks/intercept.py --data ../shared/data

For each k an LST guard that reads layers 0..k is trained on stored states; ``auroc`` is its figure on the test prompts.
Then prompts go through the base in batches, without any guard and with this one intercepting, in turns (A B A B):
``prefill_ratio`` is the seconds of the second over those of the first.  Its threshold is set so that 0%, 10% or all of
these prompts are blocked.  A batch saves blocks only when all of its prompts are blocked.
Writes the part ``intercept`` of guards.json.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from cells import Setup, prepare, row_logits, store_of
from core_data import TASKS
from parts import write_part
from safeside.adapters.adapter import Adapter
from safeside.adapters.config import Calibration
from safeside.adapters.sizing import flops_share
from safeside.artifact import create_adapter
from safeside.attach import attach
from safeside.base.model import Base, load_base
from safeside.chat import pad_batch
from safeside.errors import BlockedError
from safeside.evals.metrics import auroc, bootstrap
from safeside.provenance import config_hash
from safeside.terminal import note
from safeside.train.loop import Loop
from safeside.train.objectives import guard_metric, guard_objective
from safeside.train.recipe import Recipe
from safeside.train.taps import StoredTaps
from tidy import RESULTS, Row, figure_row, ratio_figure, result_of
from workers import Workers

BLOCKED = (0.0, 0.1, 1.0)
BATCHES = (1, 8)
N_PROMPTS = 40
_REDUCTION = 4


@dataclass(frozen=True, slots=True)
class Depth:
    """One guard: it reads layers 0..block."""

    task: str
    block: int
    seed: int


def recipe_of(setup: Setup, depth: Depth) -> Recipe:
    """The guard's training as a recipe."""
    return Recipe.model_validate(
        {
            "name": "intercept",
            "output": "none",
            "seed": depth.seed,
            "base": {"name": Path(setup.base).name},
            "data": {"train": (depth.task,), "validation": (depth.task,), "limit": setup.limit},
            "adapter": {"kind": "lst", "reduction": _REDUCTION, "layers": tuple(range(depth.block + 1))},
            "training": {"epochs": setup.epochs, "checkpoint_seconds": 1e9},
        }
    )


def measure_auroc(setup: Setup, depth: Depth) -> Row:
    """Train one guard on stored states and measure it on the test prompts."""
    data, recipe = prepare(setup, depth.task), recipe_of(setup, depth)
    adapter = create_adapter(data.base, recipe.adapter_config(data.base), depth.seed)
    sources = {
        split: StoredTaps(store_of(setup, depth.task, split), adapter) for split in ("train", "validation", "test")
    }
    objective = guard_objective(data.base, sources["train"], data.train, recipe)
    metric = guard_metric(data.base, sources["validation"], data.validation)
    Loop(adapter, data.train.lengths, objective, metric, recipe.training, seed=depth.seed).run()
    adapter.eval()
    scores = row_logits(data, sources["test"])
    scored = np.isfinite(scores)
    figure = bootstrap({"auroc": auroc}, data.test_labels[scored], scores[scored])["auroc"]
    return figure_row(
        labels_of(setup, depth),
        "auroc",
        figure.value,
        (figure.low, figure.high),
        n=int(scored.sum()),
        n_unscored=int((~scored).sum()) + data.counts["test_bad_rows"],
        **costs_of(setup, depth, data.base),
    )


def labels_of(setup: Setup, depth: Depth) -> dict[str, object]:
    base = Path(setup.base).name
    return {"task": depth.task, "base": base, "method": "lst", "seed": depth.seed, "block": depth.block}


def costs_of(setup: Setup, depth: Depth, base: Base) -> dict[str, object]:
    recipe = recipe_of(setup, depth)
    share = flops_share(base, create_adapter(base, recipe.adapter_config(base)))
    return {"flops_share": share, "config_hash": config_hash(recipe.model_dump())}


# ---- wall time -------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Prompts:
    """Encoded prompts, in batches padded on the left as ``chat_batch`` pads them."""

    batches: list[tuple[Tensor, Tensor, list[int]]]

    @classmethod
    def of(cls, base: Base, rows: Sequence[Sequence[int]], batch: int) -> Prompts:
        batches = []
        for start in range(0, len(rows), batch):
            part = rows[start : start + batch]
            ids, keep = pad_batch(part, base.tokenizer.pad_token_id or 0, side="left")
            batches.append((ids.to(base.device), keep.to(base.device), [len(row) for row in part]))
        return cls(batches)


@torch.no_grad()
def prefill_seconds(base: Base, prompts: Prompts, guard: Adapter | None) -> tuple[float, int]:
    """Seconds to read all prompts, and how many batches were blocked on the way."""
    n_blocked = 0
    with attach(base, intercept=guard) if guard else contextlib.nullcontext() as attachment:
        started = time.perf_counter()
        for ids, keep, ends in prompts.batches:
            scope = attachment.request(prompt_end=ends) if attachment else contextlib.nullcontext()
            positions = (keep.long().cumsum(1) - 1).clamp_min(0)
            with scope:
                try:
                    base.model(
                        input_ids=ids,
                        attention_mask=keep,
                        position_ids=positions,
                        past_key_values=DynamicCache(),
                        logits_to_keep=1,
                    )
                except BlockedError:
                    n_blocked += 1
        if base.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started, n_blocked


@torch.no_grad()
def set_blocked_share(base: Base, guard: Adapter, rows: Sequence[Sequence[int]], share: float) -> None:
    """Calibrate the guard so that it blocks that share of ``rows``."""
    scores = []
    with attach(base, guards=[guard]) as attachment:
        for row in rows:
            base.decoder(input_ids=torch.tensor([row], device=base.device), use_cache=False)
            scores.append(float(attachment.record.scores[guard.name][0, -1, 0]))
    falling = sorted(scores, reverse=True)
    n_blocked = round(share * len(rows))
    threshold = 0.0 if share == 1 else 1.0 if not n_blocked else (falling[n_blocked - 1] + falling[n_blocked]) / 2
    guard.set_calibration(Calibration(scale=(1.0,), bias=(0.0,), threshold=(threshold,)))


def measure_time(setup: Setup, depth: Depth, n_pairs: int) -> list[Row]:
    """The ratios at every batch size and blocked share; the guard's weights do not matter for them."""
    base = prepare(setup, depth.task).base
    rows = prepare(setup, depth.task).validation.ids[:N_PROMPTS]
    guard = create_adapter(base, recipe_of(setup, depth).adapter_config(base), depth.seed).to(base.dtype).eval()
    costs, result = costs_of(setup, depth, base), []
    for batch in BATCHES:
        prompts = Prompts.of(base, rows, batch)
        for share in BLOCKED:
            set_blocked_share(base, guard, rows, share)
            prefill_seconds(base, prompts, guard)  # warm, outside the times
            alone, guarded = [], []
            for _ in range(n_pairs):
                alone.append(prefill_seconds(base, prompts, None)[0])
                seconds, n_blocked = prefill_seconds(base, prompts, guard)
                guarded.append(seconds)
            labels = {**labels_of(setup, depth), "batch": batch, "blocked": share, "blocked_batches": n_blocked}
            value, interval = ratio_figure(guarded, alone)
            result.append(figure_row(labels, "prefill_ratio", value, interval, n=n_pairs, **costs))
    return result


def main(arguments: Sequence[str] | None = None) -> Path:
    """Parse, measure, write."""
    options = _parser().parse_args(arguments)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, Workers(options.workers, options.threads) as workers:
        base = load_base(options.base)
        setup = Setup(
            data=options.data,
            base=options.base,
            fingerprint=config_hash(base.fingerprint.model_dump()),
            cells=Path(folder),
            limit=options.limit,
            evaluation_limit=options.evaluation_limit,
            epochs=options.epochs,
        )
        if options.quick:
            setup = replace(setup, limit=64, evaluation_limit=64, epochs=1)
            options.pairs, options.seeds = min(options.pairs, 3), options.seeds[:1]
        blocks = options.blocks or list(range(1, base.n_layers + 1))
        for split in ("train", "validation", "test"):
            store_of(setup, options.task, split)
        depths = [Depth(options.task, block, seed) for seed in options.seeds for block in blocks]
        rows = []
        for depth, row in workers.run(functools.partial(measure_auroc, setup), depths):
            rows.append(row)
            note(f"block {depth.block}, seed {depth.seed}: auroc {row['value']:.4f}")
        torch.set_num_threads(options.threads)
        for block in blocks:  # in this process alone: nothing else may run beside a clock
            rows += (timed := measure_time(setup, Depth(options.task, block, 0), options.pairs))
            note(
                f"block {block}: "
                + ", ".join(f"{row['blocked']:.0%} x{row['batch']} {row['value']:.2f}" for row in timed)
            )
    notes = {
        "prefill_ratio": "seconds with the intercepting guard over seconds of the base alone, median of pairs",
        "prompts": N_PROMPTS,
        "rows": prepare(setup, options.task).counts,
        "interval": "auroc: 95% bootstrap over test rows; prefill_ratio: over pairs",
    }
    result = result_of("intercept", time.perf_counter() - started, sorted_rows(rows), notes)
    path = write_part(options.output, result)
    note(f"wrote {path}")
    return path


def sorted_rows(rows: Sequence[Row]) -> list[Row]:
    return sorted(rows, key=lambda row: (str(row["metric"]), row["block"], row["seed"]))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of the data sets")
    parser.add_argument("--base", default="builtin", help="as for load_base")
    parser.add_argument("--task", default="toxic_chat", choices=list(TASKS), help="whose rows are prompts")
    parser.add_argument("--limit", type=int, default=2000, help="training rows")
    parser.add_argument("--evaluation-limit", type=int, default=1500, help="validation rows, and test rows")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--blocks", type=int, nargs="+", help="every block unless given")
    parser.add_argument("--pairs", type=int, default=30, help="interleaved pairs of each wall time")
    parser.add_argument("--workers", type=int, default=1, help="processes that train")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the result file")
    parser.add_argument("--quick", action="store_true", help="prove that it works: few rows, one epoch, three pairs")
    return parser


if __name__ == "__main__":
    main()
