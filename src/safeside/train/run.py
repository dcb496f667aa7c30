"""Run a recipe: rows in, a calibrated and saved adapter out."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score
from torch import Tensor

from safeside.adapters.adapter import Adapter
from safeside.artifact import create_adapter, save_adapter
from safeside.base.model import Base, load_base
from safeside.chat import Encoded
from safeside.errors import ConfigError, InputError
from safeside.guards.calibrate import fit_calibration
from safeside.provenance import config_hash
from safeside.tasks.rows import BadRow, load_examples
from safeside.tasks.task import Split, load_task
from safeside.train.loop import Loop, Outcome, Progress, processes_on
from safeside.train.losses import answer_loss, balanced_weight, guard_loss
from safeside.train.recipe import Recipe
from safeside.train.taps import FINAL, Batch, LiveTaps, Source, StoredTaps, TapStore, key_of, make_batch
from safeside.types import Example

DEMO_PREFIX = "demo:"


@dataclass(slots=True)
class Rows:
    """Encoded rows of one split, and what could not be used."""

    ids: list[tuple[int, ...]]
    answer_starts: list[int]
    labels: Tensor
    soft: Tensor | None
    bad: list[BadRow] = field(default_factory=list)
    n_too_long: int = 0

    @property
    def lengths(self) -> list[int]:
        return [len(row) for row in self.ids]


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


def find_data(name: str, root: Path) -> Path:
    """The file that a recipe names: ``demo:FILE`` is packaged, anything else lies under ``root``."""
    if name.startswith(DEMO_PREFIX):
        return Path(str(files("safeside.builtin") / "demo" / name.removeprefix(DEMO_PREFIX)))
    return root / name


def encode_rows(base: Base, examples: Sequence[Example], limit: int | None = None, seed: int = 0) -> Rows:
    """Token ids and labels of ``examples``; rows that are bad or beyond the base's context are left out and counted."""
    encoded: list[tuple[Example, Encoded]] = []
    bad: list[BadRow] = []
    for example in examples:
        try:
            encoded.append((example, base.encode(example.messages)))
        except InputError as error:
            bad.append(BadRow(example.line, str(error)))
    fitting = [pair for pair in encoded if len(pair[1].ids) <= base.max_tokens]
    n_too_long = len(encoded) - len(fitting)
    if limit is not None and len(fitting) > limit:
        fitting = random.Random(seed).sample(fitting, limit)
    soft = [example.soft for example, _ in fitting]
    known = [values for values in soft if values is not None]
    return Rows(
        ids=[item.ids for _, item in fitting],
        answer_starts=[item.answer_start for _, item in fitting],
        labels=torch.tensor([example.labels for example, _ in fitting], dtype=torch.float32),
        soft=torch.tensor(known, dtype=torch.float32) if known and len(known) == len(soft) else None,
        bad=bad,
        n_too_long=n_too_long,
    )


def load_rows(
    base: Base, names: Sequence[str], root: Path, labels: tuple[str, ...], limit: int | None, seed: int
) -> Rows:
    """The rows of several files as one split; a split without a usable row is a ConfigError."""
    examples: list[Example] = []
    bad: list[BadRow] = []
    for name in names:
        some, problems = load_examples(find_data(name, root), labels)
        examples += some
        bad += [BadRow(row.line, f"{name}: {row.problem}") for row in problems]
    rows = encode_rows(base, examples, limit, seed)
    rows.bad = [*bad, *rows.bad]
    return _require_rows(rows, ", ".join(names))


def _require_rows(rows: Rows, name: str) -> Rows:
    if not rows.ids:
        first = f"; the first bad row: line {rows.bad[0].line}, {rows.bad[0].problem}" if rows.bad else ""
        long = f"; {rows.n_too_long} are longer than the base's context" if rows.n_too_long else ""
        raise ConfigError(f"No usable row in {name}{first}{long}. Check the files.")
    return rows


