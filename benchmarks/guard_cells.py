"""One cell of the guards benchmark: one method, trained on one task for one base with one seed, then measured once.

A method with several schedules has a file for each, of which validation rows choose one.
"""

from __future__ import annotations

import functools
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from torch import nn

from cells import narrowed
from guard_rows import HARMLESS, MOST_WINDOWS, SPLITS, Prepared, Setup, prepare
from guard_shared import SHARED, SHARED_TASKS, logits_of, shared_guard, sizes_of
from safeside.adapters.adapter import Adapter
from safeside.adapters.sizing import adapter_matmuls, base_matmuls
from safeside.artifact import create_adapter
from safeside.evals.baselines import States, fit_keywords, fit_probe
from safeside.evals.metrics import auroc
from safeside.evals.prompted import QUESTIONS, choose_question, prompted_scores
from safeside.lora import LoraShape
from safeside.provenance import config_hash, git_commit, machine
from safeside.train.importance import Importance, Sample, measure_importance
from safeside.train.loop import Loop
from safeside.train.lora import create_lora
from safeside.train.objectives import guard_logits, guard_metric, guard_objective
from safeside.train.pruning import create_pruned_standalone, start_from_base
from safeside.train.recipe import Recipe
from safeside.train.rows import Rows
from safeside.train.standalone import create_standalone, standalone_matmuls
from safeside.train.taps import Source, StoredTaps, TapStore
from safeside.train.taps import key_of as tap_key
from safeside.train.teacher import teacher_scores
from safeside.types import Example
from tidy import write_json

Array = NDArray[np.float64]

FORMAT = 2  # of a cell; raise it when cells of an older kind must not be used again
LST = {"kind": "lst", "reduction": 4}
ADAPTERS = {
    "plr": {"kind": "plr"},
    "rtb": {"kind": "rtb", "bottleneck": 32},
    "lst": LST,
    "lst_3_taps": {"kind": "lst", "size": 0.0755, "n_taps": 3},  # on both bases no dearer than lst on all layers
    "lst_3_taps_group_4": {"kind": "lst", "size": 0.0755, "n_taps": 3, "query_group": 4},  # a quarter of its cache
    "lst_pruned": {**LST, "start": "pruned"},
    "lst_taught": LST,
    "lst_distilled": {**LST, "start": "pruned"},
    SHARED: LST,
    "standalone": LST,
    "standalone_distilled": LST,
    "standalone_pruned": {**LST, "start": "pruned"},
    "standalone_pruned_distilled": {**LST, "start": "pruned"},
}
SCHEDULED = tuple(method for method in ADAPTERS if method != SHARED)  # trained alike, by every schedule of the task
FITTED = ("probe", "tfidf", "length", "prompted")
METHODS = (*ADAPTERS, *FITTED, "lora_full")
TAUGHT = ("lst_taught", "lst_distilled", "standalone_distilled", "standalone_pruned_distilled")  # by the LoRA guard
# Chosen on validation rows: plr, rtb and standalone by the core benchmark; lst and lora on 1,500 rows of the hate task.
LEARNING_RATES = {"plr": 3e-3, "rtb": 1e-3, "lst": 1e-3, "standalone": 1e-3, "lora": 2e-3}
BATCH_SIZE = 8  # chosen on validation rows of prompt_harm and hate for lst and standalone: 32 gives too few steps
SOFT_WEIGHT = 0.2  # of the teacher's scores beside the labels; at 0.5 and 1.0 the teacher's mistakes cost more
TEACHER: dict[str, Any] = {
    "rank": 8,
    "epochs": 3,
    "learning_rate": LEARNING_RATES["lora"],
    "batch_size": 16,
    "folds": 2,
}
SHARED_EPOCHS = 5  # of the network that all tasks share
TEACHER_EPOCHS = {"grounding": 2}  # of long rows, where three would take hours


@dataclass(frozen=True, slots=True)
class Cell:
    """One method on one task and base with one seed."""

    task: str
    base: str
    method: str
    seed: int
    epochs: int = 0
    """Most of its schedule where it has several; 0: the only one, or whichever validation rows chose."""

    @property
    def title(self) -> str:
        schedule = f", {self.epochs} epochs" if self.epochs else ""
        return f"{self.task} {self.base} {self.method} seed {self.seed}{schedule}"


def reads_states(method: str) -> bool:
    """Whether its cells read states of the base that are stored for all of them."""
    return method == "probe" or (method in ADAPTERS and not method.startswith("standalone"))


