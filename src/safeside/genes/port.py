"""Port: a gene for a model of another architecture or tokenizer, learnt from what its source says with the gene.

A gene's weights mean nothing elsewhere, but what it makes a model say does.  After Trans-LoRA (2405.17258) the source
writes the texts: with the gene it answers harmful prompts that nobody has labelled or answered.  Prompts whose answer
the gene does not change are left out, for they show nothing of it.  Updates of the target learn the others by the
likelihood of their tokens, as the target's own tokenizer cuts them, and on harmless prompts stay with the target as it
is, as in extraction.  Selection and fit are then those of any gene of the target.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from torch import Tensor

from safeside.base.families import has_lora
from safeside.base.model import Base
from safeside.base.updates import LiveUpdates, LowRank
from safeside.errors import InputError, UnsupportedError
from safeside.genes.apply import apply_genes
from safeside.genes.checks import check_fits, check_model, check_plain
from safeside.genes.extract import learn_gene
from safeside.genes.gene import Gene
from safeside.genes.optimise import Report, silent
from safeside.genes.recipe import GeneRecipe
from safeside.genes.rows import (
    Batch,
    Given,
    Row,
    answer_loss,
    check_rows,
    encode_texts,
    named,
    with_answers,
    without_answers,
)


def port_gene(
    gene: Gene,
    bases: tuple[Base, Base],
    harmful: Sequence[Given],
    benign: Sequence[Given],
    recipe: GeneRecipe | None = None,
    *,
    report: Report = silent,
) -> Gene:
    """The gene for the second of ``bases``, of all its layers and with coefficients 1; both models stay as they are.

    The first is a model of the gene's family that needs it, such as the degraded one.  Answers that rows have are not
    read.  ``recipe`` is the gene's own unless given: its extraction says rank, target layers, steps and weights; in the
    new gene's the target stands for the models.  No prompt on which the gene changes the source's answer is an
    InputError.
    """
    (source, target), started = bases, time.perf_counter()
    recipe, longest = recipe or gene.config.recipe, (recipe or gene.config.recipe).extract.max_new_tokens
    check_model(source)
    check_plain(source)
    _check_target(target)
    check_fits(gene, source)
    asked = without_answers(named(harmful, "harmful prompts"))
    for base in bases:
        check_rows(base, asked, "harmful prompts", longest)
    check_rows(target, without_answers(named(benign, "harmless prompts")), "harmless prompts", longest)
    taught, n_unchanged = _changed_answers(source, gene, asked, longest)
    ported = learn_answers(target, taught, benign, recipe, report=report)
    n_learnt = int(ported.config.results["n_harmful"])
    return ported.with_results(
        {
            "ported_from": gene.config.family.base,
            "port_seconds": time.perf_counter() - started,
            "n_unchanged": n_unchanged,
            "n_without_answer": int(ported.config.results["n_without_answer"]) + len(asked) - n_learnt - n_unchanged,
        }
    )


def learn_answers(
    target: Base,
    harmful: Sequence[Given],
    benign: Sequence[Given],
    recipe: GeneRecipe,
    *,
    report: Report = silent,
) -> Gene:
    """A gene of ``target`` that answers harmful prompts as ``harmful`` does, whoever wrote that, and stays itself else.

    What a port does once the source has written the answers; without a source its answers are anybody's refusals.
    Answers of ``benign`` rows are not read: the target's own are kept.
    """
    started, longest = time.perf_counter(), recipe.extract.max_new_tokens
    _check_target(target)
    texts = encode_texts(target, harmful, "harmful prompts", answered=True)
    plainly = without_answers(named(benign, "harmless prompts"))
    check_rows(target, plainly, "harmless prompts", longest)
    plain = encode_texts(target, with_answers(target, plainly, longest), "harmless prompts", answered=True)

    def loss_of(updates: Mapping[str, LowRank], batch: Batch) -> Tensor:
        with LiveUpdates(target.model, updates, dict.fromkeys(updates, 1.0)):
            return answer_loss(target, batch)

    own = recipe.model_copy(update={"aligned": "", "degraded": target.name})  # neither of the source's was there
    gene, loss = learn_gene(target, (texts, plain), loss_of, own, report)
    return gene.with_results(
        {
            "port_loss": loss,
            "port_seconds": time.perf_counter() - started,
            "n_harmful": len(texts),
            "n_benign": len(plain),
            "n_without_answer": len(benign) - len(plain),
        }
    )


def _check_target(target: Base) -> None:
    check_model(target)
    check_plain(target)
    if has_lora(target.model):
        raise UnsupportedError(
            f"{target.name} has a LoRA in it. Merge and save it, or unload it, to port a gene to it."
        )


def _changed_answers(source: Base, gene: Gene, prompts: Sequence[Row], max_new_tokens: int) -> tuple[list[Row], int]:
    """What the source answers with the gene where it says something else without, and how often it does not."""
    before = {row.where: row.messages[-1].content for row in with_answers(source, prompts, max_new_tokens)}
    with apply_genes(source, [gene]):
        after = with_answers(source, prompts, max_new_tokens)
    changed = [row for row in after if before.get(row.where) != row.messages[-1].content]
    if not changed:
        raise InputError(
            f"{gene.name} changes none of the answers that {source.name} gives to {len(prompts)} harmful prompts, so "
            "there is nothing to learn from them. Take the model that the gene was made for, or other prompts."
        )
    return changed, len(after) - len(changed)
