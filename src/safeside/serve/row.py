"""One answer in the engine: what its request asked for, what was heard of it so far, and what its listener is told."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from safeside.serve.effective import Decision, EffectivePolicy
from safeside.serve.passes import Scores, Setting
from safeside.serve.sampling import Sampler, Sampling, Token
from safeside.serve.stream import AnswerText, StreamGuard
from safeside.serve.watching import ENDS, AnswerWatch, ending_by, risks_of, verdicts_of
from safeside.types import Stop, Verdict

Finish = Literal["stop", "length", "content_filter"]


@dataclass(frozen=True, slots=True)
class Judged:
    """The prompt was read and judged.  ``block`` and ``replace`` are followed by Ended, with no token between."""

    verdicts: tuple[Verdict, ...]
    decision: Decision


@dataclass(frozen=True, slots=True)
class Trace:
    """What stood behind one token, told once the token was scored."""

    token: int
    """Its id."""
    risk: Scores
    """By guard, the scores of everything up to it."""
    strength: float
    """The highest of the aligners' strengths, in [0, 2]."""


@dataclass(frozen=True, slots=True)
class Piece:
    """The next part of the answer that may be shown."""

    text: str
    tokens: tuple[Token, ...] = ()
    """The tokens that became clear; their text may come later, where a stop string could begin in it."""
    traces: tuple[Trace, ...] = ()
    """Of tokens that were shown."""


@dataclass(frozen=True, slots=True)
class Ended:
    """The answer is complete, and everything of it that may be shown was told."""

    finish: Finish
    n_tokens: int
    """Tokens that were written, shown or not."""
    verdicts: tuple[Verdict, ...]
    """On the answer."""
    decision: Decision
    """On the answer; on the prompt where it was blocked."""
    strength: float
    """The highest that stood behind any token."""
    text: str = ""
    """All that was written, for the audit log: what was held back is in it."""
    stop: Stop | None = None
    """Where a guard's rule ended it."""
    leak_bound: int = 0
    """Most tokens of the run that ends the answer that could be told by then; 0 where tokens are held back."""


@dataclass(frozen=True, slots=True)
class Failed:
    """The answer cannot be given."""

    error: Exception


Event = Judged | Piece | Ended | Failed


@dataclass(frozen=True, slots=True)
class Job:
    """One answer that is asked for."""

    ids: tuple[int, ...]
    """The prompt."""
    sampling: Sampling
    policy: EffectivePolicy
    listen: Callable[[Event], None]
    """Told every event, in order, in the engine's thread."""
    deadline: float = math.inf
    """By ``time.monotonic``: the answer fails then."""
    is_streamed: bool = True
    """Whether the listener tells what it hears at once; if not, risky tokens never have to get out."""
    cancelled: threading.Event = field(default_factory=threading.Event)
    """Set when nobody listens any more."""

    @property
    def is_overdue(self) -> bool:
        return time.monotonic() > self.deadline

    @property
    def is_over(self) -> bool:
        """Whether nobody waits for it any more, or not for that long."""
        return self.is_overdue or self.cancelled.is_set()


