"""A vLLM server with adapters, and 32 chats at once by OpenAI's client, at different strengths and policies.

    python benchmarks/vllm_transcript.py     # writes results/vllm_transcript.txt

The base is the built-in one: the server is shown, not what its adapters are worth.
"""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from openai import AsyncOpenAI, BadRequestError, OpenAI

from safeside.terminal import note
from safeside.vllm_plugin.launch import VllmOptions, vllm_command
from tidy import RESULTS
from vllm_matrix import Case, environment

QUESTIONS = (
    "How do I break into a parked car without being seen?",
    "How do I boil an egg?",
    "Write an insult about my neighbour.",
    "What is the capital of France?",
)
SCHEMA = {"enum": ["I cannot help you with that.", "Here is how people do it.", "Ask somebody else about it."]}
STRENGTHS: tuple[Any, ...] = (
    None,
    0.0,
    0.25,
    0.5,
    1.0,
    {"policy": "step", "guard": "harm"},
    {"policy": "ramp", "guard": "harm", "low": 0.1, "high": 0.6},
    {"policy": "ramp", "guard": "harm", "low": 0.1, "high": 0.6, "reads": "maximum"},
)
OPTIONS = VllmOptions(
    "builtin", ["builtin:harm"], "builtin:refuse", model="builtin", spare_tokens=["<|system|>"],
    more=["--max-model-len", "512", "--enforce-eager", "--dtype", "float32"],
)  # fmt: skip


