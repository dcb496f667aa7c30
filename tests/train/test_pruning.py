"""The pruned start: what is kept is the best, whole and consistent, and with everything kept it is the base."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from safeside import Adapter, Base, create_adapter, load_base, make_config
from safeside.adapters.adapter import DeltaHead
from safeside.adapters.blocks import Attention, SideBlock, attention_bias, rotary_frequencies
from safeside.adapters.lst import Lst
from safeside.base.layouts import LAYOUTS, Heads, block_weights, heads_of
from safeside.base.taps import Tape
from safeside.errors import ConfigError
from safeside.train.importance import Importance, Sample, measure_importance
from safeside.train.pruning import (
    create_pruned_standalone,
    keep_block,
    keep_heads,
    keep_pairs,
    prune_block,
    start_from_base,
    stream_importance,
    token_states,
    top,
)
from safeside.train.taps import Batch, make_batch, record_states
from tiny import FAMILY_NAMES, make_tiny
from twin import close, hash_of

WIDE = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}  # heads as wide as a side network's
ENCODER = {"num_attention_heads": 2}
ROWS = [tuple(range(7 + row, 20 + 2 * row)) for row in range(6)]
LABELS = torch.tensor([[0.0], [1.0], [0.0], [1.0], [1.0], [0.0]])
SUPPORTED = [
    name
    for name in FAMILY_NAMES
    if name.replace("-", "_") in {kind for layout in LAYOUTS for kind in layout.model_types}
]
FAST = {"n_rows": 4, "seed": 1}


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Base]:
    """``wide("llama")``: a tiny base whose heads are 32 wide; one query group unless ``changes`` say otherwise."""
    made: dict[str, Base] = {}

    def base(family: str, **changes: object) -> Base:
        key = f"{family} {sorted(changes.items())}"
        if key not in made:
            values = (
                ENCODER
                if family in ("bert", "roberta", "electra")
                else {"n_heads": 2}
                if family == "distilbert"
                else WIDE
            )
            made[key] = load_base(make_tiny(family, tmp_path_factory.mktemp(family), **{**values, **changes}))
        return made[key]

    return base


def measured(base: Base) -> Importance:
    return measure_importance(base, Sample(ROWS, LABELS, **FAST))


# ---- importance ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_importance_is_the_sum_of_squared_gradients(wide: Callable[..., Base], family: str) -> None:
    """The twin: one row at a time, plain ``backward``, the loss by transformers itself."""
    base = wide(family)
    sample = Sample(ROWS, LABELS, **FAST)
    found = measure_importance(base, sample)
    expected = {name: torch.zeros_like(weight) for name, weight in base.model.named_parameters()}
    base.model.requires_grad_(True)
    for row in sample.drawn()[0]:
        ids = torch.tensor([row])
        base.model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        for name, weight in base.model.named_parameters():
            expected[name] += weight.grad**2
        base.model.zero_grad(set_to_none=True)
    base.model.requires_grad_(False)
    names = {weight: name for name, weight in base.model.named_parameters()}
    for squares, block in zip(found.blocks, base.blocks, strict=True):
        twin = block_weights(base, block, lambda weight: expected[names[weight]])
        for field in ("queries", "keys", "values", "output", "gate", "up", "down"):
            torch.testing.assert_close(getattr(squares, field), getattr(twin, field), rtol=1e-3, atol=1e-7)
    assert found.n_rows == 4


def test_scales_are_the_size_of_what_each_block_reads(wide: Callable[..., Base]) -> None:
    base = wide("llama")
    sample = Sample(ROWS, LABELS, **FAST)
    sizes: list[list[float]] = [[] for _ in base.blocks]
    for row in sample.drawn()[0]:
        states = record_states(base, make_batch(base, [row], [0]), range(base.n_layers))
        for layer, found in enumerate(sizes):
            found += [float(token.square().mean().sqrt()) for token in states[layer][0]]
    expected = [sum(found) / len(found) for found in sizes]
    assert measure_importance(base, sample).scales == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_measuring_leaves_the_base_as_it_was(wide: Callable[..., Base], family: str) -> None:
    base = wide(family)
    before = hash_of(base.model)
    measured(base)
    assert hash_of(base.model) == before
    assert not any(weight.requires_grad for weight in base.model.parameters())
    assert all(weight.grad is None for weight in base.model.parameters())


def test_the_seed_draws_the_rows() -> None:
    drawn = [Sample(ROWS, LABELS, 3, seed).drawn() for seed in (0, 0, 1)]
    assert drawn[0][0] == drawn[1][0] != drawn[2][0]
    assert all(float(label) == float(LABELS[ROWS.index(row)]) for row, label in zip(*drawn[0], strict=True))
    assert Sample(ROWS, LABELS).drawn()[0] == ROWS


def test_rows_that_tell_nothing_are_refused(wide: Callable[..., Base]) -> None:
    with pytest.raises(ConfigError, match="both harmful and harmless"):
        measure_importance(wide("bert"), Sample(ROWS, torch.ones(6, 1)))
    with pytest.raises(ConfigError, match="at least two tokens"):
        measure_importance(wide("llama"), Sample([(5,), (6,)], LABELS[:2]))


# ---- what is kept ----------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 5), min_size=1, max_size=20), st.data())
def test_top_keeps_the_highest(scores: list[int], data: st.DataObject) -> None:
    n_kept = data.draw(st.integers(1, len(scores)))
    kept = top(torch.tensor(scores, dtype=torch.float32), n_kept).tolist()
    assert kept == sorted(set(kept))
    left = [score for place, score in enumerate(scores) if place not in kept]
    assert len(kept) == n_kept
    assert min(scores[place] for place in kept) >= max(left, default=0)


def test_the_stream_counts_every_weight_that_touches_an_index(wide: Callable[..., Base]) -> None:
    importance = measured(wide("llama"))
    expected = torch.zeros(64)
    for index in range(64):
        for block in importance.blocks:
            for reader in (block.queries, block.keys, block.values, block.gate, block.up):
                expected[index] += reader[:, index].sum()
            for writer in (block.output, block.down):
                expected[index] += writer[index].sum()
    torch.testing.assert_close(stream_importance(importance), expected, rtol=1e-4, atol=1e-7)


def test_groups_are_taken_whole_and_hidden_units_are_the_best(wide: Callable[..., Base]) -> None:
    base = wide("llama", num_attention_heads=8, num_key_value_heads=4)
    squares, heads = measured(base).blocks[1], heads_of(base)
    total = []
    for group in range(4):
        queried, grouped = slice(group * 64, group * 64 + 64), slice(group * 32, group * 32 + 32)
        total.append(
            squares.queries[queried].sum()
            + squares.output[:, queried].sum()
            + squares.keys[grouped].sum()
            + squares.values[grouped].sum()
        )
    order = sorted(range(4), key=lambda group: -float(total[group]))
    assert keep_heads(squares, heads, 2) == [2 * order[0], 2 * order[0] + 1]
    four = keep_heads(squares, heads, 4)
    assert four == sorted(2 * group + place for group in order[:2] for place in range(2))
    three = keep_heads(squares, heads, 3)
    assert set(keep_heads(squares, heads, 2)) < set(three) < set(four)
    kept = keep_block(squares, heads, Attention(4 * 32, 32), 10)
    assert [(own.query_heads, own.group) for own in kept.groups] == [((head,), head // 2) for head in four]
    shared = keep_block(squares, heads, Attention(4 * 32, 32, query_group=2), 10).groups
    assert [(own.query_heads, own.group) for own in shared] == [
        ((2 * group, 2 * group + 1), group) for group in sorted(order[:2])
    ]
    scores = [
        float(squares.gate[unit].sum() + squares.up[unit].sum() + squares.down[:, unit].sum()) for unit in range(96)
    ]
    assert kept.feed_forward.tolist() == sorted(sorted(range(96), key=lambda unit: -scores[unit])[:10])


def test_rotary_pairs_are_whole_and_turn_alike(wide: Callable[..., Base]) -> None:
    """Of heads 64 wide every second pair turns as the side's; both halves of a pair are kept."""
    base = wide("llama", head_dim=64)
    squares, heads = measured(base).blocks[0], heads_of(base)
    head = keep_block(squares, heads, Attention(32, 32), 8).groups[0]
    first, second = head.matched[:16], head.matched[16:]
    assert first.tolist() == list(range(0, 32, 2))
    assert (second - first).tolist() == [32] * 16
    torch.testing.assert_close(heads.frequencies[first], rotary_frequencies(32))
    assert len(head.values.unique()) == 32