def load_splits(base: Base, recipe: Recipe, root: Path, labels: tuple[str, ...]) -> tuple[Rows, Rows]:
    """Training and validation rows of a recipe, from its files or its task.

    A category that the task has no rows for is a ConfigError.
    """
    data = recipe.data
    if data.task is None:
        train = load_rows(base, data.train, root, labels, data.limit, recipe.seed)
        return train, load_rows(base, data.validation, root, labels, None, recipe.seed)
    task = load_task(data.task, root, labels=labels, sources=data.sources or ())
    if task.unsupported:
        raise ConfigError(
            f"Task {data.task!r} has no risky and harmless rows for {', '.join(task.unsupported)} in train and "
            f"validation; supported here: {', '.join(task.task.labels)}. Take the others off [adapter] labels."
        )
    splits = []
    limits: dict[Split, int | None] = {"train": data.limit, "validation": None}
    for split, limit in limits.items():
        rows = encode_rows(base, task.of(split), limit, recipe.seed)
        rows.bad = [*task.bad(split), *rows.bad]
        splits.append(_require_rows(rows, f"{split} of task {data.task!r}"))
    return splits[0], splits[1]


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
    base's states.  A run that was killed goes on with ``resume``.
    """
    base = base or load_base(recipe.base.name, recipe.base.revision, dtype=recipe.base.dtype)
    folder = output or Path(recipe.output)
    config = recipe.adapter_config(base)
    labels = config.labels
    train, validation = load_splits(base, recipe, data_root, labels)
    adapter = create_adapter(base, config, recipe.seed)
    processes = processes_on(base.device)
    with processes.main_process_first():
        source, validation_source = _sources(base, adapter, recipe, [train, validation], folder, advance)
    weights = None
    if config.role == "guard":
        loss_of = guard_objective(base, source, train, recipe)
        metric_of, name = guard_metric(base, validation_source, validation), "auroc"
    else:
        loss_of = _answer_objective(base, source, train)
        metric_of, name = _answer_metric(base, validation_source, validation), "negative answer loss (nats)"
        weights = [length - start for length, start in zip(train.lengths, train.answer_starts, strict=True)]
    loop = Loop(
        adapter,
        train.lengths,
        loss_of,
        metric_of,
        recipe.training,
        weights=weights,
        seed=recipe.seed,
        identity=_identity(base, adapter, [train, validation]),
        folder=folder,
        report=report,
    )
    outcome = loop.run(resume)
    dtype = torch.bfloat16 if recipe.stored_dtype == "bfloat16" else torch.float32
    adapter.to(dtype).float().eval()  # what is calibrated and measured is what is stored
    if config.role == "guard":
        logits = guard_logits(base, validation_source, validation)
        adapter.set_calibration(
            fit_calibration(logits, validation.labels.double().numpy(), recipe.calibration.false_positive_rate)
        )
    if processes.is_main_process:
        save_adapter(adapter, folder, base, _facts(recipe, outcome, train, name), dtype=dtype)
    processes.wait_for_everyone()
    return Run(adapter, folder, outcome, train, validation, name)


def _sources(
    base: Base,
    adapter: Adapter,
    recipe: Recipe,
    splits: Sequence[Rows],
    folder: Path,
    advance: Callable[[int], None],
) -> list[Source]:
    if not recipe.training.cache_taps:
        live = LiveTaps(base, adapter)
        return [live for _ in splits]
    layers = (*adapter.config.layers, *([FINAL] if adapter.config.role == "align" else []))
    return [
        StoredTaps(TapStore.build(base, rows.ids, layers, folder / "taps", advance=advance), adapter) for rows in splits
    ]


def _last(values: Tensor, batch: Batch) -> Tensor:
    """The entry at each row's last kept token: (B, T, K) to (B, K)."""
    return values[torch.arange(len(batch.rows), device=values.device), batch.keep.sum(1) - 1]


def guard_objective(base: Base, source: Source, rows: Rows, recipe: Recipe) -> Callable[[Sequence[int]], Tensor]:
    """The loss of some rows: logits at the last token against labels and soft targets."""
    training = recipe.training
    weight = balanced_weight(rows.labels).to(base.device) if training.class_weights == "balanced" else None
    if training.soft_weight and rows.soft is None:
        raise ConfigError("soft_weight is set but not every training row has 'soft' scores. Add them, or set it to 0.")

    def loss_of(some: Sequence[int]) -> Tensor:
        batch = make_batch(base, rows.ids, some)
        output = source(batch).output
        assert output.logits is not None
        chosen = torch.tensor(batch.rows)
        soft = rows.soft[chosen].to(base.device) if rows.soft is not None and training.soft_weight else None
        labels = rows.labels[chosen].to(base.device)
        return guard_loss(
            _last(output.logits, batch),
            labels,
            positive_weight=weight,
            soft=soft,
            soft_weight=training.soft_weight,
        )

    return loss_of


