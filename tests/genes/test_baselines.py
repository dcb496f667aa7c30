"""Baselines against slow twins: entry by entry, or written out from the paper's formula."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from genes_for_tests import conversations, logits_of, random_gene
from safeside import Base
from safeside.errors import InputError
from safeside.genes.apply import apply_genes
from safeside.genes.baselines import (
    SaloraSettings,
    alignment,
    difference,
    main_directions,
    projection,
    resta,
    safe_lora,
    safe_merge,
    thinned,
    train_salora,
    weights_of,
    with_added,
)
from safeside.genes.merge import model_hash
from safeside.genes.rows import answer_loss, encode_texts
from twin import close

HARMFUL, TASK = conversations(6), conversations(6, answer="the mat", start=20)
EXACT = 1e-5  # of single products, summed in another order


def matrix(seed: int, rows: int = 4, columns: int = 3) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def slow_projected(task: torch.Tensor, safety: torch.Tensor) -> list[list[float]]:
    """``V V^T D / |V|`` with sums written out."""
    length = math.sqrt(sum(float(entry) ** 2 for entry in safety.flatten()))
    rows, columns = task.shape
    square = [
        [sum(float(safety[i, k] * safety[j, k]) for k in range(columns)) / length for j in range(rows)]
        for i in range(rows)
    ]
    return [[sum(square[i][j] * float(task[j, k]) for j in range(rows)) for k in range(columns)] for i in range(rows)]


@given(st.integers(0, 1000))
@settings(max_examples=20)
def test_projection_and_cosine(seed: int) -> None:
    task, safety = matrix(seed), matrix(seed + 1)
    slow = torch.tensor(slow_projected(task, safety))
    close(projection(safety) @ task, slow, EXACT)
    cosine = float((slow * task).sum() / (slow.norm() * task.norm()))
    assert alignment(task, safety) == pytest.approx(cosine, abs=1e-5)


def test_a_layer_that_nothing_touched_is_left_alone() -> None:
    zero = torch.zeros(4, 3)
    assert alignment(zero, matrix(1)) == alignment(matrix(1), zero) == 1.0
    assert safe_lora({"a": matrix(1)}, {"a": zero}, 0.5) == {}


def test_resta_is_the_sum_that_it_says() -> None:
    task, safety = {"a": matrix(1)}, {"a": matrix(2)}
    close(resta(task, safety, 0.5)["a"], 0.5 * safety["a"], EXACT)
    thin = thinned(task, 0.5, seed=3)
    close(task["a"] + resta(task, safety, 0.7, 0.5, seed=3)["a"], thin["a"] + 0.7 * safety["a"], EXACT)


def test_thinning_keeps_entries_or_drops_them_and_the_mean() -> None:
    whole = {"a": torch.full((300, 100), 2.0)}
    thin = thinned(whole, 0.25, seed=0)["a"]
    assert set(thin.unique().tolist()) == {0.0, 8.0}
    assert float(thin.mean()) == pytest.approx(2.0, abs=0.1)
    assert torch.equal(thinned(whole, 1.0, seed=0)["a"], whole["a"])
    for density in (0.0, 1.1, float("nan")):
        with pytest.raises(InputError, match="density is a share"):
            thinned(whole, density, seed=0)


def test_safe_lora_projects_what_strays() -> None:
    safety = {"near": matrix(1), "far": matrix(1)}
    task = {"near": matrix(1), "far": matrix(9)}
    between = (alignment(task["near"], safety["near"]) + alignment(task["far"], safety["far"])) / 2
    assert alignment(task["far"], safety["far"]) < between
    added = safe_lora(task, safety, between)
    assert set(added) == {"far"}
    close(task["far"] + added["far"], torch.tensor(slow_projected(task["far"], safety["far"])), EXACT)


def test_safe_merge_mixes_what_strays() -> None:
    task, safety, update = {"a": matrix(9)}, {"a": matrix(1)}, {"a": matrix(4)}
    assert safe_merge(task, safety, update, threshold=-1.0) == {}
    added = safe_merge(task, safety, update, threshold=1.1, share=0.75)
    close(task["a"] + added["a"], 0.75 * task["a"] + 0.25 * update["a"], EXACT)


def test_models_of_two_shapes_have_no_difference() -> None:
    with pytest.raises(InputError, match="differ in layer b"):
        difference({"a": matrix(1), "b": matrix(1)}, {"a": matrix(1)})
    with pytest.raises(InputError, match="differ in layer a"):
        difference({"a": matrix(1)}, {"a": matrix(1, 3, 4)})


def test_a_copy_with_matrices_added_is_the_live_model(tiny_base: Base) -> None:
    gene, before = random_gene(tiny_base, scale=0.2), model_hash(tiny_base)
    copy = with_added(tiny_base, {name: update.matrix for name, update in gene.updates.items()})
    with apply_genes(tiny_base, [gene]):
        close(logits_of(copy), logits_of(tiny_base), 1e-4)
    assert model_hash(tiny_base) == before
    found = difference(weights_of(copy), weights_of(tiny_base))
    close(found["model.layers.0.mlp.up_proj"], gene.updates["model.layers.0.mlp.up_proj"].matrix, 1e-5)


def test_main_directions_are_the_outputs_singular_vectors(tiny_base: Base) -> None:
    texts, name = encode_texts(tiny_base, HARMFUL, "prompts", answered=False), "model.layers.1.self_attn.o_proj"
    found = main_directions(tiny_base, texts, 3)[name]
    outputs = []
    handle = tiny_base.model.get_submodule(name).register_forward_hook(lambda m, i, output: outputs.append(output[0]))
    with torch.no_grad():
        for item in texts.encoded:
            tiny_base.model(input_ids=torch.tensor([item.ids]))
    handle.remove()
    right = torch.linalg.svd(torch.cat(outputs), full_matrices=False)[2][:3].T
    close(found @ found.T, right @ right.T, 1e-3)


def test_salora_learns_the_task_and_leaves_the_safety_directions_alone(tiny_base: Base) -> None:
    before = model_hash(tiny_base)
    found = train_salora(
        tiny_base, HARMFUL, TASK, SaloraSettings(rank=2, safety_rank=4, n_steps=12, learning_rate=0.02)
    )
    assert model_hash(tiny_base) == before
    directions = main_directions(tiny_base, encode_texts(tiny_base, HARMFUL, "prompts", answered=False), 4)
    assert all(
        float((directions[name].T @ update).norm()) < 1e-3 * float(update.norm()) for name, update in found.items()
    )
    texts = encode_texts(tiny_base, TASK, "rows", answered=True)
    with torch.no_grad():
        losses = [
            float(answer_loss(base, texts.batch(base, range(6)))) for base in (tiny_base, with_added(tiny_base, found))
        ]
    assert losses[1] < 0.8 * losses[0]


def test_an_update_at_right_angles_to_what_alignment_moved_strays_most() -> None:
    task, safety = torch.zeros(4, 3), torch.zeros(4, 3)
    task[0], safety[2] = 1.0, 1.0
    assert alignment(task, safety) == 0.0
    close(task + safe_lora({"a": task}, {"a": safety})["a"], torch.zeros(4, 3), EXACT)
    assert set(safe_merge({"a": task}, {"a": safety}, {"a": safety})) == {"a"}
