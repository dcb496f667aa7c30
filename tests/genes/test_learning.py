"""Extraction, selection and fit: each does what its formula says, and leaves the models bit for bit alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from genes_for_tests import conversations, gene_recipe, random_gene
from safeside import Base, Message, load_base
from safeside.base.families import is_updated
from safeside.errors import ConfigError, InputError, NotFiniteError
from safeside.genes.apply import apply_genes
from safeside.genes.baselines import SaloraSettings, train_salora
from safeside.genes.extract import Pair, divergence, extract_gene, parameters_of, trainable_updates
from safeside.genes.fit import fit_gene
from safeside.genes.merge import merge_genes, model_hash
from safeside.genes.optimise import Steps, draws, optimise
from safeside.genes.recipe import FitSection, SelectSection
from safeside.genes.rows import Row, answer_loss, encode_texts, named, with_answers
from safeside.genes.select import layer_shifts, select_layers
from safeside.lora import LoraShape, add_lora
from twin import close

HARMFUL, BENIGN = conversations(8, answer="the hat sat"), conversations(8, answer="the mat", start=30)


def mean_divergence(teacher: Base, base: Base, rows: list[tuple[Message, ...]]) -> float:
    """The slow twin: row by row and token by token, from logits."""
    total, n_tokens = 0.0, 0
    for messages in rows:
        item = base.encode(messages)
        ids = torch.tensor([item.ids])
        with torch.no_grad():
            wanted, found = (F.log_softmax(model.model(input_ids=ids).logits[0], -1) for model in (teacher, base))
        for place in range(item.answer_start - 1, len(item.ids) - 1):
            total += float((wanted[place].exp() * (wanted[place] - found[place])).sum())
            n_tokens += 1
    return total / n_tokens


def test_the_loss_is_the_divergence_of_the_answers(tiny_base: Base, degraded: Base) -> None:
    texts = encode_texts(degraded, HARMFUL, "rows", answered=True)
    gene = random_gene(degraded, scale=0.2)
    found = divergence(tiny_base, degraded, gene.updates, texts.batch(degraded, range(len(texts))))
    assert not is_updated(degraded.model)
    with apply_genes(degraded, [gene]):
        assert float(found) == pytest.approx(mean_divergence(tiny_base, degraded, HARMFUL), rel=1e-4)


def test_extraction_gives_back_what_was_lost_on_harmful_prompts_alone(tiny_base: Base, degraded: Base) -> None:
    before = model_hash(tiny_base), model_hash(degraded)
    held_out = conversations(6, answer="the hat sat", start=100)
    lost, lost_held_out = (mean_divergence(tiny_base, degraded, rows) for rows in (HARMFUL, held_out))
    kept_near: dict[float, float] = {}
    for weight in (0.0, 4.0):
        recipe = gene_recipe(extract={**gene_recipe().extract.model_dump(), "benign_weight": weight})
        gene = extract_gene(Pair(tiny_base, degraded), HARMFUL, BENIGN, recipe)
        with apply_genes(degraded, [gene]):
            assert mean_divergence(tiny_base, degraded, HARMFUL) < 0.5 * lost
            assert mean_divergence(tiny_base, degraded, held_out) < lost_held_out
            moved = mean_divergence(load_base(degraded.folder), degraded, BENIGN)
        kept_near[weight] = moved
    assert kept_near[4.0] < 0.5 * kept_near[0.0], "the second term keeps it off harmless prompts"
    assert (model_hash(tiny_base), model_hash(degraded)) == before
    assert gene.config.coefficients == (1.0, 1.0, 1.0)
    assert {point.rank for point in gene.config.modules} == {2}


def test_the_same_seed_gives_the_same_gene(tiny_base: Base, degraded: Base) -> None:
    recipe = gene_recipe(extract={"rank": 1, "targets": ["o_proj"], "steps": 2, "batch_size": 2})
    first, second = (extract_gene(Pair(tiny_base, degraded), HARMFUL, BENIGN, recipe) for _ in range(2))
    assert [point.name for point in first.config.modules] == [f"model.layers.{n}.self_attn.o_proj" for n in range(3)]
    assert all(torch.equal(first.updates[name].up, second.updates[name].up) for name in first.updates)


def test_prompts_without_an_answer_get_the_models_own(tiny_base: Base) -> None:
    asked = [*conversations(2), *conversations(1, answer="mine", start=5)]
    found = with_answers(tiny_base, named(asked, "rows"), 4)
    assert found[-1].messages[-1].content == "mine"
    assert [row.messages[:1] for row in found] == [row[:1] for row in asked]
    assert found[0].messages[-1].content == tiny_base.chat(asked[0], max_new_tokens=4).text


def test_a_cut_answer_is_not_learnt_as_a_finished_one(tiny_base: Base) -> None:
    (cut,) = with_answers(tiny_base, named(conversations(1), "rows"), 2)
    assert cut.is_cut, "two tokens are too few for the tiny model"
    whole = tiny_base.encode(cut.messages)
    ends = [tuple(whole.ids), tuple(whole.ids[: len(whole.ids) - 1])]
    finished, unfinished = (
        encode_texts(tiny_base, [row], "rows", answered=True).encoded[0].ids for row in (Row(cut.messages, "it"), cut)
    )
    assert [finished, unfinished] == ends
    assert finished[-1] in tiny_base.stop_ids(None)


def test_rows_that_cannot_be_learnt_from(tiny_base: Base, degraded: Base) -> None:
    pair, recipe, gene = Pair(tiny_base, degraded), gene_recipe(), random_gene(tiny_base)
    before = model_hash(tiny_base), model_hash(degraded)
    empty, long = [(Message("user", "  "),)], conversations(1, answer="the cat " * 200)
    for rows, message in (
        ([], "There are no harmful prompts"),
        (empty, "Row 1 of the harmful prompts has an empty message"),
        ([*HARMFUL[:1], *conversations(1), *empty], "Row 3 of the harmful prompts has an empty message"),
        ([(*empty[0], Message("assistant", "no"))], "Row 1 of the harmful prompts has an empty message"),
        (long, "nothing is cut"),
    ):
        with pytest.raises(InputError, match=message):
            extract_gene(pair, rows, BENIGN, recipe)
    with pytest.raises(InputError, match="There are no harmless prompts"):
        extract_gene(pair, HARMFUL, [], recipe)
    for refusals, task, message in (
        ([], BENIGN, "There are no refusals"),
        (HARMFUL, [], "There are no task rows"),
        (conversations(2), BENIGN, "Row 1 of the refusals has no answer"),
        (HARMFUL, empty, "empty message"),
        (HARMFUL, BENIGN[:3], "8 refusals and 3 task rows"),
    ):
        with pytest.raises(InputError, match=message):
            fit_gene(tiny_base, gene, refusals, task)
    with pytest.raises(InputError, match="There are no harmful prompts"):
        select_layers(tiny_base, gene, [], BENIGN)
    assert (model_hash(tiny_base), model_hash(degraded)) == before


@pytest.mark.parametrize("layer", [1, 3])
def test_a_shift_is_of_the_layers_own_update(tiny_base: Base, layer: int) -> None:
    """The slow twin adds the update to the weights of one layer and reads all states of each prompt by itself."""
    gene = random_gene(tiny_base, scale=0.2)
    found = layer_shifts(tiny_base, gene, HARMFUL, BENIGN)[layer]
    twin = load_base(tiny_base.folder)
    with torch.no_grad():
        for name, update in gene.kept([layer]).updates.items():
            twin.model.get_submodule(name).weight.add_(update.matrix)
    for rows, value in ((HARMFUL, found.harmful), (BENIGN, found.benign)):
        shifts = []
        for messages in rows:
            ids = torch.tensor([tiny_base.encode(messages[:1]).ids])
            plain, moved = (own_states(base, ids, layer) for base in (tiny_base, twin))
            shifts.append(float((moved - plain).norm() / plain.norm()))
        assert value == pytest.approx(sum(shifts) / len(shifts), rel=1e-4)
    assert found.contrast == found.harmful - found.benign


def own_states(base: Base, ids: torch.Tensor, layer: int) -> torch.Tensor:
    """What a block gives at the last token: the last layer's comes before the final norm, so it is read by a hook."""
    found = []
    handle = base.blocks[layer - 1].register_forward_hook(lambda module, inputs, output: found.append(output))
    with torch.no_grad():
        base.model(input_ids=ids)
    handle.remove()
    state = found[0][0] if isinstance(found[0], tuple) else found[0]
    return state[0, -1]


