"""What a patch learns from as windows with the base's states behind them, and the loop that learns it."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from safeside.adapters.adapter import Adapter
from safeside.base.model import Base
from safeside.content import refuse_empty
from safeside.errors import InputError
from safeside.guards.blank import BlankIds
from safeside.guards.score import mode_of, place_of
from safeside.guards.windows import windows
from safeside.train.loop import Loop, Progress
from safeside.train.losses import guard_loss
from safeside.train.recipe import TrainingSection
from safeside.train.taps import Source, StoredTaps, TapStore, make_batch
from safeside.types import Combine, Example, Mode

_ROUNDS = 4  # evaluations of the loop; the best one's weights are kept
_LEAST_TURNS = 4  # of an example: more steps than were asked for where it would have fewer
_CHUNK = 64  # rows of one pass without gradients
_GROUP = 8  # windows of one batch
_LEAST_SPREAD = 1e-3  # of old logits, so that a constant guard divides by something


@dataclass(frozen=True, slots=True)
class PatchSettings:
    """How to patch."""

    steps: int = 60
    """Optimiser steps in all; more for so many examples that one would be seen fewer than four times."""
    learning_rate: float = 1e-3
    """Peak of AdamW's rate."""
    batch_size: int = 8
    """Examples of one step."""
    replay_size: int = 24
    """Replayed rows of one step."""
    replay_weight: float = 1.0
    """Weight of the squared change of replayed logits, in units of their old spread."""
    pull: float = 0.0
    """Weight of the squared distance to the old weights."""
    replay_limit: int = 300
    """Most rows that are replayed, and most that measure the other scores and set the threshold."""
    seed: int = 0
    """Of every draw."""


class Parts(NamedTuple):
    """The rows of a patch by what they are for."""

    examples: Sequence[Example]
    """Learnt from."""
    held_out: Sequence[Example]
    """More of the family, measured."""
    replayed: Sequence[Example]
    """Their old logits are kept."""
    elsewhere: Sequence[Example]
    """Other rows, measured."""


@dataclass(frozen=True, slots=True)
class Pool:
    """All rows of a patch as windows, the base's states behind them, and which rows are which."""

    windows: list[tuple[int, ...]]
    of_row: list[list[int]]
    wanted: list[tuple[Combine, ...]]
    """The ways of combining that each window was cut for."""
    modes: list[Mode]
    labels: NDArray[np.float64]
    store: TapStore
    examples: range
    held_out: range
    replayed: range
    elsewhere: range


def make_pool(base: Base, guard: Adapter, parts: Parts, folder: Path) -> Pool:
    """All rows encoded, and the base's states on them kept in ``folder``.  A row that cannot be is an InputError."""
    ids: list[tuple[int, ...]] = []
    wanted: list[tuple[Combine, ...]] = []
    of_row, blank = [], BlankIds(base)
    ways = tuple(dict.fromkeys(guard.config.windows_by_label))
    rows = [(name, example) for name, part in zip(Parts._fields, parts, strict=True) for example in part]
    for name, example in rows:
        try:
            refuse_empty(example.messages)
            cut = _cut(base, example, ways)
            blank.refuse(example.messages, cut[0][0])
        except InputError as error:
            kind = name.replace("_", "-")
            raise InputError(f"The {kind} row in line {example.line} of its file cannot be read: {error}") from error
        of_row.append(list(range(len(ids), len(ids) + len(cut))))
        ids += [window for window, _ in cut]
        wanted += [ways for _, ways in cut]
    ends = np.cumsum([0, *map(len, parts)]).tolist()
    spans = [range(start, end) for start, end in pairwise(ends)]
    labels = np.array([example.labels for _, example in rows], dtype=np.float64)
    modes = [mode_of(len(cut), place_of(example.messages)) for cut, (_, example) in zip(of_row, rows, strict=True)]
    store = TapStore.build(base, ids, guard.config.layers, folder)
    return Pool(ids, of_row, wanted, modes, labels, store, *spans)


def _cut(base: Base, example: Example, ways: tuple[Combine, ...]) -> list[tuple[tuple[int, ...], tuple[Combine, ...]]]:
    """The row's windows for each of ``ways``, and which of them each is for: a row that fits is one window for all."""
    cut = {way: [base.encode(part).ids for part in windows(base, example.messages, combine=way)] for way in ways}
    if all(len(some) == 1 for some in cut.values()):
        return [(cut[ways[0]][0], ways)]
    return [(ids, (way,)) for way, some in cut.items() for ids in some]


