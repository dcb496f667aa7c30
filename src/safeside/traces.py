"""Which guard set an answer's strengths, by which scores: read off a request after its answer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from safeside.adapters.adapter import Adapter
from safeside.mixing import Policy
from safeside.policies import ByCategory, Timed
from safeside.request import History, Request, columns_of
from safeside.types import StrengthTrace


def traces_of(
    request: Request, history: History, guards: Sequence[Adapter], aligners: Sequence[str]
) -> list[tuple[StrengthTrace, ...]]:
    """For each row a trace of every aligner, from the prompt's last token on (of the whole text if that is unknown)."""
    columns, labels = columns_of(guards), {guard.name: guard.config.labels for guard in guards}
    rows = []
    for row, end in enumerate(request.prompt_end or (1,) * history.positions.shape[0]):
        is_answer = history.positions[row] >= end - 1
        traces = []
        for index, aligner in enumerate(aligners):
            policy = request.policies[aligner]
            strengths = tuple(history.strengths[row, is_answer, index].tolist())
            if policy.guard is None:
                traces.append(StrengthTrace(aligner, strengths))
                continue
            scores, which = _deciding(policy, history.scores[row, is_answer, columns[policy.guard]])
            names = tuple(labels[policy.guard][column] for column in which.tolist())
            traces.append(StrengthTrace(aligner, strengths, policy.guard, tuple(scores.tolist()), names))
        rows.append(tuple(traces))
    return rows


def _deciding(policy: Policy, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Of a guard's scores (T, K) the one that counted at each token, and its column."""
    curve = policy.policy if isinstance(policy, Timed) else policy
    if policy.latched:
        scores = scores[:1].expand_as(scores)
    elif isinstance(policy, Timed) and policy.reads == "both":
        scores = torch.maximum(scores, scores[:1])
    known = torch.where(scores.isfinite(), scores, torch.inf)
    if isinstance(curve, ByCategory):
        own = torch.tensor([column for column, _, _ in curve.parts], device=scores.device)
        asked = curve.by_part(scores)
        tied = asked == asked.amax(-1, keepdim=True)
        which = own[torch.where(tied, known[:, own], -torch.inf).argmax(-1)]
        which = torch.where(scores.isfinite().all(-1), which, known.argmax(-1))
    else:
        which = known.argmax(-1)
    return scores.gather(-1, which[:, None])[:, 0], which
