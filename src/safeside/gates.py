"""Decisions by scores: strengths, prompts that are blocked, answers that are stopped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from safeside.adapters.adapter import Adapter
from safeside.base.taps import Tape
from safeside.mixing import Policy
from safeside.request import History, Request, RequestLayer, columns_of
from safeside.stopping import Standing, standing_of
from safeside.types import Verdict
from safeside.verdicts import verdict_of


@dataclass(frozen=True, slots=True)
class Seen:
    """One guard's scores and the token indices of all tokens so far, those of the pass in flight included."""

    scores: Float[Tensor, "B S K"]
    positions: Int[Tensor, "B S"]
    """Index among the kept tokens of the row; -1 for padding."""

    def at_end(self, prompt_end: Sequence[int]) -> tuple[Float[Tensor, "B K"], Bool[Tensor, " B"]]:
        """The scores at each row's last prompt token, and whether the row has come that far."""
        ends = torch.tensor(prompt_end, device=self.positions.device)[:, None]
        at_end = self.positions == ends - 1
        rows = torch.arange(len(at_end), device=at_end.device)
        return self.scores[rows, at_end.int().argmax(1)], at_end.any(1)


def seen_so_far(layer: RequestLayer | None, columns: slice, new: Float[Tensor, "B T K"], tape: Tape) -> Seen:
    """What the request's layer remembers of a guard (its ``columns``) and the ``new`` scores of this pass."""
    positions = torch.where(tape.keep_new, tape.positions, -1)
    if layer is None or layer.keys is None or layer.values is None or not layer.keys.numel():
        return Seen(new, positions)
    past, indices = layer.keys[:, 0, :, columns], layer.values[:, 0, :, -1].long()
    return Seen(torch.cat([past, new], 1), torch.cat([indices, positions], 1))


def strength_of(policy: Policy, prompt_end: Sequence[int] | None, seen: Seen | None, tape: Tape) -> tuple[Tensor, bool]:
    """Strength (B, T) of one aligner at the new tokens, and whether it is decided for the rest of the request.

    ``seen`` is what the guard that the policy asks has seen; None when it asks none.
    """
    device, shape = tape.keep.device, tape.keep_new.shape
    if seen is None:
        return policy.strength(torch.zeros((), device=device)).expand(shape), True
    if not policy.latched:
        new = seen.scores[:, -tape.n_new :].amax(-1)
        return policy.strength(new) * _after_prompt(prompt_end, tape), False
    assert prompt_end is not None  # Request sees to it
    scores, decided = seen.at_end(prompt_end)
    on = decided[:, None] & _after_prompt(prompt_end, tape).bool()
    return torch.where(on, policy.strength(scores.amax(-1, keepdim=True)), 0.0), bool(decided.all())


def _after_prompt(prompt_end: Sequence[int] | None, tape: Tape) -> Tensor:
    """1 where a strength may act: everywhere without ``prompt_end``, else from the prompt's last token on."""
    if prompt_end is None:
        return torch.ones((), device=tape.keep.device)
    ends = torch.tensor(prompt_end, device=tape.keep.device)[:, None]
    return (tape.positions >= ends - 1).float()


def prompt_verdicts(
    guard: Adapter, seen: Seen, prompt_end: Sequence[int], notes: Sequence[str] = ()
) -> list[Verdict | None]:
    """The guard's verdict on each row's prompt; None for a row whose prompt has not been read to its end."""
    scores, decided = seen.at_end(prompt_end)
    return [
        verdict_of(guard, values, "prompt", notes) if known else None
        for values, known in zip(scores.tolist(), decided.tolist(), strict=True)
    ]


def blocked_prompts(
    guard: Adapter, seen: Seen, request: Request, tape: Tape, notes: Sequence[str] = ()
) -> list[Verdict] | None:
    """The verdicts when a prompt ends in this pass and by now every row's prompt is read and flagged; else None."""
    assert request.prompt_end is not None  # Attachment sees to it
    ends = torch.tensor(request.prompt_end, device=tape.keep.device)[:, None]
    if not (tape.keep_new & (tape.positions == ends - 1)).any():
        return None
    verdicts = prompt_verdicts(guard, seen, request.prompt_end, notes)
    flagged = [verdict for verdict in verdicts if verdict is not None and verdict.flagged]
    return flagged if len(flagged) == len(verdicts) else None


def answer_standings(
    request: Request,
    history: History,
    guards: Sequence[Adapter],
    intercept: Adapter | None,
    lengths: Sequence[int],
) -> list[Standing]:
    """How each row's answer of ``lengths`` tokens stands by the request's rules; blocked rows have none."""
    ends, columns = request.prompt_end or (), columns_of(guards)
    blocked = [False] * len(ends)
    if intercept is not None:
        seen = Seen(history.scores[..., columns[intercept.name]], history.positions.long())
        blocked = [verdict is None or verdict.flagged for verdict in prompt_verdicts(intercept, seen, ends)]
    result = []
    for row, (end, length) in enumerate(zip(ends, lengths, strict=True)):
        answer = history.answer(row, end, length)
        scores = {name: answer[:, columns[name]].amax(-1) for name in request.rules}
        standing = standing_of(request.rules, scores, length)
        result.append(replace(standing, n_clear=0, stop=None, is_blocked=True) if blocked[row] else standing)
    return result
