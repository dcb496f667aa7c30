"""Run a recipe: rows in, a calibrated and saved adapter out."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from safeside.adapters.adapter import Adapter
from safeside.adapters.config import AdapterConfig
from safeside.artifact import create_adapter, make_folder, save_adapter
from safeside.base.model import Base, load_base
from safeside.errors import ConfigError
from safeside.guards.calibrate import JudgedRows, calibrate_guard
from safeside.guards.score import place_of
from safeside.guards.stream import calibrate_stream
from safeside.guards.windowed import calibrate_windows
from safeside.provenance import config_hash
from safeside.tasks.leakage import text_of
from safeside.tasks.learnt import save_learnt
from safeside.terminal import note
from safeside.train.importance import Sample, measure_importance
from safeside.train.loop import CHECKPOINT, Loop, Outcome, Progress, processes_on
from safeside.train.objectives import Objective, guard_logits, objective_of
from safeside.train.pruning import check_start, start_from_base
from safeside.train.recipe import Recipe
from safeside.train.rows import Rows
from safeside.train.splits import load_benign, load_splits
from safeside.train.taps import FINAL, LiveTaps, Source, StoredTaps, TapStore, key_of, stored_bytes
from safeside.train.teacher import teacher_scores

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_HELD_OUT = 10  # of an aligner's benign rows every tenth is for validation
TAPS = "taps"  # a folder in the adapter's own, while the run lasts


@dataclass(slots=True)
class Run:
    """A finished run."""

    adapter: Adapter
    """The trained adapter, a guard's thresholds set."""
    folder: Path
    """Where it was saved."""
    outcome: Outcome
    """How training went."""
    train: Rows
    """Training rows, and which were left out."""
    validation: Rows
    """Validation rows, and which were left out."""
    validation_metric: str
    """What ``outcome.best_metric`` measures."""
    benign: Rows | None = None
    """Harmless rows of a guard's presets, or that an aligner was held near the base on, and which were left out."""

    @property
    def splits(self) -> list[Rows]:
        """All rows that were read."""
        return [self.train, self.validation, *([self.benign] if self.benign is not None else [])]


def run_recipe(
    recipe: Recipe,
    *,
    data_root: Path = Path(),
    output: Path | None = None,
    base: Base | None = None,
    resume: bool = False,
    report: Callable[[Progress], None] = lambda progress: None,
    advance: Callable[[int], None] = lambda count: None,
) -> Run:
    """Train the recipe's adapter, calibrate it if it is a guard, and save it to the output folder.

    ``base`` may be given when it is loaded already.  ``report`` follows training, ``advance`` the pass that stores the
    base's states.  A run that was killed goes on with ``resume``; one that ends leaves the adapter alone in its folder.
    """
    base = base or base_for(recipe)
    folder, config = make_folder(output or Path(recipe.output)), recipe.adapter_config(base)
    splits = splits_of(base, recipe, data_root, config.labels, folder)
    train, validation = splits[:2]
    processes = processes_on(base.device)
    adapter = _started(base, config, recipe, train)
    with processes.main_process_first():
        sources = _sources(base, adapter, recipe, splits, folder, advance)
    objective = objective_of(base, sources[:2], (train, validation), recipe)
    identity = identity_of(base, config.model_dump(mode="json"), recipe, [train, validation])
    loop = loop_for(adapter, objective, recipe, identity=identity, folder=folder, report=report)
    outcome = loop.run(resume)
    dtype = DTYPES[recipe.stored_dtype]
    adapter.to(dtype).float().eval()  # what is calibrated and measured is what is stored
    _calibrate(base, adapter, recipe, sources, splits)
    if processes.is_main_process:
        save_adapter(adapter, folder, base, facts_of(recipe, outcome, splits, objective.metric), dtype=dtype)
        if adapter.config.role == "guard":
            save_learnt(folder, train.examples)
        clean_up(folder, recipe.training.cache_taps is True)
    processes.wait_for_everyone()
    return Run(adapter, folder, outcome, train, validation, objective.metric, *splits[2:])


def base_for(recipe: Recipe) -> Base:
    """The base that a recipe names, loaded."""
    section = recipe.base
    return load_base(section.name, section.revision, section.device, section.dtype)


def loop_for(
    module: nn.Module,
    objective: Objective,
    recipe: Recipe,
    *,
    identity: str,
    folder: Path,
    report: Callable[[Progress], None],
) -> Loop:
    """The loop that trains ``module`` by the recipe."""
    return Loop(
        module,
        objective.lengths,
        objective.loss_of,
        objective.metric_of,
        recipe.training,
        weights=objective.weights,
        seed=recipe.seed,
        identity=identity,
        folder=folder,
        report=report,
    )


