"""Fit: on a task model only one scalar for each kept layer is learnt, from a few examples (SafeGene's third stage)."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from safeside.base.model import Base
from safeside.base.updates import LiveUpdates
from safeside.errors import InputError
from safeside.genes.checks import check_fits, check_model, check_plain
from safeside.genes.gene import SIZES, Gene, changed
from safeside.genes.merged import check_beside_merged
from safeside.genes.optimise import Report, Steps, diverged, draws, optimise, silent
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
    tokens (``refusal_tokens``); settings are the recipe's unless given, and stand in the gene's recipe then.
    Coefficients may become negative.  A base that holds the gene, or one that it conflicts with, in its weights is a
    ConfigError; a fit that diverges is a NotFiniteError.
    """
    settings, started = settings or gene.config.recipe.fit, time.perf_counter()
    check_model(base)
    check_plain(base)
    check_fits(gene, base)
    check_beside_merged(base, [gene])
    refused, answered = _examples(base, refusals, task_rows)
    factors = {layer: nn.Parameter(torch.ones((), device=base.device)) for layer in gene.config.layers}
    updates = {name: update.to(base.device) for name, update in gene.updates.items()}
    steps = Steps(settings.steps, settings.learning_rate, report, "[fit] learning_rate")
    with LiveUpdates(base.model, updates, {point.name: factors[point.layer] for point in gene.config.modules}):
        loss_of = _loss_of(base, (refused, answered), settings, gene.config.recipe.seed)
        loss = optimise(list(factors.values()), loss_of, steps)
    pairs = zip(factors.values(), gene.config.coefficients, strict=True)
    coefficients = [float(factor.detach()) * before for factor, before in pairs]
    _check_sizes(gene, coefficients, steps)
    results: dict[str, int | float | str] = {
        "fit_loss": loss,
        "fit_seconds": time.perf_counter() - started,
        "fit_shots": len(refused),
        "fit_model": base.name,
        "trainable_params": len(factors),
    }
    fitted = gene.with_coefficients(coefficients)
    recipe = gene.config.recipe.model_copy(update={"fit": settings})
    return Gene(changed(fitted.config, {"recipe": recipe}), fitted.updates).with_results(results)


def _check_sizes(gene: Gene, coefficients: Sequence[float], steps: Steps) -> None:
    """Raise an InputError for coefficients that no gene can hold."""
    if max(map(abs, coefficients)) > SIZES[1]:
        found = ", ".join(f"{value:.3g}" for value in coefficients)
        raise diverged(f"the coefficients became {found}; expected sizes of at most {SIZES[1]:g}", steps)
    for layer, value in zip(gene.config.layers, coefficients, strict=True):
        if abs(value) < SIZES[0]:
            raise InputError(
                f"The coefficient of layer {layer} came to {value:.3g}, so the layer does nothing here; expected sizes "
                f"of at least {SIZES[0]:g}. Select other layers, or fit on other examples."
            )


def _loss_of(
    base: Base, kinds: tuple[Texts, Texts], settings: FitSection, seed: int
) -> Callable[[int], Float[Tensor, ""]]:
    """What each step lowers, from the rows of both kinds that it draws."""
    orders = [draws(len(texts), settings.batch_size, seed) for texts in kinds]

    def loss_at(step: int) -> Tensor:
        harmful, task = (texts.batch(base, next(order)) for texts, order in zip(kinds, orders, strict=True))
        refusing, working = answer_loss(base, harmful, settings.refusal_tokens), answer_loss(base, task)
        return (refusing + settings.task_weight * working) / (1 + settings.task_weight)

    return loss_at


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
