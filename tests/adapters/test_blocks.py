"""Building blocks: what the formulas of the trunks rely on."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from references import randomise, whole_tape
from safeside.adapters.adapter import DeltaHead, GuardHead
from safeside.adapters.blocks import (
    Attention,
    Rotary,
    TapProjection,
    attention_bias,
    attention_of,
    for_each_query,
    normed,
    rotate,
)
from safeside.adapters.config import Calibration
from safeside.base.taps import SideCache, Tape

SAME = 1e-5  # float32 in another order
BFLOAT16 = 2**-7  # two roundings to 8 bits: of the scale, and of the product


def test_rotated_products_depend_on_distance_only() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 32, generator=generator)
    rotary = Rotary(32)

    def product(first: int, second: int) -> float:
        turned = [
            rotate(state[None, None, None], *rotary(torch.tensor([[position]])))
            for state, position in ((query, first), (key, second))
        ]
        return float((turned[0] * turned[1]).sum())

    assert product(7, 3) == pytest.approx(product(104, 100), abs=1e-4)
    assert product(7, 3) != pytest.approx(product(3, 7), abs=1e-2)
    assert product(5, 5) == pytest.approx(float(query @ key), abs=1e-5)


def test_rotary_is_float32_whatever_the_states() -> None:
    cosines, sines = Rotary(32)(torch.tensor([[100_000, 100_001]]))
    assert cosines.dtype == sines.dtype == torch.float32
    assert cosines.shape == (1, 1, 2, 32)
    assert rotate(torch.ones(1, 1, 2, 32, dtype=torch.bfloat16), cosines, sines).dtype == torch.bfloat16


@pytest.mark.parametrize("scale", [1e-2, 1.0, 1e4])
def test_normed_states_have_unit_size(scale: float) -> None:
    states = normed(torch.randn(2, 3, 64) * scale)
    tolerance = 0.1 if scale < 1 else 1e-3  # epsilon counts for states of size 0.01
    torch.testing.assert_close(states.square().mean(-1), torch.ones(2, 3), rtol=tolerance, atol=0.0)
    large = torch.full((1, 1, 64), 3e4, dtype=torch.float16)  # its square overflows half precision
    assert normed(large).tolist() == torch.ones(1, 1, 64).tolist()


def test_states_in_bfloat16_are_normed_without_a_copy_in_float32() -> None:
    states = (torch.randn(2, 50, 896) * torch.tensor([0.05, 300.0])[:, None, None]).bfloat16()
    expected = torch.nn.functional.rms_norm(states.float(), (896,), eps=1e-6)
    found = normed(states)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=BFLOAT16, atol=0.0)


def test_queries_and_keys_turn_together_as_they_do_apart() -> None:
    rotary = Rotary(32)(torch.tensor([[3, 4, 5], [0, 1, 2]]))
    both = torch.randn(2, 2, 4, 3, 32)  # queries and keys, B, heads, T, head_dim
    assert torch.equal(rotate(both, *rotary), torch.stack([rotate(half, *rotary) for half in both]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bias_masks_as_the_mask_does(dtype: torch.dtype) -> None:
    tape = Tape(torch.tensor([[False, True, True, True], [True, True, True, False]]), 3)
    queries, keys, values = torch.randn(3, 2, 2, 4, 32).to(dtype)
    attend = torch.nn.functional.scaled_dot_product_attention
    expected = attend(queries[:, :, 1:], keys, values, attn_mask=tape.attend)
    found = attend(queries[:, :, 1:], keys, values, attn_mask=attention_bias(tape.attend, dtype))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("n_new", [1, 2, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n_shared", [6, 2, 1])
def test_attention_is_that_of_its_formula(n_new: int, dtype: torch.dtype, n_shared: int) -> None:
    """The twin is attention in float64, written out; some of the slots are padding, 300 queries take three blocks.

    Six heads of queries have keys and values each, in two groups, or all together.
    """
    torch.manual_seed(0)
    n_slots = n_new + 7
    shapes = ((3, 6, n_new, 8), (3, n_shared, n_slots, 8), (3, n_shared, n_slots, 8))
    queries, keys, values = (torch.randn(shape).to(dtype) for shape in shapes)
    attend = torch.rand(3, 1, n_new, n_slots) > 0.4
    attend[..., 0] = True
    found = attention_of(queries, keys, values, attention_bias(attend, dtype))
    heads = [head * n_shared // 6 for head in range(6)]
    products = torch.einsum("bhtd,bhsd->bhts", queries.double(), keys[:, heads].double()) / 8**0.5
    weights = products.masked_fill(~attend, -torch.inf).softmax(-1)
    expected = torch.einsum("bhts,bhsd->bhtd", weights, values[:, heads].double())
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, atol=1e-5 if dtype == torch.float32 else 2e-2, rtol=0)


def test_a_group_keeps_one_head_of_keys_and_of_values() -> None:
    attention, cache, tape = Attention(96, 16, query_group=3), DynamicCache(), whole_tape(2, 5)
    assert attention.queries_keys_values.weight.shape == (96 + 2 * 32, 96)
    bias = attention_bias(tape.attend, torch.float32)
    mixed = attention(torch.randn(2, 5, 96), Rotary(16)(tape.positions), bias, SideCache(cache, 0), 0)
    assert mixed.shape == (2, 5, 96)
    assert cache.layers[0].keys.shape == cache.layers[0].values.shape == (2, 2, 5, 16)


def test_low_rank_taps_have_two_matrices_and_one_bias() -> None:
    shapes = [tuple(parameter.shape) for parameter in TapProjection(64, 32, 4).parameters()]
    assert shapes == [(4, 64), (32, 4), (32,)]
    assert [tuple(parameter.shape) for parameter in TapProjection(64, 32, 0).parameters()] == [(32, 64), (32,)]


def test_sharp_attention_in_bfloat16_is_off_by_the_rounding_of_its_products() -> None:
    """Products of size 9 and more, up to 40, are rounded before the softmax: weights are off by up to an eighth."""
    torch.manual_seed(0)
    queries, keys, values = (torch.randn(2, 3, 300, 32).mul(size).bfloat16() for size in (3.0, 3.0, 1.0))
    bias = attention_bias(torch.ones(2, 1, 300, 300, dtype=torch.bool).tril(), torch.bfloat16)
    wide = (state.double() for state in (queries, keys, values, bias))
    expected = torch.nn.functional.scaled_dot_product_attention(*wide)
    error = attention_of(queries, keys, values, bias).double() - expected
    assert error.square().mean().sqrt() < 0.02
    assert error.abs().max() < 0.3


def test_on_an_accelerator_shared_heads_are_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its fused kernels that take a bias know none; a device without memory stands in for one."""
    given: list[tuple[int, bool]] = []
    fused = torch.nn.functional.scaled_dot_product_attention

    def attend(queries: Tensor, keys: Tensor, values: Tensor, *, attn_mask: Tensor, enable_gqa: bool) -> Tensor:
        given.append((keys.shape[1], enable_gqa))
        return fused(queries, keys, values, attn_mask=attn_mask, enable_gqa=enable_gqa)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attend)
    for device in ("cpu", "meta"):
        queries, keys = torch.zeros(2, 6, 5, 8, device=device), torch.zeros(2, 2, 5, 8, device=device)
        found = attention_of(queries, keys, keys, torch.zeros(2, 1, 5, 5, device=device))
        assert found.shape == (2, 6, 5, 8)
    assert given == [(2, True), (6, False)]


