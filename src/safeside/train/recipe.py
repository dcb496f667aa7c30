"""A recipe is a run: one TOML file, checked before anything is computed."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from safeside.adapters.adapter import TRUNKS
from safeside.adapters.config import LADDERS, AdapterConfig, HeadDim
from safeside.adapters.sizing import make_config, sized_config
from safeside.base.model import Base
from safeside.errors import ConfigError, problems_of
from safeside.tasks.task import TASKS
from safeside.types import Combine

LORA = "lora"  # the kind that is no adapter: see ``safeside.train.run_lora``


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class BaseSection(_Section):
    """Which base: the arguments of ``load_base``."""

    name: str = "builtin"
    """``builtin``, a folder or a hub name."""
    revision: str | None = None
    """Revision on the model hub."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Of the base in memory; float32 on CPU and the checkpoint's own elsewhere unless given."""
    device: str = "cpu"
    """Where it runs, such as ``cuda``."""
    geometry: str | None = None
    """For ``--dry-run``: a JSON file, beside the recipe, with the dimensions that the base's config.json gives."""


class DataSection(_Section):
    """Which rows: files, or a task.  Paths are relative to the data root (``--data``, else the recipe's folder).

    ``demo:FILE`` names a file of the packaged demo set, ``hub:owner/name@REVISION#split`` a public set at a commit.
    """

    train: tuple[str, ...] = ()
    """Files to learn from."""
    validation: tuple[str, ...] = ()
    """Files for early stopping and calibration."""
    task: str | None = None
    """A registered task such as ``hate``, in place of files: its rows, its labels, and how it combines windows."""
    sources: tuple[str, ...] | None = None
    """Those sources of the task only; all unless given."""
    limit: int | None = Field(None, ge=1)
    """Keep that many training rows, drawn by the seed; all unless given."""
    max_tokens: int | None = Field(None, ge=2)
    """Rows of more tokens are left out and counted; those beyond the base's context always are."""
    soft: str | None = None
    """File of scores of a bigger guard: the training rows again, each with ``soft`` in place of ``label``."""
    partial_labels: bool = False
    """Whether a row's ``label`` object may leave labels out: what a row does not know is not learnt from it."""
    label_of: dict[str, str] = {}
    """By file, the one label that its rows know: their ``label`` is 0 or 1 of that label, the others are unknown."""
    benign: tuple[str, ...] = ()
    """For aligners: files of harmless rows, answered or not, on which ``kl_weight`` holds them near the base.

    Every tenth row is for validation.
    """

    leave_out: tuple[str, ...] = ()
    """Evaluations whose goals nothing may learn from: suites such as ``strongreject``, whose files lie under the data
    root, or files of prompts (``.jsonl``, ``.jsonl.gz``).  Rows that overlap with a goal are left out and counted.
    """

    against: tuple[str, ...] = ()
    """For guards: tasks whose test rows nothing may learn from.  Rows that are one, or nearly, are left out and
    counted.  Those of the recipe's own task always are; with ``sources``, those of its other sources where it is named
    here too.
    """

    @model_validator(mode="after")
    def _files_or_task(self) -> DataSection:
        if self.task is not None and (self.train or self.validation):
            raise ValueError("task and the files train, validation exclude each other; keep one")
        if self.task is None and not (self.train and self.validation):
            raise ValueError("train and validation need a file each; name them, or a task")
        if self.task is None and self.sources is not None:
            raise ValueError("sources are those of a task; add task, or name files in train and validation")
        return self