def splits_of(base: Base, recipe: Recipe, root: Path, labels: tuple[str, ...], folder: Path) -> list[Rows]:
    """Training rows with their soft targets, validation rows and, if the recipe names any, benign rows.

    An aligner's benign rows are part of the other two as well: every tenth of validation.
    """
    train, validation = load_splits(base, recipe, root, labels)
    if recipe.training.objective == "sft":
        train.rejected = validation.rejected = None  # of preferences the chosen answers are learnt
    benign = load_benign(base, recipe, root, labels, train)
    if benign is not None and recipe.adapter.role == "align":
        if len(benign.ids) < 2:
            raise ConfigError(f"data.benign has {len(benign.ids)} usable row; expected 2 or more. Add rows.")
        held_out = range(0, len(benign.ids), _HELD_OUT)
        validation.benign = benign.chosen(held_out)
        train.benign = benign.chosen([place for place in range(len(benign.ids)) if place not in held_out])
    if recipe.teacher:
        train = teacher_scores(base, recipe, (train, validation), folder)
    return [train, validation, *([benign] if benign is not None else [])]


def _started(base: Base, config: AdapterConfig, recipe: Recipe, train: Rows) -> Adapter:
    """The adapter before training: random, or pruned from the base."""
    adapter = create_adapter(base, config, recipe.seed)
    if recipe.adapter.start == "pruned":
        check_start(base, adapter)
        sample = Sample(train.ids, train.labels, recipe.adapter.start_rows, recipe.seed)
        start_from_base(base, adapter, measure_importance(base, sample))
    return adapter


def identity_of(base: Base, adapter: object, recipe: Recipe, splits: Sequence[Rows]) -> str:
    """Hash of what a checkpoint hangs on beside the training settings: base, adapter, rows and what they teach.

    ``adapter`` describes the adapter as JSON.
    """
    rows = [
        [
            key_of(base, split.texts, ()),
            split.labels.tolist(),
            [part.answer_starts for part in split.parts],
            None if split.soft is None else split.soft.tolist(),
        ]
        for split in splits
    ]
    start = [recipe.adapter.start, recipe.adapter.start_rows]
    return config_hash([adapter, rows, start])


