"""The LoRA guard: it starts as the base, learns by the same loop, and leaves the base bit for bit."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from safeside import Adapter, Base, attach
from safeside.adapters.sizing import base_matmuls
from safeside.base.families import has_lora
from safeside.errors import AttachmentError, ConfigError, UnsupportedError
from safeside.lora import LoraShape, linear_layers
from safeside.train.loop import Loop
from safeside.train.lora import create_lora
from safeside.train.objectives import guard_metric, guard_objective
from safeside.train.recipe import Recipe
from safeside.train.rows import Rows
from safeside.train.taps import make_batch, record_states
from twin import close, hash_of

ROWS = [tuple(range(7 + row, 20 + 2 * row)) for row in range(6)]
LAYERS = 3 * 7  # blocks times linear layers of each, of the tiny llama


def marked_rows(n_rows: int, seed: int) -> Rows:
    """Label 1 where token 42 stands anywhere before the end."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(43, 60, (n_rows, 8), generator=generator)
    places = torch.randint(0, 6, (n_rows,), generator=generator)
    ids[torch.arange(0, n_rows, 2), places[::2]] = 42
    labels = (ids == 42).any(1).float()[:, None]
    return Rows([tuple(row) for row in ids.tolist()], [8] * n_rows, labels, None)


def recipe(**training: object) -> Recipe:
    values = {"name": "toy", "output": "none", "data": {"train": ("toy",), "validation": ("toy",)}}
    return Recipe.model_validate({**values, "training": training})


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "mixtral", "bert"])
def test_it_learns_and_leaves_the_base_as_it_was(tiny_family: Callable[[str], Base], family: str) -> None:
    base = tiny_family(family)
    before, attributes, names = (
        hash_of(base.model),
        set(vars(base.model)),
        [name for name, _ in base.model.named_modules()],
    )
    train, validation = marked_rows(64, 0), marked_rows(32, 1)
    settings = recipe(epochs=2, batch_size=16, learning_rate=5e-3)
    with create_lora(base, 1, LoraShape(rank=4)) as guard:
        objective = guard_objective(base, guard, train, settings)
        first = guard_metric(base, guard, validation)()
        outcome = Loop(guard, train.lengths, objective, guard_metric(base, guard, validation), settings.training).run()
        assert all(bool(update.any()) for update in guard.updates)  # those that start at zero have moved
    assert outcome.best_metric > first
    assert hash_of(base.model) == before
    assert set(vars(base.model)) == attributes
    assert [name for name, _ in base.model.named_modules()] == names
    assert not has_lora(base.model)
    assert not any(weight.requires_grad for weight in base.model.parameters())
    assert not base.model.training


def test_it_learns_a_rule(tiny_base: Base) -> None:
    train, validation = marked_rows(160, 0), marked_rows(64, 1)
    settings = recipe(epochs=4, batch_size=16, learning_rate=2e-2)
    with create_lora(tiny_base, 1, LoraShape(rank=8)) as guard:
        objective = guard_objective(tiny_base, guard, train, settings)
        loop = Loop(guard, train.lengths, objective, guard_metric(tiny_base, guard, validation), settings.training)
        assert loop.run().best_metric > 0.9


@torch.no_grad()
def test_it_starts_as_a_read_out_of_the_base(tiny_base: Base) -> None:
    batch = make_batch(tiny_base, ROWS, range(len(ROWS)))
    final = record_states(tiny_base, batch, (0,))[-1]
    with create_lora(tiny_base, 2, seed=4) as guard:
        logits = guard(batch).output.logits
        expected = guard.head.linear(guard.head.norm(final))
        assert logits.shape == (*batch.ids.shape, 2)
        close(logits[batch.keep], expected[batch.keep])


def test_only_its_own_parameters_are_its_state(tiny_base: Base) -> None:
    with create_lora(tiny_base) as guard:
        assert len(guard.updates) == 2 * LAYERS
        head = {"head.norm.weight", "head.linear.weight", "head.linear.bias"}
        assert set(guard.state_dict()) == {f"updates.{index}" for index in range(2 * LAYERS)} | head
        trained = {id(weight) for weight in guard.parameters()}
        found = {id(weight) for weight in tiny_base.model.parameters() if weight.requires_grad}
        assert found <= trained


def test_its_cost_is_a_pass_of_its_own(tiny_base: Base) -> None:
    blocks = sum(weight.numel() for weight in tiny_base.blocks.parameters() if weight.ndim >= 2)
    vocabulary = tiny_base.model.get_output_embeddings().weight.numel()
    assert blocks + vocabulary == base_matmuls(tiny_base)
    sizes = [sum(tiny_base.model.get_submodule(name).weight.shape) for name in linear_layers(tiny_base, ())]
    assert len(sizes) == LAYERS
    with create_lora(tiny_base, 3, LoraShape(rank=4)) as guard:
        assert guard.matmuls == blocks + 4 * sum(sizes) + 3 * tiny_base.d_model


def test_targets_pick_layers(tiny_base: Base) -> None:
    assert len(linear_layers(tiny_base, ("q_proj", "v_proj"))) == 6
    with create_lora(tiny_base, 1, LoraShape(targets=("q_proj",))) as guard:
        assert len(guard.updates) == 6
    with pytest.raises(ConfigError, match=r"ends in query; found .*q_proj"):
        create_lora(tiny_base, 1, LoraShape(targets=("query",)))
    assert not has_lora(tiny_base.model)


def test_the_seed_decides_its_start(tiny_base: Base) -> None:
    starts = []
    for seed in (1, 1, 2):
        with create_lora(tiny_base, seed=seed) as guard:
            starts.append(torch.cat([weight.detach().flatten().clone() for weight in guard.parameters()]))
    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[0], starts[2])


def test_one_thing_at_a_time_changes_the_base(tiny_base: Base, random_guard: Callable[..., Adapter]) -> None:
    with attach(tiny_base, guards=[random_guard(tiny_base)]), pytest.raises(AttachmentError, match="already"):
        create_lora(tiny_base)
    with create_lora(tiny_base) as guard:
        with pytest.raises(AttachmentError, match="already"):
            create_lora(tiny_base)
        with pytest.raises(UnsupportedError, match="LoRA"):
            record_states(tiny_base, make_batch(tiny_base, ROWS, [0]), (0,))
    guard.unload()
    with pytest.raises(AttachmentError, match="was unloaded"):
        guard(make_batch(tiny_base, ROWS, [0]))