class Lesson:
    """A guard, what it learns and what it must keep.

    Of a long row every window is read between the rounds of training; within a round it is learnt from by those windows
    alone that counted then, one for each label at most, so a long text costs no more memory than a short one.
    """

    def __init__(self, base: Base, guard: Adapter, pool: Pool, settings: PatchSettings) -> None:
        self.base, self.guard, self.pool, self.settings = base, guard, pool, settings
        self.source: Source = StoredTaps(pool.store, guard)
        self.labels = torch.from_numpy(pool.labels).float()
        self.counting = [list(some) for some in pool.of_row]  # of each row, the windows that counted when last read
        self.targets = self.row_logits(range(len(pool.of_row)))
        self.spread = self.targets[list(pool.replayed)].std(0, correction=0).clamp_min(_LEAST_SPREAD)
        self.first = [parameter.detach().clone() for parameter in guard.parameters()]
        self.draws = random.Random(settings.seed)
        self.deck = self._dealt()

    def learn(self, report: Callable[[Progress], None]) -> None:
        """Train the guard in place."""
        self.guard.requires_grad_(True)
        size, n_turns = self.settings.batch_size, _LEAST_TURNS * len(self.pool.examples)
        n_steps = max(self.settings.steps, -(-n_turns // self.settings.batch_size))
        training = TrainingSection(
            epochs=_ROUNDS,
            batch_size=size,
            learning_rate=self.settings.learning_rate,
            weight_decay=0.0,
            patience=_ROUNDS,
            checkpoint_seconds=1e9,
        )
        lengths = [1] * (max(1, -(-n_steps // _ROUNDS)) * size)  # turns; whose they are is dealt
        Loop(self.guard, lengths, self._loss_of, self._fit, training, seed=self.settings.seed, report=report).run()

    @torch.no_grad()
    def row_logits(self, rows: Sequence[int]) -> Tensor:
        """(n, K), in the order of ``rows``, from all of their windows."""
        order = sorted(range(len(rows)), key=lambda place: len(self.pool.windows[self.pool.of_row[rows[place]][0]]))
        result = torch.zeros(len(rows), self.labels.shape[1])
        for start in range(0, len(order), _CHUNK):
            places = order[start : start + _CHUNK]
            some = [self.pool.of_row[rows[place]] for place in places]
            for place, own, logits in zip(places, some, self._window_logits(some), strict=True):
                result[place], counted = self._best(logits, own)
                self.counting[rows[place]] = [own[window] for window in sorted(set(counted.tolist()))]
        return result

    def _dealt(self) -> Iterator[int]:
        """Examples in random order, again and again: every one as often as any other."""
        while True:
            yield from self.draws.sample(self.pool.examples, len(self.pool.examples))

    def _loss_of(self, turns: Sequence[int]) -> Tensor:
        some = [next(self.deck) for _ in turns]
        again = self.draws.sample(self.pool.replayed, min(self.settings.replay_size, len(self.pool.replayed)))
        loss = self._objective(self._learnt(some), some, self._learnt(again), again)
        if not self.settings.pull:
            return loss
        moved = zip(self.guard.parameters(), self.first, strict=True)
        return loss + self.settings.pull * torch.stack([((now - then) ** 2).sum() for now, then in moved]).sum()

    def _fit(self) -> float:
        """Minus the loss on all examples and replayed rows: by this the best weights are chosen."""
        some, again = self.pool.examples, self.pool.replayed
        return -float(self._objective(self.row_logits(some), some, self.row_logits(again), again))

    def _objective(self, learnt: Tensor, some: Sequence[int], kept: Tensor, again: Sequence[int]) -> Tensor:
        """Cross-entropy of the examples, plus the squared change of replayed logits in units of their spread."""
        change = ((kept - self.targets[list(again)]) / self.spread).square().mean()
        return guard_loss(learnt, self.labels[list(some)]) + self.settings.replay_weight * change

    def _learnt(self, rows: Sequence[int]) -> Tensor:
        """(n, K) logits of rows from the windows of theirs that count."""
        counting = [self.counting[row] for row in rows]
        logits = self._window_logits(counting)
        return torch.stack([self._best(some, own)[0] for some, own in zip(logits, counting, strict=True)])

    def _best(self, logits: Tensor, own: Sequence[int]) -> tuple[Tensor, Tensor]:
        """(K,) of (windows, K) logits of the windows ``own``: each label's highest, or lowest, as when a guard judges
        long texts, among those that were cut for that; and whose they are.
        """
        ways = self.guard.config.windows_by_label
        signs = logits.new_tensor([1.0 if way == "max" else -1.0 for way in ways])
        counts = torch.tensor([[way in self.pool.wanted[window] for way in ways] for window in own])
        values, places = (logits * signs).masked_fill(~counts, -torch.inf).max(0)
        return values * signs, places

    def _window_logits(self, groups: Sequence[Sequence[int]]) -> tuple[Tensor, ...]:
        """For each group of windows (n, K) logits at their last tokens, read side by side with those of like length."""
        some = [window for group in groups for window in group]
        order = sorted(range(len(some)), key=lambda place: len(self.pool.windows[some[place]]))
        parts = []
        for start in range(0, len(order), _GROUP):
            batch = make_batch(self.base, self.pool.windows, [some[place] for place in order[start : start + _GROUP]])
            output = self.source(batch).output
            assert output.logits is not None
            parts.append(output.logits[torch.arange(len(batch.rows)), batch.keep.sum(1) - 1].cpu())
        logits = torch.cat(parts)[torch.tensor(order).argsort()]
        return logits.split([len(group) for group in groups])  # type: ignore[no-untyped-call, no-any-return]
