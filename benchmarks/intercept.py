"""A guard that blocks prompts after block k: what it finds, and what the base's prefill then costs.

    python benchmarks/intercept.py --data ../shared/data

For each k an LST guard that reads layers 0..k is trained on stored states; ``auroc`` is its figure on the test prompts
that fit the context.  Then prompts go through the base in batches, without any guard and with such a one intercepting,
in turns (B A A B): ``prefill_ratio`` is the seconds of the second over those of the first.  Its threshold is set so
that 0%, 10% or all of these prompts are blocked.  A batch saves blocks only when all of its prompts are blocked,
at 10% and 8 prompts a batch never.  Writes the part ``intercept`` of guards.json.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import DynamicCache

from parts import FILE, write_part
from safeside.adapters.adapter import Adapter
from safeside.adapters.config import Calibration
from safeside.artifact import create_adapter
from safeside.attach import attach
from safeside.base.model import Base
from safeside.chat import pad_batch
from safeside.errors import BlockedError
from safeside.evals.metrics import auroc, bootstrap
from safeside.terminal import note
from task_guards import Lesson, Sizes, parser_of
from tidy import Row, figure_row, ratio_figure, result_of

BLOCKED = (0.0, 0.1, 1.0)
BATCHES = (1, 8)
N_PROMPTS = 40  # whole batches of both sizes, and a tenth of them is whole


def measure_auroc(lesson: Lesson, block: int, seed: int) -> Row:
    """Train a guard of layers 0..block and measure it on the test prompts."""
    recipe = lesson.recipe(seed, layers=range(block + 1))
    guard = lesson.guard(recipe)
    labels, scores = lesson.labels("test"), lesson.last_scores("test", guard)
    figure = bootstrap({"auroc": auroc}, labels, scores)["auroc"]
    columns, costs = {**lesson.columns(seed), "block": block}, lesson.costs(recipe, guard)
    note(f"block {block}, seed {seed}: auroc {figure.value:.4f}")
    return figure_row(columns, "auroc", figure.value, (figure.low, figure.high), n=len(scores), **costs)


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


def measure_time(lesson: Lesson, block: int, seed: int, n_pairs: int) -> Iterator[Row]:
    """The ratios at every batch size and blocked share; the guard is fresh, for its weights do not matter for them."""
    base, rows = lesson.base, lesson.splits["validation"].ids[:N_PROMPTS]
    recipe = lesson.recipe(seed, layers=range(block + 1))
    guard = create_adapter(base, recipe.adapter_config(base), seed).to(base.dtype).eval()
    costs = lesson.costs(recipe, guard)
    for batch in BATCHES:
        prompts = Prompts.of(base, rows, batch)
        for share in BLOCKED:
            set_blocked_share(base, guard, rows, share)
            prefill_seconds(base, prompts, guard)  # warm, outside the times
            alone, guarded, n_blocked = [], [], 0
            for pair in range(n_pairs):
                for one in (None, guard) if pair % 2 else (guard, None):
                    seconds, blocked = prefill_seconds(base, prompts, one)
                    (guarded if one else alone).append(seconds)
                    n_blocked = blocked if one else n_blocked
            columns = {**lesson.columns(seed), "block": block, "batch": batch, "blocked": share}
            value, interval = ratio_figure(guarded, alone)
            note(f"block {block}, batch {batch}, {share:.0%} blocked: {value:.3f}")
            yield figure_row(
                {**columns, "blocked_batches": n_blocked}, "prefill_ratio", value, interval, n=n_pairs, **costs
            )


def main(arguments: Sequence[str] | None = None) -> Path:
    """Parse, measure, write."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    started = time.perf_counter()
    if options.quick:
        options.limit, options.evaluation_limit, options.epochs, options.seeds = 200, 200, 1, options.seeds[:1]
        options.pairs = min(options.pairs, 3)
    sizes = Sizes(options.limit, options.evaluation_limit, options.epochs)
    with tempfile.TemporaryDirectory() as folder:
        lesson = Lesson.read((options.base, options.data), options.task, Path(folder), sizes)
        blocks = options.blocks or range(1, lesson.base.n_layers + 1)
        path, rows = options.output / FILE, []
        for block in blocks:
            rows += [measure_auroc(lesson, block, seed) for seed in options.seeds]
            rows += measure_time(lesson, block, options.seeds[0], options.pairs)
            result = result_of("intercept", time.perf_counter() - started, rows, notes_of(lesson))
            path = write_part(options.output, result)  # after every block: a run that is killed keeps what it has
    note(f"wrote {path}")
    return path


def notes_of(lesson: Lesson) -> dict[str, object]:
    """What a reader of the figures must know."""
    return {
        "prefill_ratio": "seconds with the intercepting guard over seconds of the base alone, median of pairs",
        "prompts": f"{len(lesson.splits['validation'].ids[:N_PROMPTS])} validation prompts are timed",
        "rows": lesson.counts,
        "intervals": "auroc: 95% bootstrap over test rows; prefill_ratio: over pairs",
    }


def _parser() -> argparse.ArgumentParser:
    parser = parser_of(__doc__, evaluation_rows=800)
    parser.add_argument("--task", default="prompt_harm", help="a task of prompts")
    parser.add_argument("--blocks", type=int, nargs="+", help="every block unless given")
    parser.add_argument("--pairs", type=int, default=30, help="interleaved pairs of each wall time")
    return parser


if __name__ == "__main__":
    main()
