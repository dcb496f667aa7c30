"""One deployment: engine, policies, keys, limits, audit log and metrics, and what a request does with them."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

from safeside.adapters.adapter import Adapter
from safeside.base.model import Base
from safeside.content import refuse_empty
from safeside.errors import (
    AuditError,
    DeadlineError,
    InputError,
    SafesideError,
    UnknownNameError,
)
from safeside.guards.score import Scores
from safeside.moderation import chosen
from safeside.registry import did_you_mean
from safeside.serve.audit import AuditLog, AuditRecord, Outcome
from safeside.serve.effective import EffectivePolicy
from safeside.serve.engine import Engine, overdue, stopped
from safeside.serve.fingerprints import fingerprint_of
from safeside.serve.keys import Caller, Keys
from safeside.serve.limits import Admission, Limiter
from safeside.serve.metrics import Metrics
from safeside.serve.policy import PolicyBook
from safeside.serve.row import Ended, Event, Failed, Job, Judged, Piece
from safeside.serve.rules import Stage
from safeside.serve.sampling import Sampling
from safeside.serve.scoring import POLL_S, refuse_too_many, score_in_parts
from safeside.serve.wire import Asked
from safeside.types import Message, Verdict

_AUDIT_THREADS = 32


@dataclass(frozen=True, slots=True)
class ServiceLimits:
    """What one request may take."""

    default_max_tokens: int = 256
    """Tokens of an answer whose request names no number."""
    deadline_s: float = 120.0
    """Seconds from arrival to the last token."""
    max_judged_tokens: int = 65_536
    """Tokens that guards read for one request of moderation or dry run; what windows share counts in each."""
    max_body_bytes: int = 1 << 20
    """Of a request."""
    body_timeout_s: float = 30.0
    """Seconds for a body to arrive."""


@dataclass(slots=True)
class Answering:
    """One answer in progress, and what is known of it."""

    caller: Caller
    policy: EffectivePolicy
    job: Job
    admission: Admission
    inbox: asyncio.Queue[Event]
    prompt: str
    """What is audited as the prompt."""
    trace_id: str = field(default_factory=lambda: secrets.token_hex(12))
    started: float = field(default_factory=time.monotonic)
    judged: Judged | None = None
    ended: Ended | None = None
    adapters: Mapping[str, str] = field(default_factory=dict)
    """Fingerprints of the adapters that judged its prompt, and so judge it to its end."""
    polled: float = 0.0
    """When it was last asked whether the client is still there."""
    sent: list[str] = field(default_factory=list)
    """What became clear of the answer: a stream's client was sent it."""

    @property
    def is_prompt_refused(self) -> bool:
        """Whether the decision on the prompt ended the request: there is no other."""
        return self.judged is not None and self.judged.decision.action in ("block", "replace")

    @property
    def verdicts(self) -> list[tuple[Stage, Verdict]]:
        """Every verdict so far with what it is of."""
        prompt = self.judged.verdicts if self.judged is not None else ()
        answer = self.ended.verdicts if self.ended is not None else ()
        return [*(("prompt", each) for each in prompt), *(("answer", each) for each in answer)]

    def record(self, action: Outcome) -> AuditRecord:
        """What is audited of its answer, as far as that became clear."""
        return AuditRecord(
            trace_id=self.trace_id,
            tenant=self.caller.tenant,
            stage="answer",
            policy=self.policy.name,
            policy_version=self.policy.version,
            action=action,
            adapters=self.adapters,
            text="".join(self.sent),
            keep_text=self.policy.audit_text,
        )