def test_selection_keeps_the_greatest_contrasts_or_chance_or_all(tiny_base: Base) -> None:
    gene, before = random_gene(tiny_base, scale=0.2), model_hash(tiny_base)
    shifts = layer_shifts(tiny_base, gene, HARMFUL, BENIGN)
    ranked = sorted(shifts, key=lambda layer: shifts[layer].contrast, reverse=True)
    kept = select_layers(tiny_base, gene, HARMFUL, BENIGN)
    assert kept.config.layers == tuple(sorted(ranked[:2]))
    assert kept.config.results["shift_harmful_2"] == pytest.approx(shifts[2].harmful)
    drawn = select_layers(tiny_base, gene, HARMFUL, BENIGN, SelectSection(method="random", keep=1))
    assert len(drawn.config.layers) == 1
    everything = select_layers(tiny_base, gene, HARMFUL, BENIGN, SelectSection(method="all", keep=1))
    assert everything.config.layers == (1, 2, 3)
    with pytest.raises(InputError, match="has 3 layers; got keep = 4"):
        select_layers(tiny_base, gene, HARMFUL, BENIGN, SelectSection(keep=4))
    assert model_hash(tiny_base) == before


@pytest.mark.parametrize("refusal_tokens", [0, 2])
def test_a_fit_finds_the_best_scalar(tiny_base: Base, refusal_tokens: int) -> None:
    """The slow twin tries a grid of scalars, each on all of the rows."""
    gene, before = random_gene(tiny_base, scale=0.3).kept([2]), model_hash(tiny_base)
    kinds = [encode_texts(tiny_base, rows, "rows", answered=True) for rows in (HARMFUL, BENIGN)]

    def loss_at(coefficient: float) -> float:
        with apply_genes(tiny_base, [gene.with_coefficients([coefficient])]), torch.no_grad():
            losses = [
                answer_loss(tiny_base, texts.batch(tiny_base, range(len(texts))), n_first)
                for texts, n_first in zip(kinds, (refusal_tokens, 0), strict=True)
            ]
        return float(sum(losses)) / 2

    settings = FitSection(steps=50, learning_rate=0.1, refusal_tokens=refusal_tokens)
    fitted = fit_gene(tiny_base, gene, HARMFUL, BENIGN, settings)
    best = min(loss_at(step / 5 + 0.1) for step in range(-10, 10))
    assert loss_at(fitted.config.coefficients[0]) < min(best + 0.01, loss_at(1.0))
    assert model_hash(tiny_base) == before
    assert fitted.config.results["trainable_params"] == 1
    assert fitted.config.recipe.fit == settings, "what it was fitted with stands in the gene"
    assert fitted.config.results["fit_shots"] == len(HARMFUL)


