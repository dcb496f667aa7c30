"""What an adapter learns from: the base's states, computed live or once and kept on disk.

The base is frozen, so its states never change.  With ``TapStore`` they are computed in one pass, written to a
memory-mapped file, and every epoch (and every further adapter on the same rows) reads them from there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from safeside.adapters.adapter import Adapter, SideOutput
from safeside.attach import attach
from safeside.base.families import is_updated
from safeside.base.model import Base
from safeside.base.states import recorded_states
from safeside.base.taps import Tape
from safeside.chat import pad_batch
from safeside.errors import UnsupportedError

FINAL = -1  # the store's key for the decoder's normed output


@dataclass(frozen=True, slots=True)
class Batch:
    """Some rows, padded on the right: their indices in the set, ids and keep mask."""

    rows: tuple[int, ...]
    ids: Int[Tensor, "B T"]
    keep: Bool[Tensor, "B T"]


@dataclass(frozen=True, slots=True)
class Forward:
    """One pass over a batch: the adapter's output and the base's final state."""

    output: SideOutput
    base_state: Float[Tensor, "B T D"] | None


Source = Callable[[Batch], Forward]


def make_batch(base: Base, encoded: Sequence[Sequence[int]], rows: Sequence[int]) -> Batch:
    """The rows ``rows`` of ``encoded`` as one batch on the base's device."""
    ids, keep = pad_batch([encoded[row] for row in rows], base.tokenizer.pad_token_id or 0)
    return Batch(tuple(rows), ids.to(base.device), keep.to(base.device))


class LiveTaps:
    """Runs the base for every batch, with the adapter attached."""

    def __init__(self, base: Base, adapter: Adapter) -> None:
        self.base = base
        self.adapter = adapter

    def __call__(self, batch: Batch) -> Forward:
        is_guard = self.adapter.config.role == "guard"
        guards, aligners = ([self.adapter], []) if is_guard else ([], [self.adapter])
        with attach(self.base, aligners, guards) as attachment:
            self.base.decoder(input_ids=batch.ids, attention_mask=batch.keep, use_cache=False)
            record = attachment.record
        name = self.adapter.name
        output = SideOutput(record.deltas.get(name), record.logits.get(name), record.scores.get(name))
        return Forward(output, record.base_state)