class AdapterSection(_Section):
    """Which adapter: ``size`` (share of the base's compute) or ``reduction`` and single dimensions."""

    kind: str = "lst"
    """Architecture: a registered adapter kind; or ``lora``, standard fine-tuning that aligners are compared with."""
    role: Literal["guard", "align"] = "guard"
    """What to train: a guard or an aligner."""
    labels: tuple[str, ...] | None = None
    """Names of a guard's outputs; ``harm`` or the task's own unless given.  After that of a task: categories."""
    size: float | None = Field(None, gt=0)
    """Most that an ``lst`` or ``lst_plus`` may cost, as a share of the base's matmuls: 0.01 is 1%."""
    n_taps: int | None = Field(None, ge=1)
    """With ``size``: layers that are tapped, evenly spread; all unless given.  Few wide taps decode faster."""
    reduction: float | None = Field(None, ge=1)
    """Width of the base over width of the side network, r; 16 unless given."""
    layers: tuple[int, ...] | None = None
    """Tapped layers, 0 being the embedding; all unless given, for ``plr`` and ``state_map`` the last."""
    width: int | None = Field(None, ge=0)
    """Side width d, in place of ``reduction``."""
    feed_forward: int | None = Field(None, ge=1)
    """Hidden width of an ``lst`` block's feed-forward; about 8/3 of the width unless given."""
    head_dim: HeadDim = 32
    """Width of one attention head of ``lst``; it divides the width."""
    query_group: int | None = Field(None, ge=1)
    """Heads of queries that share one of keys and values, for a cache so many times smaller; 1 unless given.

    So many heads divide the width.
    """
    tap_rank: int | None = Field(None, ge=0)
    """Rank of the down-projections; full rank unless given."""
    gate: Literal["layer", "channel"] | None = None
    """One learned gate for each tapped layer of ``lst``, or one for each channel."""
    bottleneck: int | None = Field(None, ge=1)
    """Hidden width of ``rtb``'s networks, or rank of ``state_map``; 32 unless given."""
    cross_attention: bool | None = None
    """Whether tokens of ``lst_plus`` attend over their tapped layers."""
    depth: int | None = Field(None, ge=1)
    """Blocks that ``toplayers`` duplicates, 2 unless given; or top blocks that a ``lora`` is in, all unless given."""
    lora_rank: int | None = Field(None, ge=0)
    """Rank of ``toplayers``' updates to the base's own weights, weights of its own unless given; of a ``lora``, 8."""
    readout: Literal["last", "attention"] | None = None
    """What a guard reads: the last token's state, or an attention-weighted mean."""
    windows: Combine | dict[str, Combine] | None = None
    """Which score of a long text's windows a guard goes by; the task's own unless given, for files the highest.

    ``min`` is for claims that one window of a document may support.  By label, ``{ unsupported = "min" }``, it holds
    for that one.
    """
    start: Literal["random", "pruned"] = "random"
    """First weights of an ``lst``: random, or the base's own, pruned by Fisher importance."""
    start_rows: int = Field(1024, ge=1)
    """Training rows that importance is measured on, drawn by the seed."""

    def with_windows(self, config: AdapterConfig) -> AdapterConfig:
        """The guard's configuration with ``windows`` as they are given here; a name of no label is a ConfigError."""
        given: object = self.windows
        if isinstance(self.windows, dict):
            if unknown := sorted(set(self.windows) - set(config.labels)):
                expected = ", ".join(config.labels)
                raise ConfigError(f"windows names {', '.join(unknown)}; expected labels of the guard: {expected}.")
            named = zip(config.labels, config.windows_by_label, strict=True)
            given = tuple(self.windows.get(label, other) for label, other in named)
        return AdapterConfig.model_validate({**config.model_dump(), "windows": given})

    @model_validator(mode="after")
    def _one_dial(self) -> AdapterSection:
        given = [dial for dial in ("size", "reduction", "width") if self.model_dump()[dial] is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} all set the width; keep one")
        if self.size is not None and self.layers is not None:
            raise ValueError("size picks the layers too; give reduction or width with layers")
        if self.n_taps is not None and self.size is None:
            raise ValueError("n_taps goes with size; name the layers where width or reduction is given")
        if self.size is not None and self.kind not in LADDERS:
            raise ValueError(f"size is for kind 'lst'; give the dimensions of {self.kind!r} themselves")
        if self.kind == LORA:
            unread = sorted(self.model_fields_set - {"kind", "role", "lora_rank", "depth"})
            if unread:
                raise ValueError(f"kind 'lora' reads lora_rank and depth; leave out {', '.join(unread)}")
            if self.role != "align" or self.lora_rank == 0:
                raise ValueError("kind 'lora' is a baseline of aligners with a rank from 1 on; set role = 'align'")
        if self.start == "pruned" and self.kind != "lst":
            raise ValueError(f"only kind 'lst' has a pruned start; got {self.kind!r}")
        return self