def recipe_of(setup: Setup, cell: Cell) -> Recipe:
    """The cell as a recipe: everything about it but the bytes of data and base."""
    is_taught = cell.method in TAUGHT
    family = cell.method.partition("_")[0]
    return Recipe.model_validate(
        {
            "name": f"{cell.task}-{cell.method}",
            "output": "none",
            "seed": cell.seed,
            "base": {"name": cell.base},
            "data": {"task": cell.task, "limit": setup.most_rows(cell.task)["train"]},
            "adapter": {
                **ADAPTERS.get(cell.method, LST),
                "labels": SHARED_TASKS if cell.method == SHARED else ("risk",),
            },
            "training": {
                "epochs": epochs_of(setup, cell),
                "batch_size": batch_size_of(cell),
                "learning_rate": LEARNING_RATES.get(family, 1e-3),
                "soft_weight": SOFT_WEIGHT if is_taught else 0.0,
                "patience": 2,
                "checkpoint_seconds": 1e9,
            },
            **({"teacher": teacher_of(cell.task)} if is_taught else {}),
        }
    )


def teacher_of(task: str) -> dict[str, Any]:
    """How a task's LoRA guard on the whole base is trained: the teacher, and the method ``lora_full``."""
    return {**TEACHER, "epochs": TEACHER_EPOCHS.get(task, TEACHER["epochs"])}


def epochs_of(setup: Setup, cell: Cell) -> int:
    """Most epochs of its training."""
    if cell.method == "lora_full":
        return int(teacher_of(cell.task)["epochs"])
    return min(SHARED_EPOCHS, setup.epochs) if cell.method == SHARED else cell.epochs or setup.schedules(cell.task)[0]


def schedules_of(setup: Setup, cell: Cell) -> list[Cell]:
    """The cell by each of its schedules; what is not trained as adapters are, and what all tasks share, has one."""
    schedules = setup.schedules(cell.task)
    if cell.method not in SCHEDULED or len(schedules) == 1:
        return [cell]
    return [replace(cell, epochs=epochs) for epochs in schedules]


def better_of(found: Sequence[dict[str, object]]) -> dict[str, object]:
    """Of one cell by several schedules, the one of the highest AUROC on validation rows; of equal ones the first."""
    values = np.array([one["values"]["validation"] for one in found], np.float64)  # type: ignore[index]
    labels = np.array(found[0]["labels"]["validation"])  # type: ignore[index]
    known = np.isfinite(values).all(0)  # rows that could not be cut have no value in any
    areas = [auroc(labels[known], row[known]) for row in values]
    return found[areas.index(max(areas))]


def batch_size_of(cell: Cell) -> int:
    """Rows of one step."""
    if cell.method == "lora_full":
        return TEACHER["batch_size"]
    return BATCH_SIZE if cell.method in SCHEDULED else 32


def key_of(setup: Setup, cell: Cell, data: str) -> str:
    """Hash of recipe, data, base and seed: the name of the cell's file."""
    recipe = recipe_of(setup, cell).model_dump(exclude_defaults=True)  # a new field of recipes changes no cell
    values = {"format": FORMAT, "recipe": recipe, "method": cell.method, "data": data}
    if cell.method == SHARED:
        values["shared"] = sizes_of(setup)
    evaluation = (setup.most_rows(cell.task), MOST_WINDOWS, HARMLESS)
    return config_hash({**values, "base": setup.base_of(cell.base)[1], "evaluation": evaluation})


def store_of(setup: Setup, cell: Cell, split: str) -> TapStore:
    """The base's states at all layers for one split, shared by the cells of task and base; computed on first use."""
    data = prepare(setup, cell.task, cell.base)
    folder = setup.scratch / "taps" / cell.task / cell.base
    return TapStore.build(data.base, data.rows(split).ids, range(data.base.n_layers + 1), folder, batch_size=16)


def build_store(setup: Setup, job: tuple[Cell, str]) -> float:
    """Seconds that it took to have the states of one split on disk, rows read before."""
    prepare(setup, job[0].task, job[0].base)
    started = time.perf_counter()
    store_of(setup, *job)
    return time.perf_counter() - started


@functools.lru_cache(maxsize=1)
def importance_of(setup: Setup, task: str, base_name: str) -> Importance:
    """What the pruned starts of a task and base share."""
    data = prepare(setup, task, base_name)
    return measure_importance(data.base, Sample(data.train.ids, data.train.labels))


@dataclass(slots=True)
class Trained:
    """Values by split (higher is riskier), and what the method cost."""

    values: dict[str, Array]
    matmuls: float
    facts: dict[str, object]


