"""Which guard set an answer's strengths, by which scores: read off a request after its answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from safeside.adapters.adapter import Adapter
from safeside.mixing import Policy
from safeside.policies import ByCategory, Timed, guards_of, parts_of
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
            asked = {name: history.scores[row, is_answer, columns[name]] for name in guards_of(policy)}
            scores, names = _counted(policy, asked, labels)
            traces.append(StrengthTrace(aligner, strengths, " + ".join(asked), scores, names))
        rows.append(tuple(traces))
    return rows


def _counted(
    policy: Policy, asked: Mapping[str, Tensor], labels: Mapping[str, tuple[str, ...]]
) -> tuple[tuple[float, ...], tuple[str, ...]]:
    """At each token the score that counted and its label; of several guards' those of the strongest part."""
    best: list[tuple[float, float, str]] = []
    for part in parts_of(policy):
        if part.guard is None:
            continue
        curve = part.policy if isinstance(part, Timed) else part
        read = _as_read(part, asked[part.guard])
        scores, which = _deciding(curve, read)
        wanted = curve.strength(read if isinstance(curve, ByCategory) else scores)
        prefix = f"{part.guard}/" if len(asked) > 1 else ""
        names = [prefix + labels[part.guard][column] for column in which.tolist()]
        found = list(zip(wanted.tolist(), scores.tolist(), names, strict=True))
        best = [max(pair, key=lambda one: one[0]) for pair in zip(best, found, strict=True)] if best else found
    return tuple(score for _, score, _ in best), tuple(name for _, _, name in best)


def _as_read(policy: Policy, scores: Tensor) -> Tensor:
    """Of a guard's scores (T, K) those that the policy goes by at each token, hysteresis left out."""
    if policy.latched:
        return scores[:1].expand_as(scores)
    if isinstance(policy, Timed) and policy.reads == "both":
        return torch.maximum(scores, scores[:1])
    return scores


def _deciding(curve: Policy, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Of the scores (T, K) the one that counted at each token, and its column."""
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
