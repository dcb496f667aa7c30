"""The models of the genes benchmark: trained by recipes, merged into checkpoints, and kept on disk."""

from __future__ import annotations

import hashlib
import json
import time
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import load_file
from torch import Tensor

from genes_rows import (
    ATTACKS,
    HARMFUL_SHARE,
    LEAST_UNALIGNED,
    LONGEST,
    MIXED,
    N_VALIDATION,
    SOURCES,
    Sizes,
    read_pairs,
    write_rows,
)
from safeside.base.model import Base, load_base
from safeside.errors import InputError
from safeside.genes.artifact import load_gene, save_gene
from safeside.genes.baselines import SaloraSettings, train_salora, with_added
from safeside.genes.extract import Pair, extract_gene
from safeside.genes.gene import Gene, changed
from safeside.genes.merge import save_checkpoint
from safeside.genes.recipe import FitSection, GeneRecipe, Selection, SelectSection
from safeside.genes.rows import Conversation, answer_loss, encode_texts
from safeside.genes.select import select_layers
from safeside.lora import CONFIG_FILE, WEIGHTS_FILE
from safeside.provenance import config_hash
from safeside.train.recipe import Recipe
from safeside.train.run_lora import run_lora
from safeside.types import Message
from tidy import write_json

RECIPES = Path(__file__).parents[1] / "recipes" / "genes"
FORMAT = 3  # of models and cells: another one makes them all anew
MAIN_SHOTS = 32  # of the rows that methods are compared by
ANSWER, LABEL = 32, 6  # tokens of an answer to an attack, and of a class's name
SALORA_RATES = (1.0, 0.3)  # times the recipe's learning rate
TRIED_RESTA = (0.25, 0.5, 1.0, 2.0, 4.0), (1.0, 0.7)  # strengths and densities that RESTA's are chosen from
SAFE_LORA = (0.05, 0.1, 0.15, 0.2, 0.25, 0.35, 0.5, 0.7, 1.0)  # thresholds
SAFE_MERGE = (0.15, 0.25, 0.35, 0.7, 1.01), (0.8, 0.5, 0.3)  # thresholds and shares of the task's updates
RATE_OF = 0, "dolly"  # seed and task of the model whose shots choose SaLoRA's rate


@dataclass(frozen=True)
class Setup:
    """Everything that models and cells depend on."""

    data: Path
    cells: Path
    sizes: Sizes
    base: str = "builtin"
    fingerprint: str = ""
    epochs: int | None = None
    """Of every recipe, in place of its own; for a quick run."""
    steps: int | None = None
    """Of every fit and extraction, in place of the recipe's; for a quick run."""

    @cached_property
    def key(self) -> str:
        """Hash of the setting: the content of data and recipes, and the constants that rows and answers depend on."""
        files = {path: _digest_of(self.data / path) for path in (*SOURCES.values(), *ATTACKS)}
        recipes = {path.name: _without_base(path) for path in sorted(RECIPES.glob("*.toml"))}
        lengths = [ANSWER, LABEL, LONGEST, N_VALIDATION, HARMFUL_SHARE, LEAST_UNALIGNED, MAIN_SHOTS, *SALORA_RATES]
        own = [asdict(self.sizes), self.base, self.fingerprint, self.epochs, self.steps, MIXED, RATE_OF]
        own += [TRIED_RESTA, SAFE_LORA, SAFE_MERGE]
        return config_hash([FORMAT, *own, lengths, files, recipes])


@dataclass(frozen=True, slots=True)
class Choice:
    """How the layers of a gene are chosen."""

    selection: Selection = "shift"
    keep: int | None = None
    """Layers that are kept, in place of the recipe's."""
    draw: int = 0
    """By chance: which draw of the seed's."""

    @property
    def title(self) -> str:
        """Of its folder."""
        more = [f"keep{self.keep}"] if self.keep else []
        return "-".join([self.selection, *more, *([f"draw{self.draw}"] if self.draw else [])])


SHIFT = Choice()


