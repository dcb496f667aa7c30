"""LST against a twin that writes every formula out, one token and one head at a time, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from references import random_states, randomise, reference, whole_tape
from safeside import make_config
from safeside.adapters.blocks import Attention, SideBlock, TapProjection
from safeside.adapters.lst import Lst, default_feed_forward

SAME = 1e-4  # float32 against float64 over two blocks of states of size 1 to 10


def slow_norm(states: Tensor, weight: Tensor | None = None) -> Tensor:
    size = torch.tensor([math.sqrt(sum(float(x) ** 2 for x in row) / len(row) + 1e-6) for row in states])
    return states / size.double()[:, None] * (1.0 if weight is None else weight.double())


def slow_rotate(vector: Tensor, position: int) -> Tensor:
    half = len(vector) // 2
    turned = vector.clone()
    for index in range(half):
        angle = position * 10000.0 ** (-2 * index / len(vector))
        first, second = float(vector[index]), float(vector[index + half])
        turned[index] = first * math.cos(angle) - second * math.sin(angle)
        turned[index + half] = first * math.sin(angle) + second * math.cos(angle)
    return turned


def slow_attention(attention: Attention, states: Tensor) -> Tensor:
    width, size = states.shape[1], attention.head_dim
    n_kept = attention.n_shared * size
    parts = (states @ attention.queries_keys_values.weight.double().T).split([width, n_kept, n_kept], dim=1)
    mixed = torch.zeros_like(states)
    for token in range(len(states)):
        for head in range(width // size):
            place = slice(head * size, (head + 1) * size)
            group = head // (width // n_kept)
            shared = slice(group * size, (group + 1) * size)
            query = slow_rotate(parts[0][token, place], token)
            weights = [float(query @ slow_rotate(parts[1][past, shared], past)) for past in range(token + 1)]
            weights = torch.softmax(torch.tensor(weights).double() / math.sqrt(size), 0)
            for past in range(token + 1):
                mixed[token, place] += weights[past] * parts[2][past, shared]
    return mixed @ attention.output.weight.double().T


def slow_block(block: SideBlock, states: Tensor) -> Tensor:
    states = states + slow_attention(block.attention, slow_norm(states, block.attention_norm.weight))
    gate, up = (
        slow_norm(states, block.feed_forward_norm.weight) @ block.feed_forward.gate_and_up.weight.double().T
    ).chunk(2, dim=1)
    return states + (gate * torch.sigmoid(gate) * up) @ block.feed_forward.down.weight.double().T


def slow_tap(tap: TapProjection, hidden: Tensor) -> Tensor:
    states = slow_norm(hidden)
    for linear in tap.project:
        states = states @ linear.weight.double().T + (0.0 if linear.bias is None else linear.bias.double())
    return states


def slow_lst(trunk: Lst, layers: tuple[int, ...], hidden: list[Tensor]) -> Tensor:
    """One row: ``x_0 = D_0 h_0``; ``x_l = Block_l(mu_l x_{l-1} + (1 - mu_l) D_l h_l)``, ``mu_l = s(alpha_l / 0.1)``."""
    taps = [slow_tap(trunk.taps[str(layer)], hidden[layer].double()) for layer in layers]
    states = taps[0]
    if len(layers) == 1:
        return slow_block(trunk.blocks[0], states)
    for index, tap in enumerate(taps[1:]):
        mu = 1 / (1 + torch.exp(-trunk.gates[index].double() / 0.1))
        states = slow_block(trunk.blocks[index], mu * states + (1 - mu) * tap)
    return states


@pytest.mark.parametrize("layers", [(0, 1, 2, 3), (1, 3), (3,)])
@pytest.mark.parametrize("options", [{}, {"tap_rank": 4}, {"gate": "channel", "feed_forward": 48}, {"query_group": 2}])
@pytest.mark.parametrize("length", [5, 17])  # taps are projected together, and where they are read
def test_the_ladder_is_its_formula(layers: tuple[int, ...], options: dict[str, object], length: int) -> None:
    config = make_config(reference(), layers=layers, width=64, **options)
    trunk = randomise(Lst(config))
    hidden = random_states(3, 2, length, 64)
    tape = whole_tape(2, length)
    assert tape.is_short == (length == 5)
    for layer in layers:
        trunk.read(tape, layer, hidden[layer])
    with torch.no_grad():
        found = trunk(tape, None)
        for row in range(2):
            expected = slow_lst(trunk, layers, [state[row] for state in hidden])
            torch.testing.assert_close(found[row].double(), expected, rtol=SAME, atol=SAME)


def test_gates_start_halfway() -> None:
    trunk = Lst(make_config(reference()))
    assert all(torch.sigmoid(gate / 0.1).tolist() == [0.5] for gate in trunk.gates)
    assert len(trunk.gates) == trunk.n_cache_layers == 3


def test_only_projections_are_kept_on_the_tape() -> None:
    """Full-width states of all layers would be 26 GB at 7B, batch 64 x 2k."""
    trunk, tape = Lst(make_config(reference(), width=32)), whole_tape(1, 40)
    for layer, hidden in enumerate(random_states(3, 1, 40, 64)):
        trunk.read(tape, layer, hidden)
    assert {layer: tuple(state.shape) for layer, state in tape.hidden.items()} == dict.fromkeys(range(4), (1, 40, 32))


@pytest.mark.parametrize(("width", "expected"), [(32, 96), (64, 160), (256, 672), (3, 32)])
def test_the_default_feed_forward_is_eight_thirds_in_steps(width: int, expected: int) -> None:
    assert default_feed_forward(width) == expected
