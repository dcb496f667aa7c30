"""What belongs to one request: its strengths, its prompt's end, and the scores seen so far.

It hangs on the request's ``past_key_values`` as one more layer, behind those of the base and of the adapters, so it is
cropped, repeated and copied with them, and two requests can never share it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from safeside.adapters.adapter import Adapter, SideOutput
from safeside.base.taps import Tape
from safeside.errors import AttachmentError, InputError, UnsupportedError
from safeside.mixing import Policy
from safeside.policies import counts_from_prompt, follows_answer, row_values, with_row_values
from safeside.stopping import StopRule
from safeside.waiting import Waiting


def check_group(judge_every: object) -> None:
    """Refuse what is no number of tokens that can be judged together."""
    if not isinstance(judge_every, int) or isinstance(judge_every, bool) or judge_every < 1:
        raise InputError(f"judge_every is a number of tokens, 1 or more; got {judge_every!r}.")


@dataclass(frozen=True)
class Request:
    """Strength policies by aligner, and the number of prompt tokens of each row (None: not known)."""

    policies: Mapping[str, Policy]
    prompt_end: tuple[int, ...] | None = None
    copies: int = 1
    """Rows that ``generate`` makes of each row before the first pass."""
    rules: Mapping[str, StopRule] = field(default_factory=dict)
    """Stop rules by guard."""
    judge_every: int = 1
    """Tokens of an answer that guards judge together."""

    def __post_init__(self) -> None:
        check_group(self.judge_every)
        waiting = [name for name, policy in self.policies.items() if counts_from_prompt(policy)]
        if waiting and self.prompt_end is None:
            raise AttachmentError(
                f"The strength of {', '.join(waiting)} is latched at the prompt's end, but prompt_end is not known. "
                "Run inside attachment.request(prompt_end=[...]), use base.chat, or pass latched=False."
            )
        for name, policy in self.policies.items():
            self._check_rows(name, policy)

    def _check_rows(self, name: str, policy: Policy) -> None:
        values = row_values(policy)
        if self.prompt_end is None or values is None:
            return
        if len(values) not in (1, len(self.prompt_end)):
            raise InputError(
                f"The strength of {name!r} has {len(values)} values for {len(self.prompt_end)} rows; expected "
                "one value, or one for each row."
            )

    @property
    def is_gated(self) -> bool:
        """Whether any strength depends on a guard."""
        return any(policy.guard is not None for policy in self.policies.values())

    @property
    def group(self) -> int:
        """Tokens of an answer that may be judged together: one where a strength follows what guards say of each."""
        return 1 if any(map(follows_answer, self.policies.values())) else self.judge_every

    def for_rows(self, n_rows: int) -> Request:
        """The request for a batch of ``n_rows``: each row as often as ``copies`` says."""
        policies = {name: self._rows_of(policy, n_rows) for name, policy in self.policies.items()}
        end = self.prompt_end
        if end is not None and len(end) != n_rows:
            end = tuple(self._repeat(end, n_rows, "prompt_end"))
        return replace(self, policies=policies, prompt_end=end, copies=1)

    def _rows_of(self, policy: Policy, n_rows: int) -> Policy:
        values = row_values(policy)
        if values is None or len(values) in (1, n_rows):
            return policy
        return with_row_values(policy, tuple(self._repeat(values, n_rows, "strength")))

    def _repeat(self, values: tuple[float, ...] | tuple[int, ...], n_rows: int, what: str) -> list[int]:
        if n_rows != len(values) * self.copies:
            raise InputError(
                f"{what} has {len(values)} values for a batch of {n_rows} rows; expected one for each row. Where "
                "generate widens the batch, pass attachment.request(copies=num_beams or num_return_sequences)."
            )
        return [value for value in values for _ in range(self.copies)]  # type: ignore[misc]

    def select(self, rows: list[int]) -> Request:
        """The same request for some of its rows."""
        policies = dict(self.policies)
        for name, policy in self.policies.items():
            values = row_values(policy)
            if values is not None and len(values) > 1:
                policies[name] = with_row_values(policy, tuple(values[row] for row in rows))
        end = None if self.prompt_end is None else tuple(self.prompt_end[row] for row in rows)
        return replace(self, policies=policies, prompt_end=end)


class SideLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """A layer of a cache for the adapters; one that holds nothing yet can be cropped too.

    A guard's layer is behind the base's by the tokens that wait.
    """

    def __init__(self, behind: Waiting | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._behind = behind

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens (a negative number of them), if there are any."""
        if self.keys is not None:
            n_waiting = 0 if self._behind is None else len(self._behind)
            super().crop(min(0, tokens_to_remove + n_waiting))