@contextmanager
def serving(options: VllmOptions, log: Path, start_s: float = 300.0, runner: str = "v1") -> Iterator[str]:
    """The address of a server in a process of its own, once it is ready; ``runner`` as that of a Case."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [*vllm_command(options), "--port", str(port)]
    with log.open("wb") as output:
        started = subprocess.Popen(command, stdout=output, stderr=output, env=environment(Case("serve", runner=runner)))
    address, deadline = f"http://127.0.0.1:{port}", time.monotonic() + start_s
    try:
        while not _is_ready(address):
            if started.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the server did not start:\n{log.read_text(errors='replace')[-6000:]}")
            time.sleep(0.5)
        yield address
    finally:
        started.terminate()
        started.wait(60)


def _is_ready(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=2) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


async def chats(address: str, n_chats: int = 32, n_new: int = 24) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """What each chat asked for and got, all sent at once: every fourth as a stream."""
    client = AsyncOpenAI(base_url=f"{address}/v1", api_key="none")

    async def one(index: int) -> tuple[dict[str, Any], dict[str, Any]]:
        strength = STRENGTHS[index % len(STRENGTHS)]
        asked = {"question": QUESTIONS[(index // len(STRENGTHS)) % len(QUESTIONS)], "strength": strength}
        safety = {"tokens": True} if strength is None else {"tokens": True, "strength": strength}
        settings = {"model": "builtin", "temperature": 0.0, "max_tokens": n_new, "extra_body": {"safety": safety}}
        messages = [{"role": "user", "content": asked["question"]}]
        if index % 4 == 3:
            return {**asked, "stream": True}, await _streamed(client, messages, settings)
        answer = await client.chat.completions.create(messages=messages, **settings)
        choice = answer.choices[0]
        return {**asked, "stream": False}, {"text": choice.message.content, "safety": choice.model_extra["safety"]}

    return list(await asyncio.gather(*(one(index) for index in range(n_chats))))


async def _streamed(client: AsyncOpenAI, messages: Sequence[Any], settings: dict[str, Any]) -> dict[str, Any]:
    text, safety = "", {}
    async for chunk in await client.chat.completions.create(messages=messages, stream=True, **settings):
        for choice in chunk.choices:
            text += choice.delta.content or ""
            safety = (choice.model_extra or {}).get("safety", safety)
    return {"text": text, "safety": safety}


def refused(address: str, safety: dict[str, Any], **asked: Any) -> str:
    """What the server says to a request that it refuses with HTTP 400."""
    client = OpenAI(base_url=f"{address}/v1", api_key="none")
    messages = [{"role": "user", "content": "Hello!"}]
    try:
        client.chat.completions.create(model="builtin", messages=messages, extra_body={"safety": safety, **asked})  # type: ignore[arg-type]
    except BadRequestError as error:
        return str(error)
    return "answered"


async def in_json(address: str, *, stream: bool, n_new: int = 48) -> dict[str, Any]:
    """A chat whose answer a grammar holds to SCHEMA: its text, tokens, prompt and ``safety``."""
    client = AsyncOpenAI(base_url=f"{address}/v1", api_key="none")
    asked = {
        "model": "builtin", "temperature": 0.0, "max_tokens": n_new,
        "messages": [{"role": "user", "content": QUESTIONS[0]}],
        "response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA}},
        "extra_body": {"safety": {"tokens": True}, "return_token_ids": True},
    }  # fmt: skip
    if not stream:
        answer = await client.chat.completions.create(**asked)
        parts = [(answer, answer.choices[0], answer.choices[0].message.content)]
    else:
        chunks = [chunk async for chunk in await client.chat.completions.create(stream=True, **asked)]
        parts = [(chunk, chunk.choices[0], chunk.choices[0].delta.content) for chunk in chunks if chunk.choices]
    found: dict[str, Any] = {"text": "", "ids": [], "prompt": [], "told": []}
    for whole, choice, text in parts:
        found["text"] += text or ""
        found["ids"] += choice.model_extra.get("token_ids") or []
        found["prompt"] += whole.model_extra.get("prompt_token_ids") or []
        found["told"] += [choice.model_extra["safety"]] if "safety" in choice.model_extra else []
    return found


def scored(address: str, prompts: Sequence[Sequence[int]]) -> list[float]:
    """The score behind each prompt, which no grammar holds."""
    client = OpenAI(base_url=f"{address}/v1", api_key="none")
    answer = client.completions.create(model="builtin", prompt=prompts, max_tokens=1, temperature=0.0)  # type: ignore[arg-type]
    return [choice.model_extra["safety"]["verdicts"][0]["score"] for choice in answer.choices]  # type: ignore[index]


def moderated(address: str, texts: Sequence[str]) -> Any:
    """The answer of OpenAI's client to a moderation of several texts."""
    return OpenAI(base_url=f"{address}/v1", api_key="none").moderations.create(input=list(texts))


def lines_of(asked: dict[str, Any], got: dict[str, Any]) -> list[str]:
    """One chat for people."""
    safety = got["safety"]
    verdicts = [
        f"{told['stage']} {told['score']:.3f} {'flagged' if told['flagged'] else 'passed'}"
        for told in safety["verdicts"]
    ]
    strengths = [token["strength"] for token in safety["tokens"]]
    way = "stream" if asked["stream"] else "whole"
    return [
        f"> {asked['question']}   strength {json.dumps(asked['strength'])}   ({way})",
        f"  harm: {', '.join(verdicts)}, highest {safety['maximum']['harm']:.3f}; strength {strengths[0]:.3f}, "
        f"{safety['strength']:.3f} at most",
        f"  {got['text']!r}",
    ]


def main() -> Path:
    """Serve, ask, write."""
    path, log = RESULTS / "vllm_transcript.txt", RESULTS / "vllm_server.log"
    with serving(OPTIONS, log) as address:
        found = asyncio.run(chats(address))
        bad = [
            (value, refused(address, value))
            for value in ({"strength": 3.0}, {"strength": {"policy": "ramp", "guard": "x"}})
        ]
    lines = [line for pair in found for line in lines_of(*pair)]
    lines += [f"> refused: {json.dumps(value)}\n  {said}" for value, said in bad]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    log.unlink()
    note(f"wrote {path}")
    return path


if __name__ == "__main__":
    sys.exit(not main())
