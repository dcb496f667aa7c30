"""LST+ against its formula on top of the ladder, which has its own twin in test_lst.py."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from references import random_states, randomise, reference, whole_tape
from safeside import Base, create_adapter, make_config
from safeside.adapters.lst_plus import LstPlus
from safeside.errors import ConfigError

SAME = 1e-4  # float32 against float64 over a few sums of 64 terms


def made(**options: object) -> LstPlus:
    return randomise(LstPlus(make_config(reference(), kind="lst_plus", role="align", width=32, **options)))


def slow_tail(trunk: LstPlus, ladder: Tensor, taps: list[Tensor], last: Tensor) -> Tensor:
    """One token: the ladder's state, attention over depth, and the gated last state."""
    states = ladder.double()
    if trunk.attention is not None:
        scale = trunk.attention.norm.weight.double() / math.sqrt(float(states.square().mean()) + 1e-6)
        query = trunk.attention.queries.weight.double() @ (states * scale)
        products = torch.stack([query @ tap.double() for tap in taps]) / math.sqrt(len(query))
        shares = products.softmax(0)
        chosen = sum(share * tap.double() for share, tap in zip(shares, taps, strict=True))
        states = states + trunk.attention.output.weight.double() @ chosen
    opened = trunk.gate.weight.double() @ states
    return torch.cat([states, opened * opened.sigmoid() * last.double()])


@pytest.mark.parametrize("layers", [(0, 1, 2, 3), (1, 3), (3,)])
@pytest.mark.parametrize("cross_attention", [False, True])
def test_the_tail_is_its_formula(layers: tuple[int, ...], cross_attention: bool) -> None:
    trunk = made(layers=layers, cross_attention=cross_attention)
    hidden, tape, ladder_tape = random_states(3, 2, 3, 64), whole_tape(2, 3), whole_tape(2, 3)
    with torch.no_grad():
        for layer in layers:
            trunk.read(tape, layer, hidden[layer])
            trunk.ladder.read(ladder_tape, layer, hidden[layer])
        ladder, last = trunk.ladder(ladder_tape, None), trunk.last(hidden[3])
        found = trunk(tape, None)
    assert found.shape == (2, 3, trunk.width) == (2, 3, 64)
    for row in range(2):
        for token in range(3):
            taps = [ladder_tape.hidden[layer][row, token] for layer in layers]
            expected = slow_tail(trunk, ladder[row, token], taps, last[row, token])
            torch.testing.assert_close(found[row, token].double(), expected, rtol=SAME, atol=SAME)


def test_tokens_choose_their_own_layers() -> None:
    """What tells it from the ladder's gates: the same weights weigh the taps of two tokens differently."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # by chance two tokens can choose alike
        trunk, taps, states = made(cross_attention=True), torch.randn(1, 2, 4, 32), torch.randn(1, 2, 32)
    assert trunk.attention is not None
    queries = trunk.attention.queries(trunk.attention.norm(states))
    shares = torch.einsum("btd,btnd->btn", queries, taps).softmax(-1)
    assert (shares[0, 0] - shares[0, 1]).abs().max() > 0.01


def test_it_starts_as_a_ladder_with_a_gated_last_state(tiny_base: Base) -> None:
    plain, crossed = (
        create_adapter(tiny_base, make_config(tiny_base, kind="lst_plus", width=32, cross_attention=is_on)).trunk
        for is_on in (False, True)
    )
    crossed.load_state_dict(plain.state_dict(), strict=False)
    hidden = random_states(3, 1, 4, 64)
    found = []
    for trunk in (plain, crossed):
        tape = whole_tape(1, 4)
        for layer in range(4):
            trunk.read(tape, layer, hidden[layer])
        found.append(trunk(tape, None))
    assert torch.equal(*found)


def test_the_last_layer_must_be_tapped(tiny_base: Base) -> None:
    with pytest.raises(ConfigError, match=r"reads the base's last state: layers must end with 3; got \(0, 1\)"):
        make_config(tiny_base, kind="lst_plus", layers=(0, 1))
