"""Servers to load, one for each variant, and the second model: each in a process of its own.

As a program it serves the Job that its argument is as JSON, prints the address, and ends with its standard input.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
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
from safeside.serve.engine import Engine, EngineLimits
from safeside.serve.policy import PolicyBook
from safeside.serve.service import Service, ServiceLimits
from safeside.serve.threaded import in_thread
from safeside.types import Message

# By variant with guard and aligner: how many layers both read, at equal multiply-adds (None: all), and how many tokens
# of an answer the guard judges together.
GUARDED = {"guarded": (None, 1), "guarded_3_taps": (3, 1), "guarded_3_taps_every_8": (3, 8)}
VARIANTS = ("base", *GUARDED, "second_model")
JUDGE = "judge"  # the second model itself
# The aligner acts in the upper half of the scores; the guard watches every token and, so that all variants write the
# same number of tokens, would stop only at a score of 1.
POLICY = """
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


@dataclass(frozen=True, slots=True)
class Job:
    """What a process serves."""

    name: str
    """A variant, or ``JUDGE``."""
    geometry: str
    device: str
    threads: int
    """That it computes with."""


class Judged(BaseModel):
    """What the second model is asked to read: a prompt, and an answer of so many tokens."""

    text: str
    n_answer: int


def adapters_of(base: Base, n_taps: int | None = None) -> list[Adapter]:
    """A guard and an aligner of the default size, untrained: what they cost does not depend on what they know.

    They read all layers, or ``n_taps`` that are spread evenly and end at the top.
    """
    configs = [
        sized_config(base, SIZE, n_taps, name="harm"),
        sized_config(base, SIZE, n_taps, role="align", name="refuse"),
    ]
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


def listening(app: FastAPI) -> AbstractContextManager[str]:
    """The address of an application.  A connection that waits while another server is loaded is kept."""
    return in_thread(app, keep_alive_s=3600)


@contextlib.contextmanager
def served(base: Base, adapters: Sequence[Adapter], policy: str, limits: EngineLimits) -> Iterator[str]:
    """The address of a server of ``base``."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "policy.yaml").write_text(policy, encoding="utf-8")
        book = PolicyBook.load(folder / "policy.yaml")
        guards = {adapter.name: adapter for adapter in adapters if adapter.config.role == "guard"}
        book.bind(guards, [adapter.name for adapter in adapters if adapter.config.role == "align"])
        engine = Engine(base, adapters, limits=limits)
        audit = AuditLog(f"sqlite:///{folder}/audit.db")
        service = Service(engine, book, audit, model="base", limits=ServiceLimits(deadline_s=3600))
        with listening(create_app(service)) as url:
            yield url


def judge_app(base: Base, threads: int) -> FastAPI:
    """The second model behind HTTP, which reads one text at a time as one more model on the same machine."""
    judge, app = SecondPass(base), FastAPI()
    reader = ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(threads,))

    @torch.no_grad()
    def read(ids: torch.Tensor) -> None:
        judge.judge(ids)

    @app.post("/")
    async def judged(asked: Judged) -> dict[str, int]:
        ids = judged_ids(base, asked)
        await asyncio.get_running_loop().run_in_executor(reader, read, ids)
        return {"n_tokens": ids.shape[1]}

    return app


def judged_ids(base: Base, asked: Judged) -> torch.Tensor:
    """The ids (1, T) that the second model reads: the prompt's, and one for each token of the answer."""
    prompt = base.encode([Message("user", asked.text)]).ids
    return torch.tensor([[*prompt, *prompt[:1] * asked.n_answer]], device=base.device)


def served_here(job: Job) -> AbstractContextManager[str]:
    """The address of one variant, or of the second model, served by this process."""
    base = twin_of(base_of(job.geometry, job.device))
    if job.name == JUDGE:
        return listening(judge_app(base, job.threads))
    if job.name in GUARDED:
        n_taps, judge_every = GUARDED[job.name]
        limits = EngineLimits(threads=job.threads, judge_every=judge_every)
        return served(base, adapters_of(base, n_taps), POLICY, limits)
    return served(base, [], ALONE, EngineLimits(threads=job.threads))


@contextlib.contextmanager
def served_apart(job: Job) -> Iterator[str]:
    """The same by a process of its own, which ends with the context."""
    command = [sys.executable, __file__, json.dumps(asdict(job))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        if not (url := process.stdout.readline().strip()):
            raise RuntimeError(f"The server of {job.name} did not start; its error stands above.")
        try:
            yield url
        finally:
            process.stdin.close()  # what it waits for


@contextlib.contextmanager
def all_served(geometry: str, device: str, threads: int) -> Iterator[dict[str, Served]]:
    """Every variant, each in a process of its own with weights of its own."""
    with contextlib.ExitStack() as stack:
        urls = {
            name: stack.enter_context(served_apart(Job(name, geometry, device, threads))) for name in (*VARIANTS, JUDGE)
        }
        yield {name: Served(urls[name], urls[JUDGE] if name == "second_model" else "") for name in VARIANTS}


if __name__ == "__main__":
    torch.set_num_threads(1)  # the threads that compute set their own number
    with served_here(Job(**json.loads(sys.argv[1]))) as address:
        print(address, flush=True)
        sys.stdin.read()
