"""The tape: which slots belong to which token, whatever the padding and however much is cached."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache

from safeside.base.taps import SideCache, Tape


def keeps(draw: st.DrawFn) -> tuple[Tensor, int]:
    """A mask (B, S) with holes anywhere, and how many of its tokens are new."""
    n_slots = draw(st.integers(1, 7))
    rows = draw(st.lists(st.lists(st.booleans(), min_size=n_slots, max_size=n_slots), min_size=1, max_size=3))
    return torch.tensor(rows), draw(st.integers(1, n_slots))


masks = st.composite(keeps)()


@given(masks)
def test_positions_count_the_kept_tokens_before(mask: tuple[Tensor, int]) -> None:
    keep, n_new = mask
    tape = Tape(keep, n_new)
    n_past = keep.shape[1] - n_new
    assert tape.n_past == n_past
    assert tape.keep_new.tolist() == keep[:, n_past:].tolist()
    for row, slots in enumerate(keep.tolist()):
        for index, slot in enumerate(range(n_past, len(slots))):
            assert tape.positions[row, index] == max(sum(slots[: slot + 1]) - 1, 0)


@given(masks, st.booleans())
def test_tokens_attend_to_kept_ones_and_to_themselves(mask: tuple[Tensor, int], is_causal: bool) -> None:
    keep, n_new = mask
    attend = Tape(keep, n_new, is_causal).attend
    n_rows, n_slots = keep.shape
    assert attend.shape == (n_rows, 1, n_new, n_slots)
    for row in range(n_rows):
        for query in range(n_slots - n_new, n_slots):
            for slot in range(n_slots):
                seen = keep[row, slot] and (slot <= query or not is_causal)
                assert attend[row, 0, query - n_slots + n_new, slot] == (bool(seen) or slot == query)


@pytest.mark.parametrize(("n_rows", "n_new", "expected"), [(1, 32, True), (32, 1, True), (1, 33, False), (8, 5, False)])
def test_a_pass_is_short_by_its_new_tokens_of_all_rows(n_rows: int, n_new: int, expected: bool) -> None:
    assert Tape(torch.ones(n_rows, 600, dtype=torch.bool), n_new).is_short == expected


@given(masks)
def test_a_fork_is_empty_over_the_same_tokens(mask: tuple[Tensor, int]) -> None:
    tape = Tape(*mask, is_causal=False)
    tape.hidden[3], tape.final = torch.ones(1), torch.ones(1)
    fork = tape.fork()
    assert fork.keep is tape.keep
    assert (fork.n_new, fork.is_causal, fork.hidden, fork.final) == (tape.n_new, False, {}, None)


def test_a_side_cache_writes_behind_the_base() -> None:
    cache = DynamicCache()
    for layer in (0, 1):
        cache.update(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4), layer)
    side = SideCache(cache, offset=2)
    first, second = torch.randn(1, 1, 3, 8), torch.randn(1, 1, 1, 8)
    side.update(first, -first, layer=0)
    keys, values = side.update(second, -second, layer=0)
    assert torch.equal(keys, torch.cat([first, second], 2))
    assert torch.equal(values, -keys)
    assert [layer.get_seq_length() for layer in cache.layers] == [3, 3, 4]
