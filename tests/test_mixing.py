"""The mix against a slow twin in float64, and the policies that set its strength."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from safeside import fixed, mix, ramp, step
from safeside.errors import InputError, NotFiniteError
from safeside.mixing import Fixed, Policy, Ramp, Step, _numbers, as_policies
from safeside.types import MAX_STRENGTH

QUICK = settings(max_examples=60, derandomize=True)
FLOAT32_ROUNDING = 1e-5  # relative, of a sum of a few float32 values
BFLOAT16_ROUNDING = 2.0**-8  # relative, of the one cast at the end

strengths = st.floats(0, MAX_STRENGTH, width=32)
scores = st.floats(0, 1, width=32)
shapes = st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 5))
seeds = st.integers(0, 10_000)


def random_mix(seed: int, shape: tuple[int, int, int], n_aligners: int) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """A base state, deltas, and strengths of which a third are 0."""
    generator = torch.Generator().manual_seed(seed)
    state = torch.randn(shape, generator=generator)
    deltas = [torch.randn(shape, generator=generator) for _ in range(n_aligners)]
    values = [torch.rand(shape[:2], generator=generator) * MAX_STRENGTH for _ in range(n_aligners)]
    values = [torch.where(torch.rand(shape[:2], generator=generator) < 0.33, 0.0, value) for value in values]
    return state, deltas, values


def slow_mix(state: Tensor, deltas: list[Tensor], values: list[Tensor]) -> Tensor:
    """One number at a time, in float64."""
    result = state.double().clone()
    for row, column, channel in torch.cartesian_prod(*(torch.arange(size) for size in state.shape)):
        for delta, value in zip(deltas, values, strict=True):
            result[row, column, channel] += float(value[row, column]) * float(delta[row, column, channel])
    return result


@QUICK
@given(seed=seeds, shape=shapes, n_aligners=st.integers(0, 3))
def test_mix_equals_its_slow_twin(seed: int, shape: tuple[int, int, int], n_aligners: int) -> None:
    state, deltas, values = random_mix(seed, shape, n_aligners)
    mixed = mix(state, deltas, values)
    assert mixed.dtype == state.dtype
    torch.testing.assert_close(
        mixed.double(), slow_mix(state, deltas, values), rtol=FLOAT32_ROUNDING, atol=FLOAT32_ROUNDING
    )


@QUICK
@given(seed=seeds, shape=shapes, n_aligners=st.integers(1, 3))
def test_bf16_is_rounded_once(seed: int, shape: tuple[int, int, int], n_aligners: int) -> None:
    state, deltas, values = random_mix(seed, shape, n_aligners)
    state, deltas = state.bfloat16(), [delta.bfloat16() for delta in deltas]
    mixed, exact = mix(state, deltas, values), slow_mix(state, deltas, values)
    assert mixed.dtype == torch.bfloat16
    assert bool(((mixed.double() - exact).abs() <= exact.abs() * BFLOAT16_ROUNDING + FLOAT32_ROUNDING).all())


@QUICK
@given(seed=seeds, shape=shapes, dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_strength_zero_is_the_base_bit_for_bit(seed: int, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    state, deltas, values = random_mix(seed, shape, 2)
    state = state.to(dtype)
    state[0, 0, 0] = -0.0  # a sum with zero would lose its sign
    values[0][0] = values[1][0] = 0.0
    broken = deltas[0].clone()
    broken[values[0] == 0] = math.nan
    mixed = mix(state, [broken, deltas[1]], values)
    off = (values[0] == 0) & (values[1] == 0)
    assert off.any()
    assert torch.equal(mixed[off].view(torch.uint8), state[off].view(torch.uint8))
    assert torch.equal(mix(state, [], []), state)


@QUICK
@given(seed=seeds, shape=shapes)
def test_order_of_aligners_does_not_matter(seed: int, shape: tuple[int, int, int]) -> None:
    state, deltas, values = random_mix(seed, shape, 3)
    torch.testing.assert_close(
        mix(state, deltas, values),
        mix(state, deltas[::-1], values[::-1]),
        rtol=FLOAT32_ROUNDING,
        atol=FLOAT32_ROUNDING,
    )


@QUICK
@given(seed=seeds, shape=shapes, strength=strengths)
def test_the_mix_is_linear_in_strength(seed: int, shape: tuple[int, int, int], strength: float) -> None:
    state, (delta,), _ = random_mix(seed, shape, 1)
    whole = mix(state, [delta], [torch.ones(shape[:2])]) - state
    part = mix(state, [delta], [torch.full(shape[:2], strength)]) - state
    torch.testing.assert_close(part, strength * whole, rtol=FLOAT32_ROUNDING, atol=FLOAT32_ROUNDING)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_delta_in_use_must_be_finite(value: float) -> None:
    delta = torch.zeros(1, 2, 3)
    delta[0, 1, 2] = value
    with pytest.raises(NotFiniteError, match="Detach"):
        mix(torch.zeros(1, 2, 3), [delta], [torch.tensor([[0.0, 0.5]])])
    mix(torch.zeros(1, 2, 3), [delta], [torch.tensor([[0.5, 0.0]])])


def test_a_strength_of_nan_is_never_ignored() -> None:
    with pytest.raises(NotFiniteError):
        mix(torch.zeros(1, 1, 2), [torch.ones(1, 1, 2)], [torch.tensor([[math.nan]])])


def test_gradients_pass_to_the_delta_and_survive_a_broken_one_at_zero() -> None:
    deltas = [torch.ones(1, 2, 2, requires_grad=True), torch.full((1, 2, 2), math.nan, requires_grad=True)]
    mix(torch.zeros(1, 2, 2), deltas, [torch.tensor([[0.5, 0.0]]), torch.zeros(1, 2)]).sum().backward()
    assert deltas[0].grad.tolist() == [[[0.5, 0.5], [0.0, 0.0]]]
    assert deltas[1].grad.isfinite().all()


# ---- policies --------------------------------------------------------------------------------------------------------


@st.composite
def policies(draw: st.DrawFn) -> Policy:
    low, high = sorted(draw(st.tuples(strengths, strengths)))
    if draw(st.booleans()):
        return step("harm", draw(scores), low, high, latched=draw(st.booleans()))
    start, stop = sorted(draw(st.tuples(scores, scores).filter(lambda pair: abs(pair[0] - pair[1]) > 1e-3)))
    return ramp("harm", start, stop, low, high, latched=draw(st.booleans()))


@settings(QUICK, max_examples=100)
@given(policy=policies(), values=st.lists(scores, min_size=2, max_size=8))
def test_gates_rise_with_the_score_within_their_bounds(policy: Policy, values: list[float]) -> None:
    found = policy.strength(torch.tensor(sorted(values)))
    assert bool((found[1:] >= found[:-1]).all())
    floor = policy.floor if isinstance(policy, Ramp) else policy.low
    assert float(found.min()) >= floor
    assert float(found.max()) <= policy.ceiling
    edges = policy.strength(torch.tensor([0.0, 1.0]))
    assert float(edges[1]) == policy.ceiling
    assert float(edges[0]) in (floor, policy.ceiling) or isinstance(policy, Ramp)


@QUICK
@given(policy=policies(), value=st.sampled_from([math.nan, math.inf, -math.inf]))
def test_a_score_that_is_not_finite_gets_the_ceiling(policy: Policy, value: float) -> None:
    assert policy.strength(torch.tensor([value, 0.0]))[0].item() == policy.ceiling


@QUICK
@given(threshold=scores, low=strengths)
def test_a_step_is_high_at_its_threshold_exactly(threshold: float, low: float) -> None:
    policy = step("harm", threshold, low, MAX_STRENGTH)
    below = torch.nextafter(torch.tensor(threshold), torch.tensor(-1.0))
    found = policy.strength(torch.stack([below, torch.tensor(threshold)]))
    assert found.tolist() == [low, MAX_STRENGTH]


def test_a_ramp_is_exact_at_its_corners() -> None:
    for low, high, floor, ceiling in ((0.2, 0.8, 0.0, 1.0), (0.1, 0.7, 0.1, 0.7), (0.0, 1.0, 0.3, 1.9)):
        policy = ramp("harm", low, high, floor, ceiling)
        found = policy.strength(torch.tensor([0.0, low, (low + high) / 2, high, 1.0]))
        expected = torch.tensor([floor, floor, (floor + ceiling) / 2, ceiling, ceiling])
        torch.testing.assert_close(found, expected)
        assert found[[0, 1, 3, 4]].tolist() == expected[[0, 1, 3, 4]].tolist()


def test_a_fixed_strength_is_one_column() -> None:
    assert fixed(0.5).strength(torch.zeros(3, 4)).tolist() == [[0.5]]
    assert fixed([0.0, 1.5]).strength(torch.zeros(())).tolist() == [[0.0], [1.5]]
    assert fixed(torch.tensor([0.25, 1.0])) == Fixed((0.25, 1.0))
    assert (fixed([0.0, 1.5]).ceiling, fixed(0).ceiling, fixed(1).guard, fixed(1).latched) == (1.5, 0.0, None, False)


def test_a_step_takes_the_guards_own_threshold(tiny_base: object, random_guard: object) -> None:
    guard = random_guard(tiny_base, name="harm")
    assert step(guard) == Step("harm", 0.5)
    assert ramp(guard) == Ramp("harm", guard.thresholds[0] / 2, guard.thresholds[0])


def test_a_step_is_on_wherever_the_verdict_flags(tiny_base: object, random_guard: object) -> None:
    """A guard of several labels flags when any of them does, so its lowest threshold counts."""
    from safeside.adapters.config import Calibration

    guard = random_guard(tiny_base, labels=("hate", "harm"))
    guard.set_calibration(Calibration(scale=(1, 1), bias=(0, 0), threshold=(0.3, 0.9)))
    assert step(guard).threshold == 0.3


@pytest.mark.parametrize(
    "make",
    [
        lambda: fixed(-0.1),
        lambda: fixed(2.1),
        lambda: fixed(math.nan),
        lambda: fixed([]),
        lambda: fixed([0.1, math.inf]),
        lambda: step("harm"),
        lambda: step("harm", 1.5),
        lambda: step("harm", math.nan),
        lambda: step("harm", 0.5, low=1.0, high=0.5),
        lambda: step("harm", 0.5, high=2.5),
        lambda: ramp("harm"),
        lambda: ramp("harm", 0.2),
        lambda: ramp("harm", 0.8, 0.2),
        lambda: ramp("harm", 0.5, 0.5),
        lambda: ramp("harm", -0.1, 0.5),
        lambda: ramp("harm", 0.2, 0.8, floor=1.0, ceiling=0.5),
        lambda: ramp("harm", 0.2, 0.8, ceiling=math.nan),
    ],
)
def test_bad_arguments_are_input_errors(make: object) -> None:
    with pytest.raises(InputError, match=r"\w+"):
        make()


def test_a_step_by_an_aligner_is_an_input_error(tiny_base: object, random_aligner: object) -> None:
    with pytest.raises(InputError, match="'refuse' is no guard"):
        step(random_aligner(tiny_base))


# ---- as_policies -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strength", [0.5, 1, [0.5, 1.0], (0.5,), torch.tensor([0.5, 1.0]), torch.tensor(0.5)])
def test_numbers_become_one_policy_for_all(strength: object) -> None:
    assert as_policies(strength, ["a", "b"]) == {"a": fixed(strength), "b": fixed(strength)}


def test_policies_pass_through() -> None:
    gate = step("harm", 0.5)
    assert as_policies(gate, ["a"]) == {"a": gate}
    assert as_policies({"b": gate, "a": [1.0, 0.0]}, ["a", "b", "c"]) == {
        "a": fixed([1.0, 0.0]),
        "b": gate,
        "c": fixed(0.0),
    }
    assert as_policies({}, ["a"]) == {"a": fixed(0.0)}


def test_a_policy_of_ones_own_is_taken() -> None:
    class Always:
        guard, latched, ceiling = None, False, 1.0

        def strength(self, score: Tensor) -> Tensor:
            return torch.ones((1, 1))

    policy = Always()
    assert as_policies(policy, ["a"])["a"] is policy


@pytest.mark.parametrize("strength", [True, "0.5", None, object(), {"a": "strong"}, {"a": None}])
def test_other_strengths_are_input_errors(strength: object) -> None:
    with pytest.raises(InputError, match="A strength cannot be"):
        as_policies(strength, ["a"])


@pytest.mark.parametrize("strength", ["0.5", None, ["0.5"], [None], object(), [[0.5]]])
def test_a_fixed_strength_is_made_of_numbers(strength: object) -> None:
    """What ``fixed`` asks; in tests its types are checked before it runs, for users they are not."""
    with pytest.raises(InputError, match="A fixed strength is a number, or one number for each row; got"):
        _numbers(strength)


def test_unknown_aligners_are_named() -> None:
    with pytest.raises(InputError, match="No aligner called x, y; attached are a, b"):
        as_policies({"y": 1.0, "x": 1.0, "a": 1.0}, ["a", "b"])
    with pytest.raises(InputError, match="attached are none"):
        as_policies({"a": 1.0}, [])