class RequestLayer(SideLayer):  # type: ignore[no-untyped-call]
    """The request's own layer of a cache.

    ``keys`` (B, 1, S, K) hold the scores of all guards, NaN for tokens that wait; ``values`` (B, 1, S, A + 1) the
    strengths of all aligners and the token's index among the kept ones of its row (-1 for padding).
    """

    def __init__(self, owner: object, request: Request) -> None:
        super().__init__()
        self.owner = owner
        self.request = request
        self.waiting = Waiting()
        self.skipped: set[str] = set()
        self.spent = ""
        """Why nothing can go on from this cache: some of its layers have not seen what others have."""

    def refuse_foreign(self, attachment: object) -> None:
        """Raise where another attachment owns this layer, or nothing can go on from it."""
        if self.owner is not attachment:
            raise AttachmentError("This cache belongs to another attachment. Start with a new DynamicCache().")
        if self.spent:
            raise AttachmentError(f"{self.spent} Start with a new DynamicCache().")

    def refuse_new_turn(self, n_new: int, intercepts: bool) -> None:
        """Raise where several tokens follow a judged prompt without a request of their own: nobody would judge them."""
        latched = [name for name, policy in self.request.policies.items() if counts_from_prompt(policy)]
        if (latched or intercepts) and n_new > 1 and self.get_seq_length() >= min(self.request.prompt_end or (0,)):
            raise AttachmentError(
                f"{n_new} tokens follow a prompt that was judged already"
                f"{' and set the strength of ' + ', '.join(latched) if latched else ''}. Run a new turn inside "
                "attachment.request(prompt_end=[...]), so that its own prompt is judged."
            )

    @property
    def keep(self) -> Bool[Tensor, "B S"]:
        """Which slots hold a token of their row."""
        assert self.values is not None
        kept: Tensor = self.values[:, 0, :, -1] >= 0
        return kept

    def may_wait(self, tape: Tape) -> bool:
        """Whether the pass on ``tape`` feeds each row one token of its answer, and guards may judge such later."""
        if tape.n_new > 1 or not tape.n_past or self.request.group == 1:
            return False
        ends = self.request.prompt_end
        if ends is None or self.waiting:  # of an answer is what waits, too
            return True
        return bool((tape.positions[:, 0] >= torch.tensor(ends, device=tape.keep.device)).all())

    def judged(self, scores: Float[Tensor, "B T K"]) -> None:
        """Write the scores of the newest tokens, which had to wait."""
        assert self.keys is not None
        before = self.keys[:, :, : self.keys.shape[2] - scores.shape[1]]
        self.keys = torch.cat([before, scores.to(before.dtype)[:, None]], 2)

    def store(self, record: PassRecord, tape: Tape, *, waits: bool = False) -> None:
        """Add a pass: scores (NaN where the tokens wait), strengths and indices of the tokens on ``tape``."""
        n_rows, n_new = tape.keep_new.shape
        if waits and self.keys is not None:
            scores = self.keys.new_full((n_rows, n_new, self.keys.shape[-1]), math.nan)
        elif record.scores:
            scores = torch.cat([*record.scores.values()], -1).detach()
        else:  # there is no guard
            scores = torch.zeros(n_rows, n_new, 1, device=tape.keep.device)
        indices = torch.where(tape.keep_new, tape.positions, -1).float()
        strengths = [strength.expand(n_rows, n_new) for strength in record.strengths.values()]
        self.update(scores[:, None], torch.stack([*strengths, indices], -1).detach()[:, None])

    def reset(self) -> None:
        """Forget every token, and that aligners were skipped on them."""
        super().reset()
        self.waiting.drop(len(self.waiting))
        self.skipped.clear()

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens; when none is left, no aligner has missed any."""
        super().crop(tokens_to_remove)
        self.waiting.drop(-tokens_to_remove)
        if not self.get_seq_length():
            self.skipped.clear()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Beam search moves rows about; a gate's decision may not move with them."""
        if self.request.is_gated:
            raise UnsupportedError(
                "Beam search with a strength that a guard sets is refused: beams would trade gates. "
                "Use a fixed strength, or sampling."
            )
        super().reorder_cache(beam_idx)
        self.waiting.select(beam_idx.tolist())
        self.request = self.request.select(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        if self.keys is not None:
            self.waiting.select([row // repeats for row in range(self.keys.shape[0])])
            self.request = replace(self.request, copies=repeats).for_rows(self.keys.shape[0])

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        rows = indices.nonzero().flatten() if indices.dtype == torch.bool else indices
        self.waiting.select(rows.tolist())
        self.request = self.request.select(rows.tolist())

    def __deepcopy__(self, memo: dict[int, object]) -> RequestLayer:
        copy = RequestLayer(self.owner, self.request)
        copy.waiting = deepcopy(self.waiting, memo)
        copy.skipped, copy.spent = set(self.skipped), self.spent
        if self.keys is not None and self.values is not None:
            copy.update(self.keys.clone(), self.values.clone())
        memo[id(self)] = copy
        return copy


@dataclass(slots=True)
class History:
    """Scores, strengths and token indices of every slot that was judged so far, read from a request's layer."""

    scores: Float[Tensor, "B S K"]
    strengths: Float[Tensor, "B S A"]
    positions: Float[Tensor, "B S"]

    def at(self, values: Tensor, row: int, position: int) -> Tensor:
        """The entry of ``values`` (B, S, ...) at a row's kept token ``position``."""
        slots = (self.positions[row] == position).nonzero().flatten()
        if not len(slots):
            raise AttachmentError(f"The request has no token {position} in row {row}; it was cropped or not run yet.")
        entry: Tensor = values[row, slots[0]]
        return entry

    def answer(self, row: int, start: int, length: int) -> Float[Tensor, "T K"]:
        """Scores of a row's kept tokens from ``start`` on, ``length`` of them or as many as were run."""
        positions = self.positions[row]
        return self.scores[row, (positions >= start) & (positions < start + length)]


def columns_of(guards: Sequence[Adapter]) -> dict[str, slice]:
    """By guard, its columns among the K scores of a request's layer."""
    columns, start = {}, 0
    for guard in guards:
        columns[guard.name] = slice(start, start + len(guard.config.labels))
        start += len(guard.config.labels)
    return columns


def history_of(cache: DynamicCache) -> History:
    """What the request on ``cache`` has seen; a cache that no attachment filled is an AttachmentError."""
    layer = request_layer(cache)
    if layer is None or layer.keys is None or layer.values is None:
        raise AttachmentError("This cache was not filled under an attachment. Generate inside attach(...) with it.")
    n_judged = layer.keys.shape[2] - len(layer.waiting)
    values = layer.values[:, 0, :n_judged]
    return History(layer.keys[:, 0, :n_judged], values[..., :-1], values[..., -1])


def request_layer(cache: DynamicCache) -> RequestLayer | None:
    """The request's layer, or None on a cache that no attachment has used."""
    last = cache.layers[-1] if cache.layers else None
    return last if isinstance(last, RequestLayer) else None


def add_layers(cache: DynamicCache, n_base: int, n_side: Sequence[int], last: RequestLayer) -> None:
    """Give a new cache, behind the base's layers, those of guards and aligners (``n_side``) and the request's own."""
    cache.layers.extend(SideLayer() for _ in range(n_base - len(cache.layers)))
    for behind, count in zip((last.waiting, None), n_side, strict=True):
        cache.layers.extend(SideLayer(behind) for _ in range(count))
    cache.layers.append(last)


def discard_pass(cache: DynamicCache, n_base: int, layer: RequestLayer, reason: str) -> None:
    """Empty the base's layers, some of which a pass that did not end has filled; adapters refuse the cache from now on.

    Earlier turns go too: without adapters it is a new cache.
    """
    cache.layers[:n_base] = [SideLayer() for _ in range(n_base)]
    layer.spent = reason


def check_seen(layer: RequestLayer | None, n_past: int) -> None:
    """Refuse a cache of ``n_past`` tokens on which the adapters have seen another number of them."""
    n_seen = 0 if layer is None else layer.get_seq_length()
    if n_seen != n_past:
        raise AttachmentError(
            f"The cache holds {n_past} tokens but the adapters have seen {n_seen}: it was used without them, or a "
            "pass failed. Start with a new DynamicCache()."
        )


def ended_request(cache: DynamicCache) -> Request:
    """The request on ``cache``; one that does not know where its prompts end is an AttachmentError."""
    layer = request_layer(cache)
    if layer is None or layer.request.prompt_end is None:
        raise AttachmentError("Verdicts need the prompt's end. Run inside attachment.request(prompt_end=[...]).")
    return layer.request


class Owner(Protocol):
    """What a request has to know of the attachment."""

    policies: dict[str, Policy]
    intercept: Adapter | None
    judge_every: int


def request_in_force(owner: Owner, layer: RequestLayer | None, asked: Request | None, n_new: int) -> Request:
    """The request of a pass: the thread's own, else the one that the cache already carries, else the default."""
    if asked is not None:
        request = asked
    elif layer is not None:
        request = layer.request
        layer.refuse_new_turn(n_new, owner.intercept is not None)
    else:
        request = Request(owner.policies, judge_every=owner.judge_every)
    if request.prompt_end is None and layer is not None:
        request = replace(request, prompt_end=layer.request.prompt_end)
    if owner.intercept is not None and request.prompt_end is None:
        raise AttachmentError(
            f"Guard {owner.intercept.name!r} intercepts at the prompt's end, but prompt_end is not known. Run inside "
            "attachment.request(prompt_end=[...]), or use base.chat."
        )
    return request


class ForwardPass:
    """One forward pass of the base in flight: its tapes, its cache, its request, and what was run before its end."""

    def __init__(self, tapes: dict[str, Tape], cache: DynamicCache | None, request: Request) -> None:
        self.tapes = tapes
        self.cache = cache
        self.request = request
        self.early: dict[str, SideOutput] = {}
        self.may_wait = self.layer is not None and self.layer.may_wait(next(iter(tapes.values())))
        """Whether its tokens are of answers and may be judged later, with those behind them."""

    @property
    def layer(self) -> RequestLayer | None:
        """The request's layer of its cache."""
        return request_layer(self.cache) if self.cache is not None else None


@dataclass(slots=True)
class PassRecord:
    """The last forward pass of this thread: what training and tests need of it, by adapter name."""

    base_state: Float[Tensor, "B T D"]
    """The base's own final normed state: logits from it are the base's, unaligned."""
    deltas: dict[str, Float[Tensor, "B T D"]] = field(default_factory=dict)
    """By aligner, what it would add at strength 1; an aligner that was off for good has none."""
    strengths: dict[str, Float[Tensor, "B T"]] = field(default_factory=dict)
    """By aligner, the strength in [0, 2] of each new token."""
    scores: dict[str, Float[Tensor, "B T K"]] = field(default_factory=dict)
    """By guard, calibrated risk in [0, 1] of the pass's own tokens; none where they have to wait."""
    logits: dict[str, Float[Tensor, "B T K"]] = field(default_factory=dict)
    """By guard, the raw outputs behind the scores; none where a group was judged."""
