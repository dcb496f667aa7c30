"""Scores of single tokens in chunks, against full logits at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from safeside import Base
from safeside.base.token_scores import token_divergences, token_log_probs
from tiny import VOCABULARY

SAME = 1e-4  # float32 sums of 304 terms in another order
N_TOKENS = 11
CHUNKS = (1, VOCABULARY, 4 * VOCABULARY, 11 * VOCABULARY, 10**9)  # 1, 1, 4 and all tokens at once


def some_states(seed: int) -> Tensor:
    return torch.randn(N_TOKENS, 64, generator=torch.Generator().manual_seed(seed), requires_grad=True)


@pytest.fixture
def widest(tiny_base: Base) -> Iterator[list[int]]:
    """Grows by the number of tokens that the head sees at once."""
    seen: list[int] = []

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen.append(output.shape[0] * output.shape[1])

    handle = tiny_base.model.lm_head.register_forward_hook(count)
    yield seen
    handle.remove()


@pytest.mark.parametrize("n_logits", CHUNKS)
@pytest.mark.parametrize("family", ["llama", "gemma2", "granite", "cohere", "gpt2", "opt"])
def test_chunks_are_the_whole(tiny_family: Callable[[str], Base], family: str, n_logits: int) -> None:
    base, states, reference = tiny_family(family), some_states(1), some_states(2)
    targets = torch.arange(20, 20 + N_TOKENS)
    log_probs = base.head_logits(states[None])[0].float().log_softmax(-1)
    wanted = base.head_logits(reference[None])[0].float().log_softmax(-1).detach()
    expected = log_probs[torch.arange(N_TOKENS), targets], (wanted.exp() * (wanted - log_probs)).sum(-1)
    (expected_gradient,) = torch.autograd.grad(expected[0].sum() + 2 * expected[1].sum(), states)
    found = token_log_probs(base, states, targets, n_logits), token_divergences(base, reference, states, n_logits)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=SAME, atol=SAME)
    (found[0].sum() + 2 * found[1].sum()).backward()
    torch.testing.assert_close(states.grad, expected_gradient, rtol=SAME, atol=SAME)
    assert reference.grad is None


@pytest.mark.parametrize("n_tokens", [1, 4])
def test_the_head_sees_no_more_than_a_chunk(tiny_base: Base, widest: list[int], n_tokens: int) -> None:
    states = some_states(1)
    token_log_probs(tiny_base, states, torch.arange(N_TOKENS), n_tokens * VOCABULARY).sum().backward()
    token_divergences(tiny_base, some_states(2), states, n_tokens * VOCABULARY).sum().backward()
    assert max(widest) == n_tokens
    assert sum(widest) == 6 * N_TOKENS  # forward and again in backward; of the divergence both sides


def test_no_block_runs_for_a_head(tiny_base: Base) -> None:
    ran: list[int] = []
    handles = [block.register_forward_hook(lambda *_: ran.append(1)) for block in tiny_base.blocks]
    token_log_probs(tiny_base, some_states(1), torch.arange(N_TOKENS))
    for handle in handles:
        handle.remove()
    assert not ran


def test_no_token_gives_no_score(tiny_base: Base) -> None:
    states, none = torch.zeros(0, 64), torch.zeros(0, dtype=torch.long)
    assert token_log_probs(tiny_base, states, none).shape == token_divergences(tiny_base, states, states).shape == (0,)


def test_a_state_diverges_from_itself_by_nothing(tiny_base: Base) -> None:
    states, targets = some_states(1), torch.zeros(N_TOKENS, dtype=torch.long)
    assert token_divergences(tiny_base, states, states).abs().max() < 1e-5
    assert token_divergences(tiny_base, states, some_states(2)).min() > 0.01
    logits = tiny_base.head_logits(states[None])[0]
    assert torch.equal(token_log_probs(tiny_base, states, targets), -F.cross_entropy(logits, targets, reduction="none"))
