"""``safeside train RECIPE --dry-run``: whether a recipe fits together, without weights and without a network.

Base and adapter are built on the meta device from the base's dimensions, an adapter's shapes are run through, what the
run will take is reckoned, and the data that is here is read as far as its columns.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from importlib.resources import files
from itertools import islice
from pathlib import Path

import torch
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from safeside.adapters.adapter import Adapter
from safeside.adapters.sizing import base_matmuls, flops_share, geometry_base
from safeside.adapters.toplayers import TopLayers
from safeside.base.model import BUILTIN_NAME, Base
from safeside.base.packaged import PACKAGED, packaged_folder
from safeside.base.taps import Tape
from safeside.errors import ConfigError, InputError, UnknownNameError
from safeside.lora import linear_layers
from safeside.tasks.rows import BadRow, example_of
from safeside.tasks.sources import HUB, Fields, example_from, hub_place
from safeside.tasks.task import TASKS, rows_of_tests
from safeside.train.estimate import adapter_memory, linear_layers_of, lora_memory, tokens_of
from safeside.train.pruning import check_start
from safeside.train.recipe import LORA, Recipe, read_recipe
from safeside.train.run_lora import lora_shape
from safeside.train.splits import goals_to_leave_out, rows_at
from safeside.types import Example

N_READ = 1000  # rows of each place whose columns are looked at


def dry_run(path: Path, data_root: Path) -> dict[str, object]:
    """What the recipe at ``path`` would build and take, what is known of its data, and its problems.

    A recipe, geometry or adapter that does not fit together is the ConfigError or InputError that training would give.
    Data that is not here, or whose columns do not fit, stands among the ``problems``; a set on the hub that is pinned
    and not here is none.
    """
    recipe = read_recipe(path)
    base = meta_base(recipe, path.parent)
    if recipe.adapter.kind == LORA:
        facts = _lora_facts(base, recipe)
        labels: tuple[str, ...] = ()
    else:
        adapter = meta_adapter(base, recipe)
        check_shapes(base, adapter)
        if recipe.adapter.start == "pruned":
            check_start(base, adapter)
        facts, labels = _adapter_facts(base, adapter, recipe), adapter.config.labels
    data, problems = _data_facts(recipe, data_root, labels)
    return {
        "recipe": recipe.name,
        "base": recipe.base.name,
        "kind": recipe.adapter.kind,
        "role": recipe.adapter.role,
        "base_params": sum(parameter.numel() for parameter in base.model.parameters()),
        **facts,
        "tokens_per_step": tokens_of(base, recipe),
        **({"not_counted": "the teacher's own run"} if recipe.teacher else {}),
        **data,
        "problems": problems,
    }


def meta_base(recipe: Recipe, folder: Path) -> Base:
    """The recipe's base on the meta device: from its geometry in ``folder``, or a configuration that is on disk."""
    config = _config_of(recipe, folder)
    base = geometry_base(config, recipe.base.name)
    dtype = recipe.base.dtype or ("float32" if recipe.base.device == "cpu" else "bfloat16")
    torch.nn.Module.to(base.model, vars(torch)[dtype])
    return base


def _config_of(recipe: Recipe, folder: Path) -> PreTrainedConfig:
    section = recipe.base
    if section.geometry is not None:
        return _geometry(folder / section.geometry)
    place = Path(section.name)
    if section.name == BUILTIN_NAME:
        place = Path(str(files("safeside.builtin") / "base"))
    elif section.name in PACKAGED:
        place = packaged_folder(section.name)
    if place.is_dir():
        config: PreTrainedConfig = AutoConfig.from_pretrained(place)
        return config
    raise ConfigError(
        f"A dry run asks no network, and the dimensions of {section.name!r} are not here; expected [base] geometry = "
        "'FILE.json' with what its config.json says, or a folder. Add one."
    )


def _geometry(path: Path) -> PreTrainedConfig:
    """The configuration in a file of dimensions; what is missing or not one is a ConfigError."""
    try:
        values = dict(json.loads(path.read_text(encoding="utf-8")))
        config: PreTrainedConfig = CONFIG_MAPPING[str(values.pop("model_type", None))](**values)
        return config
    except OSError as error:
        raise ConfigError(f"[base] geometry: {path} cannot be read: {error.strerror}. Check the path.") from error
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(
            f"[base] geometry: {path} is no base's configuration: {error!r}. Expected JSON with model_type and the "
            "dimensions of config.json."
        ) from error


def meta_adapter(base: Base, recipe: Recipe) -> Adapter:
    """The recipe's adapter on the meta device."""
    config = recipe.adapter_config(base)
    with torch.device("meta"):
        adapter = Adapter(config)
    if isinstance(adapter.trunk, TopLayers):
        adapter.trunk.bind(base)
    return adapter


@torch.no_grad()
def check_shapes(base: Base, adapter: Adapter) -> None:
    """Run states without values through the adapter; a shape that does not fit is a ConfigError.

    The blocks of ``toplayers`` are the base's own and fit by construction; their masks need values: they are not run.
    """
    if isinstance(adapter.trunk, TopLayers):
        return
    n_rows, n_tokens = 2, 24  # more than a short pass, which decoding would be
    with torch.device("meta"):
        tape = Tape(torch.ones(n_rows, n_tokens, dtype=torch.bool), n_tokens, is_causal=not base.is_encoder)
        state = torch.empty(n_rows, n_tokens, base.d_model, dtype=base.dtype)
        tape.final = state
        try:
            for layer in adapter.config.layers:
                adapter.read(tape, layer, state)
            output = adapter(tape)
        except RuntimeError as error:
            raise ConfigError(f"The adapter does not fit {base.name}: {error}. Check [adapter].") from error
    found = output.delta if adapter.config.role == "align" else output.scores
    last = base.d_model if adapter.config.role == "align" else len(adapter.config.labels)
    if found is None or tuple(found.shape) != (n_rows, n_tokens, last):
        shape = None if found is None else tuple(found.shape)
        raise ConfigError(f"The adapter gives {shape}; expected {(n_rows, n_tokens, last)}. Check its trunk.")


