"""Stored states are the live ones bit for bit, and are never mistaken for those of another run."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from safeside import Adapter, Base, attach, load_base
from safeside.errors import UnsupportedError
from safeside.train import taps as module
from safeside.train.taps import FINAL, LiveTaps, StoredTaps, TapStore, make_batch, record_states
from tiny import N_LAYERS, N_TOKENS
from twin import base_states, close, count_hooks

LAYERS = tuple(range(N_LAYERS + 1))


def rows(n: int = 11, seed: int = 0) -> list[tuple[int, ...]]:
    """Random ids, of lengths from 1 to 20."""
    generator = random.Random(seed)
    return [tuple(generator.randrange(7, N_TOKENS) for _ in range(generator.randint(1, 20))) for _ in range(n)]


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one for every batch whose states are computed."""
    batches: list[int] = []

    def counted(base: Base, batch: object, layers: object) -> object:
        batches.append(1)
        return record_states(base, batch, layers)

    monkeypatch.setattr(module, "record_states", counted)
    return batches


# ---- states of the base ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "opt", "gpt-neox", "bert"])
def test_recorded_states_are_those_that_transformers_tells(tiny_family: Callable[[str], Base], family: str) -> None:
    base = tiny_family(family)
    batch = make_batch(base, rows(4), [2, 0, 3])
    expected, final = base_states(base, batch.ids, batch.keep)
    n_hooks = count_hooks(base.model)  # transformers leaves its own behind
    recorded = record_states(base, batch, (FINAL, *LAYERS))
    assert sorted(recorded) == [FINAL, *LAYERS]
    for layer in LAYERS:
        close(recorded[layer][batch.keep], expected[layer][batch.keep], 1e-5)
    close(recorded[FINAL][batch.keep], final[batch.keep], 1e-5)
    assert count_hooks(base.model) == n_hooks


def test_hooks_are_gone_after_an_error(tiny_base: Base) -> None:
    n_hooks = count_hooks(tiny_base.model)
    batch = make_batch(tiny_base, [(99999,)], [0])
    with pytest.raises(IndexError):
        record_states(tiny_base, batch, LAYERS)
    assert count_hooks(tiny_base.model) == n_hooks


def test_states_of_a_changed_base_are_refused(tiny_base: Base, random_aligner: Callable[..., Adapter]) -> None:
    """An aligner changes the final state; stored, it would be learnt from for ever."""
    batch = make_batch(tiny_base, rows(2), [0, 1])
    with attach(tiny_base, [random_aligner(tiny_base)]), pytest.raises(UnsupportedError, match="cannot be kept"):
        record_states(tiny_base, batch, (FINAL,))


def test_states_of_a_base_with_a_lora_are_refused(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base = load_base(tiny_folder("llama"))
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["q_proj"]), base.model)
    with pytest.raises(UnsupportedError, match="cache_taps = false"):
        TapStore.build(base, rows(2), LAYERS, tmp_path)
    assert not list(tmp_path.glob("*.done"))


def test_a_batch_is_padded_on_the_right(tiny_base: Base) -> None:
    batch = make_batch(tiny_base, [(7, 8), (9,), (10, 11, 12)], [2, 1])
    assert batch.rows == (2, 1)
    assert batch.ids.tolist() == [[10, 11, 12], [9, 0, 0]]
    assert batch.keep.tolist() == [[True, True, True], [True, False, False]]


# ---- the store -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 4, 32])
def test_stored_states_are_the_live_ones(tiny_base: Base, tmp_path: Path, batch_size: int) -> None:
    encoded = rows()
    store = TapStore.build(tiny_base, encoded, (FINAL, *LAYERS), tmp_path, batch_size=batch_size)
    batch = make_batch(tiny_base, encoded, [3, 7, 0])
    states = store.read(batch)
    assert set(states) == {FINAL, *LAYERS}
    order = sorted(range(len(encoded)), key=lambda row: len(encoded[row]))
    for place, row in enumerate(batch.rows):
        start = order.index(row) // batch_size * batch_size
        together = make_batch(tiny_base, encoded, order[start : start + batch_size])
        live = record_states(tiny_base, together, LAYERS)
        for layer, state in states.items():
            assert torch.equal(
                state[place, : len(encoded[row])], live[layer][together.rows.index(row), : len(encoded[row])]
            )
            assert not state[place, len(encoded[row]) :].any()


def test_states_at_rows_are_those_of_the_last_token_and_the_mean(tiny_base: Base, tmp_path: Path) -> None:
    encoded = rows()
    places = TapStore.build(tiny_base, encoded, (FINAL, 2), tmp_path).at_rows()
    assert set(places) == {f"{where}, {how}" for where in ("layer 2", "final state") for how in ("last token", "mean")}
    for row, ids in enumerate(encoded):
        alone = record_states(tiny_base, make_batch(tiny_base, [ids], [0]), (2,))
        for layer, where in ((2, "layer 2"), (FINAL, "final state")):
            state = alone[layer][0]
            close(torch.tensor(places[f"{where}, last token"][row]), state[-1], 1e-5)
            close(torch.tensor(places[f"{where}, mean"][row]), state.mean(0), 1e-5)


def test_a_store_is_opened_again_and_not_computed(tiny_base: Base, tmp_path: Path, computed: list[int]) -> None:
    told: list[int] = []
    first = TapStore.build(tiny_base, rows(), LAYERS, tmp_path, batch_size=4, advance=told.append)
    assert (len(computed), sum(told)) == (3, 11)
    again = TapStore.build(tiny_base, rows(), reversed(LAYERS), tmp_path, batch_size=7, advance=told.append)
    assert (len(computed), sum(told)) == (3, 11)
    assert torch.equal(again.states, first.states)


