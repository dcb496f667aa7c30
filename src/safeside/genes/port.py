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
from safeside.genes.rows import Batch, Conversation, answer_loss, encode_texts, with_answers


def port_gene(
    gene: Gene,
    bases: tuple[Base, Base],
    harmful: Sequence[Conversation],
    benign: Sequence[Conversation],
    recipe: GeneRecipe | None = None,
    *,
    report: Report = silent,
) -> Gene:
    """The gene for the second of ``bases``, of all its layers and with coefficients 1; both models stay as they are.

    The first is a model of the gene's family that needs it, such as the degraded one.  Answers that rows have are not
    read.  ``recipe`` is the gene's own unless given: its extraction says rank, target layers, steps and weights.  No
    prompt on which the gene changes the source's answer is an InputError.
    """
    (source, target), started = bases, time.perf_counter()
    recipe = recipe or gene.config.recipe
    _check(gene, source, target)
    longest = recipe.extract.max_new_tokens
    taught, n_unchanged = _changed_answers(source, gene, _asked(harmful), longest)
    kept = with_answers(target, _asked(benign), longest)
    texts = encode_texts(target, taught, "harmful prompts", answered=True)
    plain = encode_texts(target, kept, "harmless prompts", answered=True)

    def loss_of(updates: Mapping[str, LowRank], batch: Batch) -> Tensor:
        with LiveUpdates(target.model, updates, dict.fromkeys(updates, 1.0)):
            return answer_loss(target, batch)

    ported, loss = learn_gene(target, (texts, plain), loss_of, recipe, report)
    return ported.with_results(
        {
            "ported_from": gene.config.family.base,
            "port_loss": loss,
            "port_seconds": time.perf_counter() - started,
            "n_harmful": len(texts),
            "n_benign": len(plain),
            "n_unchanged": n_unchanged,
            "n_without_answer": len(harmful) + len(benign) - len(texts) - len(plain) - n_unchanged,
        }
    )


def _check(gene: Gene, source: Base, target: Base) -> None:
    for base in (source, target):
        check_model(base)
        check_plain(base)
    if has_lora(target.model):
        raise UnsupportedError(
            f"{target.name} has a LoRA in it. Merge and save it, or unload it, to port a gene to it."
        )
    check_fits(gene, source)


def _asked(conversations: Sequence[Conversation]) -> list[Conversation]:
    """The conversations up to the last thing that a user says."""
    return [
        messages[:-1] if messages[-1:] and messages[-1].role == "assistant" else messages for messages in conversations
    ]


def _changed_answers(
    source: Base, gene: Gene, prompts: Sequence[Conversation], max_new_tokens: int
) -> tuple[list[Conversation], int]:
    """What the source answers with the gene where it says something else without, and how often it does not."""
    before = {tuple(row[:-1]): row[-1].content for row in with_answers(source, prompts, max_new_tokens)}
    with apply_genes(source, [gene]):
        after = with_answers(source, prompts, max_new_tokens)
    changed = [row for row in after if before.get(tuple(row[:-1])) != row[-1].content]
    if prompts and not changed:
        raise InputError(
            f"{gene.name} changes none of the answers that {source.name} gives to {len(prompts)} harmful prompts, so "
            "there is nothing to learn from them. Take the model that the gene was made for, or other prompts."
        )
    return changed, len(after) - len(changed)