class Service:
    """What the routes call.  ``genes`` are those that live in the base, each with its fingerprint."""

    def __init__(
        self,
        engine: Engine,
        book: PolicyBook,
        audit: AuditLog,
        *,
        keys: Keys | None = None,
        model: str = "",
        genes: Mapping[str, str] = {},
        limits: ServiceLimits = ServiceLimits(),
    ) -> None:
        self.engine, self.book, self.audit, self.keys = engine, book, audit, keys
        self.limits = limits
        self.model = model or engine.base.name
        self.limiter = Limiter()
        self.genes = dict(genes)
        own = {name: fingerprint_of(adapter) for name, adapter in engine.adapters.items()}
        self.fingerprints = own | self.genes
        self.created = int(time.time())
        self._auditors = ThreadPoolExecutor(_AUDIT_THREADS, thread_name_prefix="safeside-decision")

    @property
    def base(self) -> Base:
        """The base in memory."""
        return self.engine.base

    @property
    def metrics(self) -> Metrics:
        """The engine's instruments."""
        return self.engine.metrics

    def caller_of(self, header: str | None) -> Caller:
        """Who sent a request; without a file of keys everybody is the tenant ``local``."""
        return Caller("local") if self.keys is None else self.keys.authenticate(header)

    def check_model(self, name: str) -> None:
        """Raise an UnknownNameError unless it is the model that is served."""
        if name != self.model:
            raise UnknownNameError(did_you_mean("model", name, [self.model]))

    def begin(self, caller: Caller, asked: Asked, ids: Sequence[int], prompt: str) -> Answering:
        """Let a request in and queue it; what cannot be let in is an error that says why.

        ``prompt`` is its text without what the template adds: where that is nothing, guards have nothing to judge.
        """
        self.check_model(asked.model)
        policy = self.book.resolve(caller, asked.wanted)
        if asked.moderation is not None:
            chosen(asked.moderation.model, policy.guards, self.model)
        if policy.guards:
            refuse_empty([Message("user", prompt)])
        sampling = self._sampling(asked, caller, len(ids))
        admission = self.limiter.admit(caller.key or caller.tenant, caller.limits, len(ids), sampling.max_tokens)
        inbox: asyncio.Queue[Event] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def listen(event: Event) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens
                loop.call_soon_threadsafe(inbox.put_nowait, event)

        deadline = time.monotonic() + self.limits.deadline_s
        job = Job(tuple(ids), sampling, policy, listen, deadline, asked.stream)
        try:
            self.engine.submit(job)
        except BaseException:
            admission.settle(0)
            raise
        return Answering(caller, policy, job, admission, inbox, prompt, adapters=self.fingerprints)

    def _sampling(self, asked: Asked, caller: Caller, n_prompt: int) -> Sampling:
        wanted = asked.most_tokens
        room = self.base.max_tokens - n_prompt
        if room < 1 or (wanted is not None and wanted > room):
            raise InputError(
                f"The prompt has {n_prompt} tokens and the answer may take {wanted or 1}, but {self.model} holds "
                f"{self.base.max_tokens}. Shorten the conversation or lower max_tokens; nothing is cut silently."
            )
        most = min(room, self.limits.default_max_tokens, caller.limits.max_new_tokens or room)
        return Sampling(
            max_tokens=wanted or most,
            temperature=1.0 if asked.temperature is None else asked.temperature,
            top_p=1.0 if asked.top_p is None else asked.top_p,
            seed=asked.seed,
            n_logprobs=asked.n_logprobs,
            stop=asked.stops,
        )

    async def events(self, answering: Answering, is_gone: Callable[[], Awaitable[bool]]) -> AsyncGenerator[Event]:
        """The events of an answer, each decision durable before it is told; a client that left ends them.

        An answer that cannot be given, or whose decisions cannot be made durable, is raised as its error.
        """
        n_used = 0
        before = answering.started
        problem: Exception | None = None
        try:
            while answering.ended is None:
                event = await self._next(answering, is_gone)
                if event is None:
                    return
                if isinstance(event, Failed):
                    raise event.error
                if isinstance(event, Judged):
                    answering.judged, answering.adapters = event, self.fingerprints
                    await self._note(answering, event)
                elif isinstance(event, Ended):
                    n_used = event.n_tokens
                    answering.ended = event
                    self._count(answering, n_used)
                    if event.stop is not None:
                        self.metrics.streams_stopped.labels(event.stop.guard).inc()
                    if not answering.is_prompt_refused:
                        await self._note(answering, event)
                else:
                    answering.sent.append(event.text)
                    if event.tokens:
                        now = time.monotonic()
                        self._observe(answering, event, before, now)
                        n_used, before = n_used + len(event.tokens), now
                yield event
        except Exception as error:
            problem = error
            raise
        finally:
            answering.job.cancelled.set()
            answering.admission.settle(len(answering.job.ids) + n_used)
            if answering.ended is None:
                self._count(answering, n_used)
            if answering.ended is None and not isinstance(problem, AuditError):
                await self._note_unfinished(answering, problem or (stopped() if self.engine.has_ended else None))

    async def _next(self, answering: Answering, is_gone: Callable[[], Awaitable[bool]]) -> Event | None:
        """The next event; None once the client has left.

        The engine says itself when the time is over; where it is stuck in a pass, this does.
        """
        while True:
            now, has_ended = time.monotonic(), self.engine.has_ended
            if now - answering.polled > POLL_S:
                answering.polled = now
                if await is_gone():
                    return None
            with contextlib.suppress(TimeoutError):
                return await asyncio.wait_for(answering.inbox.get(), POLL_S)
            if now > answering.job.deadline:
                raise overdue()
            if has_ended:
                raise stopped()

    def _observe(self, answering: Answering, piece: Piece, before: float, now: float) -> None:
        if before == answering.started:
            self.metrics.time_to_first_token.observe(now - before)
        else:
            self.metrics.inter_token_latency.observe((now - before) / len(piece.tokens))

    def _count(self, answering: Answering, n_tokens: int) -> None:
        """Count the tokens of an answer, also of one that was left or failed: those that became clear by then."""
        self.metrics.tokens.labels("prompt").inc(len(answering.job.ids) if answering.judged is not None else 0)
        self.metrics.tokens.labels("answer").inc(n_tokens)

    async def _note(self, answering: Answering, event: Judged | Ended) -> None:
        """Count a decision and make it durable."""
        decision = event.decision
        self.metrics.count_verdicts({verdict.task for verdict in event.verdicts}, decision.by_guard)
        await self.record(
            replace(
                answering.record(decision.action),
                stage="prompt" if isinstance(event, Judged) else "answer",
                scores={f"{verdict.task}/{verdict.label}": verdict.score for verdict in event.verdicts},
                strength=decision.strength if isinstance(event, Judged) else event.strength,
                reason=decision.reason,
                intended=decision.intended,
                text=answering.prompt if isinstance(event, Judged) else event.text,
            )
        )

    async def _note_unfinished(self, answering: Answering, problem: Exception | None) -> None:
        """Record that an answer ended without a decision."""
        if answering.is_prompt_refused:
            return
        record = replace(answering.record("abandoned"), reason="the client left before its answer was complete")
        if problem is not None:
            told = str(problem) if isinstance(problem, SafesideError) else type(problem).__name__
            record = replace(answering.record("failed"), reason=told)
        with contextlib.suppress(AuditError):  # counted; what the client is told is why there is no answer
            await self.record(record)

    async def record(self, *records: AuditRecord) -> None:
        """Make decisions durable; where that fails it is counted, and an AuditError."""
        written = asyncio.get_running_loop().run_in_executor(self._auditors, self.audit.append_all, records)
        try:
            await asyncio.shield(written)  # a client that leaves meanwhile does not stop it
        except AuditError:
            self.metrics.audit_failures.inc()
            raise

    async def score(
        self,
        caller: Caller,
        conversations: Sequence[Sequence[Message]],
        guards: Mapping[str, Adapter],
        is_gone: Callable[[], Awaitable[bool]],
    ) -> list[Scores] | None:
        """Scores of whole texts by the path of ``safeside guard``, a few windows at a time between steps of answers.

        It counts by the caller's limits, and holds a place in the engine's queue; more than ``max_judged_tokens`` are
        an InputError, what takes too long is a DeadlineError, and a guard that is no longer the one given a
        ServingError.  None once the client has left.
        """
        self.refuse_used_up(caller)
        try:
            async with asyncio.timeout(self.limits.deadline_s):
                with self.engine.place():
                    await self._admit(caller, conversations)
                    return await score_in_parts(
                        self.engine, guards, conversations, self.limits.max_judged_tokens, is_gone
                    )
        except TimeoutError as error:
            raise DeadlineError("The texts were not judged in time. Ask for fewer, or later.") from error

    def refuse_used_up(self, caller: Caller) -> None:
        """Raise a LimitError where the caller has nothing left, before its text costs anything."""
        self.limiter.refuse_used_up(caller.key or caller.tenant, caller.limits)

    async def _admit(self, caller: Caller, conversations: Sequence[Sequence[Message]]) -> None:
        """Count the texts by the caller's limits, off the event loop: many of them take a while to encode."""

        def count() -> int:
            return sum(len(self.base.encode(messages).ids) for messages in conversations)

        n_tokens = await asyncio.to_thread(count)
        refuse_too_many(n_tokens, self.limits.max_judged_tokens)
        self.limiter.admit(caller.key or caller.tenant, caller.limits, n_tokens, 0)

    def close(self, drain_s: float) -> None:
        """Let answers end, then close engine and audit log."""
        self.engine.close(drain_s)
        self._auditors.shutdown()
        self.audit.close()