def test_a_fit_goes_on_from_coefficients_that_are_there(tiny_base: Base) -> None:
    gene = random_gene(tiny_base, scale=0.2)
    halved = gene.with_coefficients([0.5, 0.5, 0.5])
    settings = FitSection(steps=1, learning_rate=1e-6)
    again = fit_gene(tiny_base, halved, HARMFUL, BENIGN, settings)
    assert again.config.coefficients == pytest.approx((0.5, 0.5, 0.5), abs=1e-4)


def test_a_base_that_holds_the_gene_is_not_fitted_again(tiny_base: Base, tmp_path: Path) -> None:
    gene = random_gene(tiny_base)
    merged = load_base(merge_genes(tiny_base, [gene], tmp_path / "merged"))
    with pytest.raises(ConfigError, match=r"is in the weights of .* already"):
        fit_gene(merged, gene, HARMFUL, BENIGN)


def test_only_as_many_task_rows_as_refusals_are_read(tiny_base: Base) -> None:
    gene, settings = random_gene(tiny_base, scale=0.2), FitSection(steps=3)
    unread = [*BENIGN[:2], (Message("user", " "),)]
    few, more = (fit_gene(tiny_base, gene, HARMFUL[:2], rows, settings) for rows in (BENIGN[:2], unread))
    assert few.config.coefficients == more.config.coefficients


@pytest.mark.parametrize("n_first", [0, 1, 3, 1000])
def test_answer_loss_is_that_of_the_logits(tiny_base: Base, n_first: int) -> None:
    texts = encode_texts(tiny_base, HARMFUL, "rows", answered=True)
    with torch.no_grad():
        found = answer_loss(tiny_base, texts.batch(tiny_base, range(len(texts))), n_first)
    total, n_tokens = 0.0, 0
    for item in texts.encoded:
        with torch.no_grad():
            scores = F.log_softmax(tiny_base.model(input_ids=torch.tensor([item.ids])).logits[0], -1)
        for place in range(item.answer_start, len(item.ids))[: n_first or None]:
            total -= float(scores[place - 1, item.ids[place]])
            n_tokens += 1
    assert float(found) == pytest.approx(total / n_tokens, rel=1e-4)


