"""Dry runs: every recipe of the project fits together, on tensors that hold nothing."""

from __future__ import annotations

import json
import re
import socket
from itertools import takewhile
from pathlib import Path

import pytest
import torch

import safeside.train.dry_run
import safeside.train.estimate
import safeside.train.run
from recipes_for_tests import guard_rows, preference_rows, recipe
from safeside import Adapter, Base, create_adapter, flops_share, make_config
from safeside.adapters.config import AdapterConfig
from safeside.adapters.sizing import geometry_base
from safeside.adapters.toplayers import TopLayers
from safeside.base.taps import Tape
from safeside.errors import ConfigError
from safeside.evals.suites import LOCAL_SUITES, SUITES
from safeside.lora import add_lora
from safeside.tasks.task import TASKS
from safeside.train.dry_run import check_shapes, dry_run, meta_adapter, meta_base
from safeside.train.estimate import adapter_memory, kept_in_training, lora_memory, tokens_of
from safeside.train.recipe import LORA, Recipe, read_recipe
from safeside.train.run import run_recipe
from safeside.train.run_lora import lora_shape
from safeside.train.splits import load_splits
from tasks.conformance import make_data, write_place
from tiny import tiny_config

RECIPES = Path(__file__).parents[2] / "recipes"
PAPER = RECIPES / "paper"
ALL = sorted({*RECIPES.rglob("*.toml")} - {RECIPES / "genes" / "gene.toml"})  # a gene is no training run
UNPINNED = "@REVISION#"
REVISION, OTHER = "0123456789" * 4, "abcdef0123" * 4
NEAR = 0.1  # promised; found are the same numbers
_CHECKED: set[str] = set()
_COUNTED: dict[tuple[str, str, int], tuple[int, int]] = {}


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a dry run asks no network")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture
def shapes_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recipes that differ in their labels alone have one trunk: it is run once, and counted once for as many tokens."""

    def trunk_of(config: AdapterConfig) -> str:
        return config.model_dump_json(exclude={"name", "labels", "windows"})

    def count(base: Base, config: AdapterConfig, of: Recipe) -> tuple[int, int]:
        key = trunk_of(config), of.training.precision, tokens_of(base, of)
        if key not in _COUNTED:
            _COUNTED[key] = kept_in_training(base, config, of)
        return _COUNTED[key]

    def check(base: Base, adapter: torch.nn.Module) -> None:
        trunk = trunk_of(adapter.config)
        if trunk not in _CHECKED:
            check_shapes(base, adapter)
            _CHECKED.add(trunk)

    monkeypatch.setattr(safeside.train.dry_run, "check_shapes", check)
    monkeypatch.setattr(safeside.train.estimate, "kept_in_training", count)


def write_files(of: Recipe, root: Path) -> None:
    """Rows for every local file that a recipe or its task names."""
    labels = of.adapter.labels or ("harm",)
    for name in (*of.data.train, *of.data.validation, *of.data.benign, *of.calibration.benign):
        if name.startswith(("hub:", "demo:")):
            continue
        rows = guard_rows(8, 1) if of.adapter.role == "guard" else preference_rows(8, 1)
        if len(labels) > 1:
            rows = [{**row, "label": dict.fromkeys(labels, row["label"]), "soft": None} for row in rows]
        if name in of.calibration.benign or name in of.data.benign:
            rows = [{"prompt": row["prompt"], "label": 0} for row in rows]
        write_place(name, rows, root)
    for name in of.data.leave_out:
        write_suite(name, root)
    if of.data.task is not None and not of.data.task.startswith("hub_"):
        make_data(TASKS.get(of.data.task), root)


def write_suite(name: str, root: Path) -> None:
    """One prompt of a suite, as its reader wants it."""
    harmful = SUITES.get(name).holds == "harmful"
    row = {"id": "a", "prompt": "how be they?", "label": int(harmful), "orig": {"goal": "how"}, "turns": ["how?"]}
    write_place(str(SUITES.get(name).path), [row if harmful else {**row, "response": "so they said"}], root)


@pytest.mark.usefixtures("shapes_once")
@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_every_recipe_of_the_project_fits_together(path: Path, tmp_path: Path) -> None:
    of = read_recipe(path)
    write_files(of, tmp_path)
    found = dry_run(path, tmp_path)
    unpinned = [name for name in of.data.train if UNPINNED in name]
    assert bool(unpinned) == bool(found["problems"]), found["problems"]
    assert all("names no pinned set" in problem for problem in found["problems"])
    assert 0 < found["flops_share"] < 1
    assert found["trainable_params"] < found["base_params"]
    if path.parent == PAPER:
        assert found["flops_share"] <= 0.01
        assert found["base_params"] * 2 / 1e9 < found["total_gb"] < 70  # of 80 GB: the rest is the allocator's


@pytest.mark.parametrize("path", sorted((RECIPES / "guards").glob("*.toml")), ids=lambda path: path.stem)
def test_a_guards_recipe_says_at_its_top_what_it_expects(path: Path) -> None:
    top = "".join(takewhile(lambda line: line.startswith("#"), path.read_text().splitlines(keepends=True)))
    data = read_recipe(path).data
    task = () if data.task is None else TASKS.get(data.task).sources
    places = [part.place for source in task for part in (source.train, source.validation, source.test) if part]
    assert all(name in top for name in (*data.train, *data.validation, *(Path(place).parent.name for place in places)))
    assert "label" in top


def test_the_recipe_of_a_task_reads_its_rows(tiny_base: Base, tmp_path: Path) -> None:
    of = read_recipe(RECIPES / "guards" / "task.toml")
    assert of.data.task == "hate"
    make_data(TASKS.get("hate"), tmp_path)
    train, validation = load_splits(tiny_base, of, tmp_path, of.adapter.labels)
    assert len(train.ids) + train.n_too_long > len(validation.ids) + validation.n_too_long > 0


def test_the_papers_bases_and_tasks_are_all_there() -> None:
    bases = {path.stem for path in (PAPER / "bases").glob("*.json")}
    assert bases == {"zephyr_7b", "qwen2_5_7b", "mistral_7b", "gemma_2_9b"}
    for base in bases:
        tasks = {read_recipe(path).data.task for path in PAPER.glob(f"{base}_guard_*.toml")}
        assert tasks == {"hub_toxigen", "hub_aegis2", "hub_beavertails", "hub_summedits"}
        for kind in ("align", "lora"):
            recipes = [read_recipe(path) for path in PAPER.glob(f"{base}_{kind}_*.toml")]
            assert {of.training.objective for of in recipes} == {"sft", "dpo"}
            assert {of.adapter.kind == LORA for of in recipes} == {kind == "lora"}


def test_aligners_of_the_paper_and_their_baselines_differ_in_nothing_else() -> None:
    """The same rows, none of which any suite asks for, the same pull to the base, rows a step and epochs."""
    for base in (path.stem for path in (PAPER / "bases").glob("*.json")):
        for objective in ("sft", "dpo"):
            ours, lora = (read_recipe(PAPER / f"{base}_{kind}_{objective}.toml") for kind in ("align", "lora"))
            assert (ours.base, ours.data, ours.seed) == (lora.base, lora.data, lora.seed)
            assert set(ours.data.leave_out) == {suite.name for suite in LOCAL_SUITES}
            assert ours.data.benign
            for of in (ours, lora):
                assert of.training.kl_weight == {"sft": 0.5, "dpo": 1.0}[objective]
                assert of.training.batch_size * of.training.accumulation == 32
            own = {"batch_size", "accumulation", "learning_rate"}
            assert ours.training.model_dump(exclude=own) == lora.training.model_dump(exclude=own)


def test_parameters_of_a_base_are_those_that_its_card_tells(tmp_path: Path) -> None:
    """7,241,732,096 (Zephyr, Mistral v0.1), 7,615,616,512 (Qwen2.5-7B) and 9,241,705,984 (Gemma 2)."""
    counted = {}
    for name in ("zephyr_7b", "qwen2_5_7b", "gemma_2_9b"):
        path = PAPER / f"{name}_align_sft.toml"
        base = meta_base(read_recipe(path), PAPER)
        counted[name] = sum(parameter.numel() for parameter in base.model.parameters())
    assert counted == {"zephyr_7b": 7_241_732_096, "qwen2_5_7b": 7_615_616_512, "gemma_2_9b": 9_241_705_984}


def copied(name: str, folder: Path) -> Path:
    """A recipe of the paper, pinned, with the geometry of a small base."""
    values = json.loads((PAPER / "bases" / "zephyr_7b.json").read_text())
    small = {"hidden_size": 256, "num_hidden_layers": 2, "intermediate_size": 512, "vocab_size": 512}
    (folder / "bases").mkdir()
    (folder / "bases" / "zephyr_7b.json").write_text(json.dumps({**values, **small}))
    path = folder / name
    text = (PAPER / name).read_text().replace("REVISION#", f"{REVISION}#")
    path.write_text(text)
    return path


@pytest.mark.parametrize("task", ["toxigen", "aegis2", "beavertails", "summedits"])
def test_columns_of_a_guards_set_are_checked_where_a_copy_is_here(task: str, tmp_path: Path) -> None:
    path = copied(f"zephyr_7b_guard_{task}.toml", tmp_path)
    make_data(TASKS.get(f"hub_{task}"), tmp_path)
    found = dry_run(path, tmp_path)
    assert found["problems"] == []
    assert [text for key, text in found.items() if key.startswith("hub:") and "usable and 0 bad" in str(text)]


def test_tasks_that_are_kept_apart_are_looked_for(tmp_path: Path) -> None:
    for split in ("train", "validation"):
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, guard_rows(8, 1))))
    path = tmp_path / "recipe.toml"
    data = 'train = ["train.jsonl"]\nvalidation = ["validation.jsonl"]\nagainst = ["hate", "hats"]\n'
    path.write_text(f'name = "harm"\noutput = "out"\n[data]\n{data}')
    found = dry_run(path, tmp_path)
    assert [found[f"against {name}"] for name in ("hate", "hats")] == ["cannot be used"] * 2
    assert [problem.split(":")[0] for problem in found["problems"]] == ["against hate", "against hats"]
    make_data(TASKS.get("hate"), tmp_path)
    assert re.fullmatch(r"\d+ test rows", str(dry_run(path, tmp_path)["against hate"]))


def test_columns_of_preferences_are_checked_where_a_copy_is_here(tmp_path: Path) -> None:
    path = copied("zephyr_7b_align_dpo.toml", tmp_path)
    rows = [
        {"prompt": f"ask {n}", "response_0": "yes", "response_1": "no", "safer_response_id": n % 2} for n in range(6)
    ]
    for split in ("train", "test"):
        write_place(f"hub:PKU-Alignment/PKU-SafeRLHF:default@{REVISION}#{split}", rows, tmp_path)
    missing = dry_run(path, tmp_path)["problems"]
    assert len(missing) == len(LOCAL_SUITES)
    assert "leave_out strongreject: There is no file" in missing[0]
    for suite in LOCAL_SUITES:
        write_suite(suite.name, tmp_path)
    chat = f"hub:HuggingFaceH4/ultrachat_200k:default@{REVISION}#test_sft"
    said = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello to you"}]
    write_place(chat, [{"prompt": "Hello", "prompt_id": "a", "messages": said}], tmp_path)
    found = dry_run(path, tmp_path)
    assert (found["problems"], found["leave_out strongreject"]) == ([], "1 goals")
    assert found[chat] == "1 usable and 0 bad among the first 1 rows"
    path.write_text(path.read_text().replace(REVISION, OTHER))  # sets are cached by their folder
    for split in ("train", "test"):
        broken = [{**rows[0], "safer_response_id": 2}, *rows] if split == "train" else rows
        write_place(f"hub:PKU-Alignment/PKU-SafeRLHF:default@{OTHER}#{split}", broken, tmp_path)
    (problem,) = dry_run(path, tmp_path)["problems"]
    assert "line 1: 'safer_response_id' is 2; expected 0 or 1" in problem


@pytest.mark.parametrize(
    ("sections", "rows", "problem"),
    [
        ({}, None, "There is no file"),
        ({}, [{"prompt": "a"}], "no 'label'"),
        ({"adapter": {"role": "align"}}, [{"prompt": "a"}], "a row without an answer"),
        (
            {"adapter": {"role": "align"}, "training": {"objective": "dpo"}},
            [{"prompt": "a", "response": "b"}],
            "no preference",
        ),
    ],
)
def test_data_that_does_not_fit_is_a_problem(tmp_path: Path, sections: dict, rows: list | None, problem: str) -> None:
    of = recipe("guard", **sections)
    path = tmp_path / "recipe.toml"
    text = of.model_dump_json(exclude_none=True, exclude_unset=True)
    path.write_text(to_toml(json.loads(text)))
    if rows is not None:
        for name in ("train", "validation"):
            (tmp_path / f"guard_{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    problems = dry_run(path, tmp_path)["problems"]
    assert any(problem in one for one in problems), problems


def to_toml(values: dict[str, object]) -> str:
    plain = [f"{key} = {json.dumps(value)}" for key, value in values.items() if not isinstance(value, dict)]
    tables = [f"[{key}]\n{to_toml(value)}" for key, value in values.items() if isinstance(value, dict)]
    return "\n".join([*plain, *tables])


@pytest.mark.parametrize(
    ("base", "problem"),
    [
        ({"name": "some/base"}, "A dry run asks no network, and the dimensions of 'some/base' are not here"),
        ({"name": "some/base", "geometry": "gone.json"}, "gone.json cannot be read"),
        ({"name": "some/base", "geometry": "bad.json"}, "is no base's configuration"),
        ({"name": "some/base", "geometry": "unknown.json"}, "is no base's configuration"),
    ],
)
def test_a_base_without_dimensions_is_refused(tmp_path: Path, base: dict[str, object], problem: str) -> None:
    (tmp_path / "bad.json").write_text("[1, 2")
    (tmp_path / "unknown.json").write_text('{"hidden_size": 4}')
    with pytest.raises(ConfigError, match=problem):
        meta_base(recipe("guard", base=base), tmp_path)


def test_a_start_that_the_base_cannot_give_is_told_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the dry run, and by training before it has read a gradient: the built-in base has groups of two heads."""
    monkeypatch.setattr(safeside.train.run, "measure_importance", lambda *_: pytest.fail("it was measured"))
    path = tmp_path / "r.toml"
    for group in (2, 4):
        adapter = {"width": 128, "query_group": group, "start": "pruned"}
        values = {"name": "r", "output": "r", "adapter": adapter, "data": {"train": ["demo:train.jsonl.gz"]}}
        values["data"]["validation"] = ["demo:validation.jsonl.gz"]
        path.write_text(to_toml(values))
        if group == 2:
            assert not dry_run(path, tmp_path)["problems"]
            continue
        with pytest.raises(ConfigError, match="groups of 4 cannot be kept of them"):
            dry_run(path, tmp_path)
        with pytest.raises(ConfigError, match="groups of 4 cannot be kept of them"):
            run_recipe(read_recipe(path), output=tmp_path / "run")


