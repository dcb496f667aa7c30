"""Guarding answers token by token: scores at every token, the rule that stops, what it finds, and a guarded stream.

A guard's score at a token judges everything up to it, so one causal forward pass over a finished answer gives what
would have been seen while it was written.
"""

from __future__ import annotations

import math
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from safeside.adapters.adapter import Adapter
from safeside.adapters.config import CONFIDENCE, PRESET_RATES, rows_needed
from safeside.attach import attach
from safeside.base.model import Base
from safeside.chat import Encoded, pad_batch
from safeside.content import refuse_empty
from safeside.errors import InputError, UnsupportedError
from safeside.guards.calibrate import counted_once, fit_mode, n_allowed, threshold_with_bound
from safeside.guards.probability import Array
from safeside.stopping import StopRule, run_scores
from safeside.tasks.leakage import text_of
from safeside.terminal import note
from safeside.types import Completion, Example, Message

__all__ = [
    "AnswerScores",
    "AnswerStream",
    "StopRule",
    "StreamReport",
    "any_label",
    "calibrate_stream",
    "evaluate_stops",
    "fit_stop_rule",
    "score_answers",
    "stream_scores",
    "strongest_runs",
]

N_CONSECUTIVE = 8  # tokens of a rule that an artifact keeps: of 1 to 32, those that stopped most within a third of the
# answer at promises of 5% and 10% (built-in guard, validation answers)


@dataclass(frozen=True, slots=True)
class AnswerScores:
    """One answer's scores by one guard."""

    scores: Float[Tensor, " T"]
    """Risk in [0, 1] at each token of the answer, of several labels the highest; empty when it has none."""
    problem: str | None = None
    """Why the answer was not scored; None when all is well."""


@torch.no_grad()
def score_answers(
    base: Base,
    guard: Adapter,
    conversations: Sequence[Sequence[Message]],
    *,
    batch_size: int = 32,
    advance: Callable[[int], None] = lambda count: None,
) -> list[AnswerScores]:
    """Scores at every token of the last answer of each conversation, in order, from one forward pass a batch.

    A conversation without an answer, or longer than the base's context, has no scores and its ``problem``.  An encoder
    reads both ways and cannot follow an answer: UnsupportedError.
    """
    if base.is_encoder:
        raise UnsupportedError(f"{base.name} is an encoder: its scores judge whole texts. Use a causal language model.")
    encoded = [_encoded_answer(base, messages) for messages in conversations]
    results = [AnswerScores(torch.empty(0), item if isinstance(item, str) else None) for item in encoded]
    fitting = [(row, item) for row, item in enumerate(encoded) if isinstance(item, Encoded)]
    fitting.sort(key=lambda pair: len(pair[1].ids))
    advance(len(encoded) - len(fitting))
    with attach(base, guards=[guard]) as attachment:
        for start in range(0, len(fitting), batch_size):
            batch = fitting[start : start + batch_size]
            ids, keep = pad_batch([item.ids for _, item in batch], base.tokenizer.pad_token_id or 0)
            base.decoder(input_ids=ids.to(base.device), attention_mask=keep.to(base.device), use_cache=False)
            scores = attachment.record.scores[guard.name].amax(-1).float().cpu()
            for place, (row, item) in enumerate(batch):
                results[row] = AnswerScores(scores[place, item.answer_start : len(item.ids)])
            advance(len(batch))
    return results


def _encoded_answer(base: Base, messages: Sequence[Message]) -> Encoded | str:
    """The conversation's ids, or why its answer cannot be scored."""
    try:
        refuse_empty(messages)
        item = base.encode(messages)
    except InputError as error:
        return str(error)
    if item.answer_start >= len(item.ids):
        return "it has no answer"
    if len(item.ids) > base.max_tokens:
        return f"it has {len(item.ids)} tokens for a context of {base.max_tokens}"
    return item


def strongest_runs(answers: Sequence[Float[Tensor, " T"]], n_consecutive: int) -> list[float]:
    """For each answer the lowest threshold at which it is *not* stopped: the most over positions of the least of
    ``n_consecutive`` scores in a row.  It is inf with a score that is not a number, -inf for an answer too short."""
    return [float(run_scores(scores, n_consecutive).max()) if len(scores) else -math.inf for scores in answers]


def stream_scores(answers: Sequence[AnswerScores], n_consecutive: int, n_labels: int) -> Array:
    """Of each answer the score (n, K) in [0, 1] that stops it when it reaches the threshold, the same for all labels.

    An answer too short for a run has -inf, one that was not scored NaN.
    """
    runs = np.array(strongest_runs([answer.scores for answer in answers], n_consecutive))
    unscored = np.array([answer.problem is not None for answer in answers], dtype=bool)
    clipped = np.where(unscored, np.nan, np.minimum(runs, 1.0))
    return np.repeat(clipped[:, None], n_labels, 1)


