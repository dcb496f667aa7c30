"""Scores of whole texts: one forward pass of the base serves every guard."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace

import torch

from safeside.adapters.adapter import Adapter
from safeside.attach import Attachment, attach
from safeside.base.families import is_updated
from safeside.base.model import Base
from safeside.chat import pad_batch
from safeside.content import refuse_empty
from safeside.errors import InputError
from safeside.guards.blank import BlankIds
from safeside.guards.windows import windows
from safeside.types import Combine, Message, Mode, Verdict
from safeside.verdicts import LORA_NOTE, verdict_of

Conversation = Sequence[Message]

_COMBINE: Mapping[Combine, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "max": torch.maximum,
    "min": torch.minimum,
}  # of either NaN is the result: a text of which one window cannot be scored fails closed
_Found = dict[tuple[str, Combine], torch.Tensor]
"""Of a conversation: (K,) what the windows read so far come to, by guard and way of combining."""
_NOT_A_NUMBER = "a score is not a number"  # verdicts say so themselves


@dataclass(frozen=True, slots=True)
class Scores:
    """Scores of one conversation."""

    by_guard: dict[str, tuple[float, ...]]
    """By guard, one score in [0, 1] for each label; NaN where it could not score."""
    n_windows: int = 1
    """Windows that the text was cut into, the most of any guard; 1 when it fits the base's context."""
    problem: str | None = None
    """Why it has no score, or one that is not a number; None when all is well."""
    windows_of: Mapping[str, int] = field(default_factory=dict)
    """Windows by guard, where they were cut for some guards' highest score and for others' lowest."""
    place: Mode = "prompt"
    """Whether a prompt or an answer ends the conversation."""

    def mode_for(self, guard: Adapter) -> Mode:
        """How the guard read it: in windows, or to the end of its ``place``."""
        return mode_of(self.windows_of.get(guard.name, self.n_windows), self.place)


def score_conversations(
    base: Base,
    guards: Sequence[Adapter],
    conversations: Sequence[Conversation],
    *,
    batch_size: int = 32,
    advance: Callable[[int], None] = lambda count: None,
    attachment: Attachment | None = None,
) -> list[Scores]:
    """Scores in the order given.  Longer texts are scored in windows and the highest score of each label counts, or
    the lowest for labels of which the guard's configuration says so.

    A conversation that holds no text, or cannot be encoded or cut to size, gets NaN and its ``problem``: no row stops
    the others.  ``advance`` is told how many conversations were finished, for a progress bar.  ``attachment`` holds
    these guards already, aligners at strength 0 beside them perhaps; without it they are attached for the call.
    """
    scoring = Scoring(base, guards, conversations)
    advance(scoring.n_finished)
    with nullcontext(attachment) if attachment is not None else attach(base, guards=guards) as attached:
        for batch in scoring.batches(batch_size):
            advance(scoring.read(batch, attached))
    return scoring.scores()


@dataclass(frozen=True, slots=True)
class Window:
    """A conversation, or a part of it that fits the base's context."""

    row: int
    """Which conversation."""
    ids: tuple[int, ...]
    wanted: list[Combine]
    """The ways of combining that it was cut for."""


class Scoring:
    """The one way from conversations to scores: cut into windows at once, read a batch at a time, then combined.

    Batches may be read one by one with other passes between them, and every one of them before ``scores``.
    """

    def __init__(
        self, base: Base, guards: Sequence[Adapter], conversations: Sequence[Conversation], limit: int | None = None
    ) -> None:
        """``limit`` is the most tokens of a window: the base's context unless given."""
        self._base, self._guards, self._conversations = base, guards, conversations
        self._modes = {guard.name: sorted(set(guard.config.windows_by_label)) for guard in guards}
        modes, blank = sorted({mode for some in self._modes.values() for mode in some}), BlankIds(base)
        self._cuts = [_cuts(base, messages, modes, limit, blank) for messages in conversations]
        windows_of = [Window(row, *window) for row, cut in enumerate(self._cuts) for window in cut.windows]
        self._windows = sorted(windows_of, key=lambda window: len(window.ids))
        self._n_unread = [len(cut.windows) for cut in self._cuts]
        self._found: list[_Found] = [{} for _ in self._cuts]

    @property
    def n_finished(self) -> int:
        """Conversations of which every window was read, or that have none because they cannot be scored."""
        return self._n_unread.count(0)

    @property
    def n_tokens(self) -> int:
        """Tokens of all windows: what they share is read again, and counts again."""
        return sum(len(window.ids) for window in self._windows)

    def batches(self, batch_size: int = 32, max_tokens: int | None = None) -> Iterator[list[Window]]:
        """The windows, shortest first, at most ``batch_size`` together and ``max_tokens`` of them, padding included.

        A window that is longer than ``max_tokens`` is a batch of its own.
        """
        batch: list[Window] = []
        for window in self._windows:
            is_over = max_tokens is not None and len(window.ids) * (len(batch) + 1) > max_tokens
            if batch and (is_over or len(batch) == batch_size):
                yield batch
                batch = []
            batch.append(window)
        if batch:
            yield batch

    @torch.no_grad()
    def read(self, batch: Sequence[Window], attachment: Attachment) -> int:
        """Score one of the ``batches`` in a pass of the attachment's base; how many conversations that finished."""
        device = self._base.device
        ids, keep = pad_batch([window.ids for window in batch], self._base.tokenizer.pad_token_id or 0)
        self._base.decoder(input_ids=ids.to(device), attention_mask=keep.to(device), use_cache=False)
        last = keep.sum(1) - 1
        recorded, rows = attachment.record.scores, torch.arange(len(batch))
        return self.keep(batch, {name: recorded[name][rows, last].float().cpu() for name in self._modes})

    def keep(self, batch: Sequence[Window], ends: Mapping[str, torch.Tensor]) -> int:
        """Take each guard's scores (B, K) at the ends of a batch, whoever made them; as ``read`` otherwise."""
        n_before = self.n_finished
        for name, modes in self._modes.items():
            for window, value in zip(batch, ends[name], strict=True):
                found = self._found[window.row]
                for mode in [mode for mode in modes if mode in window.wanted]:
                    found[name, mode] = _COMBINE[mode](found.get((name, mode), value), value)
        for window in batch:
            self._n_unread[window.row] -= 1
        return self.n_finished - n_before

    def scores(self) -> list[Scores]:
        """Of each conversation in the order given."""
        assert not any(self._n_unread), "a batch was not read"
        return [
            replace(_scores(self._guards, found, cut), place=place_of(messages))
            for found, cut, messages in zip(self._found, self._cuts, self._conversations, strict=True)
        ]


