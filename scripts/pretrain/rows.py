"""Rows of tokens and weights from the files that prepare.py wrote."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

Row = tuple[np.ndarray, np.ndarray]


class Batch(NamedTuple):
    """Rows side by side, (rows, context): a target is the token after its input, weighted by its weight."""

    inputs: Tensor
    targets: Tensor
    weights: Tensor


class Rows:
    """Endless shuffled rows of ``context + 1`` tokens, shared out among ``world`` processes."""

    def __init__(self, path: Path, context: int, seed: int, rank: int = 0, world: int = 1) -> None:
        """Open ``path`` with the endings ``.bin`` (tokens) and ``.w`` (1 where the assistant speaks)."""
        self.tokens = np.memmap(path.with_suffix(".bin"), np.uint16, "r")
        self.weights = np.memmap(path.with_suffix(".w"), np.uint8, "r")
        self.context = context
        self.count = (len(self.tokens) - 1) // context
        self.rank = rank
        self.world = world
        self.rng = np.random.default_rng(seed)
        self.order = np.array([], dtype=np.int64)
        if self.count < world:
            raise SystemExit(
                f"{path}.bin has {len(self.tokens)} tokens; expected at least {world * context + 1}, "
                f"a row of {context} for each of {world} processes. Prepare more text or shorten the rows."
            )

    def row(self, index: int) -> Row:
        """Tokens and weights of one row; its last token is the first of the next row."""
        span = slice(index * self.context, (index + 1) * self.context + 1)
        return self.tokens[span].astype(np.int64), self.weights[span].astype(np.float32)

    def next(self) -> Row:
        """The next row of this process; a new order begins when all have been read."""
        if not len(self.order):
            self.order = self.rng.permutation(self.count)[self.rank :: self.world]
        index, self.order = self.order[0], self.order[1:]
        return self.row(index)


def stack(rows: list[Row], device: torch.device) -> Batch:
    """The rows as one batch on ``device``."""
    tokens = torch.from_numpy(np.stack([tokens for tokens, _ in rows])).to(device)
    weights = torch.from_numpy(np.stack([weights for _, weights in rows])).to(device)
    return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), weights[:, 1:].contiguous())