def any_label(labels: Array) -> Array:
    """Labels (n, K) of a stream, the same for all: 1 where any is 1, 0 where all are 0, else NaN (not known)."""
    known = np.where((labels == 1).any(1), 1.0, np.where((labels == 0).all(1), 0.0, np.nan))
    return np.repeat(known[:, None], labels.shape[1], 1)


def calibrate_stream(
    base: Base,
    guard: Adapter,
    rows: Sequence[Example],
    benign: Sequence[Example] = (),
    *,
    learnt: Set[str] = frozenset(),
    n_consecutive: int = N_CONSECUTIVE,
) -> None:
    """Keep a stop rule in ``guard`` for each preset that its answers among labelled ``rows`` can promise.

    The promises rest on the answers among ``benign`` rows if there are any, and on none whose normalised text the guard
    has ``learnt``.  Without an answer nothing is kept.
    A preset for which too many of them are shorter than ``n_consecutive`` is left out with a note.
    """
    n_labels, parts = len(guard.config.labels), []
    for some in (rows, benign):
        answers = [row for row in some if row.messages[-1].role == "assistant"]
        found = score_answers(base, guard, [row.messages for row in answers]) if answers else []
        labels = np.array([row.labels for row in answers], dtype=np.float64).reshape(-1, n_labels)
        texts = tuple(map(text_of, answers))
        parts.append((stream_scores(found, n_consecutive, n_labels), any_label(labels), texts))
    (scores, labels, texts), (clean, _, clean_texts) = parts
    if not len(clean):
        is_clean = (labels == 0).all(1) & np.array([text not in learnt for text in texts], dtype=bool)
        clean, clean_texts = scores[is_clean], tuple(np.array(texts, dtype=object)[is_clean])
    if len(scores) or len(clean):
        once = counted_once(clean, clean_texts)
        fit = fit_mode(scores, labels, benign=once)
        guard.set_mode("stream", fit.model_copy(update={"n_consecutive": n_consecutive}))
        _note_short(once, n_consecutive)


def _note_short(harmless: Array, n_consecutive: int) -> None:
    """Say which presets have no stop rule because harmless answers, by their scores (n, K), are too short for it."""
    n_rows, n_short = len(harmless), int(np.isneginf(harmless).any(1).sum())
    enough = [preset for preset, rate in PRESET_RATES.items() if n_rows >= rows_needed(rate)]
    lost = [preset for preset in enough if n_rows - n_short <= n_allowed(n_rows, PRESET_RATES[preset])]
    if lost:
        note(
            f"no stop rule at {', '.join(lost)}: {n_short:,} of {n_rows:,} harmless answers have fewer than "
            f"{n_consecutive} tokens. Add longer answers, or run safeside calibrate --mode stream --consecutive"
        )


def fit_stop_rule(
    benign_answers: Sequence[Float[Tensor, " T"]],
    share: float = 0.05,
    *,
    n_consecutive: int = 2,
    confidence: float = CONFIDENCE,
) -> StopRule:
    """The most watchful rule that stops at most ``share`` of *whole* benign answers, with ``confidence``.

    ``benign_answers`` are scores of validation answers (``score_answers``), which training has not seen.  The promise
    is that of ``threshold_with_bound``: too few of them are an InputError with the count needed, and too many that are
    shorter than ``n_consecutive`` are one as well.
    """
    runs = np.array(strongest_runs(benign_answers, n_consecutive))
    return StopRule(threshold_with_bound(runs, share, confidence), n_consecutive)


@dataclass(frozen=True, slots=True)
class StreamReport:
    """What a stop rule does on labelled answers, beside scoring them when they are whole."""

    detected_share: float
    """Share of the harmful answers that are stopped."""
    false_stops: float
    """Share of the benign answers that are stopped."""
    whole_detected_share: float
    """Share of the harmful answers whose last score reaches the whole-answer threshold."""
    whole_false_flags: float
    """Share of the benign answers whose last score reaches it."""
    delay_tokens: float
    """Median over the stopped harmful answers of the tokens up to the risky one that stops, itself included.

    One more had been computed by then, for a token is scored when it is fed; it is never shown.
    """
    delay_share: float
    """Median of the same tokens as a share of the whole answer, in (0, 1]."""
    n_harmful: int
    """Harmful answers behind the figures."""
    n_benign: int
    """Benign answers behind the figures."""
    n_unscored: int = 0
    """Answers without scores; they are in no figure."""

    @property
    def kept_detection(self) -> float:
        """Detection of the rule over detection by whole answers; NaN when the latter finds nothing."""
        return self.detected_share / self.whole_detected_share if self.whole_detected_share else math.nan