@torch.no_grad()
def test_a_group_keeps_what_matters_to_all_its_queries(wide: Callable[..., Base]) -> None:
    """Of 64 entries the first query head reads the first 32, and the second three times as much of the others."""
    base = wide("llama", head_dim=64)
    squares, heads = measured(base).blocks[0], heads_of(base)
    squares.values.zero_()
    squares.output.zero_()
    squares.output[:, :32], squares.output[:, 96:128] = 1.0, 3.0
    (shared,) = keep_block(squares, heads, Attention(64, 32, query_group=2), 8).groups
    assert shared.values.tolist() == list(range(32, 64))
    first, second = keep_block(squares, heads, Attention(64, 32), 8).groups
    assert (first.values.tolist(), second.values.tolist()) == (list(range(32)), list(range(32, 64)))
    heads = replace(heads, frequencies=None)
    squares.keys.zero_()
    squares.queries.zero_()
    squares.queries[:32], squares.queries[96:128] = 3.0, 1.0
    (shared,) = keep_block(squares, heads, Attention(64, 32, query_group=2), 8).groups
    assert shared.matched.tolist() == list(range(32))


@torch.no_grad()
def test_groups_that_the_base_does_not_have_cannot_be_kept(wide: Callable[..., Base]) -> None:
    base = wide("llama", num_attention_heads=8, num_key_value_heads=4)
    importance = measured(base)
    prune_block(base, 0, SideBlock(128, 32, 96, 2), torch.arange(128) % 64, importance)
    with pytest.raises(ConfigError, match="in 4 groups of 2; 1 groups of 4 cannot be kept of them"):
        prune_block(base, 0, SideBlock(128, 32, 96, 4), torch.arange(128) % 64, importance)
    base = wide("llama", hidden_size=192, num_attention_heads=6, num_key_value_heads=2)
    squares, heads = measured(base).blocks[0], heads_of(base)
    kept = keep_block(squares, heads, Attention(4 * 32, 32, query_group=2), 8).groups
    assert [own.group for own in kept] == [0, 1], "two heads of each group of three"
    assert all(head * 2 // 6 == own.group for own in kept for head in own.query_heads)


@given(st.sampled_from([16, 24, 32, 64]), st.sampled_from([1e4, 5e5, 1e6]))
def test_pairs_keep_their_order(n_pairs: int, turn: float) -> None:
    frequencies = turn ** -(torch.arange(n_pairs) / n_pairs)
    kept = keep_pairs(frequencies, rotary_frequencies(32)).tolist()
    assert kept == sorted(set(kept))
    assert len(kept) == 16
    assert keep_pairs(rotary_frequencies(32), rotary_frequencies(32)).tolist() == list(range(16))


# ---- the oracle ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "changes"),
    [("llama", {}), ("granite", {}), ("phi3", {"rms_norm_eps": 1e-6}), ("mistral", {"sliding_window": None})],
)
@torch.no_grad()
def test_with_everything_kept_a_block_is_the_bases_own(
    wide: Callable[..., Base], family: str, changes: dict[str, object]
) -> None:
    """A side network has one epsilon and no windows."""
    base = wide(family, **changes)
    importance = measured(base)
    batch = make_batch(base, ROWS, range(len(ROWS)))
    states = record_states(base, batch, range(base.n_layers + 1))
    tape = Tape(batch.keep, batch.ids.shape[1])
    in_group = heads_of(base).n_queries // heads_of(base).n_groups
    for index, size in itertools.product(range(base.n_layers), {1, in_group}):  # keys apart, and shared as in the base
        side = SideBlock(64, 32, 96, size)
        prune_block(base, index, side, torch.arange(64), importance, is_normed=False)
        found = side(states[index], rotary(32, tape), attention_bias(tape.attend, torch.float32), None, 0)
        close(found[batch.keep], states[index + 1][batch.keep])