def run_cell(setup: Setup, cell: Cell, key: str) -> dict[str, object]:
    """Fit or train the method and give every split's values."""
    started = time.perf_counter()
    data = prepare(setup, cell.task, cell.base)
    trained = fitted(setup, cell) if cell.method in FITTED else trained_of(setup, cell)
    how = data.task.windows
    return {
        "key": key, "task": cell.task, "base": cell.base, "method": cell.method, "seed": cell.seed,
        "commit": git_commit(), "machine": machine(), "counts": data.counts,
        "flops_share": trained.matmuls / base_matmuls(data.base),
        "labels": {split: part.labels.tolist() for split, part in data.splits.items()},
        "windowed": data.splits["test"].is_windowed.tolist(),
        "values": {
            split: (data.splits[split].combined(values, how) if len(values) else values).round(6).tolist()
            for split, values in trained.values.items()
        },
        **trained.facts,
        "seconds": time.perf_counter() - started,
    }  # fmt: skip


def trained_of(setup: Setup, cell: Cell) -> Trained:
    """A guard of the Loop: adapters, standalones, and the LoRA on the whole base."""
    data, recipe = prepare(setup, cell.task, cell.base), recipe_of(setup, cell)
    if cell.method == "lora_full":
        with create_lora(data.base, 1, LoraShape(TEACHER["rank"], 2.0 * TEACHER["rank"]), cell.seed) as guard:
            return _looped(data, recipe, guard, dict.fromkeys(SPLITS, guard), guard.matmuls)
    if cell.method == SHARED:
        return _shared(setup, cell, data, recipe)
    adapter = create_adapter(data.base, recipe.adapter_config(data.base), cell.seed)
    is_pruned = recipe.adapter.start == "pruned"
    if cell.method.startswith("standalone"):
        model = (
            create_pruned_standalone(data.base, adapter, importance_of(setup, cell.task, cell.base), cell.seed)
            if is_pruned
            else create_standalone(data.base, adapter, cell.seed)
        )
        return _looped(
            _taught(setup, cell, data), recipe, model, dict.fromkeys(SPLITS, model), standalone_matmuls(model)
        )
    if is_pruned:
        start_from_base(data.base, adapter, importance_of(setup, cell.task, cell.base))
    taps = {split: _taps(setup, cell, adapter, split) for split in SPLITS if data.rows(split).ids}
    return _looped(_taught(setup, cell, data), recipe, adapter, taps, adapter_matmuls(adapter))


def _shared(setup: Setup, cell: Cell, data: Prepared, recipe: Recipe) -> Trained:
    """Scores of the network that all tasks share: the column of this one."""
    adapter, facts = shared_guard(setup, data.base, cell.base, recipe)
    values = {
        split: logits_of(data.base, _taps(setup, cell, adapter, split), part.rows, cell.task)
        if part.rows.ids
        else np.zeros(0)
        for split, part in data.splits.items()
    }
    return Trained(values, adapter_matmuls(adapter), asdict(facts))


def _taps(setup: Setup, cell: Cell, adapter: Adapter, split: str) -> Source:
    return StoredTaps(narrowed(store_of(setup, cell, split), adapter.config.layers), adapter)


def _taught(setup: Setup, cell: Cell, data: Prepared) -> Prepared:
    """The data with the soft targets of one teacher, the same for every seed, where the method is distilled."""
    if cell.method not in TAUGHT:
        return data
    return Prepared(data.base, data.task, _with_targets(setup, cell, data), data.splits, data.counts)


def _with_targets(setup: Setup, cell: Cell, data: Prepared) -> Rows:
    """The training rows with the teacher's scores, kept without their texts: many minutes, used by twelve cells."""
    splits, scratch = (data.train, data.splits["validation"].rows), setup.scratch / "teachers"
    recipe = recipe_of(setup, replace(cell, seed=0))
    seen = config_hash(
        [teacher_of(cell.task), [(tap_key(data.base, rows.ids, ()), rows.labels.tolist()) for rows in splits]]
    )
    shared = recipe.training.model_dump(exclude={*TEACHER, "soft_weight"})
    path = (setup.teachers or scratch) / f"{config_hash([FORMAT, recipe.seed, shared, seen])}.json"
    if path.is_file():
        return replace(data.train, soft=torch.tensor(json.loads(path.read_text(encoding="utf-8"))["soft"]))
    train = teacher_scores(data.base, recipe, splits, scratch)
    assert train.soft is not None
    facts = {"task": cell.task, "base": cell.base, "teacher": teacher_of(cell.task)}
    write_json(path, {**facts, "soft": train.soft.tolist()}, indent=None)
    return train