class Models:
    """The models of one seed, each made when it is first asked for."""

    def __init__(self, setup: Setup, seed: int) -> None:
        self.setup, self.seed = setup, seed
        self.folder = setup.cells / f"{setup.key}-{seed}"

    @cached_property
    def rows(self) -> Path:
        """The folder of rows."""
        place = self.folder / "rows"
        if not (place / "counts.json").is_file():
            counts = write_rows(self.setup.data, place, self.setup.sizes, self.seed)
            write_json(place / "counts.json", counts)
        return place

    def conversations(self, name: str) -> list[Conversation]:
        """The rows of a file, as prompts and answers."""
        pairs = read_pairs(self.rows / f"{name}.jsonl")
        return [
            (Message("user", prompt), *([Message("assistant", answer)] if answer else [])) for prompt, answer in pairs
        ]

    def shots(self, task: str, n_shots: int) -> tuple[list[Conversation], list[Conversation]]:
        """Refusals and task rows that scalars, and the settings of baselines, are chosen on."""
        refusals, rows = self.conversations("shots"), self.conversations(f"{task}_validation")
        if min(len(refusals), len(rows)) < n_shots:
            raise InputError(f"{task} has {len(refusals)} refusals and {len(rows)} rows to fit on; use fewer.")
        return refusals[:n_shots], rows[:n_shots]

    def attacks(self) -> list[Conversation]:
        """The harmful prompts that answers are judged on."""
        return self.conversations("attacks")

    def aligned(self) -> Path:
        """The aligned model."""
        return self.tuned("aligned", None)

    def degraded(self) -> Path:
        """Its copy after a short harmless fine-tune."""
        return self.tuned("degraded", self.aligned())

    def task(self, name: str) -> Path:
        """A task model, tuned from the aligned one."""
        return self.tuned(name, self.aligned())

    def realigned(self, name: str) -> Path:
        """A task model after safety fine-tuning."""
        return self.tuned("realigned", self.task(name), f"realigned-{name}")

    def unaligned(self) -> Path:
        """The aligned model after a short harmful fine-tune: what RESTA takes away from the aligned one."""
        return self.tuned("unaligned", self.aligned())

    def safety(self) -> Path:
        """A further safety fine-tune of the aligned model."""
        return self.tuned("safety", self.aligned())

    def tuned(self, recipe_name: str, start: Path | None, title: str = "") -> Path:
        """The model that a recipe makes of another one; beside it facts.json tells seconds and parameters."""

        def make(place: Path) -> None:
            recipe = self._recipe(recipe_name)
            base = load_base(start or self.setup.base)
            with TemporaryDirectory() as scratch:
                run = run_lora(recipe, data_root=self.rows, output=Path(scratch), base=base)
                save_checkpoint(with_added(base, lora_matrices(Path(scratch))), place)
            facts = {"seconds": run.outcome.train_seconds, "trainable_params": run.outcome.trainable_params}
            write_json(place / "facts.json", facts)

        return self.made(title or recipe_name, make)

    def salora(self, task: str) -> Path:
        """A task model that SaLoRA tuned from the aligned one, in as many steps as the plain one."""

        def make(place: Path) -> None:
            share = Models(self.setup, RATE_OF[0]).salora_rate()
            started, base = time.perf_counter(), load_base(self.aligned())
            added = self._salora(base, task, share)
            save_checkpoint(with_added(base, added), place)
            n_weights = sum(SaloraSettings().rank * sum(matrix.shape) for matrix in added.values())
            costs = {"seconds": time.perf_counter() - started, "trainable_params": n_weights}
            write_json(place / "facts.json", {**costs, "setting": f"rate x {share}"})

        return self.made(f"salora-{task}", make)

    def salora_rate(self) -> float:
        """The share of the plain learning rate that SaLoRA learns at: the loss on one model's shots chooses for all.

        No lower ones are tried, for of those the best is none: the aligned model has the lowest loss of all.
        """

        def make(place: Path) -> None:
            base, task = load_base(self.aligned()), RATE_OF[1]
            shots = self.shots(task, MAIN_SHOTS)
            losses = {
                share: loss_on(with_added(base, self._salora(base, task, share)), shots) for share in SALORA_RATES
            }
            write_json(place / "rate.json", {"rate": min(losses, key=losses.__getitem__), "losses": losses})

        return float(json.loads((self.made("salora-rate", make) / "rate.json").read_text(encoding="utf-8"))["rate"])

    def _salora(self, base: Base, task: str, share: float) -> Mapping[str, Tensor]:
        recipe, rows = self._recipe(task).training, self.conversations(f"{task}_train")
        settings = SaloraSettings(
            n_steps=recipe.epochs * -(-len(rows) // recipe.batch_size),
            batch_size=recipe.batch_size,
            learning_rate=share * recipe.learning_rate,
            seed=self.seed,
        )
        return train_salora(base, self.conversations("harmful")[:128], rows, settings)

    def gene(self, choice: Choice = SHIFT, part: int | None = None) -> Gene:
        """The seed's gene with layers chosen in one way; ``part`` 0 or 1 is one of half of the harmful prompts."""
        name = "safety" if part is None else f"safety_{part}"
        recipe = self._gene_recipe(name)
        harmful, benign = self.conversations("harmful"), self.conversations("benign")
        if part is not None:
            harmful = harmful[part::2]

        def extract(place: Path) -> None:
            pair = Pair(load_base(self.aligned()), load_base(self.degraded()))
            save_gene(extract_gene(pair, harmful, benign, recipe), place)

        whole = load_gene(self.made(f"gene-{name}", extract))

        def select(place: Path) -> None:
            kept = min(choice.keep or recipe.select.keep, len(whole.config.layers))
            settings = SelectSection(method=choice.selection, keep=kept, n_prompts=recipe.select.n_prompts)
            seeded = recipe.model_copy(update={"seed": recipe.seed + 1000 * choice.draw})
            drawn = Gene(changed(whole.config, {"recipe": seeded}), whole.updates)
            save_gene(select_layers(load_base(self.degraded()), drawn, harmful, benign, settings), place)

        return load_gene(self.made(f"gene-{name}-{choice.title}", select))

    def _recipe(self, name: str) -> Recipe:
        values = tomllib.loads((RECIPES / f"{name}.toml").read_text(encoding="utf-8"))
        training = {**values["training"], **({"epochs": self.setup.epochs} if self.setup.epochs else {})}
        base = {"name": self.setup.base}
        return Recipe.model_validate({**values, "seed": self.seed, "base": base, "training": training})

    def _gene_recipe(self, name: str) -> GeneRecipe:
        values = tomllib.loads((RECIPES / "gene.toml").read_text(encoding="utf-8"))
        steps = {"steps": self.setup.steps} if self.setup.steps else {}
        changes = {part: {**values[part], **steps} for part in ("extract", "fit")}
        return GeneRecipe.model_validate({**values, **changes, "name": name, "seed": self.seed})

    def made(self, title: str, make: Callable[[Path], None]) -> Path:
        """A folder, made if missing, whole or not at all."""
        place = self.folder / title
        if not place.is_dir():
            self.folder.mkdir(parents=True, exist_ok=True)
            with TemporaryDirectory(dir=self.folder) as scratch:
                make(Path(scratch) / "made")
                if not place.is_dir():  # another process may have been quicker
                    (Path(scratch) / "made").rename(place)
        return place


def loss_on(base: Base, shots: Sequence[Sequence[Conversation]]) -> float:
    """What settings are chosen by, as a gene's scalars are fitted: the loss on refusals' first tokens and task rows."""
    fit = FitSection.model_validate(tomllib.loads((RECIPES / "gene.toml").read_text(encoding="utf-8"))["fit"])
    refusals, rows = shots
    return _loss(base, refusals, fit.refusal_tokens) + _loss(base, rows)


@torch.no_grad()
def _loss(base: Base, rows: Sequence[Conversation], n_first: int = 0) -> float:
    texts = encode_texts(base, rows, "examples", answered=True)
    return float(answer_loss(base, texts.batch(base, range(len(texts))), n_first))


def _without_base(path: Path) -> dict[str, object]:
    """A recipe's values but for its base, which the benchmark sets."""
    values = tomllib.loads(path.read_text(encoding="utf-8"))
    return {name: value for name, value in values.items() if name != "base"}


def _digest_of(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def facts_of(folder: Path) -> dict[str, object]:
    """Seconds and trainable parameters of a model that was trained, and the setting that was chosen."""
    return dict(json.loads((folder / "facts.json").read_text(encoding="utf-8")))


def lora_matrices(folder: Path) -> Mapping[str, Tensor]:
    """What a LoRA in a peft folder adds to each layer."""
    weights = load_file(folder / WEIGHTS_FILE)
    values = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    scale = values["lora_alpha"] / values["r"]
    downs = {name: tensor for name, tensor in weights.items() if ".lora_A." in name}
    return {
        name.removeprefix("base_model.model.").partition(".lora_")[0]: scale
        * (weights[name.replace(".lora_A.", ".lora_B.")].float() @ down.float())
        for name, down in downs.items()
    }
