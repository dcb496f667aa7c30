"""Token buckets by key, against a slow twin that replays every admission."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from safeside.errors import InputError, LimitError
from safeside.serve.limits import Limiter, Limits


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_a_minutes_worth_may_come_at_once_and_then_it_drips(clock: Clock) -> None:
    limiter, limits = Limiter(clock), Limits(requests_per_minute=6)
    for _ in range(6):
        limiter.admit("alice", limits, 1, 1)
    with pytest.raises(LimitError, match=r"Come back in 10.0 s") as told:
        limiter.admit("alice", limits, 1, 1)
    assert told.value.retry_after_s == pytest.approx(10.0)
    limiter.admit("bob", limits, 1, 1)  # another key has its own
    clock.now += told.value.retry_after_s
    limiter.admit("alice", limits, 1, 1)
    with pytest.raises(LimitError):
        limiter.admit("alice", limits, 1, 1)


def test_tokens_are_set_aside_and_what_was_not_used_comes_back_once(clock: Clock) -> None:
    limiter, limits = Limiter(clock), Limits(tokens_per_minute=100)
    admission = limiter.admit("alice", limits, 20, 60)
    with pytest.raises(LimitError):
        limiter.admit("alice", limits, 20, 20)
    admission.settle(30)
    admission.settle(30)
    limiter.admit("alice", limits, 35, 35)
    with pytest.raises(LimitError):
        limiter.admit("alice", limits, 1, 0)


def test_a_request_that_is_refused_costs_nothing(clock: Clock) -> None:
    limiter, limits = Limiter(clock), Limits(requests_per_minute=2, tokens_per_minute=100)
    limiter.admit("alice", limits, 60, 0)
    for _ in range(5):
        with pytest.raises(LimitError):
            limiter.admit("alice", limits, 60, 0)
    limiter.admit("alice", limits, 40, 0)


def test_a_key_with_nothing_left_is_refused_before_its_size_is_known(clock: Clock) -> None:
    for limits in (Limits(requests_per_minute=1), Limits(tokens_per_minute=60)):
        limiter = Limiter(clock)
        for _ in range(3):
            limiter.refuse_used_up("alice", limits)  # it takes nothing
        limiter.admit("alice", limits, 60, 0)
        with pytest.raises(LimitError, match="used up its share") as told:
            limiter.refuse_used_up("alice", limits)
        clock.now += told.value.retry_after_s
        limiter.refuse_used_up("alice", limits)
    Limiter(clock).refuse_used_up("alice", Limits())


@pytest.mark.parametrize(
    ("limits", "problem"),
    [
        (Limits(max_prompt_tokens=9), "10 prompt tokens; its key allows 9"),
        (Limits(max_new_tokens=19), "20 new tokens; its key allows 19"),
        (Limits(tokens_per_minute=29), "30 tokens of prompt and answer; its key allows 29"),
    ],
)
def test_what_could_never_be_let_in_is_no_matter_of_waiting(limits: Limits, problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        Limiter().admit("alice", limits, 10, 20)


def test_without_limits_nothing_is_counted() -> None:
    limiter = Limiter()
    for _ in range(1000):
        limiter.admit("alice", Limits(), 10**6, 10**6).settle(5)


@settings(max_examples=30)
@given(st.lists(st.tuples(st.floats(0, 30), st.integers(1, 50), st.floats(0, 1)), max_size=20))
def test_no_window_admits_more_than_its_share(steps: list[tuple[float, int, float]]) -> None:
    """The slow twin: within any stretch of time, what was used is at most a full bucket and what dripped in."""
    clock = Clock()
    limiter, limits, used = Limiter(clock), Limits(tokens_per_minute=60), []
    for wait_s, n_tokens, share in steps:
        clock.now += wait_s
        try:
            admission = limiter.admit("alice", limits, n_tokens, 0)
        except LimitError:
            continue
        admission.settle(int(n_tokens * share))
        used.append((clock.now, int(n_tokens * share)))
    for start in range(len(used)):
        for end in range(start, len(used)):
            spent = sum(n_tokens for _, n_tokens in used[start : end + 1])
            assert spent <= 60 + (used[end][0] - used[start][0]) + 1e-6