def test_a_repeated_head_stands_where_its_queries_are() -> None:
    torch.manual_seed(0)
    queries, keys, values = torch.randn(2, 6, 5, 8), *torch.randn(2, 2, 2, 5, 8)
    bias = attention_bias(whole_tape(2, 5).attend, torch.float32)
    expected = attention_of(queries, keys, values, bias)
    found = attention_of(queries, for_each_query(keys, 3), for_each_query(values, 3), bias)
    torch.testing.assert_close(found, expected, atol=SAME, rtol=SAME)


@pytest.mark.parametrize("n_shared", [2, 1])
def test_where_gradients_are_wanted_attention_is_fused(n_shared: int) -> None:
    """Products would keep a matrix of queries by keys for every head; so with shared keys and values."""
    queries, keys, values = (torch.randn(1, n, 300, 16).bfloat16().requires_grad_() for n in (2, n_shared, n_shared))
    bias = attention_bias(torch.ones(1, 1, 300, 300, dtype=torch.bool).tril(), torch.bfloat16)
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        attention_of(queries, keys, values, bias).float().sum().backward()
    assert queries.grad is not None
    assert sum(kept) < 2 * 300 * 300


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tap_projects_the_state_at_unit_size(rank: int, dtype: torch.dtype) -> None:
    """The twin is the formula in float64; the second row's states are thousands of times the first one's."""
    torch.manual_seed(0)
    tap = TapProjection(896, 32, rank).to(dtype)
    hidden = (torch.randn(2, 5, 896) * torch.tensor([0.05, 300.0])[:, None, None]).to(dtype)
    twin = copy.deepcopy(tap).double()
    wide = hidden.double()
    expected = twin.project(wide * (wide.square().mean(-1, keepdim=True) + 1e-6).rsqrt())
    found = tap(hidden)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, atol=1e-5 if dtype == torch.float32 else 2e-2, rtol=0)


