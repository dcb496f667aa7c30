"""The routes: OpenAI's API with a ``safety`` object, judging without an answer, and adapters."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import APIRouter, Depends, Header, Request
from fastapi.responses import PlainTextResponse, Response, StreamingResponse

from safeside.chat import encode_text
from safeside.errors import AccessError
from safeside.moderation import ModerationRequest
from safeside.serve.admin import AdapterDesk
from safeside.serve.answers import Answer
from safeside.serve.judging import dry_run, moderate
from safeside.serve.keys import Caller
from safeside.serve.service import Service
from safeside.serve.wire import (
    ChatRequest,
    CompletionRequest,
    DryRunRequest,
    LoadRequest,
    UnloadRequest,
)

_CLIENT_LEFT = 499  # nobody reads it; it is for the metrics
Object = dict[str, object]
_STREAMS: dict[int | str, dict[str, object]] = {
    200: {
        "description": "The answer; with stream, server-sent events.",
        "content": {"application/json": {}, "text/event-stream": {}},
    }
}
_TEXT: dict[int | str, dict[str, object]] = {200: {"description": "Done.", "content": {"text/plain": {}}}}
router = APIRouter(prefix="/v1")


def service_of(request: Request) -> Service:
    """The service of the application."""
    found: Service = request.app.state.service
    return found


def desk_of(request: Request) -> AdapterDesk:
    """The adapters of the application."""
    found: AdapterDesk = request.app.state.desk
    return found


Served = Annotated[Service, Depends(service_of)]
Desk = Annotated[AdapterDesk, Depends(desk_of)]


def caller_of(service: Served, authorization: Annotated[str | None, Header(include_in_schema=False)] = None) -> Caller:
    """Who sent the request."""
    return service.caller_of(authorization)


Known = Annotated[Caller, Depends(caller_of)]


def administrator(caller: Known) -> Caller:
    """Who sent the request, if that is an administrator."""
    if not caller.is_admin:
        raise AccessError("This needs an administrator's key. Make one with safeside key --admin.")
    return caller


Allowed = Annotated[Caller, Depends(administrator)]


def in_share(service: Served, caller: Known) -> None:
    """Refuse a caller who has used up its share before its text is tokenised."""
    service.refuse_used_up(caller)


InShare = Depends(in_share)


@router.get("/models")
async def models(service: Served, caller: Known) -> Object:
    """The one model that is served."""
    return {"object": "list", "data": [_model(service)]}


@router.get("/models/{model:path}")
async def model(model: str, service: Served, caller: Known) -> Object:
    """The model of that name."""
    service.check_model(model)
    return _model(service)


@router.post("/chat/completions", response_model=None, responses=_STREAMS, dependencies=[InShare])
async def chat(asked: ChatRequest, service: Served, caller: Known, request: Request) -> Response | Object:
    """Answer a conversation."""
    messages = asked.conversation()
    ids = (await asyncio.to_thread(service.base.encode, messages)).ids
    answering = service.begin(caller, asked, ids, "\n".join(turn.content for turn in messages))
    return await _answered(Answer(service, asked, answering, "chat"), request)


@router.post("/completions", response_model=None, responses=_STREAMS, dependencies=[InShare])
async def completions(asked: CompletionRequest, service: Served, caller: Known, request: Request) -> Response | Object:
    """Go on with a text."""
    ids = (await asyncio.to_thread(encode_text, service.base.tokenizer, asked.text)).ids
    answering = service.begin(caller, asked, ids, asked.text)
    return await _answered(Answer(service, asked, answering, "text"), request)


async def _answered(answer: Answer, request: Request) -> Response | Object:
    """The whole answer, or a stream once its first event is there: until then an error is a plain response."""
    if not answer.asked.stream:
        whole = await answer.whole(request.is_disconnected)
        return Response(status_code=_CLIENT_LEFT) if whole is None else whole
    stream = answer.stream(request.is_disconnected)
    first = await anext(stream, None)
    if first is None:
        return Response(status_code=_CLIENT_LEFT)

    async def events() -> AsyncIterator[str]:
        try:
            yield first
            async for chunk in stream:
                yield chunk
        finally:
            await stream.aclose()

    return StreamingResponse(events(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})


@router.post("/moderations", response_model=Object)
async def moderations(asked: ModerationRequest, service: Served, caller: Known, request: Request) -> Response | Object:
    """Judge texts, by the same path as ``safeside guard``."""
    return await moderate(service, caller, asked, request.is_disconnected) or Response(status_code=_CLIENT_LEFT)


@router.get("/policies")
async def policies(service: Served, caller: Known) -> Object:
    """The policies that the caller may know of and which hold for it; to administrators all, and what they say."""
    holding, known = service.book.names_for(caller.tenant), service.book.known_to(caller)
    data = [
        {
            "id": name,
            "object": "policy",
            "description": policy.description,
            "holds": name in holding,
            **({"policy": policy.model_dump(mode="json")} if caller.is_admin else {}),
        }
        for name, policy in service.book.policies.items()
        if name in known
    ]
    return {"object": "list", "version": service.book.version, "data": data}


@router.post("/policies/dry-run", response_model=Object)
async def dry(asked: DryRunRequest, service: Served, caller: Known, request: Request) -> Response | Object:
    """What the caller's policy would decide on a conversation, without an answer."""
    return await dry_run(service, caller, asked, request.is_disconnected) or Response(status_code=_CLIENT_LEFT)


@router.get("/adapters")
async def adapters(desk: Desk, caller: Allowed) -> Object:
    """What is loaded."""
    return {"object": "list", "data": desk.listed()}


@router.post("/load_lora_adapter", include_in_schema=False)
@router.post("/adapters/load", response_model=None, responses=_TEXT)
async def load(asked: LoadRequest, desk: Desk, caller: Allowed) -> PlainTextResponse:
    """Load an adapter from an allowed folder."""
    await desk.load(asked.name, asked.path, in_place=asked.load_inplace)
    return PlainTextResponse(f"Success: adapter '{asked.name}' added successfully.")


@router.post("/unload_lora_adapter", include_in_schema=False)
@router.post("/adapters/unload", response_model=None, responses=_TEXT)
async def unload(asked: UnloadRequest, desk: Desk, caller: Allowed) -> PlainTextResponse:
    """Drop an adapter that no policy asks for."""
    await desk.unload(asked.name)
    return PlainTextResponse(f"Success: adapter '{asked.name}' removed successfully.")


def _model(service: Service) -> Object:
    return {
        "id": service.model,
        "object": "model",
        "created": service.created,
        "owned_by": "safeside",
        "root": service.base.name,
        "parent": None,
        "max_model_len": service.base.max_tokens,
    }
