"""Genes in a model: live, as hooks that come off again, or merged into a copy that keeps the originals.

Either way taking a gene out restores what was there and never subtracts: the model is bit for bit what it was.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Self

import torch
from torch import nn

from safeside.base.model import Base
from safeside.base.updates import LiveUpdates
from safeside.errors import AttachmentError, ConfigError, InputError, UnknownNameError
from safeside.genes.checks import check_fits, check_model
from safeside.genes.gene import Gene
from safeside.genes.merged import check_beside_merged
from safeside.registry import did_you_mean

LIMIT = 2.0
"""Greatest weight, as of an aligner's strength."""
_applied: weakref.WeakSet[nn.Module] = weakref.WeakSet()

Weights = Mapping[str, float]
"""By a gene's name, how much of it: from 0, which is none of it, to LIMIT.

A gene that is not named is at 1 where genes are applied, swapped, weighed or merged, but at 0 in a context of a policy.
"""


@dataclass(frozen=True)
class ContextPolicy:
    """Weights by context: a deployment, a regulation, whatever the caller tells apart."""

    contexts: Mapping[str, Weights]
    """By the context's name, a weight for each gene; a gene that is not named is at 0 there: it is not used."""

    def __post_init__(self) -> None:
        for context, weights in self.contexts.items():
            check_weights(weights, f"context {context!r}")

    def weights_for(self, context: str, genes: Sequence[Gene]) -> dict[str, float]:
        """A weight for each of ``genes``, 0 for those that the context does not name.

        An unknown context is an UnknownNameError, an unknown gene a ConfigError.
        """
        if context not in self.contexts:
            raise UnknownNameError(did_you_mean("context", context, list(self.contexts)))
        names = [gene.name for gene in genes]
        unknown = sorted(set(self.contexts[context]) - set(names))
        if unknown:
            raise ConfigError(
                f"Context {context!r} weighs {', '.join(unknown)}; the genes here are {', '.join(names)}. Apply them "
                "too, or take them off the policy."
            )
        return {name: float(self.contexts[context].get(name, 0.0)) for name in names}


class AppliedGenes:
    """Genes live inside ``base``.  Use it as a context manager, or call ``unapply``."""

    def __init__(self, base: Base, genes: Sequence[Gene], weights: Weights | None = None) -> None:
        check_model(base)
        if base.model in _applied:
            raise AttachmentError(f"{base.name} has genes already. Swap them, or unapply them first.")
        self.base = base
        self.genes: dict[str, Gene] = {}
        self.weights: dict[str, float] = {}
        self._live: list[LiveUpdates] = []
        self._is_applied = True
        self.swap(genes, weights)
        _applied.add(base.model)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.unapply()

    def swap(self, genes: Sequence[Gene], weights: Weights | None = None) -> None:
        """Put these genes in place of those that are there, each at weight 1 unless ``weights`` says otherwise.

        What does not fit, or conflicts, is an error and changes nothing.
        """
        self._check_applied()
        checked = self._checked(genes, weights)
        for gene in genes:
            check_fits(gene, self.base)
        self._remove()
        self.genes, self.weights = {gene.name: gene for gene in genes}, checked
        self._install()

    def set_weights(self, weights: Weights) -> None:
        """Weigh the genes anew, those that are not named at 1, whatever they were at (a policy's are at 0).

        At 0 a gene's hooks are gone: it changes no bit.
        """
        self._check_applied()
        checked = self._checked(list(self.genes.values()), weights)
        self._remove()
        self.weights = checked
        self._install()

    def use(self, policy: ContextPolicy, context: str) -> None:
        """Weigh the genes as the policy says for a context, those that it does not name at 0."""
        self.set_weights(policy.weights_for(context, list(self.genes.values())))

    def unapply(self) -> None:
        """Take every gene out; the model is bit for bit what it was.  Safe to call twice."""
        if self._is_applied:
            self._remove()
            self._is_applied = False
            _applied.discard(self.base.model)

    def _checked(self, genes: Sequence[Gene], weights: Weights | None) -> dict[str, float]:
        """A weight for each gene; those that cannot be together, or with what the base's weights hold, are errors."""
        found = checked_weights(genes, weights)
        check_beside_merged(self.base, [gene for gene in genes if found[gene.name]])
        return found

    def _check_applied(self) -> None:
        if not self._is_applied:
            raise AttachmentError(f"These genes were taken out of {self.base.name}. Apply them again.")

    def _install(self) -> None:
        torch.compiler.reset()  # code that was compiled before would run on without the hooks
        for name, weight in self.weights.items():
            if weight:
                updates = {key: update.to(self.base.device) for key, update in self.genes[name].updates.items()}
                self._live.append(LiveUpdates(self.base.model, updates, dict.fromkeys(updates, weight)))

    def _remove(self) -> None:
        while self._live:
            self._live.pop().remove()
        torch.compiler.reset()


def apply_genes(base: Base, genes: Sequence[Gene], weights: Weights | None = None) -> AppliedGenes:
    """Genes live inside ``base``, beside its own LoRA if it has one; at weight 1 each unless given.

    Genes that declare a conflict, have one name, or do not fit the base are refused before anything is changed.
    """
    return AppliedGenes(base, genes, weights)


def checked_weights(genes: Sequence[Gene], weights: Weights | None) -> dict[str, float]:
    """A weight for each gene; genes that cannot be together, and weights that cannot be, are errors."""
    if not genes:
        raise InputError("There is no gene to apply; expected at least one.")
    names = [gene.name for gene in genes]
    if len(set(names)) < len(names):
        raise InputError(f"Genes must have names of their own; got {', '.join(names)}. Leave one out.")
    given = dict(weights or {})
    unknown = sorted(set(given) - set(names))
    if unknown:
        raise InputError(f"Weights name {', '.join(unknown)}; the genes are {', '.join(names)}. Correct the names.")
    check_weights(given, "the weights")
    found = {name: float(given.get(name, 1.0)) for name in names}
    used = [gene for gene in genes if found[gene.name]]
    for gene in used:
        rivals = sorted({other.name for other in used} & set(gene.config.conflicts))
        if rivals:
            raise ConfigError(
                f"Gene {gene.name!r} declares a conflict with {', '.join(rivals)}; they are never used together. "
                "Leave one out, or weigh it 0."
            )
    return found


def check_weights(weights: Mapping[str, object], where: str) -> None:
    """Raise an InputError unless every weight is a real number between 0 and LIMIT, such as 0.5 or NumPy's."""
    for name, weight in weights.items():
        if isinstance(weight, bool) or not isinstance(weight, Real) or weight < 0 or not weight <= LIMIT:  # NaN is not
            raise InputError(
                f"A gene's weight is a number between 0 and {LIMIT:g}; {where} give {name} {weight!r}. Correct it."
            )
