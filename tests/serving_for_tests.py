"""What the tests of the server share: policies made in place, listeners, scripted answers and guards."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from safeside import Adapter, Base
from safeside.serve.effective import EffectivePolicy
from safeside.serve.engine import Engine, EngineLimits
from safeside.serve.merging import strictest
from safeside.serve.row import Ended, Event, Failed, Job, Judged, Piece, Row
from safeside.serve.rules import Policy
from safeside.serve.sampling import Sampling, Token

GREEDY = Sampling(max_tokens=12, temperature=0.0)


def effective(adapters: Sequence[Adapter] = (), strength: float | None = None, **fields: object) -> EffectivePolicy:
    """One policy of these fields with these adapters loaded; ``strength`` is set whatever it says."""
    guards = {adapter.name: adapter for adapter in adapters if adapter.config.role == "guard"}
    aligners = tuple(adapter.name for adapter in adapters if adapter.config.role == "align")
    policy = strictest([Policy.model_validate(fields)])
    return EffectivePolicy("test", "0", policy, guards, aligners, strength)


class Listener:
    """Collects the events of one job."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._ended: queue.SimpleQueue[None] = queue.SimpleQueue()

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        if isinstance(event, Ended | Failed):
            self._ended.put(None)

    def wait(self) -> Listener:
        """This listener, once its answer has ended."""
        self._ended.get(timeout=60)
        return self

    @property
    def text(self) -> str:
        return "".join(event.text for event in self.events if isinstance(event, Piece))

    @property
    def tokens(self) -> list[int]:
        return [token.id for event in self.events if isinstance(event, Piece) for token in event.tokens]

    @property
    def judged(self) -> Judged:
        return next(event for event in self.events if isinstance(event, Judged))

    @property
    def ended(self) -> Ended:
        (event,) = (event for event in self.events if isinstance(event, Ended))
        return event

    @property
    def error(self) -> Exception:
        (event,) = (event for event in self.events if isinstance(event, Failed))
        return event.error


class Script:
    """A row that is fed tokens and scores by hand."""

    def __init__(self, base: Base, policy: EffectivePolicy, max_tokens: int, *, is_streamed: bool = True) -> None:
        self.heard = Listener()
        sampling = Sampling(max_tokens=max_tokens, temperature=0.0)
        self.row = Row(Job((1,), sampling, policy, self.heard, is_streamed=is_streamed), base.tokenizer, set())
        self.ids = base.tokenizer("the cat sat on the mat", add_special_tokens=False)["input_ids"]

    def run(self, *scores: float | tuple[float, ...]) -> Listener:
        """Each of ``scores`` is the guard's of one more token, until the answer ends."""
        for number, score in enumerate(scores):
            self.row.tokens.append(token := Token(self.ids[number]))
            self.row._strengths.append(0.0)
            self.row._text.add(token.id)
            if len(self.row.tokens) == self.row.job.sampling.max_tokens:
                self.row._ending = "length"
            if not self.row.hear([{"harm": score if isinstance(score, tuple) else (score,)}]):
                break
        return self.heard


@contextmanager
def engine_of(base: Base, adapters: Sequence[Adapter] = (), **limits: float) -> Iterator[Engine]:
    """An engine that is closed, and leaves the base detached, whatever happens."""
    engine = Engine(base, adapters, limits=EngineLimits(**limits))  # type: ignore[arg-type]
    try:
        yield engine
    finally:
        engine.close()


@contextmanager
def still_engine(base: Base, adapters: Sequence[Adapter] = (), **limits: float) -> Iterator[Engine]:
    """An engine without a thread: the test takes its turns."""
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(threading.Thread, "start", lambda thread: None)
        patch.setattr(Engine, "_refuse_closed", lambda engine: None)
        engine = Engine(base, adapters, limits=EngineLimits(**limits))  # type: ignore[arg-type]
        try:
            yield engine
        finally:
            engine._runner.detach()


def ask(
    engine: Engine, ids: Sequence[int], policy: EffectivePolicy, sampling: Sampling = GREEDY, **fields: float
) -> Listener:
    """The listener of a job that was submitted."""
    listener = Listener()
    engine.submit(Job(tuple(ids), sampling, policy, listener, **fields))  # type: ignore[arg-type]
    return listener


class MarkedTrunk(nn.Module):
    """Reads the embedding and says of each token alone whether it is one of ``marked``."""

    n_cache_layers = 0

    def __init__(self, base: Base, marked: Sequence[int], width: int) -> None:
        super().__init__()
        self.width = width
        self.register_buffer("marked", base.model.get_input_embeddings().weight[list(marked)].clone())

    def read(self, tape: object, layer: int, hidden: Tensor) -> None:
        if layer == 0:
            tape.hidden[0] = torch.cdist(hidden, self.marked.expand(len(hidden), -1, -1)).amin(-1) < 1e-3

    def forward(self, tape: object, cache: object) -> Tensor:
        signs = torch.where(torch.arange(self.width) % 2 == 0, 1.0, -1.0)
        return torch.where(tape.hidden[0][..., None], signs, -signs)


def marking(guard: Adapter, base: Base, marked: Sequence[int]) -> Adapter:
    """``guard`` with a score near 1 at the marked tokens and near 0 at the others; it has to tap layer 0."""
    guard.trunk = MarkedTrunk(base, marked, width := guard.trunk.width)
    with torch.no_grad():
        guard.head.norm.weight.fill_(1.0)
        guard.head.linear.weight.copy_(torch.where(torch.arange(width) % 2 == 0, 8.0, -8.0)[None] / width)
        guard.head.linear.bias.zero_()
    return guard


@contextmanager
def scripted(base: Base, answer: Sequence[int]) -> Iterator[Callable[[], int]]:
    """Make ``base`` write ``answer`` in every row, one token a pass; gives how many were written."""
    real, written = base.head_logits, 0

    def head_logits(final: Tensor) -> Tensor:
        nonlocal written
        logits = torch.zeros_like(real(final))
        logits[..., answer[written % len(answer)]] = 100.0
        written += 1
        return logits

    base.head_logits = head_logits  # type: ignore[method-assign]
    try:
        yield lambda: written
    finally:
        del base.head_logits
