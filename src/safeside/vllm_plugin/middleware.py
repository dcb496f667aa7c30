"""``safety`` in the answers of vLLM's own server, by its ``--middleware`` flag.

It asks for the log-probabilities of the slots, takes them out of the answer again, and puts ``safety`` in their place:
into each choice of a whole answer, and into the last chunk of each choice of a stream.  Where a grammar masks the slots
it gives the request a tag, and reads from the worker what was kept under it.  It stands in front of all else, vLLM's
check of keys too, so what that turns away passes unread.  A request may hold ``safety`` itself:
``{"strength": 0.5}`` or a policy in its place, and ``"tokens": true`` for the risk of every token.
``/v1/moderations`` is made of chats.
"""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, MutableMapping, Sequence
from contextlib import nullcontext
from functools import cached_property
from http import HTTPStatus
from typing import Any, NamedTuple, Self

from transformers import AutoTokenizer

from safeside.errors import InputError, UnknownNameError, UnsupportedError
from safeside.terminal import note
from safeside.vllm_plugin.answers import NAMED, Answers
from safeside.vllm_plugin.asked import AskedSafety, encoded, needs_tag, prepared
from safeside.vllm_plugin.kept import READ, TAG
from safeside.vllm_plugin.keys import Keys
from safeside.vllm_plugin.moderation import PATH as MODERATIONS
from safeside.vllm_plugin.moderation import Moderation
from safeside.vllm_plugin.plan import EngineConfig, read_engine_config
from safeside.vllm_plugin.told import Told

PATHS = ("/v1/chat/completions", "/v1/completions")
SILENT = ("/tokenize", "/detokenize")
"""Paths that take a body and answer without the model."""
READ_SECONDS = 30.0
"""How long workers have to tell the scores of an answer; after that its guards flag."""
AT_ONCE = 64
"""Chats of one moderation in the engine at the same time: others are served beside it."""
ADJUSTING = {"mistral", "cohere_command3", "cohere_command4"}
"""vLLM's parsers of tools and reasoning that may give any chat a grammar, whatever it asks for."""
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]


class Texts:
    """The text of tokens that are named by their ids, by the engine's tokenizer."""

    def __init__(self, tokenizer: str) -> None:
        self.folder = tokenizer

    @cached_property
    def tokenizer(self) -> Any:
        """Read when it is first asked for: few requests want log-probabilities."""
        return AutoTokenizer.from_pretrained(self.folder, trust_remote_code=False)

    def __call__(self, name: str) -> str:
        """The text of one token."""
        return str(self.tokenizer.decode([int(name.removeprefix(NAMED))]))


class Engine(NamedTuple):
    """What the server runs."""

    config: EngineConfig
    """Its adapters."""
    told: Told
    """How scores are told."""
    texts: Texts
    """The text of its tokens."""
    served: Sequence[str]
    """What clients may call its model."""
    client: Any
    """vLLM's own, which speaks to the workers."""
    n_copies: int
    """Engines beside each other (data parallelism)."""
    adjusts_chats: bool
    """Whether its parser is one of ADJUSTING."""
    keys: Keys
    """Without one of these there is no answer."""

    def tagged(self, values: Mapping[str, Any], path: str) -> Tagged | None:
        """A tag for a request whose scores the workers are to keep."""
        is_adjusted = self.adjusts_chats and path.endswith(PATHS[0])
        needed = self.config.slots and needs_tag(values, self.n_copies, is_adjusted=is_adjusted)
        return Tagged(self.client) if needed else None

    def answers(self, values: Mapping[str, Any], safety: AskedSafety, tagged: Tagged | None) -> Answers | None:
        """What puts ``safety`` into the answer; None without guards."""
        if not self.config.slots:
            return None
        keeps = values.get("logprobs") is not None and values["logprobs"] is not False
        text_of = None if values.get("return_tokens_as_token_ids") else self.texts
        slots, with_tokens = self.config.slots, safety.tokens
        return Answers(slots, self.told, with_tokens=with_tokens, keeps_logprobs=keeps, text_of=text_of, kept=tagged)