@torch.no_grad()
def guard_logits(base: Base, source: Source, rows: Rows, batch_size: int = 64) -> NDArray[np.float64]:
    """Raw logits (n, K) at every row's last token, in the order of ``rows``."""
    order = sorted(range(len(rows.ids)), key=lambda row: len(rows.ids[row]))
    result = np.zeros(tuple(rows.labels.shape))
    for start in range(0, len(order), batch_size):
        batch = make_batch(base, rows.ids, order[start : start + batch_size])
        output = source(batch).output
        assert output.logits is not None
        result[list(batch.rows)] = _last(output.logits, batch).double().cpu().numpy()
    return result


def guard_metric(base: Base, source: Source, rows: Rows) -> Callable[[], float]:
    """Mean AUROC over labels on ``rows``; NaN where a logit is not finite."""
    labels = rows.labels.double().numpy()
    if any(len(set(column.tolist())) < 2 for column in labels.T):
        raise ConfigError("Validation needs both harmful and harmless rows for every label. Add rows.")

    def metric_of() -> float:
        logits = guard_logits(base, source, rows)
        if not np.isfinite(logits).all():
            return math.nan
        return float(np.mean([roc_auc_score(label, logit) for label, logit in zip(labels.T, logits.T, strict=True)]))

    return metric_of


def _answer_logits(base: Base, source: Source, batch: Batch) -> Tensor:
    forward = source(batch)
    assert forward.base_state is not None
    assert forward.output.delta is not None
    mixed = forward.base_state.float() + forward.output.delta.float()
    return base.head_logits(mixed.to(base.dtype))


def _answer_mask(rows: Rows, batch: Batch) -> Tensor:
    starts = torch.tensor([rows.answer_starts[row] for row in batch.rows], device=batch.ids.device)
    return batch.keep & (torch.arange(batch.ids.shape[1], device=batch.ids.device) >= starts[:, None])


def _check_answers(rows: Rows) -> None:
    if any(start >= length for start, length in zip(rows.answer_starts, rows.lengths, strict=True)):
        raise ConfigError("An aligner learns from answers: every row needs 'prompt' and 'response'. Check the data.")


def _answer_objective(base: Base, source: Source, rows: Rows) -> Callable[[Sequence[int]], Tensor]:
    _check_answers(rows)

    def loss_of(some: Sequence[int]) -> Tensor:
        batch = make_batch(base, rows.ids, some)
        return answer_loss(_answer_logits(base, source, batch), batch.ids, _answer_mask(rows, batch))

    return loss_of


def _answer_metric(base: Base, source: Source, rows: Rows) -> Callable[[], float]:
    _check_answers(rows)

    def metric_of() -> float:
        total, count = 0.0, 0
        for start in range(0, len(rows.ids), 32):
            batch = make_batch(base, rows.ids, range(start, min(start + 32, len(rows.ids))))
            mask = _answer_mask(rows, batch)
            n_tokens = int(mask.sum())
            total += float(answer_loss(_answer_logits(base, source, batch), batch.ids, mask)) * n_tokens
            count += n_tokens
        return -total / count

    return metric_of


def _identity(base: Base, adapter: Adapter, splits: Sequence[Rows]) -> str:
    """Hash of what a checkpoint hangs on beside the training settings: base, adapter, rows and what they teach."""
    rows = [
        [
            key_of(base, split.ids, ()),
            split.labels.tolist(),
            split.answer_starts,
            None if split.soft is None else split.soft.tolist(),
        ]
        for split in splits
    ]
    return config_hash([adapter.config.model_dump(mode="json"), rows])


def _data_name(recipe: Recipe) -> str:
    data = recipe.data
    if data.task is None:
        return ", ".join(Path(name).name for name in data.train)
    return f"task {data.task}" + (f" ({', '.join(data.sources)})" if data.sources else "")


def _facts(recipe: Recipe, outcome: Outcome, train: Rows, metric: str) -> dict[str, str]:
    """What the artifact's provenance and card say of the run."""
    return {
        "recipe_hash": config_hash(recipe.model_dump()),
        "seed": str(recipe.seed),
        "train_rows": str(len(train.ids)),
        "train_data": _data_name(recipe),
        f"validation {metric}": f"{outcome.best_metric:.4f}",
        "train_seconds": f"{outcome.train_seconds:.1f}",
        "peak_bytes": str(outcome.peak_bytes),
        "trainable_params": str(outcome.trainable_params),
    }
