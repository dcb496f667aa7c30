"""PLR: a head on one state."""

from __future__ import annotations

import math

import pytest
import torch

from references import random_states, randomise, reference, whole_tape
from safeside import Adapter, make_config
from safeside.adapters.plr import Plr
from safeside.errors import ConfigError

SAME = 1e-5  # float32 against float64 over one sum of 64 terms


def test_a_linear_probe_reads_one_state() -> None:
    """score = sigmoid(w · norm(h) + b), on the last tapped layer only."""
    config = make_config(reference(), kind="plr", layers=(3,), labels=("a", "b"))
    guard = randomise(Adapter(config.model_copy(update={"layers": (1, 3)})))  # as older files may have it
    hidden, tape = random_states(3, 1, 4, 64), whole_tape(1, 4)
    for layer in (1, 3):
        guard.read(tape, layer, hidden[layer])
    assert list(tape.hidden) == [3]
    with torch.no_grad():
        found = guard(tape)
    for token in range(4):
        state = hidden[3][0, token].double()
        for _ in range(2):  # the trunk's norm, then the head's
            state = state / math.sqrt(float(state.square().mean()) + 1e-6)
        state = state * guard.head.norm.weight.double()
        logits = guard.head.linear.weight.double() @ state + guard.head.linear.bias.double()
        torch.testing.assert_close(found.logits[0, token].double(), logits, rtol=SAME, atol=SAME)
        torch.testing.assert_close(found.scores[0, token].double(), 1 / (1 + (-logits).exp()), rtol=SAME, atol=SAME)


def test_a_width_makes_it_a_small_network() -> None:
    trunk = randomise(Plr(make_config(reference(), kind="plr", width=16)))
    hidden, tape = random_states(3, 1, 4, 64)[3], whole_tape(1, 4)
    trunk.read(tape, 3, hidden)
    linear = trunk.hidden.project[0]
    with torch.no_grad():
        inner = (hidden / (hidden.square().mean(-1, keepdim=True) + 1e-6).sqrt()) @ linear.weight.T + linear.bias
        expected = inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))
        torch.testing.assert_close(trunk(tape, None), expected, rtol=SAME, atol=SAME)
    assert trunk.width == 16


def test_an_aligner_has_a_width_and_a_guard_is_a_probe() -> None:
    assert make_config(reference(), kind="plr", role="align").width == 32
    assert make_config(reference(), kind="plr", role="guard").width == 0
    assert make_config(reference(), kind="plr").layers == (3,)


def test_layers_that_it_would_not_read_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"kind 'plr' reads one layer; got layers \(1, 3\)"):
        make_config(reference(), kind="plr", layers=(1, 3))
