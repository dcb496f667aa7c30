"""A ported gene makes another model say what the gene makes its own model say, and leaves both models alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from genes_for_tests import conversations, gene_recipe, random_gene
from safeside import Base, Message, load_base
from safeside.errors import InputError, MismatchError, UnsupportedError
from safeside.genes.apply import apply_genes
from safeside.genes.checks import check_fits
from safeside.genes.extract import divergence
from safeside.genes.gene import Gene
from safeside.genes.merge import model_hash
from safeside.genes.port import learn_answers, port_gene
from safeside.genes.recipe import GeneRecipe
from safeside.genes.rows import Given, Row, answer_loss, encode_texts, named, with_answers

HARMFUL, BENIGN = conversations(8), conversations(8, start=30)


@pytest.fixture(scope="module")
def target(tiny_folder: Callable[[str], Path]) -> Base:
    """A model of another architecture."""
    return load_base(tiny_folder("gemma2"))


@pytest.fixture(scope="module")
def gene(session_base: Base) -> Gene:
    return random_gene(session_base)


def recipe_of(**extract: object) -> GeneRecipe:
    return gene_recipe(extract={**gene_recipe().extract.model_dump(), **extract})


@torch.no_grad()
def loss_on(base: Base, rows: list[Given]) -> float:
    texts = encode_texts(base, rows, "rows", answered=True)
    return float(answer_loss(base, texts.batch(base, range(len(texts)))))


def said_with(base: Base, gene: Gene, prompts: list[Given]) -> list[Row]:
    with apply_genes(base, [gene]):
        return with_answers(base, named(prompts, "rows"), gene.config.recipe.extract.max_new_tokens)


def test_the_target_learns_what_the_gene_says_and_stays_itself_elsewhere(
    session_base: Base, target: Base, gene: Gene
) -> None:
    before = model_hash(session_base), model_hash(target)
    taught = said_with(session_base, gene, HARMFUL)
    own = encode_texts(target, with_answers(target, named(BENIGN, "rows"), 6), "rows", answered=True)
    plain = loss_on(target, taught)
    moved: dict[float, float] = {}
    for weight in (0.0, 2.0):
        ported = port_gene(
            gene, (session_base, target), HARMFUL, BENIGN, recipe_of(benign_weight=weight, steps=30, rank=4)
        )
        with apply_genes(target, [ported]):
            assert loss_on(target, taught) < 0.7 * plain
        moved[weight] = float(divergence(target, target, ported.updates, own.batch(target, range(len(own)))).detach())
    assert moved[2.0] < 0.5 * moved[0.0]
    assert (model_hash(session_base), model_hash(target)) == before
    assert (ported.name, ported.config.layers) == (gene.name, tuple(range(1, target.n_layers + 1)))
    assert ported.config.results["ported_from"] == session_base.name
    assert ported.config.results["n_harmful"] == 8 - int(ported.config.results["n_unchanged"])
    assert (ported.config.recipe.aligned, ported.config.recipe.degraded) == ("", target.name), "not the source's"
    check_fits(ported, target)
    with pytest.raises(MismatchError, match="does not fit"):
        check_fits(ported, session_base)


def test_answers_in_the_rows_are_not_read(session_base: Base, target: Base, gene: Gene) -> None:
    recipe = recipe_of(steps=2, rank=1)
    answered = [[(*messages, Message("assistant", "sat")) for messages in rows] for rows in (HARMFUL, BENIGN)]
    first = port_gene(gene, (session_base, target), HARMFUL, BENIGN, recipe)
    second = port_gene(gene, (session_base, target), *answered, recipe)
    assert all(torch.equal(first.updates[name].up, second.updates[name].up) for name in first.updates)


def test_only_prompts_whose_answer_the_gene_changes_are_learnt(session_base: Base, target: Base, gene: Gene) -> None:
    plain = with_answers(session_base, named(HARMFUL, "rows"), 6)
    same = [pair[0] == pair[1] for pair in zip(said_with(session_base, gene, HARMFUL), plain, strict=True)]
    ported = port_gene(gene, (session_base, target), HARMFUL, BENIGN, recipe_of(steps=1))
    assert ported.config.results["n_unchanged"] == sum(same)
    faint = gene.with_coefficients([1e-6] * len(gene.config.layers))
    with pytest.raises(InputError, match="changes none of the answers"):
        port_gene(faint, (session_base, target), HARMFUL, BENIGN)


def test_a_model_with_another_tokenizer(session_base: Base, gene: Gene) -> None:
    target = load_base("builtin")
    ported = port_gene(
        gene, (session_base, target), HARMFUL[:2], BENIGN[:2], recipe_of(steps=2, rank=1, targets=["o_proj"])
    )
    assert len(ported.config.modules) == target.n_layers
    taught = said_with(session_base, gene, HARMFUL[:2])
    plain = loss_on(target, taught)
    with apply_genes(target, [ported]):
        assert loss_on(target, taught) < plain


def test_models_that_cannot_be_ported_between_are_refused(
    session_base: Base, target: Base, gene: Gene, tiny_folder: Callable[[str], Path]
) -> None:
    with pytest.raises(MismatchError, match="does not fit"):
        port_gene(gene, (target, session_base), HARMFUL, BENIGN)
    with pytest.raises(UnsupportedError, match="is an encoder"):
        port_gene(gene, (session_base, load_base(tiny_folder("bert"))), HARMFUL, BENIGN)
    with pytest.raises(InputError, match="no harmful prompts"):
        port_gene(gene, (session_base, target), [], BENIGN)


def test_rows_are_checked_before_any_is_answered(
    session_base: Base, target: Base, gene: Gene, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answered(*_: object, **__: object) -> None:
        raise AssertionError("nothing is answered yet")

    monkeypatch.setattr(Base, "chat_batch", answered)
    long = [(Message("user", "the cat " * 200),)]
    for harmful, benign, message in (
        ([*HARMFUL, *long], BENIGN, "Row 9 of the harmful prompts has .* nothing is cut"),
        (HARMFUL, [*BENIGN, (Message("user", " "),)], "Row 9 of the harmless prompts has an empty message"),
    ):
        with pytest.raises(InputError, match=message):
            port_gene(gene, (session_base, target), harmful, benign)


def test_written_answers_are_learnt_without_a_source(target: Base) -> None:
    written, recipe = conversations(8, answer="the hat sat"), recipe_of(steps=10)
    learnt = learn_answers(target, written, BENIGN, recipe)
    plain = loss_on(target, written)
    with apply_genes(target, [learnt]):
        assert loss_on(target, written) < plain
    assert (learnt.config.results["n_harmful"], learnt.config.recipe.degraded) == (8, target.name)
