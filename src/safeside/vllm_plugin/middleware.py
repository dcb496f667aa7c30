"""``safety`` in the answers of vLLM's own server, by its ``--middleware`` flag.

It asks for the log-probabilities of the slots, takes them out of the answer again, and puts ``safety`` in their place:
into each choice of a whole answer, and into the last chunk of each choice of a stream.  Where a grammar masks the slots
it gives the request a tag, and reads from the worker what was kept under it.  A request may hold ``safety`` itself:
``{"strength": 0.5}`` or a policy in its place, and ``"tokens": true`` for the risk of every token.
``/v1/moderations`` is made of chats.
"""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, MutableMapping, Sequence
from functools import cached_property
from http import HTTPStatus
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, ValidationError
from transformers import AutoTokenizer

from safeside.errors import InputError, UnknownNameError, UnsupportedError
from safeside.vllm_plugin.answers import NAMED, Answers
from safeside.vllm_plugin.kept import READ, TAG
from safeside.vllm_plugin.moderation import PATH as MODERATIONS
from safeside.vllm_plugin.moderation import Moderation
from safeside.vllm_plugin.plan import EngineConfig, read_engine_config
from safeside.vllm_plugin.strengths import KEY, parse_strength
from safeside.vllm_plugin.told import Told

PATHS = ("/v1/chat/completions", "/v1/completions")
SILENT = ("/tokenize", "/detokenize")
"""Paths that take a body and answer without the model."""
AT_ONCE = 64
"""Chats of one moderation in the engine at the same time: others are served beside it."""
_PLAIN = {"type": "text"}  # the format that is none
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]


class AskedSafety(BaseModel):
    """What a request may ask for in ``safety``."""

    model_config = ConfigDict(extra="forbid")

    strength: float | dict[str, Any] | None = None
    tokens: bool = False


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


class Tagged:
    """What the workers keep of one request."""

    def __init__(self, client: Any) -> None:
        self.tag = secrets.token_hex(16)
        """The request's, and no other's."""
        self._client = client

    async def __call__(self) -> list[list[float]]:
        """The scores behind each token, which are forgotten there; every rank has the same."""
        first, *_ = await self._client.collective_rpc(READ, args=(self.tag,))
        return list(first)


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
        if scope["path"].endswith(MODERATIONS):
            await self._moderate(scope, receive, send)
            return
        if not scope["path"].endswith(PATHS):
            await _refuse(send, f"{scope['path']} gives no verdicts. Use {', '.join(PATHS)} or {MODERATIONS}.")
            return
        engine = self._engine(scope)
        config = engine.config
        try:
            values, safety = prepared(await _body(receive), config)
            tagged = Tagged(engine.client) if config.slots and needs_tag(values, engine.n_copies) else None
        except InputError as error:
            await _refuse(send, str(error))
            return
        scope = {**scope, "headers": [pair for pair in scope["headers"] if pair[0] != b"content-length"]}
        outgoing = send
        if config.slots:
            keeps = values.get("logprobs") is not None and values["logprobs"] is not False
            text_of = None if values.get("return_tokens_as_token_ids") else engine.texts
            answers = Answers(
                config.slots, engine.told, with_tokens=safety.tokens, keeps_logprobs=keeps, text_of=text_of, kept=tagged
            )
            values, outgoing = {**values, **answers.asked}, _Outgoing(send, answers)
        if tagged is not None:
            values["vllm_xargs"] = {**(values.get("vllm_xargs") or {}), TAG: tagged.tag}
        await self.app(scope, _once(values, receive), outgoing)

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

        async def judged(text: str) -> bytes:
            async with places:
                kept = _Kept()
                await self.app(dict(chat), _once(asked.chat(text), receive), kept)
                if kept.status != HTTPStatus.OK:
                    raise _ChatFailedError(kept.status, kept.body)
                return kept.body

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
            self.engine = Engine(
                config=config,
                told=Told(config),
                texts=Texts(state.vllm_config.model_config.tokenizer),
                served=[path.name for path in state.openai_serving_models.base_model_paths],
                client=state.engine_client,
                n_copies=state.vllm_config.parallel_config.data_parallel_size,
            )
        return self.engine


