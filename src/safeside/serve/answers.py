"""An answer on its way to the client: whole, or as server-sent events."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass, field

from safeside.moderation import chosen
from safeside.serve.moderation import inline
from safeside.serve.problems import problem_of
from safeside.serve.replies import DONE, Kind, Reply, SafetyTold, TokenTold, Usage, VerdictTold, event, logprobs_of
from safeside.serve.row import Ended, Event, Judged, Piece, Trace
from safeside.serve.rules import SEVERITY
from safeside.serve.sampling import Token
from safeside.serve.service import Answering, Service
from safeside.serve.wire import Asked

IsGone = Callable[[], Awaitable[bool]]


@dataclass(slots=True)
class Answer:
    """What the routes need to tell of one answer."""

    service: Service
    asked: Asked
    answering: Answering
    kind: Kind
    traces: list[Trace] = field(default_factory=list)
    reply: Reply = field(init=False)
    """One for all chunks, which share their ``id`` and ``created``."""

    def __post_init__(self) -> None:
        self.reply = Reply(self.kind, self.service.model, self.answering.trace_id)

    async def whole(self, is_gone: IsGone) -> dict[str, object] | None:
        """The complete answer; None when the client left."""
        texts: list[str] = []
        tokens: list[Token] = []
        async with aclosing(self.service.events(self.answering, is_gone)) as events:
            async for found in events:
                if isinstance(found, Piece):
                    texts.append(found.text)
                    tokens += found.tokens
                    self.traces += found.traces
        ended = self.answering.ended
        if ended is None:
            return None
        is_replaced = ended.decision.action == "replace"
        if ended.finish == "content_filter" and ended.stop is None:  # flagged as a whole: no part of it is clear
            texts, tokens, self.traces = [], [], []
        text = ended.decision.text if is_replaced else "".join(texts)
        logprobs = None if is_replaced else self._logprobs(tokens)
        rest = {"usage": self._usage(), "safety": self._safety(with_tokens=True), **self._moderation()}
        return self.reply.whole(text, ended.finish, logprobs, rest)

    async def stream(self, is_gone: IsGone) -> AsyncGenerator[str]:
        """The events of a stream.  The first comes once the prompt was judged; an error before it is raised."""
        is_open = False
        try:
            async with aclosing(self.service.events(self.answering, is_gone)) as events:
                async for found in events:
                    for chunk in self._chunks(found):
                        is_open = True
                        yield chunk
        except Exception as error:  # the edge of the server: where bytes are out, the error is the last of them
            if not is_open:
                raise
            yield event(problem_of(error)[1])

    def _chunks(self, found: Event) -> list[str]:
        """What is sent for one event of the engine's."""
        if isinstance(found, Piece):
            return self._piece(found)
        if isinstance(found, Ended):
            return self._closing(found)
        return [self.reply.opening()] if isinstance(found, Judged) and self.kind == "chat" else []

    def _piece(self, piece: Piece) -> list[str]:
        logprobs = self._logprobs(piece.tokens)
        rest: dict[str, object] = {}
        if self.asked.safety.tokens and piece.traces:
            rest = {"safety": {"tokens": [each.model_dump() for each in self._tokens(piece.traces)]}}
        return [self.reply.chunk(piece.text, None, logprobs, rest)] if piece.text or logprobs or rest else []

    def _closing(self, ended: Ended) -> list[str]:
        reply = self.reply
        chunks = [reply.chunk(ended.decision.text)] if ended.decision.action == "replace" else []
        chunks.append(reply.chunk(None, ended.finish, None, {"safety": self._safety(with_tokens=False)}))
        if moderation := self._moderation():
            chunks.append(reply.extra(moderation))
        if self.asked.stream_options is not None and self.asked.stream_options.include_usage:
            chunks.append(reply.extra({"usage": self._usage()}))
        return [*chunks, DONE]

    def _logprobs(self, tokens: list[Token] | tuple[Token, ...]) -> dict[str, object] | None:
        if self.answering.job.sampling.n_logprobs is None or not tokens:
            return None
        return logprobs_of(self.kind, tokens, self.service.base.tokenizer)

    def _usage(self) -> dict[str, int]:
        ended = self.answering.ended
        usage: dict[str, int] = Usage.of(len(self.answering.job.ids), ended.n_tokens if ended else 0).model_dump()
        return usage

    def _tokens(self, traces: list[Trace] | tuple[Trace, ...]) -> list[TokenTold]:
        return [TokenTold.of(trace, self.service.base.tokenizer) for trace in traces]

    def _safety(self, *, with_tokens: bool) -> dict[str, object]:
        answering = self.answering
        ended, judged = answering.ended, answering.judged
        assert ended is not None
        assert judged is not None
        decision = max(
            judged.decision, ended.decision, key=lambda each: (SEVERITY[each.action], SEVERITY[each.intended])
        )
        told = SafetyTold(
            verdicts=[VerdictTold.of(verdict, stage) for stage, verdict in answering.verdicts],
            strength=max(ended.strength, 0.0),
            action=decision.action,
            intended=decision.intended,
            reason=decision.reason,
            policy=answering.policy.name,
            trace_id=answering.trace_id,
            leak_bound=ended.leak_bound if self.asked.stream else 0,
            tokens=self._tokens(self.traces) if with_tokens and self.asked.safety.tokens else None,
        )
        dumped: dict[str, object] = told.model_dump(exclude=None if told.tokens is not None else {"tokens"})
        return dumped

    def _moderation(self) -> dict[str, object]:
        if self.asked.moderation is None:
            return {}
        model = self.asked.moderation.model or self.service.model
        guards = chosen(model, self.answering.policy.guards, self.service.model)
        prompt = [verdict for stage, verdict in self.answering.verdicts if stage == "prompt"]
        answer = [verdict for stage, verdict in self.answering.verdicts if stage == "answer"]
        return {"moderation": inline(model, guards, prompt, answer)}