def test_fresh_updates_are_nothing_and_all_that_is_learnt(tiny_base: Base) -> None:
    points = random_gene(tiny_base).config.modules
    updates = trainable_updates(points, tiny_base.device, seed=0)
    texts = encode_texts(tiny_base, HARMFUL, "rows", answered=True)
    loss = divergence(tiny_base, tiny_base, updates, texts.batch(tiny_base, [0, 1]))
    close(loss.detach(), torch.zeros(()), 1e-6)
    assert len(parameters_of(updates)) == 2 * len(points)


def test_draws_use_every_row_before_any_again() -> None:
    order = draws(5, 2, seed=3)
    drawn = [row for _ in range(5) for row in next(order)]
    assert sorted(drawn[:5]) == sorted(drawn[5:]) == [0, 1, 2, 3, 4]
    assert len(next(draws(3, 10, seed=0))) == 3


def test_a_loss_that_is_not_finite_stops() -> None:
    parameter = torch.nn.Parameter(torch.ones(1))
    with pytest.raises(NotFiniteError, match=r"loss is nan at step 0; .*Lower \[fit\] learning_rate, which is 0\.1"):
        optimise(
            [parameter], lambda step: (parameter * float("nan")).sum(), Steps(2, 0.1, rate_name="[fit] learning_rate")
        )


def test_a_last_step_that_is_not_finite_is_noticed_too() -> None:
    parameter = torch.nn.Parameter(torch.ones(1))
    with pytest.raises(NotFiniteError, match=r"NaN or infinity at the end; .*Lower learning_rate, which is 0\.1"):
        optimise([parameter], lambda step: (parameter - 1).abs().sqrt().sum(), Steps(1, 0.1))


def test_a_parameter_that_the_loss_does_not_depend_on_stays_as_it_is() -> None:
    used, unused = (torch.nn.Parameter(torch.ones(1)) for _ in range(2))
    optimise([used, unused], lambda step: used.square().sum(), Steps(2, 0.1))
    assert float(used.detach()) < 1 == float(unused.detach())


@pytest.mark.parametrize(("learning_rate", "steps"), [(1e8, 1), (1e30, 1), (1e30, 2), (1e30, 10)])
def test_a_fit_that_diverges_says_so(tiny_base: Base, learning_rate: float, steps: int) -> None:
    settings, before = FitSection(steps=steps, learning_rate=learning_rate), model_hash(tiny_base)
    with pytest.raises(NotFiniteError, match=r"diverged: .*Lower \[fit\] learning_rate, which is 1e\+"):
        fit_gene(tiny_base, random_gene(tiny_base), HARMFUL, BENIGN, settings)
    assert model_hash(tiny_base) == before
    assert not is_updated(tiny_base.model)


def test_gradients_of_the_user_stay_as_they_were(tiny_base: Base, degraded: Base) -> None:
    """What can learn in a model beside the gene is the user's: it gets no gradient, and keeps the one that it has."""
    quick = gene_recipe(extract={"rank": 1, "steps": 2, "batch_size": 2})
    with add_lora(tiny_base, LoraShape(rank=2)):
        own = [parameter for parameter in tiny_base.model.parameters() if parameter.requires_grad]
        own[0].grad = torch.full_like(own[0], 3.0)
        fit_gene(tiny_base, random_gene(tiny_base), HARMFUL, BENIGN, FitSection(steps=2))
        train_salora(tiny_base, HARMFUL, BENIGN, SaloraSettings(rank=1, safety_rank=1, n_steps=1, batch_size=2))
        assert torch.equal(own[0].grad, torch.full_like(own[0], 3.0))
        assert all(parameter.grad is None for parameter in own[1:])
    trainable = degraded.model.get_parameter("model.layers.0.mlp.up_proj.weight").requires_grad_()
    extract_gene(Pair(tiny_base, degraded), HARMFUL, BENIGN, quick)
    trainable.requires_grad_(requires_grad=False)
    assert trainable.grad is None


def test_a_layer_that_does_nothing_is_named(tiny_base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    """A coefficient that ends at zero is no gene's."""

    def end_at_zero(parameters: list[torch.nn.Parameter], loss_of: object, steps: Steps) -> float:
        with torch.no_grad():
            parameters[-1].zero_()
        return 0.0

    monkeypatch.setattr("safeside.genes.fit.optimise", end_at_zero)
    gene = random_gene(tiny_base)
    with pytest.raises(InputError, match=f"The coefficient of layer {gene.config.layers[-1]} came to 0, so the layer"):
        fit_gene(tiny_base, gene, HARMFUL, BENIGN)
