"""Sigmoids, policies by category and their bounds; what is timed runs against a slow twin of single floats."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from safeside import by_category, fixed, ramp, sigmoid, step, strongest, timed
from safeside.errors import InputError
from safeside.gates import Seen, held_scores
from safeside.mixing import Policy
from safeside.policies import ByCategory, Sigmoid, Timed, counts_from_prompt, guards_of, row_values, with_row_values
from safeside.types import MAX_STRENGTH

QUICK = settings(max_examples=60, derandomize=True)
SAME = 1e-6  # one float32 operation
strengths = st.floats(0, MAX_STRENGTH, width=32)
scores = st.floats(0, 1, width=32)
widths = st.floats(0.015625, 4, width=32)


@QUICK
@given(middle=scores, width=widths, bounds=st.tuples(strengths, strengths), values=st.lists(scores, min_size=1))
def test_a_sigmoid_is_its_formula(
    middle: float, width: float, bounds: tuple[float, float], values: list[float]
) -> None:
    low, high = sorted(bounds)
    found = sigmoid("harm", middle, width, low, high).strength(torch.tensor(sorted(values)))
    for value, score in zip(found.tolist(), sorted(values), strict=True):
        expected = low + (high - low) * 0.5 * (1 + math.tanh(2 * (score - middle) / width))
        assert value == pytest.approx(expected, abs=1e-4)
        assert low - SAME <= value <= high + SAME
    assert bool((found[1:] >= found[:-1]).all())


def test_a_sigmoid_is_half_way_in_the_middle() -> None:
    found = sigmoid("harm", 0.5, 0.2, 0.0, 2.0).strength(torch.tensor([0.4, 0.5, 0.6]))
    assert found.tolist() == pytest.approx([2 * 0.1192, 1.0, 2 * 0.8808], abs=1e-3)


@QUICK
@given(value=st.sampled_from([math.nan, math.inf, -math.inf]), ceiling=strengths)
def test_a_score_that_is_not_finite_gets_the_ceiling(value: float, ceiling: float) -> None:
    found = sigmoid("harm", 0.5, ceiling=ceiling).strength(torch.tensor([value, 0.0]))
    assert found[0].item() == pytest.approx(ceiling)
    parts = ((0, "hate", step("harm", 0.5, high=ceiling)), (2, "theft", step("harm", 0.5, high=ceiling / 2)))
    policy = ByCategory("harm", parts, 3)
    assert policy.strength(torch.tensor([[0.0, value, 0.0], [value, 0.0, 0.0]])).tolist() == pytest.approx(
        [ceiling] * 2
    )


def test_a_sigmoid_takes_the_guards_threshold(tiny_base, random_guard) -> None:
    assert sigmoid(random_guard(tiny_base)) == Sigmoid("harm", 0.5, 0.2)


# ---- by category -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def guard(session_base, random_guard):
    return random_guard(session_base, labels=("hate", "violence", "theft"))


def test_each_label_asks_for_its_own_strength(guard) -> None:
    policy = by_category(guard, {"hate": 0.5, "theft": ramp("harm", 0.2, 0.6, ceiling=1.5)})
    found = policy.strength(
        torch.tensor([[0.9, 0.0, 0.0], [0.0, 0.9, 0.0], [0.0, 0.0, 0.4], [0.9, 0.9, 0.9], [0.4, 1.0, 0.1]])
    )
    assert found.tolist() == pytest.approx([0.5, 0.0, 0.75, 1.5, 0.0])
    assert (policy.guard, policy.ceiling, policy.latched) == ("harm", 1.5, True)
    assert isinstance(policy, Policy)


@QUICK
@given(rows=st.lists(st.tuples(scores, scores, scores), min_size=1, max_size=5))
def test_the_strongest_part_counts(rows: list[tuple[float, float, float]]) -> None:
    curves = (step("harm", 0.3, high=0.4), ramp("harm", 0.2, 0.8), sigmoid("harm", 0.5))
    policy = ByCategory("harm", tuple((index, str(index), curve) for index, curve in enumerate(curves)), 3)
    alone = torch.stack([curve.strength(torch.tensor(rows)[:, index]) for index, curve in enumerate(curves)])
    assert torch.equal(policy.strength(torch.tensor(rows)), alone.amax(0))


@pytest.mark.parametrize(
    ("wanted", "problem"),
    [
        ({}, "no label \\(none was given\\)"),
        ({"hat": 1.0}, "has no label hat; expected some of hate, violence, theft"),
        ({"hate": [0.1, 0.2]}, "is one number, or a policy"),
        ({"hate": ramp("other", 0.1, 0.2)}, "must be a step, ramp or sigmoid of guard 'harm'"),
        ({"hate": "much"}, "A strength cannot be 'much'"),
        ({"hate": 3.0}, "must lie in"),
    ],
)
def test_mistakes_in_categories(guard, wanted: dict[str, object], problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        by_category(guard, wanted)


def test_a_policy_of_another_guards_labels_is_refused(guard) -> None:
    with pytest.raises(InputError, match="is for 3 labels; got 2"):
        by_category(guard, {"hate": 1.0}).strength(torch.zeros(1, 2))


# ---- timed -----------------------------------------------------------------------------------------------------------


def test_times_default_to_the_policys_own() -> None:
    assert timed(step("harm", 0.5)).reads == "prompt"
    assert timed(step("harm", 0.5, latched=False)).reads == "answer"
    assert (timed(0.5, first_tokens=4).guard, timed(0.5, first_tokens=4).ceiling) == (None, 0.5)
    assert isinstance(timed(0.5), Policy)


def test_who_has_to_know_the_prompts_end() -> None:
    live = step("harm", 0.5, latched=False)
    waiting = [step("harm", 0.5), timed(live, reads="both"), timed(live, reads="prompt"), timed(0.5, first_tokens=2)]
    assert all(map(counts_from_prompt, waiting))
    assert not any(map(counts_from_prompt, [live, fixed(1), timed(live, margin=0.1), timed(0.5)]))


def test_rows_of_a_timed_strength() -> None:
    policy = timed(fixed([0.1, 0.2]), first_tokens=3)
    assert row_values(policy) == (0.1, 0.2)
    assert with_row_values(policy, (0.3,)) == timed(0.3, first_tokens=3)
    assert row_values(step("harm", 0.5)) is None


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"reads": "question"}, "reads 'prompt', 'answer' or 'both'; got 'question'"),
        ({"reads": "answer", "margin": 1.5}, "a difference of scores in"),
        ({"reads": "answer", "margin": math.nan}, "a difference of scores in"),
        ({"reads": "prompt", "margin": 0.1}, "A margin does nothing where the score is read once"),
        ({"first_tokens": 0}, "first_tokens counts tokens and starts at 1; got 0"),
    ],
)
def test_mistakes_in_times(options: dict[str, object], problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        Timed(**{"policy": step("harm", 0.5), "reads": "prompt", **options})


def test_times_that_do_nothing_are_refused() -> None:
    with pytest.raises(InputError, match="does nothing for a strength that asks no guard"):
        timed(0.5, reads="answer")
    with pytest.raises(InputError, match="timed already"):
        timed(timed(0.5, first_tokens=1))
    for make in (
        lambda: sigmoid("harm", 0.5, 0.0),
        lambda: sigmoid("harm", 1.5),
        lambda: sigmoid("harm", 0.5, math.nan),
    ):
        with pytest.raises(InputError):
            make()


@QUICK
@given(
    values=st.lists(st.one_of(scores, st.just(math.nan)), min_size=1, max_size=12),
    start=st.integers(0, 5),
    margin=st.floats(0.015625, 1, width=32),
    n_new=st.integers(1, 12),
    n_padding=st.integers(0, 3),
)
def test_hysteresis_is_its_recursion(
    values: list[float], start: int, margin: float, n_new: int, n_padding: int
) -> None:
    """``e_t = max(s_t, min(e_{t-1}, s_t + margin))``, one float after the other, padding on the left."""
    n_new = min(n_new, len(values))
    positions = torch.tensor([[-1] * n_padding + list(range(len(values)))])
    filled = torch.tensor([[0.7] * n_padding + values])[..., None]
    found = held_scores(Seen(filled, positions), [start + 1], margin, n_new)[0, :, 0].tolist()
    expected, before = [], -math.inf
    for index, score in enumerate(values):
        known = 1.0 if math.isnan(score) else score
        if index >= start:
            before = max(known, min(before, known + margin))
        expected.append(score if index < start or math.isnan(score) else before)
    assert found == pytest.approx(expected[-n_new:], abs=SAME, nan_ok=True)


def test_a_gate_with_a_margin_lets_go_late() -> None:
    values = torch.tensor([[0.1, 0.6, 0.45, 0.35, 0.45, 0.55]])[..., None]
    held = held_scores(Seen(values, torch.arange(6)[None]), None, 0.2, 6)[..., 0]
    assert (step("harm", 0.5).strength(held) > 0).tolist() == [[False, True, True, True, True, True]]
    plain = held_scores(Seen(values, torch.arange(6)[None]), None, 0.0, 6)[..., 0]
    assert (step("harm", 0.5).strength(plain) > 0).tolist() == [[False, True, False, False, False, True]]
    closed = held_scores(Seen(values, torch.arange(6)[None]), None, 0.1, 6)[..., 0]
    assert (step("harm", 0.5).strength(closed) > 0).tolist() == [[False, True, True, False, False, True]]


def test_who_is_asked_by_the_strongest_of_several() -> None:
    policy = strongest(
        0.3, step("harm", 0.5), timed(step("leak", 0.5, high=1.5), reads="answer"), ramp("harm", 0.1, 0.2)
    )
    assert (guards_of(policy), policy.guard, policy.ceiling) == (("harm", "leak"), "harm", 1.5)
    assert not policy.latched
    assert counts_from_prompt(policy)
    assert strongest(0.3, step("harm", 0.5)).latched
    assert float(policy.strength(torch.tensor(0.6))) == 1.5


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda: strongest(step("harm", 0.5)), "needs two or more"),
        (lambda: strongest(0.2, 0.5), "one of them with a guard"),
        (lambda: strongest(strongest(0.2, step("harm", 0.5)), 0.1), "Give all parts at once"),
        (lambda: strongest([0.2, 0.3], step("harm", 0.5)), "one for all rows"),
        (lambda: strongest(float("nan"), step("harm", 0.5)), r"must lie in \[0, 2\]"),
        (lambda: timed(strongest(0.2, step("harm", 0.5)), reads="both"), "Give each part its times"),
    ],
)
def test_mistakes_in_several_policies(make, problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        make()
