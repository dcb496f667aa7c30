"""Recipes: every field, and every mistake named before anything is computed."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from safeside import Base, flops_share, make_config
from safeside.adapters.adapter import Adapter
from safeside.errors import ConfigError, UnknownNameError
from safeside.train.recipe import Recipe, read_recipe

RECIPES = Path(__file__).parents[2] / "recipes"
EVERYTHING = """
name = "harm"
output = "runs/harm"
seed = 7
stored_dtype = "bfloat16"
[base]
name = "some/base"
revision = "main"
dtype = "bfloat16"
device = "cuda"
[data]
train = ["a.jsonl", "demo:train.jsonl.gz"]
validation = ["b.jsonl"]
limit = 100
max_tokens = 512
partial_labels = true
label_of = { "a.jsonl" = "hate" }
benign = []
leave_out = ["strongreject", "goals.jsonl"]
against = ["hate"]
[adapter]
kind = "lst"
role = "guard"
labels = ["harm", "hate"]
layers = [0, 2, 3]
width = 64
feed_forward = 48
head_dim = 32
query_group = 2
tap_rank = 4
gate = "channel"
bottleneck = 16
readout = "attention"
windows = "min"
start = "pruned"
start_rows = 64
[training]
epochs = 2
batch_size = 8
accumulation = 4
learning_rate = 1e-4
weight_decay = 0.5
warmup = 0.25
max_gradient_norm = 2.0
patience = 1
precision = "bfloat16"
class_weights = "balanced"
soft_weight = 0.5
temperature = 2.0
targets = "prefixes"
objective = "sft"
beta = 0.1
sft_weight = 0.0
kl_weight = 0.0
cache_taps = false
checkpoint_seconds = 5
[teacher]
rank = 4
epochs = 2
learning_rate = 1e-3
batch_size = 4
folds = 3
[calibration]
false_positive_rate = 0.01
benign = ["c.jsonl"]
"""
LEAST = """
name = "harm"
output = "runs/harm"
[data]
train = ["a.jsonl"]
validation = ["b.jsonl"]
"""


def read(tmp_path: Path, text: str | bytes) -> Recipe:
    path = tmp_path / "recipe.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_recipe(path)


TASK = """
name = "hate"
output = "runs/hate"
[data]
task = "grounding"
sources = ["summedits"]
"""


def test_a_task_stands_in_place_of_files(tmp_path: Path, tiny_base: Base) -> None:
    recipe = read(tmp_path, TASK)
    assert (recipe.data.task, recipe.data.sources, recipe.data.train) == ("grounding", ("summedits",), ())
    config = recipe.adapter_config(tiny_base)
    assert (config.labels, config.windows) == (("unsupported",), "min")
    chosen = read(tmp_path, TASK.replace("grounding", "hate") + '[adapter]\nlabels = ["hate", "harassment"]\n')
    assert (chosen.adapter_config(tiny_base).labels, chosen.adapter_config(tiny_base).windows) == (
        ("hate", "harassment"),
        "max",
    )
    assert read(tmp_path, LEAST).adapter_config(tiny_base).windows == "max"
    claims = LEAST + '[adapter]\nlabels = ["unsupported"]\nwindows = "min"\n'
    assert read(tmp_path, claims).adapter_config(tiny_base).windows == "min"
    both = claims.replace('["unsupported"]', '["harm", "unsupported"]').replace('"min"', '{ unsupported = "min" }')
    assert read(tmp_path, both).adapter_config(tiny_base).windows_by_label == ("max", "min")
    with pytest.raises(ConfigError, match=r"windows names harm; expected labels of the guard: unsupported"):
        read(tmp_path, claims.replace('"min"', '{ harm = "min" }')).adapter_config(tiny_base)
    task = TASK + '[adapter]\nlabels = ["unsupported", "harm"]\nwindows = { harm = "max" }\n'
    assert read(tmp_path, task).adapter_config(tiny_base).windows == ("min", "max")
    with pytest.raises(UnknownNameError, match=r"Unknown task 'hat'.*Did you mean 'hate'"):
        read(tmp_path, TASK.replace("grounding", "hat")).adapter_config(tiny_base)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (TASK + 'train = ["a.jsonl"]\n', "task and the files train, validation exclude each other"),
        (TASK + 'validation = ["a.jsonl"]\n', "exclude each other"),
        (TASK + '[adapter]\nrole = "align"\n', "task 'grounding' trains a guard"),
        (LEAST.replace('train = ["a.jsonl"]', ""), "train and validation need a file each"),
        (LEAST + 'sources = ["a"]\n', "sources are those of a task"),
    ],
)
def test_files_and_tasks_do_not_mix(tmp_path: Path, text: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        read(tmp_path, text)


def test_every_field_is_read_as_it_stands(tmp_path: Path) -> None:
    recipe = read(tmp_path, EVERYTHING)
    values = recipe.model_dump(exclude_none=True)
    written = tomllib.loads(EVERYTHING)
    for section, fields in written.items():
        for name, value in fields.items() if isinstance(fields, dict) else ():
            found = values[section][name]
            assert (list(found) if isinstance(found, tuple) else found) == value
    for name in ("name", "output", "seed", "stored_dtype"):
        assert values[name] == written[name]
    # What the text leaves out is the second way to give scores, and the other ways to set the width and the layers.
    assert set(Recipe.model_fields) == set(written)
    for section in ("base", "data", "training", "teacher", "calibration"):
        assert set(values[section]) == set(written[section])
    assert set(type(recipe.adapter).model_fields) - set(written["adapter"]) == {
        "size",
        "n_taps",
        "reduction",
        *OF_ALIGNERS,
    }


def test_most_fields_have_defaults(tmp_path: Path) -> None:
    recipe = read(tmp_path, LEAST)
    assert recipe.base.name == "builtin"
    assert (recipe.adapter.kind, recipe.adapter.role) == ("lst", "guard")
    assert recipe.training.cache_taps
    assert (recipe.calibration.false_positive_rate, recipe.calibration.benign) == (0.05, ())


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (LEAST + "extra = 1\n", "data.extra: Extra inputs are not permitted"),
        (LEAST + "[trianing]\nepochs = 1\n", "trianing: Extra inputs are not permitted"),
        (LEAST + "[training]\nepoch = 1\n", "training.epoch: Extra inputs are not permitted"),
        (LEAST + "[training]\nepochs = 0\n", "training.epochs: Input should be greater"),
        (LEAST + "[training]\nlearning_rate = inf\n", "training.learning_rate: Input should be a finite number"),
        (LEAST + "[training]\nwarmup = 1.0\n", "training.warmup: Input should be less"),
        (LEAST + "[training]\nprecision = 'int8'\n", "training.precision: Input should be 'float32' or 'bfloat16'"),
        (LEAST + "[calibration]\nfalse_positive_rate = 0\n", "calibration.false_positive_rate: Input should be"),
        (LEAST + "[adapter]\nrole = 'judge'\n", "adapter.role: Input should be 'guard' or 'align'"),
        (LEAST + "[adapter]\nhead_dim = 48\n", "adapter.head_dim: Input should be 32, 64 or 128"),
        (LEAST.replace('["a.jsonl"]', "[]"), "data: train and validation need a file each"),
        (LEAST + "[adapter]\nkind = 'plr'\nstart = 'pruned'\n", "only kind 'lst' has a pruned start; got 'plr'"),
        (LEAST + "[adapter]\nstart = 'fisher'\n", "adapter.start: Input should be 'random' or 'pruned'"),
        (LEAST + "[teacher]\nfolds = 1\n", "teacher.folds: Input should be greater than or equal to 2"),
        (LEAST + "[teacher]\nrank = 2\n", "count for nothing while soft_weight is 0"),
        (LEAST + "soft = 's.jsonl'\n", "count for nothing while soft_weight is 0"),
        (
            LEAST + "soft = 's.jsonl'\n[adapter]\nrole = 'align'\n[training]\nsoft_weight = 0.5\n",
            "soft targets are for guards",
        ),
        (LEAST + "soft = 's.jsonl'\n[training]\nsoft_weight = 0.5\n[teacher]\nrank = 2\n", "keep one"),
        (LEAST + "[training]\ntemperature = 0\n", "training.temperature: Input should be greater than 0"),
        (LEAST.replace('"harm"', "3", 1), "name: Input should be a valid string"),
        (LEAST.replace('"harm"', '""', 1), "name: String should have at least 1 character"),
        (LEAST.replace('"runs/harm"', '""', 1), "output: String should have at least 1 character"),
        ("seed = -1\n" + LEAST, "seed: Input should be greater than or equal to 0"),
        ("seed = 99999999999\n" + LEAST, "seed: Input should be less than"),
        ("name = 'x'\noutput = 'y'\n", "data: Field required"),
        ("name = ", "is not TOML"),
        (b"name = '\xff'", "is not TOML"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, text: str | bytes, problem: str) -> None:
    with pytest.raises(ConfigError, match="recipe") as caught:
        read(tmp_path, text)
    assert problem in str(caught.value)


@pytest.mark.parametrize("name", ["none.toml", "."])
def test_a_missing_recipe_is_an_error(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="There is no recipe"):
        read_recipe(tmp_path / name)


# ---- one dial --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dials", "problem"),
    [
        ("size = 0.01\nreduction = 4", "size and reduction all set the width"),
        ("size = 0.01\nwidth = 32", "size and width all set the width"),
        ("reduction = 4\nwidth = 32", "reduction and width all set the width"),
        ("size = 0.01\nlayers = [1]", "size picks the layers too"),
        ("size = 0.01\nkind = 'rtb'", "size is for kind 'lst'"),
        ("width = 32\nn_taps = 2", "n_taps goes with size"),
    ],
)
def test_two_dials_are_one_too_many(tmp_path: Path, dials: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        read(tmp_path, LEAST + "[adapter]\n" + dials)


OF_ALIGNERS = {"cross_attention", "depth", "lora_rank"}


def config_of(tmp_path: Path, base: Base, adapter: str) -> object:
    return read(tmp_path, LEAST + "[adapter]\n" + adapter).adapter_config(base)


def test_the_dial_makes_the_adapter(tmp_path: Path, tiny_base: Base) -> None:
    assert config_of(tmp_path, tiny_base, "reduction = 2") == make_config(tiny_base, reduction=2, name="harm")
    assert config_of(tmp_path, tiny_base, "width = 32") == make_config(tiny_base, width=32, name="harm")
    assert config_of(tmp_path, tiny_base, "") == make_config(tiny_base, reduction=16, name="harm")
    sized = config_of(tmp_path, tiny_base, "size = 0.5")
    assert flops_share(tiny_base, Adapter(sized)) <= 0.5
    small = config_of(tmp_path, tiny_base, "size = 0.2")
    assert flops_share(tiny_base, Adapter(small)) < flops_share(tiny_base, Adapter(sized))
    assert config_of(tmp_path, tiny_base, "size = 0.5\nn_taps = 2").layers == (2, 3)


def test_every_dimension_reaches_the_adapter(tmp_path: Path, tiny_base: Base) -> None:
    recipe = read(tmp_path, EVERYTHING.replace("bottleneck = 16\n", ""))
    config = recipe.adapter_config(tiny_base)
    assert config_of(tmp_path, tiny_base, "kind = 'rtb'\nbottleneck = 16").bottleneck == 16
    of_training = {"start", "start_rows"}
    fields = (
        set(type(recipe.adapter).model_fields)
        - {"size", "n_taps", "reduction", "bottleneck", *OF_ALIGNERS}
        - of_training
    )
    for field in fields:
        assert config.model_dump()[field] == recipe.adapter.model_dump()[field]
    assert config.name == "harm"
    top = config_of(tmp_path, tiny_base, "role = 'align'\nkind = 'toplayers'\ndepth = 3\nlora_rank = 4")
    assert (top.depth, top.lora_rank) == (3, 4)
    assert config_of(tmp_path, tiny_base, "kind = 'lst_plus'\ncross_attention = true").cross_attention


def test_what_the_base_cannot_carry_is_an_error(tmp_path: Path, tiny_base: Base) -> None:
    for adapter, problem in (
        ("layers = [9]", "layers must lie in 0..3"),
        ("role = 'align'\nlabels = ['a']", "no labels"),
    ):
        with pytest.raises(ConfigError, match=problem):
            config_of(tmp_path, tiny_base, adapter)
    with pytest.raises(UnknownNameError, match="Unknown adapter kind 'lts'"):
        config_of(tmp_path, tiny_base, "kind = 'lts'")


@pytest.mark.parametrize(
    ("adapter", "problem"),
    [
        ("kind = 'rtb'\nreduction = 4", "'reduction' does nothing for a guard of kind 'rtb'"),
        ("kind = 'plr'\nreduction = 4", "'reduction' does nothing for a guard of kind 'plr'"),
        ("kind = 'rtb'\nwidth = 32", "'width' does nothing for kind 'rtb'"),
        ("kind = 'rtb'\nhead_dim = 64", "'head_dim' does nothing for kind 'rtb'"),
        ("kind = 'plr'\ngate = 'channel'", "'gate' does nothing for kind 'plr'"),
        ("bottleneck = 8", "'bottleneck' does nothing for kind 'lst'"),
        ("role = 'align'\nreadout = 'attention'", "'readout' is for guards"),
    ],
)
def test_what_the_kind_would_ignore_is_an_error(tmp_path: Path, tiny_base: Base, adapter: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        config_of(tmp_path, tiny_base, adapter)


@pytest.mark.parametrize(
    ("section", "field"),
    [
        ("[training]\nclass_weights = 'balanced'", "class_weights"),
        ("[training]\nsoft_weight = 0.5", "soft_weight"),
        ("[calibration]\nfalse_positive_rate = 0.1", "calibration"),
    ],
)
def test_what_is_for_guards_is_refused_for_aligners(tmp_path: Path, section: str, field: str) -> None:
    with pytest.raises(ConfigError, match=f"{field}: for guards only, and role is 'align'"):
        read(tmp_path, LEAST + "[adapter]\nrole = 'align'\n" + section)
    assert read(tmp_path, LEAST + section).adapter.role == "guard"


@pytest.mark.parametrize(
    "path",
    sorted({*RECIPES.rglob("*.toml")} - {RECIPES / "genes" / "gene.toml"}),  # a gene's recipe has a test of its own
    ids=lambda path: path.name,
)
def test_every_recipe_of_the_project_is_valid(path: Path) -> None:
    assert read_recipe(path).name


@pytest.mark.parametrize(
    ("role", "text", "problem"),
    [
        ("guard", "objective = 'dpo'", "objective: for aligners only, and role is 'guard'"),
        ("guard", "kl_weight = 0.5", "kl_weight: for aligners only, and role is 'guard'"),
        ("align", "beta = 0.5", "beta does nothing for objective 'sft'"),
        ("align", "sft_weight = 1.0", "sft_weight does nothing for objective 'sft'"),
        ("guard", "sft_weight = 1.0", "sft_weight: for aligners only"),
        ("align", "objective = 'ppo'", "training.objective: Input should be 'sft' or 'dpo'"),
        ("align", "objective = 'dpo'\nbeta = 0", "training.beta: Input should be greater"),
        ("align", "objective = 'dpo'\nbeta = nan", "training.beta: Input should be"),
        ("align", "kl_weight = -1.0", "training.kl_weight: Input should be"),
        ("align", "kl_weight = 0.5", "kl_weight and data.benign belong together"),
    ],
)
def test_objectives_are_checked(tmp_path: Path, role: str, text: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        read(tmp_path, f"{LEAST}[adapter]\nrole = '{role}'\n[training]\n{text}\n")