class TrainingSection(_Section):
    """How to train."""

    epochs: int = Field(6, ge=1)
    """Most passes over the training rows."""
    batch_size: int = Field(32, ge=1)
    """Rows of one forward pass."""
    accumulation: int = Field(1, ge=1)
    """Forward passes of one optimiser step."""
    learning_rate: float = Field(2e-3, gt=0)
    """Peak of AdamW's rate: linear warm-up, then cosine to a tenth."""
    weight_decay: float = Field(0.01, ge=0)
    """On matrices only."""
    warmup: float = Field(0.06, ge=0, lt=1)
    """Share of all steps."""
    max_gradient_norm: float = Field(1.0, gt=0)
    """Gradients are clipped to this norm."""
    patience: int = Field(3, ge=1)
    """Epochs without a better validation figure before training stops."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """``bfloat16`` trains under autocast; losses stay in float32."""
    class_weights: Literal["none", "balanced"] = "none"
    """``balanced`` gives harmful and harmless rows the same say."""
    soft_weight: float = Field(0.0, ge=0, le=1)
    """Share of the loss that goes to soft targets of a bigger guard (rows' ``soft``, a file's, or a teacher's)."""
    temperature: float = Field(1.0, gt=0)
    """Divides the logits of guard and soft targets in that share; above 1 it stresses how sure the bigger guard is."""
    targets: Literal["end", "prefixes"] = "end"
    """Where a guard's loss is taken: at the last token, or half there and half on all tokens of the answer."""
    objective: Literal["sft", "dpo"] = "sft"
    """What an aligner learns: answers (of preferences the chosen ones), or to prefer the chosen to the rejected one."""
    beta: float = Field(0.1, gt=0)
    """Of ``dpo``: how dear it is to leave the base, which is the reference."""
    sft_weight: float = Field(0.0, ge=0)
    """Of ``dpo``: weight of the chosen answer's negative log-likelihood per token, added to each pair's loss.

    Preference alone may lower both answers' likelihood; this keeps the chosen one's up (arXiv 2404.19733, section 2).
    """
    kl_weight: float = Field(0.0, ge=0)
    """Weight of the divergence from the base on benign rows; each counts as much as a training row (``sft``: token)."""
    cache_taps: bool | Literal["keep"] = True
    """Compute the base's states once, store them in a memory-mapped file beside the adapter, and train from there.

    The file is deleted when the run has ended; ``"keep"`` leaves it for further runs on the same rows and layers.
    """
    checkpoint_seconds: float = Field(60.0, ge=0)
    """Seconds between checkpoints; one is also written after every epoch."""


class TeacherSection(_Section):
    """A LoRA guard on the whole base that is trained first, on the same rows, and whose scores are learnt from.

    Each training row is scored by a teacher that did not see it.
    """

    rank: int = Field(8, ge=1)
    """Of the LoRA, on every linear layer of the blocks; updates are multiplied by 2."""
    epochs: int = Field(3, ge=1)
    """Most passes over its rows."""
    learning_rate: float = Field(5e-4, gt=0)
    """Peak of AdamW's rate."""
    batch_size: int = Field(16, ge=1)
    """Rows of one step."""
    folds: int = Field(2, ge=2)
    """Teachers; each learns from all rows but its own share, and scores that."""


class CalibrationSection(_Section):
    """Where a guard's thresholds are set."""

    false_positive_rate: float = Field(0.05, gt=0, lt=1)
    """Share of a label's harmless validation rows that may be flagged under it."""
    benign: tuple[str, ...] = ()
    """Files of harmless rows for the presets' promises; the harmless validation rows unless given.

    Rows that training has not seen make the better promise: validation rows have stopped it.
    """


class Recipe(_Section):
    """One run."""

    name: str = Field(min_length=1)
    """The adapter's name."""
    output: str = Field(min_length=1)
    """Folder for the adapter, relative to where the command runs; ``--output`` replaces it."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Of the adapter's first weights, the order of rows and the rows that ``limit`` keeps."""
    stored_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the weights on disk; they are rounded before calibration."""
    base: BaseSection = BaseSection()
    """The frozen base."""
    data: DataSection
    """Training and validation rows."""
    adapter: AdapterSection = AdapterSection()
    """The side network."""
    training: TrainingSection = TrainingSection()
    """The training loop."""
    teacher: TeacherSection | None = None
    """For guards: where soft targets come from."""
    calibration: CalibrationSection = CalibrationSection()
    """For guards: the threshold."""

    @model_validator(mode="after")
    def _tasks_are_for_guards(self) -> Recipe:
        if self.data.task is not None and self.adapter.role != "guard":
            raise ValueError(f"task {self.data.task!r} trains a guard; an aligner needs files in train and validation")
        return self

    @model_validator(mode="after")
    def _thresholds_are_for_guards(self) -> Recipe:
        if self.calibration.benign and self.adapter.role != "guard":
            raise ValueError("an aligner has no thresholds; remove calibration.benign, or set role = 'guard'")
        return self

    @model_validator(mode="after")
    def _one_source_of_scores(self) -> Recipe:
        has_scores = self.teacher is not None or self.data.soft is not None
        if has_scores and self.adapter.role != "guard":
            raise ValueError("soft targets are for guards; remove teacher and soft, or set role = 'guard'")
        if has_scores and self.training.soft_weight == 0:
            raise ValueError("soft targets count for nothing while soft_weight is 0; set it, 0.5 for example")
        if self.teacher is not None and self.data.soft is not None:
            raise ValueError("teacher and data.soft both give soft targets; keep one")
        return self

    @model_validator(mode="after")
    def _fits_the_role(self) -> Recipe:
        training = self.training
        of_role = {
            "guard": {
                "class_weights": training.class_weights != "none",
                "soft_weight": training.soft_weight,
                "targets": training.targets != "end",
                "calibration": self.calibration != CalibrationSection(),
                "adapter.windows": self.adapter.windows,
                "data.against": self.data.against,
            },
            "align": {
                "objective": training.objective != "sft",
                "beta": training.beta != TrainingSection.model_fields["beta"].default,
                "sft_weight": training.sft_weight,
                "kl_weight": training.kl_weight,
                "data.benign": self.data.benign,
            },
        }
        for role, fields in of_role.items():
            given = [field for field, is_set in fields.items() if is_set]
            if given and role != self.adapter.role:
                kind = {"guard": "guards", "align": "aligners"}[role]
                raise ValueError(
                    f"{' and '.join(given)}: for {kind} only, and role is {self.adapter.role!r}; leave out"
                )
        given = [field for field in ("beta", "sft_weight") if of_role["align"][field]]
        if given and training.objective != "dpo":
            raise ValueError(f"{given[0]} does nothing for objective 'sft'; leave it out, or set objective = 'dpo'")
        if bool(training.kl_weight) != bool(self.data.benign):
            raise ValueError("kl_weight and data.benign belong together: a weight, and the rows that it acts on")
        return self

    def adapter_config(self, base: Base) -> AdapterConfig:
        """The adapter's configuration on ``base``; an unknown kind is an UnknownNameError."""
        section = self.adapter
        if section.kind == LORA:
            raise ConfigError("Kind 'lora' is a baseline and no adapter of safeside. Call run_lora with this recipe.")
        TRUNKS.get(section.kind)
        options: dict[str, object] = {"name": self.name, "kind": section.kind, "role": section.role}
        if section.head_dim != AdapterSection.model_fields["head_dim"].default:
            options["head_dim"] = section.head_dim
        for field in (
            "labels",
            "layers",
            "width",
            "feed_forward",
            "query_group",
            "tap_rank",
            "gate",
            "bottleneck",
            "cross_attention",
            "depth",
            "lora_rank",
            "readout",
        ):
            value = section.model_dump()[field]
            if value is not None:
                options[field] = value
        if self.data.task is not None:
            task = TASKS.get(self.data.task)
            options = {"labels": task.labels, "windows": task.windows, **options}
        if section.size is not None:
            config = sized_config(base, section.size, section.n_taps, **options)
        else:
            config = make_config(base, reduction=section.reduction, **options)  # type: ignore[arg-type]
        return config if section.windows is None else section.with_windows(config)


def read_recipe(path: str | Path) -> Recipe:
    """The recipe in a TOML file; a missing file, bad TOML or an unknown field is a ConfigError."""
    path = Path(path)
    if not path.exists() or path.is_dir():
        raise ConfigError(f"There is no recipe {path}; expected a TOML file. Examples are in recipes/.")
    try:
        return Recipe.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not TOML: {error}.") from error
    except ValidationError as error:
        raise ConfigError(
            f"{path} is not a valid recipe: {problems_of(error)}. See docs/reference/recipe.md."
        ) from error