def rotary(head_dim: int, tape: Tape) -> tuple[torch.Tensor, torch.Tensor]:
    angles = tape.positions[..., None].float() * rotary_frequencies(head_dim)
    both = torch.cat([angles, angles], -1)[:, None]
    return both.cos(), both.sin()


@torch.no_grad()
def test_with_everything_kept_the_standalone_is_the_base(wide: Callable[..., Base]) -> None:
    """Hidden units that the base does not have are silenced for this."""
    base = wide("llama")
    adapter = create_adapter(base, make_config(base, width=64))
    model = create_pruned_standalone(base, adapter, measured(base), seed=3)
    for block in model.blocks:
        block.feed_forward.down.weight[:, 96:] = 0.0
    batch = make_batch(base, ROWS, range(len(ROWS)))
    read: list[torch.Tensor] = []
    handle = model.head.register_forward_pre_hook(lambda module, inputs: read.append(inputs[0]))
    model(batch)
    handle.remove()
    expected = record_states(base, batch, (base.n_layers,))[base.n_layers]
    close(read[0][batch.keep], expected[batch.keep])


@torch.no_grad()
@pytest.mark.parametrize("family", [*SUPPORTED, "bert", "roberta", "electra", "distilbert"])
def test_every_standalone_starts_from_what_the_first_block_reads(wide: Callable[..., Base], family: str) -> None:
    """As scaled and normed: gemma's and granite's embeddings are multiplied, encoders' normed, electra's projected."""
    base = wide(family)
    adapter = create_adapter(base, make_config(base, width=64))
    model = create_pruned_standalone(base, adapter, measured(base))
    ids = torch.tensor([[11, 5], [5, 5]])
    read = record_states(base, Batch((0, 1), ids, ids > 0), (0,))[0]
    close(model.embedding(torch.tensor([5])), read[1, 1][None])
    if not base.is_encoder:  # without positions of its own
        close(model.embedding(ids), read)


