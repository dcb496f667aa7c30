"""RTB against its formula, one token at a time, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from references import random_states, randomise, reference, whole_tape
from safeside import make_config
from safeside.adapters.rtb import ResTuner, Rtb

SAME = 1e-4  # float32 against float64 over a few sums of 64 terms


def slow_tuner(tuner: ResTuner, state: Tensor) -> Tensor:
    """``A(x) = x + W2 GELU(W1 x)``."""
    inner = tuner.down.weight.double() @ state + tuner.down.bias.double()
    inner = torch.tensor([x * 0.5 * (1 + math.erf(x / math.sqrt(2))) for x in inner.tolist()]).double()
    return state + tuner.up.weight.double() @ inner + tuner.up.bias.double()


def slow_rtb(trunk: Rtb, layers: tuple[int, ...], states: list[Tensor]) -> Tensor:
    """One token: ``b_l = A_lat(h_l) + A_vert(b_{l-1})``, states at unit root-mean-square."""
    bypass = None
    for layer in layers:
        state = states[layer].double()
        state = state / math.sqrt(sum(x * x for x in state.tolist()) / len(state) + 1e-6)
        lateral = slow_tuner(trunk.lateral[str(layer)], state)
        bypass = lateral if bypass is None else lateral + slow_tuner(trunk.vertical[str(layer)], bypass)
    assert bypass is not None
    return bypass


@pytest.mark.parametrize("layers", [(0, 1, 2, 3), (1, 3), (2,)])
@pytest.mark.parametrize("bottleneck", [1, 8])
def test_the_bypass_is_its_formula(layers: tuple[int, ...], bottleneck: int) -> None:
    trunk = randomise(Rtb(make_config(reference(), kind="rtb", layers=layers, bottleneck=bottleneck)))
    hidden, tape = random_states(3, 2, 3, 64), whole_tape(2, 3)
    with torch.no_grad():
        for layer in layers:
            trunk.read(tape, layer, hidden[layer])
            assert list(tape.hidden) == [layer], "only the running value is kept"
        found = trunk(tape, None)
    for row in range(2):
        for token in range(3):
            expected = slow_rtb(trunk, layers, [state[row, token] for state in hidden])
            torch.testing.assert_close(found[row, token].double(), expected, rtol=SAME, atol=SAME)


def test_a_tuner_starts_as_the_identity() -> None:
    state = torch.randn(1, 4, 64)
    assert torch.equal(ResTuner(64, 8)(state), state)


def test_there_is_one_vertical_tuner_less() -> None:
    trunk = Rtb(make_config(reference(), kind="rtb"))
    assert (list(trunk.lateral), list(trunk.vertical)) == (["0", "1", "2", "3"], ["1", "2", "3"])
    assert trunk.n_cache_layers == 0