def test_a_padded_token_reaches_nobody_and_stays_finite() -> None:
    attention = randomise(Attention(64, 32))
    states = torch.randn(1, 4, 64)
    tape = Tape(torch.tensor([[False, True, True, False]]), 4)

    def run(values: Tensor) -> Tensor:
        with torch.no_grad():
            return attention(values, Rotary(32)(tape.positions), attention_bias(tape.attend, values.dtype), None, 0)

    found = run(states)
    changed = states.clone()
    changed[0, [0, 3]] = 100.0
    assert found.isfinite().all()
    torch.testing.assert_close(run(changed)[0, 1:3], found[0, 1:3], rtol=SAME, atol=SAME)


def test_attention_pooling_is_a_weighted_mean_of_the_past() -> None:
    head = randomise(GuardHead(8, 2, pooled=True))
    states = torch.randn(1, 5, 8)
    with torch.no_grad():
        found = head(states, whole_tape(1, 5), None, 0)
        inner = head.norm(states)[0].double()
        for token in range(5):
            seen = inner[: token + 1]
            weights = torch.softmax(seen @ head.query.double() / math.sqrt(8), 0)
            pooled = sum(weight * state for weight, state in zip(weights, seen, strict=True))
            expected = head.linear.weight.double() @ pooled + head.linear.bias.double()
            torch.testing.assert_close(found.logits[0, token].double(), expected, rtol=SAME, atol=SAME)


def test_a_fresh_pooling_is_the_plain_mean() -> None:
    head = GuardHead(8, 1, pooled=True)
    states = torch.randn(1, 3, 8)
    with torch.no_grad():
        found = head(states, whole_tape(1, 3), None, 0).logits[0, -1]
        expected = head.linear(head.norm(states).mean(1))[0]
    torch.testing.assert_close(found, expected, rtol=SAME, atol=SAME)


def test_calibration_turns_logits_into_scores() -> None:
    head = randomise(GuardHead(8, 2, pooled=False))
    head.calibrate(Calibration(scale=(2.0, 0.5), bias=(-1.0, 3.0), threshold=(0.5, 0.5)))
    with torch.no_grad():
        found = head(torch.randn(1, 3, 8), whole_tape(1, 3), None, 0)
    expected = torch.sigmoid(torch.tensor([2.0, 0.5]) * found.logits + torch.tensor([-1.0, 3.0]))
    assert torch.equal(found.scores, expected)
    assert found.scores.dtype == torch.float32


@pytest.mark.parametrize("move", [lambda m: m.bfloat16(), lambda m: m.to(torch.float16), lambda m: m.half().float()])
def test_a_cast_leaves_the_calibration(move: object) -> None:
    head = GuardHead(8, 1, pooled=False)
    head.calibrate(Calibration(scale=(1.2345678,), bias=(-7.123456,), threshold=(0.5,)))
    before = (head.scale, head.bias)
    moved = move(head)
    assert torch.equal(torch.stack([moved.scale, moved.bias]), torch.stack(before))


def test_an_untrained_delta_is_zero() -> None:
    head = DeltaHead(8, 16)
    assert not head(torch.randn(2, 3, 8)).delta.any()
    head(torch.randn(2, 3, 8)).delta.sum().backward()
    assert head.up.weight.grad.any(), "it must be able to leave zero"