def test_other_rows_layers_dtypes_and_bases_get_their_own_store(
    tiny_base: Base, tiny_folder: Callable[[str], Path], tmp_path: Path, computed: list[int]
) -> None:
    def n_computed(base: Base, encoded: list[tuple[int, ...]], layers: tuple[int, ...]) -> int:
        before = len(computed)
        TapStore.build(base, encoded, layers, tmp_path)
        return len(computed) - before

    half = load_base(tiny_folder("llama"), dtype="bfloat16")
    other = load_base(tiny_folder("llama"))
    # Only the fingerprint's last digits differ: those that its short form leaves out.
    other.fingerprint = other.fingerprint.model_copy(update={"weights": other.fingerprint.weights[:-1] + "x"})
    split = [rows()[0][:1], rows()[0][1:], *rows()[1:]]
    for expected in ([1] * 6, [0] * 6):
        found = [
            n_computed(tiny_base, rows(), LAYERS),
            n_computed(tiny_base, rows(seed=1), LAYERS),
            n_computed(tiny_base, split, LAYERS),
            n_computed(tiny_base, rows(), LAYERS[1:]),
            n_computed(half, rows(), LAYERS),
            n_computed(other, rows(), LAYERS),
        ]
        assert found == expected


def spoil_done(folder: Path) -> None:
    next(folder.glob("*.done")).unlink()
    path = next(folder.glob("*.bin"))
    path.write_bytes(b"\0" * path.stat().st_size)


def spoil_missing(folder: Path) -> None:
    next(folder.glob("*.bin")).unlink()


def spoil_short(folder: Path) -> None:
    path = next(folder.glob("*.bin"))
    os.truncate(path, path.stat().st_size // 2)


def spoil_half_written(folder: Path) -> None:
    spoil_done(folder)
    spoil_short(folder)


@pytest.mark.parametrize("spoil", [spoil_done, spoil_missing, spoil_short, spoil_half_written])
def test_a_store_that_is_not_whole_is_built_anew(
    tiny_base: Base, tmp_path: Path, computed: list[int], spoil: Callable[[Path], None]
) -> None:
    whole = TapStore.build(tiny_base, rows(), LAYERS, tmp_path).states.clone()
    spoil(tmp_path)
    assert torch.equal(TapStore.build(tiny_base, rows(), LAYERS, tmp_path).states, whole)
    assert len(computed) == 2
    TapStore.build(tiny_base, rows(), LAYERS, tmp_path)
    assert len(computed) == 2


def test_a_pass_that_was_killed_leaves_no_finished_store(
    tiny_base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "record_states", fail)
    with pytest.raises(KeyboardInterrupt):
        TapStore.build(tiny_base, rows(), LAYERS, tmp_path)
    monkeypatch.undo()
    store = TapStore.build(tiny_base, rows(), LAYERS, tmp_path)
    assert store.states.any()


def test_the_file_holds_the_bases_dtype(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    half = load_base(tiny_folder("llama"), dtype="bfloat16")
    store = TapStore.build(half, rows(), (2,), tmp_path)
    assert store.states.dtype == torch.bfloat16
    (path,) = tmp_path.glob("*.bin")
    assert path.stat().st_size == sum(map(len, rows())) * half.d_model * 2


# ---- what an adapter gets --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["plr", "rtb", "lst"])
@pytest.mark.parametrize("role", ["guard", "align"])
def test_live_and_stored_taps_give_the_same(
    tiny_base: Base,
    random_guard: Callable[..., Adapter],
    random_aligner: Callable[..., Adapter],
    tmp_path: Path,
    kind: str,
    role: str,
) -> None:
    adapter = (random_guard if role == "guard" else random_aligner)(tiny_base, kind=kind)
    layers = (*adapter.config.layers, *([FINAL] if role == "align" else []))
    encoded = rows(3)
    stored = StoredTaps(TapStore.build(tiny_base, encoded, layers, tmp_path, batch_size=1), adapter)
    live = LiveTaps(tiny_base, adapter)
    batch = make_batch(tiny_base, encoded, [1])  # alone, so that both see the base's states of the same batch
    for found, expected in zip(_tensors(stored(batch), role), _tensors(live(batch), role), strict=True):
        assert torch.equal(found, expected)
    padded = make_batch(tiny_base, encoded, [0, 1, 2])
    for found, expected in zip(_tensors(stored(padded), role), _tensors(live(padded), role), strict=True):
        close(found[padded.keep], expected[padded.keep])


def _tensors(forward: object, role: str) -> list[torch.Tensor]:
    output = forward.output
    if role == "align":
        assert output.scores is None
        return [output.delta, forward.base_state]
    assert output.delta is None
    return [output.logits, output.scores]


def test_gradients_reach_the_adapter_and_not_the_base(
    tiny_base: Base, random_guard: Callable[..., Adapter], tmp_path: Path
) -> None:
    guard = random_guard(tiny_base)
    encoded = rows(4)
    store = TapStore.build(tiny_base, encoded, guard.config.layers, tmp_path)
    for source in (LiveTaps(tiny_base, guard), StoredTaps(store, guard)):
        guard.zero_grad()
        source(make_batch(tiny_base, encoded, range(4))).output.logits.sum().backward()
        assert all(parameter.grad is not None and parameter.grad.any() for parameter in guard.parameters())
        assert all(parameter.grad is None for parameter in tiny_base.model.parameters())
    assert tiny_base.attachment is None
