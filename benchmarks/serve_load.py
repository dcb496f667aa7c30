"""Servers to load, one for each variant, and the second model: all in this process, around one set of weights."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from overhead_variants import SIZE, SecondPass, open_base, twin_of
from safeside.adapters.adapter import Adapter
from safeside.adapters.sizing import sized_config
from safeside.base.model import Base, load_base
from safeside.serve.app import create_app
from safeside.serve.audit import AuditLog
from safeside.serve.engine import Engine
from safeside.serve.policy import PolicyBook
from safeside.serve.service import Service, ServiceLimits
from safeside.types import Message

VARIANTS = ("base", "guarded", "second_model")
# The aligner acts in the upper half of the scores; the guard watches every token and, so that all variants write the
# same number of tokens, would stop only at a score of 1.
GUARDED = """
policies:
  house:
    prompt: [{action: steer, guard: harm, low: 0.5, high: 0.9}]
    answer: [{action: block, guard: harm, threshold: 1.0}]
deployment: [house]
"""
ALONE = "{policies: {none: {}}, deployment: [none]}"


@dataclass(frozen=True, slots=True)
class Served:
    """One variant behind HTTP."""

    url: str
    judge: str = ""
    """Where the second model is called; empty without one."""


class Judged(BaseModel):
    """What the second model is asked to read: a prompt, and an answer of so many tokens."""

    text: str
    n_answer: int


def adapters_of(base: Base) -> list[Adapter]:
    """A guard and an aligner of the default size, untrained: what they cost does not depend on what they know."""
    configs = [sized_config(base, SIZE, name="harm"), sized_config(base, SIZE, role="align", name="refuse")]
    with torch.device(base.device):
        return [Adapter(config).to(base.dtype).eval().requires_grad_(False) for config in configs]


def base_of(geometry: str, device: str) -> Base:
    """A base whose answers end only where they were told to, so that all variants write the same number of tokens.

    A geometry has no tokenizer: it gets the built-in one, with a word of its own for every id that this does not know.
    """
    base = open_base(geometry, device)
    if geometry != "builtin":
        base.tokenizer = spelling(load_base("builtin").tokenizer, base.model.config.get_text_config().vocab_size)
    base.tokenizer.eos_token = None
    if base.model.generation_config is not None:
        base.model.generation_config.eos_token_id = None
    return base


def spelling(tokenizer: PreTrainedTokenizerFast, n_tokens: int) -> PreTrainedTokenizerFast:
    """A tokenizer that reads texts as ``tokenizer`` does, and spells ``n_tokens`` ids at least."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["model"]["vocab"] |= {f"\u0120w{token}": token for token in range(len(tokenizer), n_tokens)}
    words = Tokenizer.from_str(json.dumps(state))
    begin, template = tokenizer.bos_token, tokenizer.chat_template
    return PreTrainedTokenizerFast(tokenizer_object=words, bos_token=begin, chat_template=template)


@contextlib.contextmanager
def listening(app: FastAPI) -> Iterator[str]:
    """The address of an application, in a thread of its own."""
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical"))
    with socket.create_server(("127.0.0.1", 0)) as place:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [place]})
        thread.start()
        while not server.started:
            time.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{place.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


@contextlib.contextmanager
def served(base: Base, adapters: Sequence[Adapter], policy: str) -> Iterator[str]:
    """The address of a server of ``base``."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "policy.yaml").write_text(policy, encoding="utf-8")
        book = PolicyBook.load(folder / "policy.yaml")
        guards = {adapter.name: adapter for adapter in adapters if adapter.config.role == "guard"}
        book.bind(guards, [adapter.name for adapter in adapters if adapter.config.role == "align"])
        engine = Engine(base, adapters)
        audit = AuditLog(f"sqlite:///{folder}/audit.db")
        service = Service(engine, book, audit, model="base", limits=ServiceLimits(deadline_s=3600))
        with listening(create_app(service)) as url:
            yield url


def judge_app(base: Base) -> FastAPI:
    """The second model behind HTTP, which reads one text at a time as one more model on the same machine."""
    judge, lock, app = SecondPass(base), threading.Lock(), FastAPI()

    @torch.no_grad()
    def read(ids: torch.Tensor) -> None:
        with lock:
            judge.judge(ids)

    @app.post("/")
    async def judged(asked: Judged) -> dict[str, int]:
        ids = judged_ids(base, asked)
        await asyncio.to_thread(read, ids)
        return {"n_tokens": ids.shape[1]}

    return app


def judged_ids(base: Base, asked: Judged) -> torch.Tensor:
    """The ids (1, T) that the second model reads: the prompt's, and one for each token of the answer."""
    prompt = base.encode([Message("user", asked.text)]).ids
    return torch.tensor([[*prompt, *prompt[:1] * asked.n_answer]], device=base.device)


@contextlib.contextmanager
def all_served(geometry: str, device: str) -> Iterator[dict[str, Served]]:
    """Every variant around one set of weights."""
    base = base_of(geometry, device)
    with contextlib.ExitStack() as stack:
        urls = {
            name: stack.enter_context(
                served(twin := twin_of(base), adapters_of(twin), GUARDED)
                if name == "guarded"
                else served(twin_of(base), [], ALONE)
            )
            for name in VARIANTS
        }
        judge = stack.enter_context(listening(judge_app(twin_of(base))))
        yield {name: Served(url, judge if name == "second_model" else "") for name, url in urls.items()}
