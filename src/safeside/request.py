"""What belongs to one request: its strengths, its prompt's end, and the scores seen so far.

It hangs on the request's ``past_key_values`` as one more layer, behind those of the base and of the adapters, so it is
cropped, repeated and copied with them, and two requests can never share it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from safeside.adapters.adapter import Adapter
from safeside.errors import AttachmentError, InputError, UnsupportedError
from safeside.mixing import Policy
from safeside.policies import counts_from_prompt, row_values, with_row_values
from safeside.stopping import StopRule


@dataclass(frozen=True)
class Request:
    """Strength policies by aligner, and the number of prompt tokens of each row (None: not known)."""

    policies: Mapping[str, Policy]
    prompt_end: tuple[int, ...] | None = None
    copies: int = 1
    """Rows that ``generate`` makes of each row before the first pass."""
    rules: Mapping[str, StopRule] = field(default_factory=dict)
    """Stop rules by guard."""

    def __post_init__(self) -> None:
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
    """A layer of a cache for the adapters; one that holds nothing yet can be cropped too."""

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens, if there are any."""
        if self.keys is not None:
            super().crop(tokens_to_remove)


class RequestLayer(SideLayer):
    """The request's own layer of a cache.

    ``keys`` (B, 1, S, K) hold the scores of all guards, ``values`` (B, 1, S, A + 1) the strengths of all aligners and
    the token's index among the kept ones of its row (-1 for padding).
    """

    def __init__(self, owner: object, request: Request) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.owner = owner
        self.request = request
        self.skipped: set[str] = set()
        self.is_spent = False  # a pass was stopped on the way: the layers behind it have not seen its tokens

    def refuse_spent(self) -> None:
        """Raise where an intercepting guard stopped a pass on the way."""
        if self.is_spent:
            raise AttachmentError(
                "The prompts on this cache were blocked before the base had read them. Start with a new DynamicCache()."
            )

    def refuse_new_turn(self, n_new: int, intercepts: bool) -> None:
        """Raise where several tokens follow a judged prompt without a request of their own: nobody would judge them."""
        latched = [name for name, policy in self.request.policies.items() if counts_from_prompt(policy)]
        if (latched or intercepts) and n_new > 1 and self.get_seq_length() >= min(self.request.prompt_end or (0,)):
            raise AttachmentError(
                f"{n_new} tokens follow a prompt that was judged already"
                f"{' and set the strength of ' + ', '.join(latched) if latched else ''}. Run a new turn inside "
                "attachment.request(prompt_end=[...]), so that its own prompt is judged."
            )

    def reset(self) -> None:
        """Forget every token, and that aligners were skipped on them."""
        super().reset()
        self.skipped.clear()

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens; when none is left, no aligner has missed any."""
        super().crop(tokens_to_remove)
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
        self.request = self.request.select(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        if self.keys is not None:
            self.request = replace(self.request, copies=repeats).for_rows(self.keys.shape[0])

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        rows = indices.nonzero().flatten() if indices.dtype == torch.bool else indices
        self.request = self.request.select(rows.tolist())

    def __deepcopy__(self, memo: dict[int, object]) -> RequestLayer:
        copy = RequestLayer(self.owner, self.request)
        copy.skipped, copy.is_spent = set(self.skipped), self.is_spent
        if self.keys is not None and self.values is not None:
            copy.update(self.keys.clone(), self.values.clone())
        memo[id(self)] = copy
        return copy


@dataclass(slots=True)
class History:
    """Scores, strengths and token indices of every slot so far, read from a request's layer."""

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
    values = layer.values[:, 0]
    return History(layer.keys[:, 0], values[..., :-1], values[..., -1])


def request_layer(cache: DynamicCache) -> RequestLayer | None:
    """The request's layer, or None on a cache that no attachment has used."""
    last = cache.layers[-1] if cache.layers else None
    return last if isinstance(last, RequestLayer) else None


def ended_request(cache: DynamicCache) -> Request:
    """The request on ``cache``; one that does not know where its prompts end is an AttachmentError."""
    layer = request_layer(cache)
    if layer is None or layer.request.prompt_end is None:
        raise AttachmentError("Verdicts need the prompt's end. Run inside attachment.request(prompt_end=[...]).")
    return layer.request


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
    """By guard, calibrated risk in [0, 1]."""
    logits: dict[str, Float[Tensor, "B T K"]] = field(default_factory=dict)
    """By guard, the raw outputs behind the scores."""
