"""The requests of a running batch: their rules, what their gates remember, and the strength of every token.

Nothing here depends on values on the host, so it can be captured in a graph of kernels.  Scores live here only until
they are used: a prefix-cache hit never covers a prompt's last token, so the score at the prompt's end is always
computed, and what was decided by it stays with the request when it is preempted.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from safeside.vllm_plugin.strengths import NO_NUMBER, READS, Setting, curve

_UNKNOWN = -1.0  # no score yet: below every score
_GUARD, _READS = 4, 5  # columns of a setting


class RequestTable:
    """One row for each request of the batch, and a last one for padding tokens, whose strength is 0."""

    def __init__(self, n_rows: int, columns: Sequence[slice], device: torch.device) -> None:
        n_guards = max(1, len(columns))
        self.columns = tuple(columns)
        self.padding = n_rows
        self.settings = torch.zeros(n_rows + 1, len(Setting._fields), device=device)
        self.ends = torch.zeros(n_rows + 1, dtype=torch.long, device=device)
        self.decided = torch.full((n_rows + 1, n_guards), _UNKNOWN, device=device)
        """By row and guard, the score at the prompt's end."""
        self.highest = torch.full((n_rows + 1, n_guards), _UNKNOWN, device=device)
        """By row and guard, the highest score from the prompt's end on."""

    def put(self, row: int, setting: Setting, prompt_end: int, memory: Float[Tensor, "2 G"] | None = None) -> None:
        """A request of ``prompt_end`` prompt tokens takes ``row``, with what it remembers of before."""
        values = torch.tensor(setting, dtype=torch.float32, pin_memory=self.settings.is_cuda)
        self.settings[row].copy_(values, non_blocking=values.is_pinned())  # nothing waits for a copy to a GPU
        self.ends[row] = prompt_end
        self.decided[row] = _UNKNOWN if memory is None else memory[0]
        self.highest[row] = _UNKNOWN if memory is None else memory[1]

    def memory(self, row: int) -> Float[Tensor, "2 G"]:
        """What the request in ``row`` has to keep when it leaves the batch."""
        return torch.stack([self.decided[row], self.highest[row]])

    def move(self, source: int, target: int) -> None:
        """The request in ``source`` takes ``target``."""
        for part in (self.settings, self.ends, self.decided, self.highest):
            part[target] = part[source]

    def swap(self, first: int, second: int) -> None:
        """Two requests change places."""
        for part in (self.settings, self.ends, self.decided, self.highest):
            part[[first, second]] = part[[second, first]]

    def strengths(
        self, rows: Int[Tensor, " T"], positions: Int[Tensor, " T"], scores: Float[Tensor, "T K"]
    ) -> Float[Tensor, " T"]:
        """The strength of every token of a pass, and the gates' memory brought up to date.

        Tokens of one request are neighbours and in order; ``scores`` are those of all guards.
        """
        risk = self._risk(scores, len(rows))
        ends = self.ends[rows]
        is_end, is_after = (positions == ends - 1)[:, None], (positions >= ends - 1)[:, None]
        places = rows[:, None].expand_as(risk)
        self.decided.scatter_reduce_(0, places, torch.where(is_end, risk, _UNKNOWN), "amax")
        decided = self.decided[rows]
        decided = torch.where(decided == _UNKNOWN, NO_NUMBER, decided)  # behind a prompt that was not seen: closed
        counted = torch.where(is_after, risk, _UNKNOWN)
        highest = torch.maximum(_highest_so_far(counted, rows), self.highest[rows])
        self.highest.scatter_reduce_(0, places, highest, "amax")
        highest = torch.where(self.decided[rows] == _UNKNOWN, NO_NUMBER, highest)
        both = torch.maximum(risk, decided)
        by_reads = torch.stack([torch.zeros_like(risk), decided, risk, both, highest], -1)  # in the order of READS
        settings = self.settings[rows]
        guard, reads = settings[:, _GUARD].long(), settings[:, _READS].long()
        score = by_reads.gather(1, guard[:, None, None].expand(-1, 1, len(READS)))[:, 0].gather(1, reads[:, None])[:, 0]
        return torch.where(is_after[:, 0] | (reads == 0), curve(settings, score), 0.0)

    def _risk(self, scores: Float[Tensor, "T K"], n_tokens: int) -> Float[Tensor, "T G"]:
        """By guard the highest of its labels' scores."""
        if not self.columns:
            return scores.new_zeros(n_tokens, 1, dtype=torch.float32)
        risk = torch.stack([scores[:, columns].float().amax(-1) for columns in self.columns], -1)
        return torch.where(risk.isfinite(), risk, NO_NUMBER)


def _highest_so_far(values: Float[Tensor, "T G"], rows: Int[Tensor, " T"]) -> Float[Tensor, "T G"]:
    """The running maximum within each request: each lies on a step of its own, so that no maximum crosses a border."""
    starts = torch.cat([rows.new_zeros(1), (rows[1:] != rows[:-1]).long().cumsum(0)])
    steps = starts[:, None].double() * 4.0  # values lie in [-1, 2]
    return ((values.double() + steps).cummax(0).values - steps).float()
