"""A gene's folder: plain PEFT loads it and gives our logits, and nothing that is not whole is used."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file, save_file

from genes_for_tests import logits_of, random_gene
from safeside import Base, load_base
from safeside.base.updates import LowRank
from safeside.errors import FormatError, InputError
from safeside.genes.apply import apply_genes
from safeside.genes.artifact import GENE_FILE, load_gene, read_gene_config, save_gene
from safeside.genes.gene import Gene
from safeside.lora import CONFIG_FILE, WEIGHTS_FILE

PEFT_TOLERANCE = 1e-6  # of logits: the same sums in the same order


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_peft_alone_gives_our_logits(tiny_family: Callable[[str], Base], tmp_path: Path, family: str) -> None:
    base = tiny_family(family)
    gene = random_gene(base).kept([1, 3]).with_coefficients([0.5, -1.5])
    save_gene(gene, tmp_path)
    plain = logits_of(base)
    with apply_genes(base, [load_gene(tmp_path)]):
        ours = logits_of(base)
    assert not torch.allclose(ours, plain, atol=0.1)
    other = load_base(base.folder)
    theirs = PeftModel.from_pretrained(other.model, str(tmp_path))
    ids = torch.arange(7, 7 + 3 * 12).view(3, 12)
    with torch.no_grad():
        assert (theirs(input_ids=ids).logits - ours).abs().max() <= PEFT_TOLERANCE


def test_it_comes_back_as_it_was_saved(tiny_base: Base, tmp_path: Path) -> None:
    gene = random_gene(tiny_base, conflicts=("other",)).with_coefficients([0.5, 2.0, -1.0]).with_results({"loss": 0.25})
    save_gene(gene, tmp_path, {"note": "a fact"})
    found = load_gene(tmp_path)
    assert found.config.model_dump(exclude={"checksum"}) == gene.config.model_dump(exclude={"checksum"})
    for name, update in gene.updates.items():
        assert torch.equal(found.updates[name].down, update.down)
        assert torch.equal(found.updates[name].up, update.up)
    assert json.loads((tmp_path / "provenance.json").read_text())["note"] == "a fact"
    assert len({file.stat().st_mode for file in tmp_path.iterdir()}) == 1  # who may read one may read all


def test_peft_is_told_of_the_kept_layers_only(tiny_base: Base, tmp_path: Path) -> None:
    gene = random_gene(tiny_base).kept([2])
    save_gene(gene, tmp_path)
    values = json.loads((tmp_path / CONFIG_FILE).read_text())
    names = {point.name for point in gene.config.modules}
    assert names == set(values["target_modules"]) == set(values["rank_pattern"]) == set(values["alpha_pattern"])
    assert all(".layers.1." in name for name in names), "the second block"
    assert {
        name.partition(".lora_")[0].removeprefix("base_model.model.") for name in load_file(tmp_path / WEIGHTS_FILE)
    } == names


def test_another_gene_in_the_same_folder_takes_its_place(tiny_base: Base, tmp_path: Path) -> None:
    save_gene(random_gene(tiny_base, "first"), tmp_path)
    save_gene(random_gene(tiny_base, "second", seed=1).kept([3]), tmp_path)
    assert load_gene(tmp_path).name == "second"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [GENE_FILE, CONFIG_FILE, WEIGHTS_FILE, "provenance.json"]
    )


@pytest.mark.parametrize("missing", [GENE_FILE, CONFIG_FILE, WEIGHTS_FILE])
def test_a_half_written_folder(tiny_base: Base, tmp_path: Path, missing: str) -> None:
    save_gene(random_gene(tiny_base), tmp_path)
    (tmp_path / missing).unlink()
    with pytest.raises(FormatError, match=f"has no {missing}"):
        load_gene(tmp_path)


def test_damaged_weights(tiny_base: Base, tmp_path: Path) -> None:
    save_gene(random_gene(tiny_base), tmp_path)
    path = tmp_path / WEIGHTS_FILE
    weights = load_file(path)
    name, tensor = next(iter(weights.items()))
    for damaged, message in (
        ({key: value for key, value in weights.items() if key != name}, "has shape None"),
        ({**weights, name: tensor[:1].contiguous()}, "has shape"),
        ({**weights, "more": tensor.clone()}, "does not list: more"),
        ({**weights, name: torch.full_like(tensor, float("nan"))}, "NaN or infinity"),
        ({**weights, name: tensor.half()}, "not float32"),
        ({**weights, name: tensor + 1}, "differ from the checksum"),
    ):
        save_file(damaged, path)
        with pytest.raises(FormatError, match=message):
            load_gene(tmp_path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(FormatError, match="cannot be read as a gene"):
        load_gene(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 2}, "has format 2; this safeside reads format 1"),
        ({"surprise": 1}, "surprise"),
        ({"coefficients": [1.0, 0.0, 1.0]}, "none 0"),
        ({"coefficients": [1.0]}, "one for each layer"),
        ({"layers": [1, 2, 9]}, "layers must rise"),
        ({"layers": [1, 2]}, "one for each layer"),
        ({"conflicts": ["other", "safe"]}, "got 'safe', which is the gene itself"),
    ],
)
def test_a_broken_description(tiny_base: Base, tmp_path: Path, changes: dict[str, object], message: str) -> None:
    path = save_gene(random_gene(tiny_base), tmp_path) / GENE_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(FormatError, match=message):
        load_gene(tmp_path)


@pytest.mark.parametrize("changes", [{"coefficients": [2.0, 1.0, 1.0]}, {"conflicts": []}, {"results": {"loss": 0.0}}])
def test_an_edited_description(tiny_base: Base, tmp_path: Path, changes: dict[str, object]) -> None:
    """Its coefficients are in the weights already: what somebody writes here would change nothing, and be believed."""
    path = save_gene(random_gene(tiny_base, conflicts=("rival",)), tmp_path) / GENE_FILE
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values))  # another spelling is no change
    load_gene(tmp_path)
    path.write_text(json.dumps({**values, **changes}))
    with pytest.raises(FormatError, match=f"{GENE_FILE} differ from the checksum"):
        load_gene(tmp_path)


def test_descriptions_that_are_none(tiny_base: Base, tmp_path: Path) -> None:
    path = save_gene(random_gene(tiny_base), tmp_path) / GENE_FILE
    for text in ("[]", "{}", "half of it {"):
        path.write_text(text)
        with pytest.raises(FormatError, match="not a gene's description"):
            read_gene_config(tmp_path)


def test_a_changed_peft_configuration(tiny_base: Base, tmp_path: Path) -> None:
    path = save_gene(random_gene(tiny_base), tmp_path) / CONFIG_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), "lora_alpha": 8}))
    with pytest.raises(FormatError, match="checksum"):
        load_gene(tmp_path)


@settings(max_examples=25)
@given(st.lists(st.floats(0.01, 100) | st.floats(-100, -0.01), min_size=3, max_size=3))
def test_coefficients_are_folded_in_and_can_be_set_again(session_base: Base, values: list[float]) -> None:
    gene = random_gene(session_base)
    found = gene.with_coefficients(values).with_coefficients([1.0, 1.0, 1.0])
    for name, update in gene.updates.items():
        assert torch.allclose(found.updates[name].up, update.up, rtol=1e-5)
    folded, name = gene.with_coefficients(values), gene.config.modules[-1].name
    assert torch.allclose(folded.updates[name].up, values[-1] * gene.updates[name].up, rtol=1e-5)
    assert torch.equal(folded.updates[name].down, gene.updates[name].down)


@pytest.mark.parametrize(
    "values", [[1.0, 1.0], [1.0, 0.0, 1.0], [1.0, float("nan"), 1.0], [1.0, -1e-300, 1.0], [1, 1e7, 1]]
)
def test_coefficients_that_cannot_be(tiny_base: Base, values: list[float]) -> None:
    with pytest.raises(InputError, match=r"needs 3 coefficients of a size between 1e-06 and 1e.06"):
        random_gene(tiny_base).with_coefficients(values)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e300])
def test_updates_that_are_not_finite_make_no_gene(tiny_base: Base, value: float) -> None:
    gene = random_gene(tiny_base)
    name, update = next(iter(gene.updates.items()))
    broken = LowRank(update.down, torch.full_like(update.up, value, dtype=torch.float64))
    with pytest.raises(InputError, match=f"the update of {name} holds NaN or infinity"):
        Gene(gene.config, {**gene.updates, name: broken})


def test_updates_that_are_not_those_of_the_modules_make_no_gene(tiny_base: Base) -> None:
    gene = random_gene(tiny_base)
    name, update = next(iter(gene.updates.items()))
    for updates, message in (
        ({key: value for key, value in gene.updates.items() if key != name}, f"the update of {name} is missing"),
        ({**gene.updates, "lm_head": update}, "the update of lm_head is of no module"),
        ({**gene.updates, name: LowRank(update.down[:1], update.up)}, f"the update of {name} has the shapes"),
    ):
        with pytest.raises(InputError, match=message):
            Gene(gene.config, updates)


@pytest.mark.parametrize("layers", [[], [4], [0, 1]])
def test_layers_that_it_does_not_have(tiny_base: Base, layers: list[int]) -> None:
    with pytest.raises(InputError, match="has layers 1, 2, 3"):
        random_gene(tiny_base).kept(layers)