@torch.no_grad()
def test_the_embeddings_of_a_base_that_takes_them_as_they_are_are_copied(wide: Callable[..., Base]) -> None:
    base = wide("llama")
    expected = base.model.get_input_embeddings().get_parameter("weight")
    assert torch.equal(token_states(base, len(expected), torch.arange(64)), expected)
    assert torch.equal(token_states(base, 9, torch.tensor([3, 60])), expected[:9, [3, 60]])


@torch.no_grad()
def test_a_block_on_normed_states_is_the_bases_own_divided_by_its_scale(wide: Callable[..., Base]) -> None:
    """Of a token whose state has exactly the mean size."""
    base = wide("llama")
    importance = measured(base)
    side = SideBlock(64, 32, 96)
    prune_block(base, 1, side, torch.arange(64), importance)
    batch = Batch((0,), torch.tensor([[9]]), torch.ones(1, 1, dtype=torch.bool))
    state = record_states(base, batch, (1, 2))[1]
    state = state / state.square().mean().sqrt() * importance.scales[1]
    tape = Tape(batch.keep, 1)
    expected = base.blocks[1](state, position_embeddings=rotary(32, tape), attention_mask=None)
    expected = expected[0] if isinstance(expected, tuple) else expected
    found = side(state / importance.scales[1], rotary(32, tape), attention_bias(tape.attend, torch.float32), None, 0)
    close(found[0] * importance.scales[1], expected.view(found[0].shape))