def evaluate_stops(
    rule: StopRule, whole_threshold: float, answers: Sequence[Float[Tensor, " T"]], harmful: Sequence[bool]
) -> StreamReport:
    """The figures of ``rule`` on test answers, given as scores of their tokens, beside a threshold on the last score.

    For a fair comparison fit both on the same benign rows and share, ``whole_threshold`` by ``threshold_with_bound`` on
    their last scores.  Answers without a token are counted as unscored.
    """
    scored = [(scores, bool(label)) for scores, label in zip(answers, harmful, strict=True) if len(scores)]
    stops = [(rule.first_stop(scores), len(scores), label) for scores, label in scored]
    whole = [(not bool(scores[-1] < whole_threshold), label) for scores, label in scored]  # NaN flags
    written = [(token + 1, length) for token, length, label in stops if label and token is not None]

    def share(hits: Sequence[bool]) -> float:
        return sum(hits) / len(hits) if hits else math.nan

    return StreamReport(
        detected_share=share([token is not None for token, _, label in stops if label]),
        false_stops=share([token is not None for token, _, label in stops if not label]),
        whole_detected_share=share([flagged for flagged, label in whole if label]),
        whole_false_flags=share([flagged for flagged, label in whole if not label]),
        delay_tokens=float(np.median([tokens for tokens, _ in written])) if written else math.nan,
        delay_share=float(np.median([tokens / length for tokens, length in written])) if written else math.nan,
        n_harmful=sum(label for _, label in scored),
        n_benign=sum(not label for _, label in scored),
        n_unscored=len(answers) - len(scored),
    )


ANSWERING = "safeside answer"
"""Name of the threads in which models write."""


class _ClosedError(Exception):
    """The reader of a stream went away."""


@dataclass(slots=True)
class _Ended:
    """The last thing in a stream's queue."""

    completion: Completion | None = None
    error: BaseException | None = None


@dataclass(frozen=True, slots=True)
class StreamOptions:
    """What ``Base.chat`` takes besides the conversation."""

    stop: object = None
    """A StopRule for the only guard, rules by guard, or True for those that the guards' artifacts keep.

    None streams without stopping.
    """
    strength: object = None
    """Overrides the attachment's strength."""
    max_new_tokens: int = 128
    """Most tokens of the answer."""
    generate: Mapping[str, object] = field(default_factory=dict)
    """Further options of transformers' ``generate``."""


class AnswerStream(Iterator[str]):
    """The pieces of one answer while it is written; joined and stripped they are ``completion.text``.

    Nothing that a guard flags is ever yielded: a token is held back while it may still become part of a run that meets
    the rule, ``n_consecutive`` tokens at most.  The model runs in a thread of its own under the base's attachment.
    Leave a stream early by ``close`` or a ``with`` block; errors of the model are raised where the stream is read.
    """

    def __init__(self, base: Base, messages: Sequence[Message], options: StreamOptions = StreamOptions()) -> None:
        self._base, self._messages, self._options = base, messages, options
        self._queue: queue.SimpleQueue[list[int] | _Ended] = queue.SimpleQueue()
        self._is_closed = threading.Event()
        self._ids: list[int] = []
        self._shown = ""
        self._ended: _Ended | None = None
        self._thread = threading.Thread(target=self._run, name=ANSWERING, daemon=True)
        self._thread.start()

    @property
    def completion(self) -> Completion:
        """The whole answer, once the stream has ended; before that an InputError."""
        if self._ended is None or self._ended.completion is None:
            raise InputError("The stream has not ended. Read it to its end first.")
        return self._ended.completion

    def __next__(self) -> str:
        while self._ended is None:
            item = self._queue.get()
            if isinstance(item, _Ended):
                self._ended = item
                self._thread.join()
                if item.error is not None and not self._is_closed.is_set():
                    raise item.error
            else:
                self._ids += item
            piece = self._new_text(is_last=self._ended is not None)
            if piece:
                return piece
        raise StopIteration

    def close(self) -> None:
        """End the answer where it is, without waiting: the model's thread ends with the token that it is at."""
        self._is_closed.set()
        self._ended = self._ended or _Ended()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _new_text(self, is_last: bool) -> str:
        """What the released tokens spell beyond what was shown; half a character waits for its other half."""
        text = str(self._base.tokenizer.decode(self._ids, skip_special_tokens=True))
        if not text.startswith(self._shown) or (text.endswith("\ufffd") and not is_last):
            return ""
        piece, self._shown = text[len(self._shown) :], text
        return piece

    def _run(self) -> None:
        options = self._options
        try:
            (completion,) = self._base.chat_batch(
                [self._messages],
                strength=options.strength,
                stop=options.stop,
                max_new_tokens=options.max_new_tokens,
                release=self._release,
                **options.generate,  # type: ignore[arg-type]
            )
            self._queue.put(_Ended(completion))
        except BaseException as error:  # handed to the reader, in whose thread it belongs
            self._queue.put(_Ended(error=error))

    def _release(self, row: int, ids: list[int]) -> None:
        if self._is_closed.is_set():
            raise _ClosedError
        if ids:
            self._queue.put(ids)
