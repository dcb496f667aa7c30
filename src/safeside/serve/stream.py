"""One answer while it is written: its text, what of it may be shown, and where it ends."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from safeside.stopping import StopRule
from safeside.types import Stop

_HALF = "\ufffd"  # what a decoder writes for bytes that are no whole character yet


class AnswerText:
    """The text of an answer, token by token, and the first stop string in it.  A token costs the same at any length."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, [text for text in stop if text]
        self._ids: list[int] = []
        self._before, self._read = 0, 0  # decoding goes on from ids[before:], of which ids[:read] are in the text
        self._ends: list[int] = []
        self._shown = 0
        self._whole = ""  # everything so far, half characters left out
        self._stop_place: int | None = None  # where the first stop string begins
        self._stopped_at = math.inf  # how many tokens there were when it was met

    @property
    def is_stopped(self) -> bool:
        """Whether a stop string was met."""
        return self._stop_place is not None

    @property
    def text(self) -> str:
        """Everything so far, half characters left out, and nothing from a stop string on."""
        return self._whole[: self._stop_place]

    def of(self, n_tokens: int) -> str:
        """What the first ``n_tokens`` spell, as if no more had been written."""
        return self._whole[: self._end(n_tokens, n_tokens)]

    def add(self, token: int) -> None:
        """Take the next token of the answer."""
        self._ids.append(token)
        piece = self._piece()
        if piece and not piece.endswith(_HALF):
            self._take(piece)
        self._ends.append(len(self._whole))

    def show(self, n_tokens: int, n_known: int | None = None, *, is_last: bool = False) -> str:
        """What the first ``n_tokens`` spell beyond what was shown; the start of a stop string waits for its rest.

        Of the others only the first ``n_known`` count, as if no more had been written; all unless given.
        """
        n_known = len(self._ids) if n_known is None else n_known
        if is_last and not self.is_stopped and n_tokens == len(self._ids) and (rest := self._piece()):
            self._take(rest)
            self._ends[-1] = len(self._whole)
        end = self._end(n_tokens, n_known)
        if not is_last and n_known < self._stopped_at:
            known = self._end(n_known, n_known)
            end = min(end, known - self._n_waiting(known))
        piece = self._whole[self._shown : end]
        self._shown = max(self._shown, end)
        return piece

    def _end(self, n_tokens: int, n_known: int) -> int:
        """Where the first ``n_tokens`` end in the text, or a stop string begins that ``n_known`` tokens have met."""
        if not n_tokens or not self._ends:
            return 0
        end = self._ends[min(n_tokens, len(self._ends)) - 1]
        return end if self._stop_place is None or n_known < self._stopped_at else min(end, self._stop_place)

    def _piece(self) -> str:
        """What the tokens that are not in the text yet add to it."""
        before = self._decode(self._ids[self._before : self._read])
        return self._decode(self._ids[self._before :])[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))

    def _take(self, piece: str) -> None:
        start = len(self._whole)
        self._whole += piece
        self._before, self._read = self._read, len(self._ids)
        places = [self._whole.find(stop, max(0, start - len(stop) + 1)) for stop in self._stop]
        found = [place for place in places if place >= 0]
        if found and self._stop_place is None:
            self._stop_place, self._stopped_at = min(found), len(self._ids)

    def _n_waiting(self, end: int) -> int:
        """Characters before ``end`` that may begin a stop string."""
        longest = max((len(stop) for stop in self._stop), default=0)
        tail = self._whole[max(0, end - longest + 1) : end] if longest > 1 else ""
        tails = range(len(tail), 0, -1)
        return next((n for n in tails if any(stop.startswith(tail[-n:]) for stop in self._stop)), 0)


@dataclass(slots=True)
class RuleState:
    """One stop rule over the scores of an answer so far, of which it keeps only the last ones."""

    rule: StopRule
    n_clear: int = 0
    """How many of the first tokens can no longer become part of a run of risky ones."""
    run: list[float] = field(default_factory=list)
    """The scores of the run in progress."""

    def add(self, score: float, token: int) -> bool:
        """Take the score of the answer's ``token``; True where the rule is met.  NaN meets it at once."""
        if score < self.rule.threshold:
            self.run.clear()
            self.n_clear = token + 1
            return False
        self.run.append(score)
        return math.isnan(score) or len(self.run) >= self.rule.n_consecutive


class StreamGuard:
    """The stop rules of one answer, score by score: ``safeside.stopping.standing_of`` without looking back."""

    def __init__(self, rules: Mapping[str, StopRule], window: int = 0) -> None:
        self._states = {name: RuleState(rule) for name, rule in rules.items()}
        self._window = window
        self.n_scored = 0
        self.stop: Stop | None = None
        """Where a guard ended the answer."""

    def add(self, scores: Mapping[str, float]) -> Stop | None:
        """Take the scores of the next token by guard (those without a rule count for nothing); where one stops."""
        token, self.n_scored = self.n_scored, self.n_scored + 1
        met = [name for name, state in self._states.items() if state.add(scores[name], token)]
        if met and self.stop is None:
            name = min(met)
            run = self._states[name].run
            score = math.nan if any(map(math.isnan, run)) else min(run)
            self.stop = Stop(name, token, self.n_clear, score, self._states[name].rule.threshold)
        return self.stop

    @property
    def n_clear(self) -> int:
        """How many of the first tokens no guard can take back, the window of ``window`` tokens held back besides."""
        clear = min((state.n_clear for state in self._states.values()), default=self.n_scored)
        return max(0, min(clear, self.n_scored - self._window))

    @property
    def leak_bound(self) -> int:
        """Most tokens of the run that ends an answer that are out by then, where tokens are sent at once."""
        return max((state.rule.n_consecutive for state in self._states.values()), default=0)
