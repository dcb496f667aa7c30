"""Genes, rows and siblings of tiny models, for tests."""

from __future__ import annotations

from pathlib import Path

import torch

from safeside import Base, Message, load_base
from safeside.base.updates import LowRank
from safeside.genes.checks import family_of
from safeside.genes.extract import attachment_points
from safeside.genes.gene import Gene, GeneConfig
from safeside.genes.recipe import GeneRecipe
from safeside.genes.rows import Conversation

WORDS = ("the cat", "that hat", "the other mat", "how can this be", "sat on it", "there and then")


def conversations(n_rows: int, *, answer: str = "", start: int = 0) -> list[Conversation]:
    """Short prompts that differ, answered or not."""
    prompts = [f"{WORDS[(start + row) % len(WORDS)]} {start + row}" for row in range(n_rows)]
    asked = [(Message("user", prompt),) for prompt in prompts]
    return [(*messages, Message("assistant", answer)) for messages in asked] if answer else list(asked)


def gene_recipe(**changes: object) -> GeneRecipe:
    """A recipe of a few quick steps."""
    values: dict[str, object] = {
        "name": "safe",
        "data": {"harmful": ["harmful.jsonl"], "benign": ["benign.jsonl"]},
        "extract": {"rank": 2, "steps": 20, "batch_size": 8, "learning_rate": 0.03, "max_new_tokens": 6},
        "select": {"keep": 2, "n_prompts": 8},
        "fit": {"steps": 20, "learning_rate": 0.1},
    }
    return GeneRecipe.model_validate({**values, **changes})


def random_gene(base: Base, name: str = "safe", seed: int = 0, scale: float = 0.5, **changes: object) -> Gene:
    """A gene on every linear layer of ``base``, its updates as large as ``scale`` times a weight."""
    recipe = gene_recipe(name=name)
    points = attachment_points(base, (), recipe.extract.rank)
    generator = torch.Generator().manual_seed(seed)
    updates = {
        point.name: LowRank(
            torch.randn(point.rank, point.n_in, generator=generator) / point.n_in**0.5,
            scale * torch.randn(point.n_out, point.rank, generator=generator),
        )
        for point in points
    }
    layers = tuple(range(1, base.n_layers + 1))
    values: dict[str, object] = {
        "name": name,
        "layers": layers,
        "coefficients": (1.0,) * len(layers),
        "modules": points,
        "family": family_of(base),
        "recipe": recipe,
    }
    return Gene(GeneConfig.model_validate({**values, **changes}), updates)


def logits_of(base: Base) -> torch.Tensor:
    """Logits of a few fixed rows."""
    ids = torch.arange(7, 7 + 3 * 12).view(3, 12)
    with torch.no_grad():
        found: torch.Tensor = base.model(input_ids=ids).logits
    return found


def moved_copy(base: Base, folder: Path, matrices: dict[str, torch.Tensor]) -> Base:
    """A sibling of ``base`` with matrices added to its linear layers, saved and loaded."""
    copy = load_base(base.folder)
    with torch.no_grad():
        for name, matrix in matrices.items():
            weight = copy.model.get_submodule(name).weight
            weight.add_(matrix.T if weight.shape != matrix.shape else matrix)
    copy.model.save_pretrained(folder)
    copy.tokenizer.save_pretrained(folder)
    return load_base(folder)
