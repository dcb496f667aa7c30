"""One forward pass for rows of different requests: scores, the strength of each row by its own policy, and logits.

The attachment runs every pass at strength 0 and keeps what the aligners would add.  Which strength a row has is decided
from the pass's own scores, by the same code that decides it in ``attach``, row by row; then base and aligners are mixed
and the base's own head gives the logits.  So one batch can hold any mix of policies.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import DynamicCache

from safeside.adapters.adapter import Adapter
from safeside.attach import Attachment, attach
from safeside.base.model import Base
from safeside.base.taps import Tape
from safeside.chat import pad_batch
from safeside.errors import ServingError
from safeside.gates import Seen, strength_of
from safeside.mixing import Policy, mix
from safeside.policies import follows_answer, guards_of
from safeside.request import History, columns_of, history_of, request_layer
from safeside.serve.batch import Rows

Scores = Mapping[str, tuple[float, ...]]
"""By guard, its K scores in [0, 1] at one token."""


@dataclass(frozen=True, slots=True)
class Setting:
    """What a pass has to know of a row."""

    prompt_end: int
    """Tokens of its prompt."""
    strengths: Mapping[str, Policy]
    """By aligner, what sets its strength; aligners left out are off."""

    @property
    def follows_answer(self) -> bool:
        """Whether a strength depends on what guards say of each token of the answer."""
        return any(map(follows_answer, self.strengths.values()))


@dataclass(frozen=True, slots=True)
class Pass:
    """What one pass gives for the newest token of each row."""

    rows: Rows
    """The rows with everything that they have read."""
    logits: Float[Tensor, "B V"]
    """Of the next token."""
    scores: tuple[tuple[Scores, ...], ...]
    """By row, of each token that the pass judged, the oldest first: its newest, those that waited before it, or none
    where it has to wait itself."""
    strengths: tuple[Mapping[str, float], ...]
    """By row, the strength in [0, 2] of each aligner."""


class Runner:
    """A base with its adapters, one pass at a time: use it in one thread."""

    def __init__(
        self, base: Base, guards: Sequence[Adapter], aligners: Sequence[Adapter], judge_every: int = 1
    ) -> None:
        self.base = base
        self.judge_every = judge_every
        self.guards = tuple(guards)
        self.aligners = tuple(aligners)
        self.attachment: Attachment | None = None
        if guards or aligners:
            self.attachment = attach(base, aligners, guards, strength=0.0, judge_every=judge_every)

    def detach(self) -> None:
        """Leave the base as it was."""
        if self.attachment is not None:
            self.attachment.detach()

    @property
    def is_attached(self) -> bool:
        """Whether its guards and aligners see what the base reads."""
        return self.base.attachment is self.attachment

    def prefill(self, prompts: Sequence[Sequence[int]], settings: Sequence[Setting]) -> Pass:
        """Read whole prompts."""
        ids, keep = pad_batch(prompts, self.base.pad_id, side="left")
        return self._run(ids, Rows(DynamicCache(), keep.to(self.base.device)), settings)

    def step(self, rows: Rows, tokens: Sequence[int], settings: Sequence[Setting], *, judges_now: bool = False) -> Pass:
        """Feed one more token of each row, and with ``judges_now`` let none wait."""
        return self._run(torch.tensor(tokens)[:, None], rows.grown(), settings, judges_now)

    def judge(self, rows: Rows) -> tuple[tuple[Scores, ...], ...]:
        """By row the scores of its tokens that wait, the oldest first; then none does."""
        n_waiting = self._n_waiting(rows)
        if n_waiting and self.attachment is not None:
            self.attachment.judge(rows.cache)
        return self._scores(rows, n_waiting)

    def _run(self, ids: Tensor, rows: Rows, settings: Sequence[Setting], judges_now: bool = False) -> Pass:
        if not self.is_attached:  # its record would be that of another pass
            raise ServingError("The adapters are not attached, so nothing can be judged.")
        n_waiting = self._n_waiting(rows)
        final = self.base.decoder(
            input_ids=ids.to(self.base.device),
            attention_mask=rows.keep,
            position_ids=(rows.keep.long().cumsum(1) - 1).clamp_min(0)[:, -ids.shape[1] :],
            past_key_values=rows.cache,
            use_cache=True,
        )[0][:, -1:]
        deltas = self.attachment.record.deltas if self.attachment is not None else {}
        if self.attachment is not None and (judges_now or any(setting.follows_answer for setting in settings)):
            self.attachment.judge(rows.cache)
        strengths = self._strengths(rows, settings)
        if strengths:
            final = mix(final, [deltas[name][:, -1:] for name in strengths], list(strengths.values()))
        by_row = zip(*(values[:, 0].tolist() for values in strengths.values()), strict=True)
        return Pass(
            rows,
            self.base.head_logits(_compact(final))[:, -1],
            self._scores(rows, n_waiting + 1 - self._n_waiting(rows)),
            tuple(dict(zip(strengths, values, strict=True)) for values in by_row) or ({},) * len(settings),
        )

    def _n_waiting(self, rows: Rows) -> int:
        """Tokens of each row that were read and not judged."""
        layer = request_layer(rows.cache)
        return len(layer.waiting) if layer is not None else 0

    def _scores(self, rows: Rows, n_tokens: int) -> tuple[tuple[Scores, ...], ...]:
        """By row the scores of its last ``n_tokens`` that were judged; without a guard they have none."""
        n_rows = rows.keep.shape[0]
        if not self.guards or not n_tokens:
            return (({},) * n_tokens,) * n_rows
        history = history_of(rows.cache).scores[:, -n_tokens:]
        lists = {name: history[..., columns].tolist() for name, columns in columns_of(self.guards).items()}
        return tuple(
            tuple({name: tuple(values[row][token]) for name, values in lists.items()} for token in range(n_tokens))
            for row in range(n_rows)
        )

    def _strengths(self, rows: Rows, settings: Sequence[Setting]) -> dict[str, Float[Tensor, "B 1"]]:
        """By aligner the strength of each row at its newest token; rows of one policy are decided together."""
        result = {}
        for aligner in self.aligners:
            together: dict[Policy, list[int]] = defaultdict(list)
            for row, setting in enumerate(settings):
                if aligner.name in setting.strengths:
                    together[setting.strengths[aligner.name]].append(row)
            strength = torch.zeros((len(settings), 1), device=rows.keep.device)
            history = history_of(rows.cache)
            for policy, members in together.items():
                ends = [settings[row].prompt_end for row in members]
                tape = Tape(rows.keep[members], 1)
                strength[members] = strength_of(policy, ends, self._seen(policy, history, members), tape)[0].float()
            result[aligner.name] = strength
        return result

    def _seen(self, policy: Policy, history: History, members: Sequence[int]) -> dict[str, Seen]:
        """What each guard that the policy asks has seen of these rows."""
        columns, rows = columns_of(self.guards), list(members)
        return {
            guard: Seen(history.scores[rows][..., columns[guard]], history.positions[rows].long())
            for guard in guards_of(policy)
        }


def _compact(states: Float[Tensor, "B 1 D"]) -> Float[Tensor, "B 1 D"]:
    """A copy whose rows lie one behind the other: from states with gaps between them CPUs copy a tied head's matrix.

    Of one row ``contiguous`` keeps the gap, for it looks at no stride of a dimension of size 1.
    """
    return states.clone(memory_format=torch.contiguous_format)
