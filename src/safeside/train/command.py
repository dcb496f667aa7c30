"""What ``safeside train`` does: read, train with a progress bar, summarise."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safeside.adapters.sizing import flops_share
from safeside.tasks.leakage import text_of
from safeside.terminal import Advance, note, progress_bars
from safeside.train.loop import CHECKPOINT, Progress, processes_on
from safeside.train.recipe import LORA, read_recipe
from safeside.train.run import Run, base_for, run_recipe
from safeside.train.run_lora import LoraRun, run_lora


def train_command(path: Path, data_root: Path, output: Path | None, resume: bool) -> dict[str, object] | None:
    """Run the recipe at ``path`` and say how it went; of several processes only the first one does."""
    recipe = read_recipe(path)
    base = base_for(recipe)
    if resume and not ((output or Path(recipe.output)) / CHECKPOINT).is_file():
        note("there is no checkpoint to resume from: the run starts at the beginning")
    train = run_lora if recipe.adapter.kind == LORA else run_recipe
    if not processes_on(base.device).is_main_process:
        train(recipe, data_root=data_root, output=output, base=base, resume=resume)
        return None
    with training_bars(recipe.name) as (report, read):
        run = train(recipe, data_root=data_root, output=output, base=base, resume=resume, report=report, advance=read)
    for row in [row for rows in run.splits for row in rows.bad]:
        note(f"line {row.line} was left out: {row.problem}")
    summary = lora_summary(run) if isinstance(run, LoraRun) else summary_of(run, flops_share(base, run.adapter))
    if n_learnt := summary["validation_rows_learnt"]:
        note(
            f"Warning: {n_learnt} of {len(run.validation.ids)} validation rows are training rows too: what is measured "
            "and promised on them flatters the adapter. Give rows of their own under [data] validation."
        )
    return summary


@contextmanager
def training_bars(name: str) -> Iterator[tuple[Callable[[Progress], None], Advance]]:
    """Bars for ``run_recipe``: what it reports to, and what it advances while it reads the base."""
    with progress_bars(("read the base", None, "rows"), (f"train {name}", None, "steps")) as (read, train):
        n_shown = 0

        def report(progress: Progress) -> None:
            nonlocal n_shown
            if math.isnan(progress.loss):
                note(f"epoch {progress.epoch}: validation {progress.metric:.4f}")
            train(progress.step - n_shown, progress.n_steps)  # a resumed run starts in the middle
            n_shown = progress.step

        yield report, read


def summary_of(run: Run, share: float) -> dict[str, object]:
    """The figures of a finished run."""
    return {
        "adapter": str(run.folder),
        "kind": run.adapter.config.kind,
        "role": run.adapter.config.role,
        "thresholds": [round(value, 4) for value in run.adapter.thresholds],
        "presets": {mode: list(found.presets) for mode, found in run.adapter.config.modes.items()},
        **_figures(run, share),
    }


def lora_summary(run: LoraRun) -> dict[str, object]:
    """The figures of a finished LoRA."""
    return {"adapter": str(run.folder), "kind": LORA, "role": "align", **_figures(run, run.flops_share)}


def _figures(run: Run | LoraRun, share: float) -> dict[str, object]:
    return {
        f"best validation {run.validation_metric}": round(run.outcome.best_metric, 4),
        "epochs": run.outcome.epochs,
        "train_rows": len(run.train.ids),
        "rows_too_long": sum(rows.n_too_long for rows in run.splits),
        "rows_overlapping": sum(rows.n_overlapping for rows in run.splits),
        "rows_in_tests": sum(rows.n_in_tests for rows in run.splits),
        "validation_rows_learnt": _learnt_rows(run),
        **_task_counts(run),
        "bad_rows": sum(len(rows.bad) for rows in run.splits),
        "train_seconds": round(run.outcome.train_seconds, 2),
        "peak_bytes": run.outcome.peak_bytes,
        "trainable_params": run.outcome.trainable_params,
        "flops_share": round(share, 6),
    }


def _learnt_rows(run: Run | LoraRun) -> int:
    """Validation rows whose text, case and white space apart, is that of a training row."""
    learnt = set(map(text_of, run.train.examples))
    return sum(text_of(example) in learnt for example in run.validation.examples)


def _task_counts(run: Run | LoraRun) -> dict[str, object]:
    """What a task did not use of training and validation; nothing for files, in which nobody looked for leaks."""
    parts = [rows.left_out for rows in run.splits if rows.left_out is not None]
    if not parts:
        return {}
    return {
        "leaks_exact": sum(left.exact for left in parts),
        "leaks_near": sum(left.near for left in parts),
        "rows_repeated": sum(left.repeated for left in parts),
        "label_conflicts": sum(left.label_conflicts for left in parts),
        "rows_of_other_splits": sum(left.not_of_part for left in parts),
    }
