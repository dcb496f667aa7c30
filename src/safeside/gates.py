"""Decisions by scores: strengths, prompts that are blocked, answers that are stopped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from safeside.adapters.adapter import Adapter
from safeside.base.taps import Tape
from safeside.mixing import Policy
from safeside.policies import ByCategory, Timed, parts_of
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


def seen_so_far(layer: RequestLayer | None, columns: slice, new: Float[Tensor, "B T K"] | None, tape: Tape) -> Seen:
    """What the request's layer remembers of a guard (its ``columns``) and the ``new`` scores of this pass.

    Without ``new`` its tokens wait to be judged; so long their scores are not numbers.
    """
    if new is None:
        new = torch.full((*tape.keep_new.shape, columns.stop - columns.start), torch.nan, device=tape.keep.device)
    positions = torch.where(tape.keep_new, tape.positions, -1)
    if layer is None or layer.keys is None or layer.values is None or not layer.keys.numel():
        return Seen(new, positions)
    past, indices = layer.keys[:, 0, :, columns], layer.values[:, 0, :, -1].long()
    return Seen(torch.cat([past, new], 1), torch.cat([indices, positions], 1))


def strength_of(
    policy: Policy, prompt_end: Sequence[int] | None, seen: Mapping[str, Seen], tape: Tape
) -> tuple[Tensor, bool]:
    """Strength (B, T) of one aligner at the new tokens, and whether it is decided for the rest of the request.

    ``seen`` holds what each guard that the policy asks has seen.
    """
    parts = parts_of(policy)
    found = [_part_strength(part, prompt_end, seen[part.guard] if part.guard else None, tape) for part in parts]
    return torch.stack([strength for strength, _ in found]).amax(0), all(is_decided for _, is_decided in found)


def _part_strength(
    policy: Policy, prompt_end: Sequence[int] | None, seen: Seen | None, tape: Tape
) -> tuple[Tensor, bool]:
    if not isinstance(policy, Timed):
        return _plain_strength(policy, prompt_end, seen, tape)
    if seen is None:
        strength, is_decided = _plain_strength(policy.policy, prompt_end, None, tape)
    elif policy.latched:
        strength, is_decided = _latched_strength(policy.policy, prompt_end, seen, tape)
    else:
        scores = held_scores(seen, prompt_end, policy.margin, tape.n_new)
        if policy.reads == "both":
            assert prompt_end is not None  # Request sees to it
            at_end, decided = seen.at_end(prompt_end)
            scores = torch.where(decided[:, None, None], torch.maximum(scores, at_end[:, None]), scores)
        strength, is_decided = _of_scores(policy.policy, scores) * _after_prompt(prompt_end, tape), False
    if policy.first_tokens is None:
        return strength, is_decided
    assert prompt_end is not None
    ends = torch.tensor(prompt_end, device=tape.keep.device)[:, None]
    acts = tape.positions < ends - 1 + policy.first_tokens
    return torch.where(acts, strength, 0.0), is_decided and not bool(strength.any())


def _plain_strength(
    policy: Policy, prompt_end: Sequence[int] | None, seen: Seen | None, tape: Tape
) -> tuple[Tensor, bool]:
    """What a policy gives that is not timed."""
    device, shape = tape.keep.device, tape.keep_new.shape
    if seen is None:
        return policy.strength(torch.zeros((), device=device)).expand(shape), True
    if not policy.latched:
        return _of_scores(policy, seen.scores[:, -tape.n_new :]) * _after_prompt(prompt_end, tape), False
    return _latched_strength(policy, prompt_end, seen, tape)


def _latched_strength(policy: Policy, prompt_end: Sequence[int] | None, seen: Seen, tape: Tape) -> tuple[Tensor, bool]:
    """The strength by the score at the prompt's end, from there on."""
    assert prompt_end is not None  # Request sees to it
    scores, decided = seen.at_end(prompt_end)
    on = decided[:, None] & _after_prompt(prompt_end, tape).bool()
    return torch.where(on, _of_scores(policy, scores)[:, None], 0.0), bool(decided.all())


def _of_scores(policy: Policy, scores: Float[Tensor, "*B K"]) -> Float[Tensor, "*B"]:
    """The policy's strength for each row of a guard's K scores: of the highest one, or of each label's own."""
    return policy.strength(scores if isinstance(policy, ByCategory) else scores.amax(-1))


def held_scores(seen: Seen, prompt_end: Sequence[int] | None, margin: float, n_new: int) -> Float[Tensor, "B T K"]:
    """The scores of the new tokens with hysteresis: up at once, down only by more than ``margin``.

    ``e_t = max(s_t, min(e_{t-1}, s_t + margin))`` over the tokens from the prompt's last one on, so
    ``e_t = max_j min(s_j, min_{j < i <= t} s_i + margin)``, which needs no state but the scores.  A score that is not a
    number counts as 1 for the tokens behind it, and stays itself.
    """
    if margin == 0.0:
        return seen.scores[:, -n_new:]
    start = torch.zeros_like(seen.positions[:, :1])
    if prompt_end is not None:
        start = torch.tensor(prompt_end, device=start.device)[:, None] - 1
    counted = (seen.positions >= start)[..., None]
    known = torch.where(seen.scores.isfinite(), seen.scores, 1.0)
    peaks, floors = torch.where(counted, known, -torch.inf), torch.where(counted, known, torch.inf)
    result = seen.scores[:, -n_new:].clone()
    for index in range(n_new):
        stop = seen.scores.shape[1] - n_new + index + 1
        behind = torch.cat([floors[:, 1:stop], torch.full_like(floors[:, :1], torch.inf)], 1)
        lowest = behind.flip(1).cummin(1).values.flip(1)  # of the scores behind each token
        held = torch.minimum(peaks[:, :stop], lowest + margin).amax(1)
        is_held = counted[:, stop - 1] & result[:, index].isfinite()
        result[:, index] = torch.where(is_held, held, result[:, index])
    return result


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
