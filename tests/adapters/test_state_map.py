"""The low-rank map against its formula, and against an update of the base's head."""

from __future__ import annotations

import torch

from references import random_states, randomise, reference, whole_tape
from safeside import Base, attach, make_config
from safeside.adapters.state_map import StateMap
from safeside.base.families import locate

SAME = 1e-4  # float32 against float64 over a few sums of 64 terms


def test_the_delta_is_its_formula() -> None:
    trunk = randomise(StateMap(make_config(reference(), kind="state_map", role="align", bottleneck=3)))
    hidden, tape = random_states(3, 2, 3, 64), whole_tape(2, 3)
    with torch.no_grad():
        trunk.read(tape, 3, hidden[3])
        found = trunk(tape, None)
    state = hidden[3].double()
    state = state / (state.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    expected = state @ trunk.down.weight.double().T @ trunk.up.weight.double().T + trunk.up.bias.double()
    torch.testing.assert_close(found.double(), expected, rtol=SAME, atol=SAME)
    assert {layer: tuple(kept.shape) for layer, kept in tape.hidden.items()} == {3: (2, 3, 3)}


def test_it_is_a_low_rank_update_of_the_head(tiny_base: Base, random_aligner) -> None:
    """The tiny llama ends with a root-mean-square norm: ``h = g * n`` with n what the map reads."""
    aligner = random_aligner(tiny_base, kind="state_map", bottleneck=3)
    ids = torch.tensor([[9, 20, 31, 42, 53]])
    trunk, gain = aligner.trunk, locate(tiny_base.decoder, "norm").weight
    head = tiny_base.model.lm_head.weight
    with torch.no_grad():
        final = tiny_base.decoder(ids)[0]
        update = trunk.up.weight @ trunk.down.weight / gain  # (D, D): acts on h
        expected = final @ (head + head @ update).T + head @ trunk.up.bias
        with attach(tiny_base, aligners=[aligner]):
            found = tiny_base.model(ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