def _calibrate(base: Base, adapter: Adapter, recipe: Recipe, sources: Sequence[Source], splits: Sequence[Rows]) -> None:
    """Calibrate a guard on validation rows, and its presets on benign rows if there are any; aligners need none.

    No promise rests on a validation row whose text is a training row's.  Rows beyond the base's context, from which
    nobody learnt, calibrate how the guard reads such texts.  A guard that learnt from prefixes keeps a stop rule too.
    """
    if adapter.config.role != "guard":
        return
    train, *held_out = splits
    learnt = frozenset(map(text_of, train.examples))
    judged = [
        JudgedRows(
            guard_logits(base, source, rows),
            rows.labels.double().numpy(),
            tuple(place_of(example.messages) for example in rows.examples),
            tuple(map(text_of, rows.examples)),
            learnt,
        )
        for source, rows in zip(sources[1:], held_out, strict=True)
    ]
    calibrate_guard(adapter, recipe.calibration.false_positive_rate, *judged)
    longest = min(recipe.data.max_tokens or base.max_tokens, base.max_tokens)  # as many tokens at once as in training
    batch_size = max(1, recipe.training.batch_size * longest // base.max_tokens)
    calibrate_windows(base, adapter, *(rows.beyond for rows in held_out), batch_size=batch_size)
    if recipe.training.targets == "prefixes":
        calibrate_stream(base, adapter, *(rows.examples for rows in held_out), learnt=learnt)


def _sources(
    base: Base,
    adapter: Adapter,
    recipe: Recipe,
    splits: Sequence[Rows],
    folder: Path,
    advance: Callable[[int], None],
) -> list[Source]:
    """Where each split's states come from.  An aligner's benign rows are read with those of the other two."""
    splits = splits[:2] if adapter.config.role == "align" else splits
    if not recipe.training.cache_taps:
        live = LiveTaps(base, adapter)
        return [live for _ in splits]
    layers = (*adapter.config.layers, *([FINAL] if adapter.config.role == "align" else []))
    return [StoredTaps(store, adapter) for store in stores_of(base, splits, layers, folder, advance)]


def stores_of(
    base: Base, splits: Sequence[Rows], layers: Sequence[int], folder: Path, advance: Callable[[int], None]
) -> list[TapStore]:
    """The base's states of each split at ``layers``, on disk; too little room for them is a ConfigError."""
    place = make_folder(folder / TAPS)
    n_bytes = sum(stored_bytes(base, rows.texts, layers) for rows in splits)
    free = shutil.disk_usage(place).free + sum(path.stat().st_size for path in place.iterdir())
    note(f"the states of {base.name} take {n_bytes / 1e6:,.0f} MB in {place} ({free / 1e6:,.0f} MB are free)")
    if n_bytes > free:
        raise ConfigError(f"{place} has no room for {n_bytes / 1e6:,.0f} MB. Make room, or set cache_taps = false.")
    return [TapStore.build(base, rows.texts, layers, place, advance=advance) for rows in splits]


def clean_up(folder: Path, delete_taps: bool) -> None:
    """Delete what only an unfinished run needs: its checkpoint and, unless they are kept, the stored taps."""
    (folder / CHECKPOINT).unlink(missing_ok=True)
    if delete_taps and (folder / TAPS).is_dir():
        for path in (folder / TAPS).glob("taps-*"):
            path.unlink()
        if not any((folder / TAPS).iterdir()):  # whatever else is there is not ours
            (folder / TAPS).rmdir()


def _data_name(recipe: Recipe) -> str:
    data = recipe.data
    if data.task is None:
        return ", ".join(Path(name).name for name in data.train)
    return f"task {data.task}" + (f" ({', '.join(data.sources)})" if data.sources else "")


def _aligner_facts(recipe: Recipe, train: Rows) -> dict[str, str]:
    """What an aligner's provenance says of its loss."""
    training = recipe.training
    if recipe.adapter.role != "align":
        return {}
    learnt = f"dpo, beta {training.beta:g}" if training.objective == "dpo" else "sft"
    if training.sft_weight:
        learnt += f", chosen answers' likelihood x {training.sft_weight:g}"
    if train.benign is None:
        return {"objective": learnt}
    return {"objective": f"{learnt}, KL to the base x {training.kl_weight:g} on {len(train.benign.ids)} benign rows"}


def _left_out(recipe: Recipe, splits: Sequence[Rows]) -> dict[str, str]:
    """How many rows were left out because an evaluation asks for the same, or a test set of another task holds them."""
    data, facts = recipe.data, {}
    named = dict(zip(("training", "validation", "benign"), splits, strict=False))
    if data.leave_out:
        counts = [f"{rows.n_overlapping} {name}" for name, rows in named.items()]
        facts["left_out"] = f"{', '.join(counts)} rows that overlap with {', '.join(data.leave_out)}"
    of_files = {name: rows for name, rows in named.items() if rows.left_out is None}  # a task tells its leaks itself
    tests = dict.fromkeys([*([] if data.task is None else [data.task]), *data.against])
    if tests and of_files:
        counts = [f"{rows.n_in_tests} {name}" for name, rows in of_files.items()]
        facts["in_tests"] = f"{', '.join(counts)} rows in the test sets of {', '.join(tests)}"
    return facts


def _task_left_out(splits: Sequence[Rows]) -> dict[str, str]:
    """What the recipe's task did not use, leaks among it; nothing for files, where nobody looked."""
    named = zip(("training", "validation"), splits, strict=False)
    counts = [f"{name}: {rows.left_out.summary}" for name, rows in named if rows.left_out is not None]
    return {"task_left_out": "; ".join(counts)} if counts else {}


def facts_of(recipe: Recipe, outcome: Outcome, splits: Sequence[Rows], metric: str) -> dict[str, str]:
    """What the artifact's provenance and card say of the run; ``splits`` are those of ``splits_of``."""
    train = splits[0]
    return {
        "recipe_hash": config_hash(recipe.model_dump()),
        "seed": str(recipe.seed),
        "train_rows": str(len(train.ids)),
        "train_data": _data_name(recipe),
        **_left_out(recipe, splits),
        **_task_left_out(splits),
        **_aligner_facts(recipe, train),
        f"validation {metric}": f"{outcome.best_metric:.4f}",
        "train_seconds": f"{outcome.train_seconds:.1f}",
        "peak_bytes": str(outcome.peak_bytes),
        "peak_measure": outcome.peak_measure,
        "trainable_params": str(outcome.trainable_params),
    }
