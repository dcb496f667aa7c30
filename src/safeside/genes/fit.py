"""Fit: on a task model only one scalar for each kept layer is learnt, from a few examples (SafeGene's third stage)."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from safeside.base.model import Base
from safeside.base.updates import LiveUpdates
from safeside.errors import InputError
from safeside.genes.checks import check_fits, check_model, check_plain
from safeside.genes.gene import Gene
from safeside.genes.merged import check_beside_merged
from safeside.genes.optimise import Report, Steps, draws, optimise, silent
from safeside.genes.recipe import FitSection
from safeside.genes.rows import Given, Texts, answer_loss, encode_texts


def fit_gene(
    base: Base,
    gene: Gene,
    refusals: Sequence[Given],
    task_rows: Sequence[Given],
    settings: FitSection | None = None,
    *,
    report: Report = silent,
) -> Gene:
    """The gene with coefficients fitted on ``base``, a task model of its family, which stays as it is.

    ``refusals`` are harmful prompts with the answers that are wanted; of ``task_rows`` as many are read, the first.
    The loss is the mean over both kinds of their answers' negative log-likelihood, of refusals that of their first
    tokens (``refusal_tokens``); settings are the recipe's unless given.  Coefficients may become negative.  A base that
    holds the gene, or one that it conflicts with, in its weights is a ConfigError.
    """
    settings, started = settings or gene.config.recipe.fit, time.perf_counter()
    check_model(base)
    check_plain(base)
    check_fits(gene, base)
    check_beside_merged(base, [gene])
    refused, answered = _examples(base, refusals, task_rows)
    factors = {layer: nn.Parameter(torch.ones((), device=base.device)) for layer in gene.config.layers}
    orders = [draws(len(texts), settings.batch_size, gene.config.recipe.seed) for texts in (refused, answered)]

    def loss_of(step: int) -> Tensor:
        kinds = zip((refused, answered), orders, strict=True)
        harmful, task = (texts.batch(base, next(order)) for texts, order in kinds)
        refusing, working = answer_loss(base, harmful, settings.refusal_tokens), answer_loss(base, task)
        return (refusing + settings.task_weight * working) / (1 + settings.task_weight)

    updates = {name: update.to(base.device) for name, update in gene.updates.items()}
    scales = {point.name: factors[point.layer] for point in gene.config.modules}
    with LiveUpdates(base.model, updates, scales):
        steps = Steps(settings.steps, settings.learning_rate, report)
        loss = optimise(list(factors.values()), loss_of, steps)
    pairs = zip(factors.values(), gene.config.coefficients, strict=True)
    results: dict[str, int | float | str] = {
        "fit_loss": loss,
        "fit_seconds": time.perf_counter() - started,
        "fit_shots": len(refused),
        "fit_model": base.name,
        "trainable_params": len(factors),
    }
    return gene.with_coefficients([float(factor.detach()) * before for factor, before in pairs]).with_results(results)


def _examples(base: Base, refusals: Sequence[Given], task_rows: Sequence[Given]) -> tuple[Texts, Texts]:
    """All refusals and as many task rows, the first; fewer rows are an InputError."""
    refused = encode_texts(base, refusals, "refusals", answered=True)
    answered = encode_texts(base, task_rows[: len(refusals)], "task rows", answered=True)
    if len(answered) < len(refused):
        raise InputError(
            f"There are {len(refused)} refusals and {len(answered)} task rows; expected as many rows as refusals. Add "
            "rows, or use fewer refusals."
        )
    return refused, answered