def _adapter_facts(base: Base, adapter: Adapter, recipe: Recipe) -> dict[str, object]:
    trained = sum(parameter.numel() for parameter in adapter.parameters() if parameter.requires_grad)
    facts: dict[str, object] = {
        "layers": len(adapter.config.layers),
        "width": adapter.config.width,
        "trainable_params": trained,
        "flops_share": round(flops_share(base, adapter), 6),
        **adapter_memory(base, adapter, recipe).in_gigabytes(),
    }
    if recipe.training.cache_taps:
        n_layers = len(adapter.config.layers) + (adapter.config.role == "align")
        n_bytes = n_layers * base.d_model * base.dtype.itemsize
        facts["disk_gb_per_million_tokens"] = round(n_bytes / 1e3, 3)
    return facts


def _lora_facts(base: Base, recipe: Recipe) -> dict[str, object]:
    shape = lora_shape(recipe)
    names = linear_layers(base, shape.targets, shape.depth)
    sizes = [size for name in names for size in linear_layers_of(base.model.get_submodule(name))]
    trained = sum(shape.rank * (n_in + n_out) for n_in, n_out in sizes)
    return {
        "layers": shape.depth or base.n_layers,
        "rank": shape.rank,
        "trainable_params": trained,
        "flops_share": round(trained / base_matmuls(base), 6),
        **lora_memory(base, names, trained, recipe).in_gigabytes(),
    }


# ---- data ------------------------------------------------------------------------------------------------------------


def _data_facts(recipe: Recipe, root: Path, labels: tuple[str, ...]) -> tuple[dict[str, object], list[str]]:
    """What is known of each place, and what is wrong."""
    facts: dict[str, object] = {}
    problems: list[str] = []
    for place, fields, names in _places(recipe, labels):
        try:
            facts[place] = _looked_at(recipe, (place, fields, names), root, problems)
        except (InputError, ConfigError) as error:
            facts[place] = "cannot be used"
            problems.append(f"{place}: {error}")
    kept_apart: dict[str, tuple[Callable[[Sequence[str], Path], Sequence[object]], str, str]]
    kept_apart = {f"leave_out {name}": (goals_to_leave_out, name, "goals") for name in recipe.data.leave_out}
    kept_apart |= {f"against {name}": (rows_of_tests, name, "test rows") for name in recipe.data.against}
    for place, (read, name, what) in kept_apart.items():
        try:
            facts[place] = f"{len(read([name], root))} {what}"
        except (InputError, ConfigError, UnknownNameError) as error:
            facts[place] = "cannot be used"
            problems.append(f"{place}: {error}")
    return facts, list(dict.fromkeys(problems))


Place = tuple[str, Fields | None, tuple[str, ...] | None]
"""A place, how its rows are read, and the labels that they must have: None for harmless rows, labelled or not."""


def _places(recipe: Recipe, labels: tuple[str, ...]) -> Iterator[Place]:
    """Each place that the recipe names."""
    data = recipe.data
    if data.task is not None:
        task = TASKS.get(data.task)
        for source in task.narrowed(data.sources).sources if data.sources else task.sources:
            for part in (source.train, source.validation, source.test):
                if part is not None:
                    yield part.place, source.fields, labels
    for name in (*data.train, *data.validation):
        yield name, None, (data.label_of[name],) if name in data.label_of else labels
    for name in (*data.benign, *recipe.calibration.benign):
        yield name, None, None


def _looked_at(recipe: Recipe, where: Place, root: Path, problems: list[str]) -> str:
    """What the first rows of a place are; those that do not fit go to ``problems``."""
    place, fields, labels = where
    if place.startswith(HUB):
        copy = hub_place(place).copy_in(root)
        if not copy.is_dir():
            return f"not here, so not checked; it is fetched from the hub, or read from {copy}"
    n_usable, bad = 0, list[BadRow]()
    for row in islice(rows_at(place, root), N_READ):
        problem = row if isinstance(row, BadRow) else _problem_of(recipe, row, fields, labels)
        if problem is None:
            n_usable += 1
        else:
            bad.append(problem)
    if not n_usable:
        problems.append(f"{place} has no usable row among its first {N_READ}.")
    if bad:
        problems.append(f"{place}: line {bad[0].line}: {bad[0].problem}")
    return f"{n_usable} usable and {len(bad)} bad among the first {n_usable + len(bad)} rows"


def _problem_of(
    recipe: Recipe, row: tuple[int, dict[str, object]], fields: Fields | None, labels: tuple[str, ...] | None
) -> BadRow | None:
    line, values = row
    try:
        if fields is not None:
            example_from(fields, values, labels or (), line)
            return None
        example = example_of(values, labels or (), line, partial=recipe.data.partial_labels)
        is_learnt = recipe.adapter.role == "align" and labels is not None
        missing = _missing_answer(recipe, example) if is_learnt else ""
    except InputError as error:
        return BadRow(line, str(error))
    return BadRow(line, missing) if missing else None


def _missing_answer(recipe: Recipe, example: Example) -> str:
    """What an aligner's row lacks."""
    if example.messages[-1].role != "assistant":
        return "a row without an answer; expected 'prompt' and 'response'"
    if recipe.training.objective == "dpo" and example.rejected is None:
        return "no preference; expected 'prompt', 'chosen' and 'rejected'"
    return ""
