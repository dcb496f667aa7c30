"""Trained aligners, baselines and the gate of the alignment benchmark: one cached folder for each recipe and seed."""

from __future__ import annotations

import functools
import math
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from align_rows import make_rows
from safeside.adapters.adapter import Adapter
from safeside.adapters.sizing import flops_share
from safeside.artifact import load_adapter, read_provenance
from safeside.base.model import Base, load_base
from safeside.evals.methods import Aligned, Method, WithLora
from safeside.mixing import as_policy
from safeside.provenance import config_hash
from safeside.terminal import note
from safeside.train.recipe import LORA, AdapterSection, DataSection, Recipe, TrainingSection, read_recipe
from safeside.train.run import run_recipe
from safeside.train.run_lora import run_lora

RECIPES = Path(__file__).parents[1] / "recipes" / "align"
GATE = "gate"
KINDS = ("lst", "state_map", "toplayers", "lst_plus")
LORAS = ("lora_dpo", "lora_sft", "lora_top")
FORMAT = 1  # of a trained folder; raise it when older ones must not be used again

Changes = Mapping[str, object]
"""What a try changes in the recipe: fields of its data, adapter or training section."""


class MissingError(Exception):
    """Something that was not made yet, and that this run has no time to make."""


@dataclass(frozen=True)
class Clock:
    """When a run stops making what is not there."""

    end: float = math.inf
    """As ``time.monotonic`` counts."""

    def check(self) -> None:
        """Raise MissingError when the time is over."""
        if time.monotonic() >= self.end:
            raise MissingError


@dataclass(frozen=True)
class Setup:
    """What everything in a run shares."""

    data: Path
    """The public data sets."""
    cells: Path
    """Cached rows, folders and records."""
    base_name: str = "builtin"
    """What the base is loaded by."""
    limit: int | None = None
    """Training rows of each run; all unless given."""
    epochs: int | None = None
    """Of each run; the recipe's unless given."""
    clock: Clock = Clock()
    """How long there is."""
    device: str = "cpu"
    """Of the base."""

    @functools.cached_property
    def base(self) -> Base:
        """The base, loaded once."""
        return load_base(self.base_name, device=self.device)

    @property
    def rows(self) -> Path:
        """The folder of training rows."""
        return self.cells / "rows"

    @functools.cached_property
    def counts(self) -> dict[str, object]:
        """Training rows by file, which are made where they are missing."""
        return make_rows(self.base, self.data, self.rows)


@dataclass(frozen=True)
class Trained:
    """One trained aligner or baseline."""

    name: str
    """Of the recipe: what results call the method."""
    seed: int
    """Of first weights and the order of rows."""
    folder: Path
    """As ``save_adapter`` or peft writes it, with the run's facts."""
    base: Base = field(repr=False)
    """The base that it was trained for."""

    @functools.cached_property
    def adapter(self) -> Adapter:
        """The aligner; of a LoRA there is none."""
        return load_adapter(self.folder, self.base)

    @property
    def facts(self) -> dict[str, str]:
        """Seconds, memory and parameters of the run, and its validation figure."""
        return read_provenance(self.folder)

    @property
    def share(self) -> float:
        """Multiply-adds a token over the base's."""
        known = self.facts.get("flops_share")
        return float(known) if self.name in LORAS and known else flops_share(self.base, self.adapter)

    def at(self, strength: float) -> Method:
        """It as a way to answer, at a fixed strength."""
        if self.name in LORAS:
            return WithLora(self.base, self.folder, strength, self.name)
        return Aligned(self.base, self.adapter, as_policy(strength))


def recipe_of(setup: Setup, name: str, seed: int, changes: Changes) -> Recipe:
    """The recipe in ``recipes/align``, with another seed and what a try changes."""
    values = read_recipe(RECIPES / f"{name}.toml").model_dump(exclude_unset=True)
    sections = {"data": DataSection, "adapter": AdapterSection, "training": TrainingSection}
    for field_name, value in changes.items():
        (section,) = [each for each, model in sections.items() if field_name in model.model_fields]
        values[section][field_name] = value
    values["training"] |= {} if setup.epochs is None else {"epochs": setup.epochs}
    values["data"] |= {} if setup.limit is None else {"limit": setup.limit}
    return Recipe.model_validate({**values, "seed": seed, "base": {"name": setup.base_name}})


def trained(setup: Setup, name: str, seed: int, changes: Changes | None = None, *, makes: bool = True) -> Trained:
    """The method ``name`` trained with ``seed``, from the cache or now; a run that was killed goes on.

    What is not there when the time is over, or with ``makes`` off, is MissingError.
    """
    recipe = recipe_of(setup, name, seed, changes or {})
    files = [*recipe.data.train, *recipe.data.validation, *recipe.data.benign]
    described = recipe.model_dump(exclude_defaults=True, exclude={"output"})
    known = [FORMAT, described, _hash_of(setup, tuple(files)), setup.base.fingerprint.model_dump()]
    folder = setup.cells / "trained" / f"{name}-{seed}-{config_hash(known)}"
    if not (folder / "provenance.json").is_file():
        (setup.clock if makes else Clock(0.0)).check()
        note(f"{name}, seed {seed}: training {dict(changes or {})}")
        run = run_lora if recipe.adapter.kind == LORA else run_recipe
        run(recipe, data_root=setup.rows, output=folder, base=setup.base, resume=True)
        shutil.rmtree(folder / "taps", ignore_errors=True)
    return Trained(name, seed, folder, setup.base)


@functools.cache
def _hash_of(setup: Setup, names: tuple[str, ...]) -> str:
    """Hash of what some files of rows hold."""
    assert setup.counts
    return config_hash([(setup.rows / name).read_text(encoding="utf-8") for name in names])