@dataclass(frozen=True, slots=True)
class _Cut:
    """A conversation as windows that fit."""

    windows: list[tuple[tuple[int, ...], list[Combine]]]
    """Ids of each window, and the ways of combining that it was cut for."""
    counts: dict[Combine, int]
    """Windows for each way; none where the conversation cannot be cut for it."""
    problem: str | None
    """Why not."""


def _cuts(base: Base, messages: Conversation, modes: Sequence[Combine], limit: int | None, blank: BlankIds) -> _Cut:
    cut: dict[tuple[tuple[int, ...], ...], list[Combine]] = defaultdict(list)
    counts: dict[Combine, int] = {}
    problem = None
    for mode in modes:
        try:
            refuse_empty(messages)
            encoded = tuple(base.encode(part).ids for part in windows(base, messages, limit, mode))
            if len(encoded) == 1:
                blank.refuse(messages, encoded[0])
        except InputError as error:
            problem = str(error)
            continue
        counts[mode] = len(encoded)
        cut[encoded].append(mode)  # a text that fits is read once for all
    return _Cut([(ids, wanted) for encoded, wanted in cut.items() for ids in encoded], counts, problem)


def mode_of(n_windows: int, place: Mode) -> Mode:
    """How a text is read that takes so many windows of the base and ends at ``place``."""
    return "windowed" if n_windows > 1 else place


def place_of(messages: Conversation) -> Mode:
    """``answer`` when an assistant's message ends the conversation, else ``prompt``."""
    return "answer" if messages and messages[-1].role == "assistant" else "prompt"


def unscored(guards: Sequence[Adapter], problem: str) -> Scores:
    """The scores of a text that no guard could score: NaN, with the reason."""
    return Scores(_no_scores(guards), problem=problem)


def _no_scores(guards: Sequence[Adapter]) -> dict[str, tuple[float, ...]]:
    return {guard.name: (math.nan,) * len(guard.config.labels) for guard in guards}


def _scores(guards: Sequence[Adapter], found: _Found, cut: _Cut) -> Scores:
    values = {guard.name: _by_label(guard, found) for guard in guards}
    is_finite = all(math.isfinite(score) for scores in values.values() for score in scores)
    return Scores(
        values,
        max(cut.counts.values(), default=1),
        cut.problem or (None if is_finite else _NOT_A_NUMBER),
        {guard.name: max(cut.counts.get(mode, 1) for mode in guard.config.windows_by_label) for guard in guards},
    )


def _by_label(guard: Adapter, found: _Found) -> tuple[float, ...]:
    """Each label's score by its own way of combining; NaN where the text could not be cut for that."""
    by_mode = {mode: found[guard.name, mode].tolist() for mode in _COMBINE if (guard.name, mode) in found}
    modes = enumerate(guard.config.windows_by_label)
    return tuple(by_mode[mode][label] if mode in by_mode else math.nan for label, mode in modes)


def judge(
    base: Base, guards: Sequence[Adapter], conversations: Sequence[Conversation], *, batch_size: int = 32
) -> list[tuple[Verdict, ...]]:
    """One verdict of each guard on the end of each conversation, in order; windowed texts say so in the reason."""
    scored = score_conversations(base, guards, conversations, batch_size=batch_size)
    return [verdicts_of(base, guards, row) for row in scored]


def verdicts_of(base: Base, guards: Sequence[Adapter], scores: Scores) -> tuple[Verdict, ...]:
    """One verdict of each guard on the conversation that ``scores`` belong to; without a score it is flagged."""
    return tuple(
        verdict_of(guard, scores.by_guard[guard.name], scores.mode_for(guard), _notes(base, guard, scores))
        for guard in guards
    )


def _notes(base: Base, guard: Adapter, scores: Scores) -> list[str]:
    is_scored = all(map(math.isfinite, scores.by_guard[guard.name]))
    n_windows = scores.windows_of.get(guard.name, scores.n_windows)
    which = " and ".join(
        word for mode, word in {"max": "highest", "min": "lowest"}.items() if mode in guard.config.windows_by_label
    )
    return [
        *([scores.problem] if scores.problem and scores.problem != _NOT_A_NUMBER and not is_scored else []),
        *([f"{which} of {n_windows} windows"] if n_windows > 1 else []),
        *([LORA_NOTE] if is_updated(base.model) else []),
    ]