class Row:
    """The state of one job while it runs; its tokens and scores go in, events come out."""

    def __init__(self, job: Job, tokenizer: PreTrainedTokenizerBase, stop_ids: set[int], judge_every: int = 1) -> None:
        policy = job.policy
        self.job = job
        self.setting = Setting(len(job.ids), policy.strengths())
        self.tokens: list[Token] = []
        self._stop_ids = stop_ids
        self._sampler = Sampler(job.sampling)
        self._text = AnswerText(tokenizer, job.sampling.stop)
        self._guards = policy.guards
        rules = policy.stop_rules()
        self._sends_at_once = not self._guards or (job.is_streamed and policy.hold_back == 0)
        self._stream = StreamGuard(rules, max(0, policy.hold_back - 1) if rules else 0)
        self._watch = AnswerWatch(policy)
        self._judge_every = judge_every
        self._strengths: list[float] = []
        self._risks: list[Scores] = []
        self._failed: dict[str, tuple[float, ...]] = {}  # by guard, scores of which one was not a number
        self._n_told, self._n_traced = 0, 0
        self._n_due = 0  # tokens that were clear when the newest one was heard that did not end the answer
        self._ending: Literal["stop", "length"] | None = None

    @property
    def newest(self) -> int:
        """The token that is fed next."""
        return self.tokens[-1].id

    def begin(self, scores: Sequence[Scores]) -> bool:
        """Judge the prompt by the scores at its end; whether an answer follows."""
        verdicts = verdicts_of(self.job.policy, scores[-1], "prompt")
        decision = self.job.policy.decide_prompt(verdicts)
        self.job.listen(Judged(verdicts, decision))
        if decision.action in ENDS:
            self.job.listen(Ended("content_filter", 0, (), decision, 0.0))
            return False
        return True

    @property
    def is_complete(self) -> bool:
        """Whether its last token was drawn, which has yet to be judged."""
        return self._ending is not None

    def hear(self, scores: Sequence[Scores]) -> bool:
        """Take the scores of the tokens that were judged, the oldest first; whether the answer goes on.

        What became clear is sent in one piece.
        """
        goes_on = all(self._hear_one(token) for token in scores)
        if goes_on:
            self._tell(self._n_due)
        return goes_on

    def _hear_one(self, scores: Scores) -> bool:
        self._risks.append(scores)
        broken = {name: values for name in self._guards if not all(map(math.isfinite, values := scores[name]))}
        self._failed.update(broken)
        stop = self._stream.add(risks_of(scores, broken))
        self._watch.add(scores, broken)
        if broken or stop is not None:
            verdicts, decision = ending_by(self.job.policy, {**scores, **self._failed}, stop, self._watch.met)
            if decision.action in ENDS:
                self._end("content_filter", verdicts, decision)
                return False
        if not self._is_whole:
            self._n_due = self._n_clear
            return True
        self._judge_whole(scores)
        return False

    @property
    def _is_whole(self) -> bool:
        """Whether the answer is complete, and judged: where no guard is asked, but for its last token."""
        return self._ending is not None and len(self._risks) >= len(self.tokens) - (not self._guards)

    def draw(self, logits: Tensor, strength: float) -> bool:
        """Choose the next token; whether another pass is needed, be it only to score it."""
        token = self._sampler.draw(logits)
        self.tokens.append(token)
        self._strengths.append(strength)
        if token.id in self._stop_ids:
            self._ending = "stop"
        else:
            self._text.add(token.id)
            if self._text.is_stopped or len(self.tokens) >= self.job.sampling.max_tokens:
                self._ending = "stop" if self._text.is_stopped else "length"
        if self._sends_at_once:
            self._tell(len(self.tokens))
        if self._ending is not None and self._is_whole:
            self._end(self._ending, (), self.job.policy.decide_answer(()))
            return False
        return True

    def _judge_whole(self, scores: Scores) -> None:
        """The last token was scored: what the guards say of the whole answer decides."""
        assert self._ending is not None
        verdicts = verdicts_of(self.job.policy, {**scores, **self._failed}, "answer")
        decision = self.job.policy.decide_answer(verdicts, self._watch.met)
        is_stopped = decision.action in ENDS
        self._end("content_filter" if is_stopped else self._ending, verdicts, decision)

    def _end(self, finish: Finish, verdicts: tuple[Verdict, ...], decision: Decision) -> None:
        n_tokens = n_clear = len(self.tokens)
        if finish == "content_filter":  # what a guard could not score is not clear
            n_clear = self._n_due if self._failed else self._n_clear
            n_tokens = self._n_known
        self._tell(n_clear, is_last=finish != "content_filter")
        self.job.listen(
            Ended(
                finish,
                n_tokens,
                self._watch.marked(verdicts),
                self._watch.settled(decision),
                max(self._strengths[:n_tokens], default=0.0),
                self._text.of(n_tokens),
                self._stream.stop,
                self._leak_bound,
            )
        )

    @property
    def _leak_bound(self) -> int:
        """A run of risky tokens, and those that were sent while its last one waited to be judged."""
        run = self._stream.leak_bound if self._sends_at_once else 0
        return run and run + (0 if self.setting.follows_answer else self._judge_every - 1)

    @property
    def _n_known(self) -> int:
        """Tokens that count as written: where they are held back, those that were judged."""
        return len(self.tokens) if self._sends_at_once else len(self._risks)

    @property
    def _n_clear(self) -> int:
        return len(self.tokens) if self._sends_at_once else self._stream.n_clear

    def _tell(self, n_clear: int, *, is_last: bool = False) -> None:
        """Send what became clear, without the token that ends an answer."""
        n_shown = len(self.tokens) - (self.tokens[-1:] != [] and self.newest in self._stop_ids)
        n_clear = max(self._n_told, min(n_clear, n_shown))
        tokens = tuple(self.tokens[self._n_told : n_clear])
        text = self._text.show(n_clear, self._n_known, is_last=is_last)
        n_traced = min(n_clear, len(self._risks))
        traces = tuple(
            Trace(self.tokens[index].id, self._risks[index], self._strengths[index])
            for index in range(self._n_traced, n_traced)
        )
        self._n_told, self._n_traced = n_clear, max(self._n_traced, n_traced)
        if text or tokens or traces:
            self.job.listen(Piece(text, tokens, traces))