def _looped(data: Prepared, recipe: Recipe, model: nn.Module, sources: dict[str, Source], matmuls: float) -> Trained:
    loop = Loop(
        model,
        data.train.lengths,
        guard_objective(data.base, sources["train"], data.train, recipe),
        metric_of(data, sources["validation"]),
        recipe.training,
        seed=recipe.seed,
    )
    outcome = loop.run()
    model.eval()
    values = {
        split: guard_logits(data.base, sources[split], part.rows)[:, 0] if part.rows.ids else np.zeros(0)
        for split, part in data.splits.items()
    }
    facts: dict[str, object] = {"train_seconds": outcome.train_seconds, "peak_bytes": outcome.peak_bytes}
    facts |= {"trainable_params": outcome.trainable_params, "epochs": outcome.epochs}
    return Trained(values, matmuls, facts)


def metric_of(data: Prepared, source: Source) -> Callable[[], float]:
    """The AUROC on validation rows by which epochs are chosen: of windows, or of claims by the window that counts.

    A supported claim has windows that do not support it, so those of ``grounding`` have no labels of their own.
    """
    part = data.splits["validation"]
    if data.task.windows == "max":
        return guard_metric(data.base, source, part.rows)

    def of_rows() -> float:
        logits = guard_logits(data.base, source, part.rows)[:, 0]
        if not np.isfinite(logits).all():
            return math.nan
        return auroc(part.labels, part.combined(logits, data.task.windows))

    return of_rows


def fitted(setup: Setup, cell: Cell) -> Trained:
    """Baselines that are fitted and not trained; texts are seen whole by keywords, in windows by the probe."""
    data = prepare(setup, cell.task, cell.base)
    started = time.perf_counter()
    values, matmuls, n_params = _FITS[cell.method](setup, cell, data)
    facts: dict[str, object] = {"train_seconds": time.perf_counter() - started, "peak_bytes": 0, "epochs": 0}
    return Trained(values, matmuls, {**facts, "trainable_params": n_params})


def _fit_keywords(setup: Setup, cell: Cell, data: Prepared) -> tuple[dict[str, Array], float, int]:
    model = fit_keywords(data.train.examples, data.splits["validation"].examples, cell.seed)
    values = {
        split: model.scores(part.examples)[part.row_of_window] if part.examples else np.zeros(0)
        for split, part in data.splits.items()
    }
    return values, 0.0, model.model.coef_.size


def _fit_length(setup: Setup, cell: Cell, data: Prepared) -> tuple[dict[str, Array], float, int]:
    """What the number of characters of the last message alone tells: how rows were made, not what they say."""

    def sizes(examples: Sequence[Example]) -> Array:
        return np.log1p([[float(len(example.messages[-1].content))] for example in examples])

    model = LogisticRegression().fit(sizes(data.train.examples), data.train.labels[:, 0].numpy())
    values = {
        split: model.decision_function(sizes(part.examples))[part.row_of_window] if part.examples else np.zeros(0)
        for split, part in data.splits.items()
    }
    return values, 0.0, 2


def _fit_probe(setup: Setup, cell: Cell, data: Prepared) -> tuple[dict[str, Array], float, int]:
    states = functools.cache(lambda split: store_of(setup, cell, split).at_rows())
    validation = data.splits["validation"]
    model = fit_probe(
        States(states("train"), data.train.labels[:, 0].double().numpy()),
        States(states("validation"), validation.labels[validation.row_of_window]),
        cell.seed,
    )
    values = {
        split: model.scores(states(split)) if part.rows.ids else np.zeros(0) for split, part in data.splits.items()
    }
    return values, float(data.base.d_model), data.base.d_model + 1


def _fit_prompted(setup: Setup, cell: Cell, data: Prepared) -> tuple[dict[str, Array], float, int]:
    questions = QUESTIONS[cell.task]
    combine = data.task.windows
    question, _ = choose_question(data.base, data.splits["validation"].examples, questions, combine)
    values, share = {}, 0.0
    for split, part in data.splits.items():
        if not part.examples:
            values[split] = np.zeros(0)
            continue
        texts = [example.messages for example in part.examples]
        result = prompted_scores(data.base, texts, [question], combine=combine)
        values[split] = result.scores[part.row_of_window, 0]
        share = result.flops_share[0] if split == "test" else share
    return values, share * base_matmuls(data.base), 0


_FITS = {"tfidf": _fit_keywords, "length": _fit_length, "probe": _fit_probe, "prompted": _fit_prompted}
