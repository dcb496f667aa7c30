"""Models that genes are not for: a clear error that names the first thing, and the model unharmed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from genes_for_tests import conversations, gene_recipe, random_gene
from safeside import Adapter, Base, attach, load_base
from safeside.base.updates import LowRank
from safeside.errors import InputError, MismatchError, SafesideError, UnsupportedError
from safeside.genes.apply import apply_genes
from safeside.genes.checks import check_fits, check_model
from safeside.genes.extract import Pair, extract_gene
from safeside.genes.fit import fit_gene
from safeside.genes.gene import AttachmentPoint, Gene, changed
from safeside.genes.merge import merge_genes, model_hash
from safeside.genes.select import select_layers
from safeside.lora import LoraShape, add_lora
from tiny import make_tiny

REFUSALS, TASK = conversations(4, answer="the hat"), conversations(4, answer="the mat", start=9)


def every_use(base: Base, gene: Gene, folder: Path) -> list[Callable[[], object]]:
    """All that is done with a gene and a model."""
    return [
        lambda: apply_genes(base, [gene]),
        lambda: fit_gene(base, gene, REFUSALS, TASK),
        lambda: select_layers(base, gene, REFUSALS, TASK),
        lambda: merge_genes(base, [gene], folder / "merged"),
    ]


def assert_refused(base: Base, gene: Gene, folder: Path, error: type[SafesideError], message: str) -> None:
    before, hooks = model_hash(base), sum(len(module._forward_hooks) for module in base.model.modules())
    for use in every_use(base, gene, folder):
        with pytest.raises(error, match=message):
            use()
    assert model_hash(base) == before
    assert sum(len(module._forward_hooks) for module in base.model.modules()) == hooks
    assert not (folder / "merged").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"intermediate_size": 128}, "intermediate_size is 128 where 96 is expected"),
        ({"num_hidden_layers": 2}, "num_hidden_layers is 2 where 3 is expected"),
        ({"rope_theta": 5e5}, "rope_parameters"),
    ],
)
def test_another_architecture(session_base: Base, tmp_path: Path, changes: dict[str, object], message: str) -> None:
    other = load_base(make_tiny("llama", tmp_path / "other", **changes))
    assert_refused(other, random_gene(session_base), tmp_path, MismatchError, message)


def test_another_family(session_base: Base, tiny_family: Callable[[str], Base], tmp_path: Path) -> None:
    assert_refused(
        tiny_family("gpt2"), random_gene(session_base), tmp_path, MismatchError, "model_type is 'gpt2' where 'llama'"
    )


def test_another_tokenizer(session_base: Base, fresh_base: Base, tmp_path: Path) -> None:
    fresh_base.tokenizer.add_tokens(["<new>"])
    fresh_base.model.save_pretrained(tmp_path / "other")
    fresh_base.tokenizer.save_pretrained(tmp_path / "other")
    other = load_base(tmp_path / "other")
    assert_refused(other, random_gene(session_base), tmp_path, MismatchError, "its tokenizer is another one")


def test_renamed_modules(session_base: Base, fresh_base: Base) -> None:
    attention = fresh_base.blocks[1].self_attn
    attention.query = attention._modules.pop("q_proj")
    before = model_hash(fresh_base)
    with pytest.raises(MismatchError, match=r"expected a linear layer model\.layers\.1\.self_attn\.q_proj"):
        apply_genes(fresh_base, [random_gene(session_base)])
    assert model_hash(fresh_base) == before


def test_an_attachment_point_of_another_width(session_base: Base, fresh_base: Base) -> None:
    fresh_base.blocks[2].mlp.up_proj = nn.Linear(64, 80, bias=False)
    with pytest.raises(MismatchError, match=r"model\.layers\.2\.mlp\.up_proj goes from 64 to 80 and not from 64 to 96"):
        check_fits(random_gene(session_base), fresh_base)


@pytest.mark.parametrize("name", ["lm_head", "model.layers.1.mlp.up_proj"])
def test_modules_that_are_not_in_the_layer_that_the_gene_says(session_base: Base, tmp_path: Path, name: str) -> None:
    gene = random_gene(session_base).kept([1, 3])
    layer = session_base.model.get_submodule(name)
    point = AttachmentPoint(name=name, layer=1, rank=1, n_in=layer.in_features, n_out=layer.out_features)
    update = LowRank(torch.ones(1, point.n_in), torch.ones(point.n_out, 1))
    config = changed(gene.config, {"modules": (*gene.config.modules, point)})
    told = Gene(config, {**gene.updates, name: update})
    assert_refused(session_base, told, tmp_path, MismatchError, f"{name} is not in layer 1")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_quantised_weights(session_base: Base, fresh_base: Base, tmp_path: Path) -> None:
    quantised = torch.ao.quantization.quantize_dynamic(fresh_base.model, {nn.Linear}, dtype=torch.qint8)
    other = replace(fresh_base, model=quantised)
    gene = random_gene(session_base)
    for use in every_use(other, gene, tmp_path):
        with pytest.raises(UnsupportedError, match=r"has quantised weights .*Load the model unquantised"):
            use()


def test_a_configuration_that_says_quantised(fresh_base: Base) -> None:
    fresh_base.model.config.quantization_config = {"quant_method": "fp8"}
    with pytest.raises(UnsupportedError, match="quantised"):
        check_model(fresh_base)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(session_base: Base, fresh_base: Base, tmp_path: Path, value: float) -> None:
    with torch.no_grad():
        fresh_base.blocks[0].mlp.up_proj.weight[3, 5] = value
    assert_refused(fresh_base, random_gene(session_base), tmp_path, InputError, "NaN or infinity, such as .*up_proj")


def test_encoders(session_base: Base, tiny_family: Callable[[str], Base], tmp_path: Path) -> None:
    assert_refused(tiny_family("bert"), random_gene(session_base), tmp_path, UnsupportedError, "is an encoder")


def test_pairs_that_are_none(tiny_base: Base, tiny_family: Callable[[str], Base], degraded: Base) -> None:
    recipe, rows = gene_recipe(), conversations(4, answer="the hat")
    with pytest.raises(InputError, match="hold the same weights"):
        extract_gene(Pair(tiny_base, load_base(tiny_base.folder)), rows, rows, recipe)
    with pytest.raises(MismatchError, match="are no pair: "):
        extract_gene(Pair(tiny_base, tiny_family("qwen2")), rows, rows, recipe)
    with pytest.raises(UnsupportedError, match="is an encoder"):
        extract_gene(Pair(tiny_base, tiny_family("bert")), rows, rows, recipe)
    with add_lora(degraded, LoraShape(rank=2)), pytest.raises(UnsupportedError, match="has a LoRA in it"):
        extract_gene(Pair(tiny_base, degraded), rows, rows, recipe)
    with (
        apply_genes(degraded, [random_gene(tiny_base)]),
        pytest.raises(UnsupportedError, match="has a gene in it"),
    ):
        extract_gene(Pair(tiny_base, degraded), rows, rows, recipe)


def test_models_with_adapters_are_not_learnt_around(
    tiny_base: Base, degraded: Base, random_aligner: Callable[..., Adapter]
) -> None:
    gene = random_gene(tiny_base)
    with attach(tiny_base, aligners=[random_aligner(tiny_base)]):
        with pytest.raises(UnsupportedError, match="Detach them first"):
            fit_gene(tiny_base, gene, REFUSALS, TASK)
        with pytest.raises(UnsupportedError, match="Detach them first"):
            extract_gene(Pair(tiny_base, degraded), REFUSALS, TASK, gene_recipe())
