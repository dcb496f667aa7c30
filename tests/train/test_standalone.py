"""The standalone baseline: it costs what the adapter costs, ignores padding, and learns."""

from __future__ import annotations

import pytest
import torch

from safeside import Base, create_adapter, make_config
from safeside.adapters.adapter import Adapter
from safeside.adapters.config import BaseReference
from safeside.adapters.sizing import adapter_matmuls
from safeside.base.fingerprint import Fingerprint
from safeside.errors import ConfigError
from safeside.train.loop import Loop
from safeside.train.objectives import guard_metric, guard_objective
from safeside.train.recipe import Recipe
from safeside.train.rows import Rows
from safeside.train.standalone import Standalone, create_standalone, matched_shape, standalone_matmuls
from safeside.train.taps import Batch

SAME_COST = 0.02  # of the adapter's multiply-adds
PADDING = 1e-5  # float32 sums over masked slots, in another order


def reference(d_model: int, n_layers: int) -> BaseReference:
    fingerprint = Fingerprint(architecture="a", tokenizer="b", template="t", weights="c")
    return BaseReference(
        name="made up", model_type="llama", fingerprint=fingerprint, n_layers=n_layers, d_model=d_model
    )


@pytest.mark.parametrize(
    ("d_model", "n_layers", "options"),
    [
        (256, 8, {"reduction": 4}),
        (256, 8, {"reduction": 8, "layers": (2, 5, 8)}),
        (256, 8, {"reduction": 2, "tap_rank": 16, "labels": ("violence", "hate", "harm")}),
        (64, 3, {"reduction": 2}),
        (64, 3, {"reduction": 2, "layers": (3,)}),
        (1024, 6, {"reduction": 4, "head_dim": 64}),
        (1024, 6, {"reduction": 4, "query_group": 4}),
    ],
)
def test_it_costs_what_the_adapter_costs(d_model: int, n_layers: int, options: dict[str, object]) -> None:
    with torch.device("meta"):
        adapter = Adapter(make_config(reference(d_model, n_layers), **options))
        model = Standalone(matched_shape(adapter, n_tokens=500))
    assert standalone_matmuls(model) == pytest.approx(adapter_matmuls(adapter), rel=SAME_COST)
    assert model.shape.query_group == adapter.config.query_group
    embeddings = 500 * adapter.config.width
    assert sum(parameter.numel() for parameter in model.parameters()) > standalone_matmuls(model) + embeddings


def test_only_a_ladder_guard_has_a_match(tiny_base: Base) -> None:
    with pytest.raises(ConfigError, match="'plr'"):
        create_standalone(tiny_base, create_adapter(tiny_base, make_config(tiny_base, kind="plr")))
    with pytest.raises(ConfigError, match="'align'"):
        create_standalone(tiny_base, create_adapter(tiny_base, make_config(tiny_base, role="align", reduction=2)))


@pytest.fixture
def model(tiny_base: Base) -> Standalone:
    return create_standalone(tiny_base, create_adapter(tiny_base, make_config(tiny_base, reduction=2)), seed=3)


@torch.no_grad()
def test_padding_on_either_side_changes_nothing(model: Standalone) -> None:
    ids = torch.randint(7, 200, (2, 9), generator=torch.Generator().manual_seed(0))
    alone = logits_of(model, ids, torch.ones(2, 9, dtype=torch.bool))
    for left, right in ((0, 4), (4, 0), (3, 2)):
        padded = torch.nn.functional.pad(ids, (left, right), value=9)
        keep = torch.nn.functional.pad(torch.ones(2, 9, dtype=torch.bool), (left, right))
        found = logits_of(model, padded, keep)[:, left : left + 9]
        torch.testing.assert_close(found, alone, atol=PADDING, rtol=PADDING)


@torch.no_grad()
def test_it_reads_only_what_came_before(model: Standalone) -> None:
    ids = torch.randint(7, 200, (1, 9), generator=torch.Generator().manual_seed(0))
    other = ids.clone()
    other[0, -1] = (other[0, -1] + 1) % 200
    first, second = (logits_of(model, some, torch.ones(1, 9, dtype=torch.bool)) for some in (ids, other))
    torch.testing.assert_close(first[:, :-1], second[:, :-1], atol=PADDING, rtol=PADDING)
    assert (first[:, -1] - second[:, -1]).abs().max() > PADDING


def logits_of(model: Standalone, ids: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    logits = model(Batch(tuple(range(len(ids))), ids, keep)).output.logits
    assert logits is not None
    return logits


def test_the_same_seed_gives_the_same_weights(tiny_base: Base) -> None:
    adapter = create_adapter(tiny_base, make_config(tiny_base, reduction=2))
    one, same, other = (create_standalone(tiny_base, adapter, seed).embedding.weight for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_it_learns_which_token_is_harmful(tiny_base: Base, model: Standalone) -> None:
    """Label 1 where token 42 stands anywhere before the end."""
    train, validation = (marked_rows(n_rows, seed) for n_rows, seed in ((256, 0), (64, 1)))
    values = {"name": "toy", "output": "none", "data": {"train": ("toy",), "validation": ("toy",)}}
    recipe = Recipe.model_validate({**values, "training": {"epochs": 6, "learning_rate": 5e-3}})
    objective = guard_objective(tiny_base, model, train, recipe)
    outcome = Loop(model, train.lengths, objective, guard_metric(tiny_base, model, validation), recipe.training).run()
    assert outcome.best_metric > 0.95


def marked_rows(n_rows: int, seed: int) -> Rows:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(43, 60, (n_rows, 10), generator=generator)
    places = torch.randint(0, 8, (n_rows,), generator=generator)
    ids[torch.arange(0, n_rows, 2), places[::2]] = 42
    labels = (ids == 42).any(1).float()[:, None]
    return Rows([tuple(row) for row in ids.tolist()], [10] * n_rows, labels, None)