class TapStore:
    """States of all rows at some layers, in one flat file of the base's dtype: (tokens, layers, D)."""

    def __init__(self, states: Tensor, layers: tuple[int, ...], starts: Sequence[int], lengths: Sequence[int]) -> None:
        self.states = states
        self.layers = layers
        self.starts = starts
        self.lengths = lengths

    @classmethod
    def build(
        cls,
        base: Base,
        encoded: Sequence[Sequence[int]],
        layers: Sequence[int],
        folder: Path,
        *,
        batch_size: int = 32,
        advance: Callable[[int], None] = lambda count: None,
    ) -> TapStore:
        """Compute the states of ``encoded`` rows at ``layers`` (``FINAL`` for the normed output), or find them again.

        The file's name is a hash of base, dtype, layers and rows, so a second run on the same rows opens it.
        """
        layers = tuple(sorted(set(layers)))
        lengths = [len(row) for row in encoded]
        starts = [0, *torch.tensor(lengths).cumsum(0).tolist()[:-1]]
        shape = (sum(lengths), len(layers), base.d_model)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"taps-{key_of(base, encoded, layers)}.bin"
        done = path.with_suffix(".done")
        size = shape[0] * shape[1] * shape[2]
        n_bytes = stored_bytes(base, encoded, layers)
        is_new = not (done.exists() and path.is_file() and path.stat().st_size == n_bytes)
        states = torch.from_file(str(path), shared=True, size=size, dtype=base.dtype).view(shape)
        store = cls(states, layers, starts, lengths)
        if is_new:
            done.unlink(missing_ok=True)
            store._fill(base, encoded, batch_size, advance)
            done.touch()
        return store

    @torch.no_grad()
    def _fill(
        self, base: Base, encoded: Sequence[Sequence[int]], batch_size: int, advance: Callable[[int], None]
    ) -> None:
        order = sorted(range(len(encoded)), key=lambda row: len(encoded[row]))
        for start in range(0, len(order), batch_size):
            batch = make_batch(base, encoded, order[start : start + batch_size])
            recorded = record_states(base, batch, self.layers)
            for place, row in enumerate(batch.rows):
                span = slice(self.starts[row], self.starts[row] + self.lengths[row])
                for index, layer in enumerate(self.layers):
                    self.states[span, index] = recorded[layer][place, : self.lengths[row]].cpu()
            advance(len(batch.rows))

    def read(self, batch: Batch) -> dict[int, Float[Tensor, "B T D"]]:
        """The states of a batch by layer, zero on padding."""
        n_rows, length = batch.ids.shape
        stacked = self.states.new_zeros((n_rows, length, *self.states.shape[1:]))
        for place, row in enumerate(batch.rows):
            stacked[place, : self.lengths[row]] = self.states[self.starts[row] : self.starts[row] + self.lengths[row]]
        stacked = stacked.to(batch.ids.device)
        return {layer: stacked[:, :, index] for index, layer in enumerate(self.layers)}

    def at_rows(self) -> dict[str, NDArray[np.float64]]:
        """Two (n, D) states of every row for each layer: at its last token, and the mean over its tokens.

        What a linear probe is fitted on.  Keys are ``layer 3, last token`` and ``layer 3, mean``.
        """
        spans = [slice(start, start + length) for start, length in zip(self.starts, self.lengths, strict=True)]
        ends = torch.stack([self.states[span][-1] for span in spans]).double()  # (n, layers, D)
        means = torch.stack([self.states[span].double().mean(0) for span in spans])
        result = {}
        for index, layer in enumerate(self.layers):
            place = "final state" if layer == FINAL else f"layer {layer}"
            result[f"{place}, last token"] = ends[:, index].numpy()
            result[f"{place}, mean"] = means[:, index].numpy()
        return result


class StoredTaps:
    """Feeds an adapter from a TapStore: the base is not run."""

    def __init__(self, store: TapStore, adapter: Adapter) -> None:
        self.store = store
        self.adapter = adapter

    def __call__(self, batch: Batch) -> Forward:
        states = self.store.read(batch)
        final = states.get(FINAL)
        is_causal = not self.adapter.config.base.is_encoder
        tape = Tape(batch.keep, batch.ids.shape[1], is_causal=is_causal, final=final)
        for layer in self.adapter.config.layers:
            self.adapter.read(tape, layer, states[layer])
        return Forward(self.adapter(tape), final)


def record_states(base: Base, batch: Batch, layers: Sequence[int]) -> dict[int, Tensor]:
    """The base's states (B, T, D) at ``layers`` for one batch, full width: for the store and for tests."""
    if base.attachment is not None or is_updated(base.model):
        raise UnsupportedError(
            f"The states of {base.name} cannot be kept: something is attached to it, or it has a LoRA or a gene. Use "
            "the plain base, or train with cache_taps = false."
        )
    with recorded_states(base, layers) as recorded:
        output = base.decoder(input_ids=batch.ids, attention_mask=batch.keep, use_cache=False)
    recorded[FINAL] = output[0]
    return recorded


def stored_bytes(base: Base, encoded: Sequence[Sequence[int]], layers: Sequence[int]) -> int:
    """Size of the file that holds the states of ``encoded`` rows at ``layers``."""
    return sum(map(len, encoded)) * len(set(layers)) * base.d_model * base.dtype.itemsize


def key_of(base: Base, encoded: Sequence[Sequence[int]], layers: Sequence[int]) -> str:
    """A hash of base, dtype, layers and rows: what stored states depend on."""
    hasher = hashlib.sha256(f"{base.fingerprint.model_dump_json()} {base.dtype} {layers}".encode())
    for row in encoded:
        hasher.update(torch.tensor(row, dtype=torch.int32).numpy().tobytes() + b";")
    return hasher.hexdigest()[:24]
