"""Likelihoods: batches give what one token after the other gives, under whatever is attached."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch

from safeside import Adapter, Base, Message, attach, ramp
from safeside.adapters.config import Calibration
from safeside.errors import InputError
from safeside.evals import likelihood as module
from safeside.evals.likelihood import Likelihood, likelihoods, utility

TALKS = [
    [Message("user", prompt), Message("assistant", answer)]
    for prompt, answer in (
        ("the cat", "sat on the mat and then"),
        ("how can this be", "they"),
        ("hat", "the other hat"),
    )
]
CLOSE = 1e-4  # float32 sums over a few dozen tokens, in other orders


@torch.no_grad()
def slowly(base: Base, messages: list[Message]) -> Likelihood:
    """One pass for each token of the answer, without a cache."""
    encoded, total = base.encode(messages), 0.0
    for end in range(encoded.answer_start, len(encoded.ids)):
        attached = base.attachment
        with attached.request(prompt_end=[encoded.answer_start]) if attached else nullcontext():
            logits = base.model(torch.tensor([encoded.ids[:end]]), use_cache=False).logits[0, -1]
        total -= float(logits.double().log_softmax(-1)[encoded.ids[end]])
    return Likelihood(total, len(encoded.ids) - encoded.answer_start)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_a_batch_is_what_token_after_token_gives(
    family: str, tiny_family: Callable[[str], Base], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_TOKENS_AT_ONCE", 3)
    base = tiny_family(family)
    for found, messages in zip(likelihoods(base, TALKS), TALKS, strict=True):
        expected = slowly(base, messages)
        assert found.n_tokens == expected.n_tokens
        assert found.nll == pytest.approx(expected.nll, abs=CLOSE)


@pytest.mark.parametrize("gated", [False, True])
def test_aligners_and_their_gates_count(
    gated: bool, tiny_base: Base, random_aligner: Callable[..., Adapter], random_guard: Callable[..., Adapter]
) -> None:
    aligner, guard = random_aligner(tiny_base), random_guard(tiny_base)
    guard.set_calibration(Calibration(scale=(1.0,), bias=(0.0,), threshold=(0.6,)))
    plain = likelihoods(tiny_base, TALKS)
    with attach(tiny_base, [aligner], [guard], strength=ramp(guard, 0.3, 0.6) if gated else 1.0):
        found = likelihoods(tiny_base, TALKS)
        expected = [slowly(tiny_base, messages) for messages in TALKS]
    assert [one.nll for one in found] == pytest.approx([one.nll for one in expected], abs=CLOSE)
    assert all(one.nll != other.nll for one, other in zip(found, plain, strict=True))
    with attach(tiny_base, [aligner], strength=0.0):
        assert likelihoods(tiny_base, TALKS) == plain


def test_what_has_no_answer_or_does_not_fit_is_refused(tiny_base: Base) -> None:
    with pytest.raises(InputError, match="ends with no answer"):
        likelihoods(tiny_base, [[Message("user", "the cat")]])
    with pytest.raises(InputError, match="Nothing is cut"):
        likelihoods(tiny_base, [[Message("user", "the cat"), Message("assistant", "cat " * 900)]])


def test_utility_is_the_change_per_token() -> None:
    base = [Likelihood(10.0, 4), Likelihood(2.0, 1)]
    worse = [Likelihood(12.0, 4), Likelihood(2.5, 1)]
    figure = utility(base, worse)
    assert figure.value == pytest.approx(math.exp(-2.5 / 5))
    assert math.exp(-2.0 / 4) >= figure.high >= figure.value >= figure.low >= math.exp(-0.5) - 1e-12
    same = utility(base, base)
    assert (same.value, same.low, same.high) == (1.0, 1.0, 1.0)
    assert utility(worse, base).value > 1.0
    for other in ([], [Likelihood(1.0, 4)], [Likelihood(1.0, 4), Likelihood(1.0, 2)]):
        with pytest.raises(InputError, match="not of the same answers"):
            utility(base, other)
    with pytest.raises(InputError, match="not of the same answers"):
        utility([], [])
