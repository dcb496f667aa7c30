"""Genes live and merged: the same model either way, and taken out it is bit for bit what it was."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from genes_for_tests import logits_of, random_gene
from safeside import Adapter, Base, Message, attach, load_base
from safeside.artifact import load_adapter, save_adapter
from safeside.base.families import is_updated
from safeside.errors import (
    AttachmentError,
    ConfigError,
    FormatError,
    InputError,
    MismatchError,
    UnknownNameError,
    UnsupportedError,
)
from safeside.genes.apply import ContextPolicy, apply_genes
from safeside.genes.baselines import with_added
from safeside.genes.merge import ORIGINALS_FILE, merge_genes, model_hash, save_checkpoint, unmerge_genes
from safeside.genes.merged import MERGED_FILE
from safeside.lora import LoraShape, add_lora
from safeside.train.taps import make_batch, record_states
from twin import close

TOLERANCE = 1e-4  # of logits: sums in another order


def with_weights_added(base: Base, parts: list[tuple[float, dict[str, torch.Tensor]]]) -> torch.Tensor:
    """The slow twin: the same model with everything added to its weights by hand."""
    copy = load_base(base.folder)
    with torch.no_grad():
        for weight, matrices in parts:
            for name, matrix in matrices.items():
                own = copy.model.get_submodule(name).weight
                own.add_(weight * (matrix.T if own.shape != matrix.shape else matrix))
    return logits_of(copy)


def matrices_of(gene: object) -> dict[str, torch.Tensor]:
    return {name: update.matrix for name, update in gene.updates.items()}


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt-neox"])
def test_live_it_is_the_weights_added(tiny_family: Callable[[str], Base], family: str) -> None:
    base = tiny_family(family)
    gene, before = random_gene(base, scale=0.2), model_hash(base)
    plain = logits_of(base)
    with apply_genes(base, [gene], {"safe": 0.5}):
        close(logits_of(base), with_weights_added(base, [(0.5, matrices_of(gene))]), TOLERANCE)
        assert is_updated(base.model)
    assert torch.equal(logits_of(base), plain)
    assert model_hash(base) == before
    assert not is_updated(base.model)


def test_several_are_added_up_and_swapped_while_they_run(tiny_base: Base) -> None:
    first, second = random_gene(tiny_base, "first", 1, 0.2), random_gene(tiny_base, "second", 2, 0.2).kept([2])
    plain = logits_of(tiny_base)
    with apply_genes(tiny_base, [first, second], {"second": 1.5}) as applied:
        both = with_weights_added(tiny_base, [(1.0, matrices_of(first)), (1.5, matrices_of(second))])
        close(logits_of(tiny_base), both, TOLERANCE)
        applied.set_weights({"first": 0.0, "second": 0.0})
        assert torch.equal(logits_of(tiny_base), plain), "weight 0 changes no bit"
        applied.swap([second])
        alone = logits_of(tiny_base)
        close(alone, with_weights_added(tiny_base, [(1.0, matrices_of(second))]), TOLERANCE)
        with pytest.raises(InputError, match="between 0 and 2"):
            applied.set_weights({"second": 3.0})
        assert torch.equal(logits_of(tiny_base), alone), "a refused change changes nothing"
    with pytest.raises(AttachmentError, match="taken out"):
        applied.set_weights({})


def moved_lora(base: Base) -> object:
    lora = add_lora(base, LoraShape(rank=2), seed=3)
    with torch.no_grad():
        for update in lora.updates:
            update.copy_(torch.randn(update.shape, generator=torch.Generator().manual_seed(5)) * 0.1)
    return lora


def test_it_stacks_with_the_users_own_lora_in_either_order(tiny_base: Base) -> None:
    gene, plain = random_gene(tiny_base, scale=0.2), logits_of(tiny_base)
    with moved_lora(tiny_base):
        own = logits_of(tiny_base)
        with apply_genes(tiny_base, [gene]):
            both = logits_of(tiny_base)
        assert torch.equal(logits_of(tiny_base), own), "the LoRA stays"
    assert not torch.allclose(both, own, atol=0.05)
    applied = apply_genes(tiny_base, [gene])
    alone = logits_of(tiny_base)
    with moved_lora(tiny_base):
        assert torch.equal(logits_of(tiny_base), both)
    assert torch.equal(logits_of(tiny_base), alone), "the gene stays"
    applied.unapply()
    assert torch.equal(logits_of(tiny_base), plain)


def test_a_gene_put_in_over_a_lora_outlives_it(tiny_base: Base) -> None:
    gene, plain = random_gene(tiny_base, scale=0.2), logits_of(tiny_base)
    lora = moved_lora(tiny_base)
    applied = apply_genes(tiny_base, [gene])
    lora.unload()
    close(logits_of(tiny_base), with_weights_added(tiny_base, [(1.0, matrices_of(gene))]), TOLERANCE)
    applied.unapply()
    assert torch.equal(logits_of(tiny_base), plain)


def test_guards_are_told(tiny_base: Base, random_guard: Callable[..., Adapter]) -> None:
    question = [Message("user", "the cat sat")]
    with attach(tiny_base, guards=[random_guard(tiny_base)]), apply_genes(tiny_base, [random_gene(tiny_base)]):
        verdicts = tiny_base.chat(question, max_new_tokens=2).verdicts
        assert all("a gene in the base shifts the states" in verdict.reason for verdict in verdicts)
    with attach(tiny_base, guards=[random_guard(tiny_base)]):
        assert not any(verdict.reason for verdict in tiny_base.chat(question, max_new_tokens=2).verdicts)


def test_states_of_a_base_with_a_gene_are_not_kept(tiny_base: Base) -> None:
    with apply_genes(tiny_base, [random_gene(tiny_base)]), pytest.raises(UnsupportedError, match="a gene"):
        record_states(tiny_base, make_batch(tiny_base, [(7, 8)], [0]), [1])


def test_what_is_refused_leaves_the_model_alone(tiny_base: Base) -> None:
    gene, rival = random_gene(tiny_base, conflicts=("rival",)), random_gene(tiny_base, "rival", 1)
    before = model_hash(tiny_base)
    for genes, weights, error, message in (
        ([], None, InputError, "no gene"),
        ([gene, gene], None, InputError, "names of their own"),
        ([gene], {"sfae": 1.0}, InputError, "Weights name sfae"),
        ([gene], {"safe": -0.1}, InputError, "between 0 and 2"),
        ([gene], {"safe": float("nan")}, InputError, "between 0 and 2"),
        ([gene], {"safe": "1"}, InputError, "a number between 0 and 2"),
        ([gene], {"safe": True}, InputError, "a number between 0 and 2"),
        ([gene], {"safe": np.float32("nan")}, InputError, "a number between 0 and 2"),
        ([rival, gene], None, ConfigError, "'safe' declares a conflict with rival"),
    ):
        with pytest.raises(error, match=message):
            apply_genes(tiny_base, genes, weights)
        assert not is_updated(tiny_base.model)
    assert model_hash(tiny_base) == before
    with apply_genes(tiny_base, [rival, gene], {"rival": 0.0}) as applied:
        with pytest.raises(ConfigError, match="conflict"):
            applied.set_weights({})
        with pytest.raises(AttachmentError, match="has genes already"):
            apply_genes(tiny_base, [gene])


def test_to_unapply_again_takes_nothing_from_those_that_came_after(tiny_base: Base) -> None:
    first = apply_genes(tiny_base, [random_gene(tiny_base)])
    first.unapply()
    with apply_genes(tiny_base, [random_gene(tiny_base, "next")]):
        first.unapply()
        with pytest.raises(AttachmentError, match="has genes already"):
            apply_genes(tiny_base, [random_gene(tiny_base, conflicts=("next",))])


def test_weights_by_context(tiny_base: Base) -> None:
    genes = [random_gene(tiny_base, "privacy", 1, 0.2), random_gene(tiny_base, "violence", 2, 0.2)]
    policy = ContextPolicy({"clinic": {"privacy": 1.5}, "school": {"privacy": 0.5, "violence": 2.0}})
    with apply_genes(tiny_base, genes) as applied:
        applied.use(policy, "school")
        assert applied.weights == {"privacy": 0.5, "violence": 2.0}
        applied.use(policy, "clinic")
        assert applied.weights == {"privacy": 1.5, "violence": 0.0}, "a policy names all that it uses"
        applied.set_weights({})
        assert applied.weights == {"privacy": 1.0, "violence": 1.0}, "what is not named here is at 1"
        applied.use(policy, "clinic")
        close(logits_of(tiny_base), with_weights_added(tiny_base, [(1.5, matrices_of(genes[0]))]), TOLERANCE)
        with pytest.raises(UnknownNameError, match="Did you mean 'clinic'"):
            applied.use(policy, "clinics")
        with pytest.raises(ConfigError, match="weighs violence"):
            policy.weights_for("school", genes[:1])
    with pytest.raises(InputError, match="context 'all' give privacy 3"):
        ContextPolicy({"all": {"privacy": 3.0}})


@pytest.mark.parametrize("weight", [np.float32(0.5), np.float64(0.5), Fraction(1, 2)])
def test_weights_are_any_real_numbers(tiny_base: Base, weight: object) -> None:
    with apply_genes(tiny_base, [random_gene(tiny_base)], {"safe": weight}) as applied:
        assert applied.weights == {"safe": 0.5}
        assert type(applied.weights["safe"]) is float
        applied.use(ContextPolicy({"clinic": {"safe": weight}}), "clinic")
        assert type(applied.weights["safe"]) is float
        applied.set_weights({"safe": np.int64(1)})
        assert applied.weights == {"safe": 1.0}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_merged_copy_and_its_originals(tiny_family: Callable[[str], Base], tmp_path: Path, family: str) -> None:
    base = tiny_family(family)
    gene, other = random_gene(base, scale=0.2), random_gene(base, "other", 1, 0.2).kept([1])
    before, plain = model_hash(base), logits_of(base)
    merged = load_base(merge_genes(base, [gene, other], tmp_path / "merged", {"other": 0.5}))
    with apply_genes(base, [gene, other], {"other": 0.5}):
        close(logits_of(merged), logits_of(base), TOLERANCE)
    restored = load_base(unmerge_genes(tmp_path / "merged", tmp_path / "restored"))
    assert model_hash(restored) == before == model_hash(base)
    assert torch.equal(logits_of(restored), plain)
    assert restored.fingerprint.weights == base.fingerprint.weights, "the file itself"
    assert not (tmp_path / "restored" / MERGED_FILE).exists()


def test_a_checkpoint_in_several_files_comes_back_in_one(
    tiny_base: Base, tmp_path: Path, random_guard: Callable[..., Adapter]
) -> None:
    """The same tensors, but other files: what belongs to the original has to be told so."""
    tiny_base.model.save_pretrained(tmp_path / "parts", max_shard_size="100KB")
    tiny_base.tokenizer.save_pretrained(tmp_path / "parts")
    base = load_base(tmp_path / "parts")
    guard = save_adapter(random_guard(base), tmp_path / "guard")
    merge_genes(base, [random_gene(base)], tmp_path / "merged")
    restored = load_base(unmerge_genes(tmp_path / "merged", tmp_path / "restored"))
    assert model_hash(restored) == model_hash(base)
    with pytest.raises(MismatchError, match="weights"):
        load_adapter(guard, restored)
    load_adapter(guard, restored, allow_mismatch="weights")


def test_a_merged_copy_that_is_saved_anew_forgets_its_genes(tiny_base: Base, tmp_path: Path) -> None:
    gene = random_gene(tiny_base)
    merged = load_base(merge_genes(tiny_base, [gene], tmp_path / "merged"))
    save_checkpoint(merged, tmp_path / "anew")
    merge_genes(load_base(tmp_path / "anew"), [gene], tmp_path / "twice")


def test_a_copy_in_bfloat16_is_restored_bit_for_bit(tiny_base: Base, tmp_path: Path) -> None:
    """Here subtraction would not give the weights back."""
    half = load_base(tiny_base.folder, dtype="bfloat16")
    half.model.save_pretrained(tmp_path / "half")
    half.tokenizer.save_pretrained(tmp_path / "half")
    half = load_base(tmp_path / "half", dtype="auto")
    gene = random_gene(half, scale=2.0)
    unmerge_genes(merge_genes(half, [gene], tmp_path / "merged"), tmp_path / "restored")
    assert model_hash(load_base(tmp_path / "restored", dtype="auto")) == model_hash(half)
    copy = load_base(tmp_path / "merged", dtype="auto")
    with torch.no_grad():
        for name, update in gene.updates.items():
            copy.model.get_submodule(name).weight.sub_(update.matrix.bfloat16())
    assert model_hash(copy) != model_hash(half)


def test_copies_that_cannot_be_made_or_restored(tiny_base: Base, tmp_path: Path) -> None:
    gene = random_gene(tiny_base)
    with pytest.raises(InputError, match="exists already"):
        merge_genes(tiny_base, [gene], tmp_path)
    with moved_lora(tiny_base), pytest.raises(UnsupportedError, match="holds a LoRA or a gene"):
        merge_genes(tiny_base, [gene], tmp_path / "with_lora")
    assert not (tmp_path / "with_lora").exists()
    with pytest.raises(InputError, match=f"has no {MERGED_FILE}"):
        unmerge_genes(tiny_base.folder, tmp_path / "none")
    merged = merge_genes(tiny_base, [gene], tmp_path / "merged")
    originals = load_file(merged / ORIGINALS_FILE)
    name = next(iter(originals))
    for damaged, message in (
        ({**originals, name: originals[name] + 1}, "is not the one"),
        ({**originals, name: originals[name][:1].contiguous()}, "another shape"),
    ):
        folder = tmp_path / message.replace(" ", "_")
        shutil.copytree(merged, folder)
        save_file(damaged, folder / ORIGINALS_FILE)
        with pytest.raises(FormatError, match=message):
            unmerge_genes(folder, tmp_path / "restored")
        assert not (tmp_path / "restored").exists()
    record = json.loads((merged / MERGED_FILE).read_text())
    for values, message in (
        ({}, "not a valid record"),
        ({**record, "format": 2}, "has format 2; this safeside reads format 1"),
        ({**record, "genes": 1}, "not a valid record of merged genes: genes"),
    ):
        (merged / MERGED_FILE).write_text(json.dumps(values))
        with pytest.raises(FormatError, match=message):
            unmerge_genes(merged, tmp_path / "restored")


def test_weights_that_the_files_do_not_hold_are_not_lost_in_a_merge(tiny_base: Base, tmp_path: Path) -> None:
    gene = random_gene(tiny_base)
    changed = with_added(tiny_base, matrices_of(random_gene(tiny_base, seed=1)))
    with pytest.raises(UnsupportedError, match=r"changed in memory: model.* is not what its files hold"):
        merge_genes(changed, [gene], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    narrow = load_base(tiny_base.folder, dtype="bfloat16")  # the files in another dtype are no change
    assert model_hash(load_base(merge_genes(narrow, [gene], tmp_path / "merged"))) != model_hash(tiny_base)


def test_a_copy_that_would_overflow_is_not_written(tiny_base: Base, tmp_path: Path) -> None:
    half = load_base(tiny_base.folder, dtype="float16")
    half.model.save_pretrained(tmp_path / "half")
    half.tokenizer.save_pretrained(tmp_path / "half")
    gene = random_gene(tiny_base).with_coefficients([1e6, 1e6, 1e6])
    with pytest.raises(InputError, match=r"beyond torch\.float16"):
        merge_genes(load_base(tmp_path / "half", dtype="auto"), [gene], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_genes_in_the_weights_count_too(tiny_base: Base, tmp_path: Path) -> None:
    inside = random_gene(tiny_base, "inside", conflicts=("enemy",))
    merged = load_base(merge_genes(tiny_base, [inside], tmp_path / "merged"))
    friend, enemy = random_gene(tiny_base, "friend", 1), random_gene(tiny_base, "enemy", 2)
    wary = random_gene(tiny_base, "wary", 3, conflicts=("inside",))
    for gene in (inside, enemy, wary):
        with pytest.raises(ConfigError, match=r"in the weights of .*merged already"):
            apply_genes(merged, [gene])
        assert not is_updated(merged.model)
    with apply_genes(merged, [friend, enemy], {"enemy": 0.0}) as applied:
        with pytest.raises(ConfigError, match="conflict with inside"):
            applied.set_weights({})
        assert applied.weights == {"friend": 1.0, "enemy": 0.0}
    with pytest.raises(UnsupportedError, match="merge all at once"):
        merge_genes(merged, [friend], tmp_path / "again")