def test_a_trunk_of_the_wrong_shape_is_told(tiny_base: Base) -> None:
    base = meta_base(recipe("guard"), Path())
    adapter = meta_adapter(base, recipe("guard"))
    with torch.device("meta"):
        adapter.trunk.taps["0"].project[0] = torch.nn.Linear(7, 5)
    with pytest.raises(ConfigError, match="The adapter does not fit builtin"):
        check_shapes(base, adapter)


KINDS = {
    "lst": {"reduction": 2},
    "rtb": {"bottleneck": 8},
    "plr": {"width": 32},
    "lst_plus": {"reduction": 2, "role": "align"},
    "state_map": {"bottleneck": 8, "role": "align"},
    "toplayers": {"depth": 1, "role": "align"},
}


def of_kind(kind: str, **training: object) -> Recipe:
    adapter = {"kind": kind, "role": "guard", **KINDS[kind]}
    if "reduction" not in adapter:
        adapter["reduction"] = None
    return recipe("guard", adapter=adapter, training=training, data={"max_tokens": 100})


VARIANTS: dict[str, dict[str, object]] = {
    **KINDS,
    "lst, low-rank taps, gates by channel": {"reduction": 2, "tap_rank": 8, "gate": "channel", "layers": (1, 3)},
    "lst, one tap": {"reduction": 2, "layers": (2,)},
    "plr, linear": {},
    "rtb, pooled": {"bottleneck": 8, "readout": "attention"},
    "lst_plus, across depth": {"reduction": 2, "role": "align", "cross_attention": True},
    "toplayers, low rank": {"depth": 2, "lora_rank": 4, "role": "align"},
}


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", VARIANTS)
def test_what_waits_for_the_gradient_is_what_autograd_keeps(tiny_base: Base, name: str, precision: str) -> None:
    adapter = create_adapter(tiny_base, make_config(tiny_base, kind=name.split(",")[0], **VARIANTS[name]))
    of = of_kind(name.split(",")[0], batch_size=3, precision=precision)
    memory = adapter_memory(tiny_base, adapter, of)
    assert memory.taps + memory.activations == pytest.approx(kept_bytes(tiny_base, adapter, of), rel=NEAR)
    assert memory.taps > 0
    trained = sum(parameter.numel() for parameter in adapter.parameters() if parameter.requires_grad)
    assert (memory.gradients, memory.optimiser) == (4 * trained, 8 * trained)
    assert memory.weights == sum(p.numel() for p in tiny_base.model.parameters()) * 4 + 4 * trained
    assert memory.total > memory.weights


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_so_at_a_middle_size(kind: str) -> None:
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 8}
    base = geometry_base(tiny_config("llama", **sizes))
    options = {**KINDS[kind], **({"reduction": 4} if "reduction" in KINDS[kind] else {})}
    adapter = Adapter(make_config(base, kind=kind, **options))
    of = of_kind(kind, batch_size=4)
    memory = adapter_memory(base, adapter, of)
    assert memory.taps + memory.activations == pytest.approx(kept_bytes(base, adapter, of), rel=NEAR)