# ---- adapters --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [*SUPPORTED, "bert", "roberta", "electra", "distilbert"])
def test_every_family_with_a_layout_starts_an_adapter(wide: Callable[..., Base], family: str) -> None:
    base = wide(family)
    importance = measured(base)
    adapter = create_adapter(base, make_config(base, width=32))
    before = adapter.trunk.blocks[1].feed_forward.gate_and_up.weight.clone()
    stream = start_from_base(base, adapter, importance)
    assert stream.tolist() == top(stream_importance(importance), 32).tolist()
    trunk = adapter.trunk
    assert isinstance(trunk, Lst)
    hidden = torch.randn(2, 5, 64)
    for tap in trunk.taps.values():
        close(tap(hidden), torch.nn.functional.rms_norm(hidden, (64,), eps=1e-6)[..., stream])
    has_gate = importance.blocks[0].gate is not None
    assert torch.equal(trunk.blocks[1].feed_forward.gate_and_up.weight, before) != has_gate
    assert all(bool(weight.isfinite().all()) for weight in adapter.parameters())
    if not base.is_encoder:
        aligner = create_adapter(base, make_config(base, role="align", width=32))
        start_from_base(base, aligner, importance)
        assert isinstance(aligner.head, DeltaHead)
        assert not aligner.head.up.weight.any()


def test_each_side_block_comes_from_the_block_that_it_taps(wide: Callable[..., Base]) -> None:
    base = wide("llama")
    importance = measured(base)
    adapter = create_adapter(base, make_config(base, width=32, layers=(0, 1, 3)))
    start_from_base(base, adapter, importance)
    stream = top(stream_importance(importance), 32)
    for block, index in zip(adapter.trunk.blocks, (0, 2), strict=True):
        norm = base.blocks[index].input_layernorm.weight
        assert torch.equal(block.attention_norm.weight, norm[stream])


def test_a_tap_of_low_rank_selects_the_most_important(wide: Callable[..., Base]) -> None:
    base = wide("llama")
    importance = measured(base)
    adapter = create_adapter(base, make_config(base, width=32, tap_rank=8))
    stream = start_from_base(base, adapter, importance)
    best = set(top(stream_importance(importance), 8).tolist())
    hidden = torch.randn(1, 3, 64)
    expected = torch.nn.functional.rms_norm(hidden, (64,), eps=1e-6)[..., stream]
    expected[..., [place for place, index in enumerate(stream.tolist()) if index not in best]] = 0
    close(adapter.trunk.taps["2"](hidden), expected)


def test_what_cannot_start_from_the_base_is_refused(
    wide: Callable[..., Base], tiny_family: Callable[[str], Base], tmp_path: Path
) -> None:
    base = wide("llama")
    importance = measured(base)
    with pytest.raises(ConfigError, match="'plr'"):
        start_from_base(base, create_adapter(base, make_config(base, kind="plr")), importance)
    narrow = tiny_family("llama")
    with pytest.raises(ConfigError, match="are 16 wide"):
        start_from_base(narrow, create_adapter(narrow, make_config(narrow, width=32)), measured(narrow))
    one = wide("llama", num_attention_heads=1)
    with pytest.raises(ConfigError, match="has 1 heads; 2 cannot be kept"):
        start_from_base(one, create_adapter(one, make_config(one, width=64)), measured(one))
    with pytest.raises(ConfigError, match=r"'gpt2' base.*Expected one of .*llama"):
        measured(tiny_family("gpt2"))


def test_heads_of_partial_rotation_are_refused(wide: Callable[..., Base]) -> None:
    base = wide("phi3", partial_rotary_factor=0.5)
    with pytest.raises(ConfigError, match="turns 16 of the 32"):
        heads_of(base)
    assert isinstance(heads_of(wide("llama")), Heads)


def test_the_pruned_guard_is_an_adapter_like_any_other(wide: Callable[..., Base]) -> None:
    base = wide("llama")
    random, pruned = (create_adapter(base, make_config(base, width=32), 5) for _ in range(2))
    start_from_base(base, pruned, measured(base))
    assert isinstance(pruned, Adapter)
    assert torch.equal(random.head.linear.weight, pruned.head.linear.weight)  # the read-out is random in both