def prepared(body: bytes, config: EngineConfig) -> tuple[dict[str, Any], AskedSafety]:
    """The request without ``safety``, its strength among ``vllm_xargs``; what cannot be answered is an InputError."""
    try:
        values = json.loads(body)
    except ValueError as error:
        raise InputError(f"The body is not JSON: {error}.") from error
    if not isinstance(values, dict):
        raise InputError("The body is not a JSON object.")
    try:
        safety = AskedSafety.model_validate(values.pop("safety", None) or {})
    except ValidationError as error:
        raise InputError(f"'safety' holds 'strength' and 'tokens': {error}") from error
    extra = values.get("vllm_xargs") or {}
    if not isinstance(extra, dict):
        raise InputError(f"'vllm_xargs' is an object; got {extra!r}.")
    if TAG in extra:
        raise InputError(f"{TAG} is given by the server alone. Leave it out.")
    if safety.strength is not None:
        if config.aligner is None:
            raise InputError("A strength was given but the engine has no aligner. Leave it out.")
        parse_strength(safety.strength, config.thresholds)
        values["vllm_xargs"] = {**extra, KEY: json.dumps(safety.strength)}
    _check_readable(values, config)
    return values, safety


def _check_readable(values: dict[str, Any], config: EngineConfig) -> None:
    """Raise an InputError for what would hide the scores."""
    many = values.get("top_logprobs") or values.get("logprob_token_ids") or values.get("prompt_logprobs")
    n_logprobs = values.get("logprobs")
    if config.slots and (many or (isinstance(n_logprobs, int) and n_logprobs > 1)):
        raise InputError(
            "Scores travel among the log-probabilities, so those of tokens that were not drawn cannot be asked for "
            "beside them. Ask for 'logprobs' of the drawn tokens alone."
        )
    if config.slots and (values.get("use_beam_search") or values.get("echo")):
        raise InputError("Beam search and echo give no scores. Leave them out.")
    if config.slots and values.get("include_reasoning") not in (None, True):
        raise InputError(
            "'include_reasoning' other than true hides log-probabilities where the server parses reasoning, and scores "
            "travel as such. Leave it out, and pass over the reasoning in the answer."
        )


def needs_tag(values: Mapping[str, Any], n_copies: int) -> bool:
    """Whether a grammar masks the ids that carry scores; an InputError where those of several answers would be mixed.

    Tools that the model is free to call may bring a grammar too (``strict``), so they have a tag wherever it can be.
    """
    masks = [name for name in ("response_format", "structured_outputs") if values.get(name) not in (None, _PLAIN)]
    choice = (values.get("tool_choice") or "auto") if values.get("tools") else "none"
    masks += ["tool_choice"] if choice not in ("auto", "none") else []
    prompt = values.get("prompt")
    several = isinstance(prompt, list) and len(prompt) > 1 and not isinstance(prompt[0], int)
    is_alone = values.get("n") in (None, 1) and not several and not values.get("prompt_embeds") and n_copies == 1
    if masks and not is_alone:
        raise InputError(
            f"{masks[0]!r} masks the ids that carry scores, so the engine keeps them by request, and can tell neither "
            "several answers of one request apart nor engines beside each other. Ask for n=1 and one prompt, of a "
            "server without data parallelism."
        )
    return bool(masks) or (choice == "auto" and is_alone)


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


def _once(values: dict[str, Any], receive: Receive) -> Receive:
    """Gives the request anew, then whatever comes: that the client has left."""
    messages: list[Message] = [{"type": "http.request", "body": json.dumps(values).encode(), "more_body": False}]

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
