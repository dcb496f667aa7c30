"""Answers' tokens that guards have not judged yet: they may wait for each other, to be judged together.

A side network's step on one token costs its fixed parts, calls and weights that are fetched; on eight tokens at once it
costs hardly more.  What waits hangs on the request's cache and is cropped, repeated and copied with it.
"""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Bool
from torch import Tensor

from safeside.base.taps import Tape


class Waiting:
    """By pass, what each guard read in it, the oldest first; every pass has one new token a row."""

    def __init__(self, passes: Sequence[dict[str, Tape]] = ()) -> None:
        self._passes = list(passes)

    def __len__(self) -> int:
        return len(self._passes)

    def add(self, tapes: dict[str, Tape]) -> None:
        """Take what the guards read in one more pass."""
        self._passes.append(tapes)

    def take(self, keep: Bool[Tensor, "B S"]) -> dict[str, Tape]:
        """By guard one tape of all that waited; then nothing does.  ``keep`` covers these tokens and all before."""
        passes, self._passes = self._passes, []
        return {name: Tape.joined([tapes[name] for tapes in passes], keep) for name in passes[0]}

    def drop(self, n_tokens: int) -> None:
        """Forget the newest tokens, as many as there are."""
        del self._passes[max(0, len(self._passes) - n_tokens) :]

    def select(self, rows: Sequence[int]) -> None:
        """Go on with these rows, in this order; one may come more than once."""
        self._passes = [{name: tape.at_rows(rows) for name, tape in tapes.items()} for tapes in self._passes]