class Tagged:
    """What the workers keep of one request: forgotten there when it is read, or in the end."""

    def __init__(self, client: Any) -> None:
        self.tag = secrets.token_hex(16)
        """The request's, and no other's."""
        self._client = client
        self._is_read = False

    def on(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The request with its tag."""
        return {**values, "vllm_xargs": {**(values.get("vllm_xargs") or {}), TAG: self.tag}}

    async def __call__(self) -> list[list[float]]:
        """The scores behind each token, which are forgotten there; none where the workers fail, so that guards flag."""
        self._is_read = True
        try:
            async with asyncio.timeout(READ_SECONDS):
                first, *_ = await self._client.collective_rpc(READ, args=(self.tag,))
            return list(first)  # every rank has the same
        except Exception as error:  # whatever it was, the answer is told without scores and not cut short
            note(f"Scores of {self.tag} could not be read from vLLM's workers, so its guards flag: {error!r}")
            return []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        """A client that left, or a server that refused, has read nothing."""
        if not self._is_read:
            await self()


class SafetyMiddleware:
    """An ASGI application around vLLM's."""

    def __init__(self, app: App) -> None:
        self.app = app
        self.engine: Engine | None = None

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Answer one request; what asks nothing of the model passes untouched.

        vLLM's other ways to an answer have no place for verdicts, so they are refused.
        """
        if scope["type"] != "http" or scope["method"] != "POST" or scope["path"].endswith(SILENT):
            await self.app(scope, receive, send)
            return
        engine, path = self._engine(scope), scope["path"]
        if engine.keys.turn_away(scope):
            await self.app(scope, _withheld, send)
        elif path.endswith(MODERATIONS):
            await self._moderate(scope, receive, send)
        elif path.endswith(PATHS):
            await self._answer(scope, receive, send)
        else:
            await _refuse(send, f"{path} gives no verdicts. Use {', '.join(PATHS)} or {MODERATIONS}.")

    async def _answer(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Ask for scores beside what the client asks for, and tell it what they say."""
        engine = self._engine(scope)
        try:
            values, safety = prepared(await _body(receive), engine.config)
            tagged = engine.tagged(values, scope["path"])
            answers = engine.answers(values, safety, tagged)
            incoming = _once(_asking(values, answers, tagged), receive)
        except InputError as error:
            await _refuse(send, str(error))
            return
        scope = {**scope, "headers": [pair for pair in scope["headers"] if pair[0] != b"content-length"]}
        async with tagged or nullcontext():
            await self.app(scope, incoming, send if answers is None else _Outgoing(send, answers))

    async def _moderate(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Judge each text as the prompt of a chat, some at a time; the first chat that fails is the answer."""
        engine = self._engine(scope)
        try:
            asked = Moderation(await _body(receive), engine.config, engine.told, engine.served)
        except UnknownNameError as error:
            await _refuse(send, str(error), HTTPStatus.NOT_FOUND)
            return
        except (InputError, UnsupportedError) as error:
            await _refuse(send, str(error))
            return
        path = scope["path"].removesuffix(MODERATIONS) + PATHS[0]
        headers = [pair for pair in scope["headers"] if pair[0] not in (b"content-length", b"x-request-id")]
        chat = {**scope, "path": path, "raw_path": path.encode(), "headers": headers}
        places = asyncio.Semaphore(AT_ONCE)

        async def judged(text: str) -> list[float]:
            values, kept = asked.chat(text), _Kept()
            tagged = engine.tagged(values, path)
            answers = asked.answers(tagged)
            async with places, tagged or nullcontext():
                await self.app(dict(chat), _once(_asking(values, answers, tagged), receive), kept)
                if kept.status != HTTPStatus.OK:
                    raise _ChatFailedError(kept.status, kept.body)
                return await answers.first(kept.body)

        status, body = int(HTTPStatus.OK), b""
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(judged(text)) for text in asked.texts]
            body = json.dumps(asked.answer([task.result() for task in tasks])).encode()
        except* _ChatFailedError as errors:
            status, body = errors.exceptions[0].args
        await _send(send, status, body)

    def _engine(self, scope: MutableMapping[str, Any]) -> Engine:
        if self.engine is None:
            state = scope["app"].state
            config = read_engine_config(state.vllm_config.additional_config)
            parsers = {state.args.tool_call_parser, state.vllm_config.structured_outputs_config.reasoning_parser}
            self.engine = Engine(
                config=config,
                told=Told(config),
                texts=Texts(state.vllm_config.model_config.tokenizer),
                served=[path.name for path in state.openai_serving_models.base_model_paths],
                client=state.engine_client,
                n_copies=state.vllm_config.parallel_config.data_parallel_size,
                adjusts_chats=bool(ADJUSTING & parsers),
                keys=Keys(state.args.api_key),
            )
        return self.engine


class _Outgoing:
    """Rewrites what the server sends: JSON as a whole, streams event by event."""

    def __init__(self, send: Send, answers: Answers) -> None:
        self.send, self.answers = send, answers
        self.start: Message | None = None
        self.is_stream = False
        self.held = b""

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = dict(message["headers"])
            self.is_stream = headers.get(b"content-type", b"").startswith(b"text/event-stream")
            self.start = message
            if self.is_stream:
                await self.send(message)
            return
        self.held += message.get("body", b"")
        is_last = not message.get("more_body", False)
        if self.is_stream:
            body = b"".join([event async for event in self._events(is_last)])
            await self.send({"type": "http.response.body", "body": body, "more_body": not is_last})
        elif is_last:
            await self._whole()

    async def _events(self, is_last: bool) -> AsyncIterator[bytes]:
        *events, self.held = self.held.split(b"\n\n")
        for event in events:
            yield await self.answers.event(event) + b"\n\n"
        if is_last and self.held:
            yield await self.answers.event(self.held)

    async def _whole(self) -> None:
        assert self.start is not None
        body = await self.answers.whole(self.held) if self.start["status"] == 200 else self.held
        headers = [pair for pair in self.start["headers"] if pair[0] != b"content-length"]
        length = (b"content-length", str(len(body)).encode())
        await self.send({**self.start, "headers": [*headers, length]})
        await self.send({"type": "http.response.body", "body": body})


class _ChatFailedError(Exception):
    """A chat of a moderation was not answered; status and body of what was sent in its place are its arguments."""


class _Kept:
    """Keeps what the server sends."""

    def __init__(self) -> None:
        self.status = int(HTTPStatus.INTERNAL_SERVER_ERROR)
        self.body = b""

    async def __call__(self, message: Message) -> None:
        self.status = message.get("status", self.status)
        self.body += message.get("body", b"")


async def _body(receive: Receive) -> bytes:
    """The whole body of a request; a client that leaves first has sent an empty one."""
    parts = []
    while (message := await receive())["type"] == "http.request":
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(parts)
    raise InputError("The client left before its request was whole.")


async def _withheld() -> Message:
    """In place of a request that nobody may read."""
    return {"type": "http.disconnect"}


def _asking(values: Mapping[str, Any], answers: Answers | None, tagged: Tagged | None) -> dict[str, Any]:
    """The request, and what it has to ask for beside."""
    asked = {**values, **(answers.asked if answers is not None else {})}
    return tagged.on(asked) if tagged is not None else asked


def _once(values: Mapping[str, Any], receive: Receive) -> Receive:
    """Gives the request anew, then whatever comes: that the client has left."""
    messages: list[Message] = [{"type": "http.request", "body": encoded(values), "more_body": False}]

    async def next_message() -> Message:
        return messages.pop() if messages else await receive()

    return next_message


async def _refuse(send: Send, reason: str, status: HTTPStatus = HTTPStatus.BAD_REQUEST) -> None:
    """HTTP 400 or 404 in the shape of OpenAI's errors."""
    kind = "NotFoundError" if status == HTTPStatus.NOT_FOUND else "BadRequestError"
    error = {"message": reason, "type": kind, "param": None, "code": int(status)}
    await _send(send, status, json.dumps({"error": error}).encode())


async def _send(send: Send, status: int, body: bytes) -> None:
    """A whole answer of JSON."""
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": int(status), "headers": headers})
    await send({"type": "http.response.body", "body": body})