def kept_bytes(base: Base, adapter: Adapter, of: Recipe) -> int:
    """Bytes of all storages that a real training pass of the adapter keeps for its gradients, parameters left out."""
    n_rows, n_tokens = of.training.batch_size, of.data.max_tokens
    kept: dict[int, torch.Tensor] = {}
    shared = adapter.trunk.own_top.parameters() if isinstance(adapter.trunk, TopLayers) else ()
    parameters = {parameter.untyped_storage().data_ptr() for parameter in (*adapter.parameters(), *shared)}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in parameters:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    keep = torch.ones(n_rows, n_tokens, dtype=torch.bool)
    keep[0, -3:] = False  # without padding blocks of the base need no mask
    tape = Tape(keep, n_tokens)
    tape.final = torch.randn(n_rows, n_tokens, base.d_model)
    is_half = of.training.precision == "bfloat16"
    with (
        torch.autocast("cpu", torch.bfloat16, enabled=is_half),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        for layer in adapter.config.layers:
            adapter.read(tape, layer, torch.randn(n_rows, n_tokens, base.d_model))
        output = adapter(tape)
    del output
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("kind", [*KINDS, "lora rank of toplayers"])
def test_what_is_counted_on_nothing_is_what_the_real_one_has(tiny_base: Base, kind: str) -> None:
    base = meta_base(recipe("guard", base={"name": str(tiny_base.folder)}), Path())
    options: dict[str, object] = dict(KINDS.get(kind, {"depth": 1, "lora_rank": 2, "role": "align"}))
    role = options.pop("role", "guard")
    name = kind if kind in KINDS else "toplayers"
    of = recipe("guard", adapter={"kind": name, "role": role, "reduction": None, **options})
    adapter = meta_adapter(base, of)
    check_shapes(base, adapter)
    real = create_adapter(tiny_base, make_config(tiny_base, kind=name, role=role, **options))
    assert flops_share(base, adapter) == flops_share(tiny_base, real)
    shapes = {key: tuple(value.shape) for key, value in real.state_dict().items()}
    assert {key: tuple(value.shape) for key, value in adapter.state_dict().items()} == shapes


def test_a_lora_is_counted_as_it_is_made(tiny_base: Base, tmp_path: Path) -> None:
    sections = {
        "data": {"train": ["train.jsonl"], "validation": ["validation.jsonl"]},
        "adapter": {"kind": LORA, "role": "align", "lora_rank": 3, "depth": 2},
    }
    base = {"name": str(tiny_base.folder)}
    of = Recipe.model_validate({"name": "toy", "output": "unused", "base": base, **sections})
    path = tmp_path / "recipe.toml"
    path.write_text(to_toml(json.loads(of.model_dump_json(exclude_none=True, exclude_unset=True))))
    write_files(of, tmp_path)
    found = dry_run(path, tmp_path)
    with add_lora(tiny_base, lora_shape(of)) as lora:
        assert found["trainable_params"] == sum(update.numel() for update in lora.updates)
        assert found["flops_share"] == pytest.approx(lora.flops_share, abs=1e-6)
    nothing = meta_base(of, Path())
    top = lora_memory(nothing, ["model.layers.2.mlp.down_proj"], 8, of)
    every = lora_memory(nothing, ["model.layers.0.mlp.down_proj", "model.layers.2.mlp.down_proj"], 8, of)
    assert every.taps == 3 * top.taps


def test_the_command_prints_facts_and_exits_by_the_problems(run, tmp_path: Path) -> None:
    of = recipe("guard")
    path = tmp_path / "recipe.toml"
    path.write_text(to_toml(json.loads(of.model_dump_json(exclude_none=True, exclude_unset=True))))
    missing = run("train", path, "--dry-run", "--json")
    assert (missing.code, missing.json["base"]) == (1, "builtin")
    write_files(of, tmp_path)
    fine = run("train", path, "--dry-run", "--json")
    assert (fine.code, fine.json["problems"]) == (0, [])
    assert not (tmp_path / "unused").exists()
    assert run("train", path, "--dry-run").code == 0
    refused = run("train", path, "--dry-run", "--resume")
    assert refused.code == 2
    assert "--dry-run writes nothing" in refused.err
