"""What ``safeside chat`` does: answers at one or several strengths, with verdicts."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass

from safeside.adapters.adapter import Adapter
from safeside.artifact import load_adapter
from safeside.attach import attach
from safeside.base.model import load_base
from safeside.errors import InputError
from safeside.mixing import ramp
from safeside.terminal import note
from safeside.types import Completion, Message


@dataclass(frozen=True, slots=True)
class ChatOptions:
    """The options of ``safeside chat``."""

    base: str
    aligners: list[str]
    guards: list[str]
    strengths: list[float]
    gated: bool
    max_new_tokens: int


def chat_command(options: ChatOptions, prompt: str | None, as_json: bool) -> None:
    """Answer ``prompt``, or each line of standard input in one conversation for each strength."""
    if options.gated and not options.guards:
        raise InputError("--gated needs a guard that sets the strength; add --guard builtin:harm.")
    base = load_base(options.base)
    aligners = [load_adapter(name, base) for name in options.aligners]
    guards = [load_adapter(name, base) for name in options.guards]
    if not aligners and len(options.strengths) > 1:
        raise InputError("Strengths need an aligner; add --aligner builtin:refuse, or give one prompt without them.")
    strengths = options.strengths
    attached = attach(base, aligners, guards) if aligners or guards else nullcontext()
    histories: list[list[Message]] = [[] for _ in strengths]
    with attached:
        for text in [prompt] if prompt is not None else _typed_lines():
            for strength, history in zip(strengths, histories, strict=True):
                history.append(Message("user", text))
                completion = base.chat(
                    history,
                    strength=_policy(options, guards, strength) if aligners else None,
                    max_new_tokens=options.max_new_tokens,
                )
                history.append(Message("assistant", completion.text))
                _show(completion, strength if aligners else None, as_json)


def _policy(options: ChatOptions, guards: list[Adapter], strength: float) -> object:
    if not options.gated or strength == 0:
        return strength
    return ramp(guards[0], ceiling=strength)


def _typed_lines() -> Iterator[str]:
    if sys.stdin.isatty():
        note("Type a message; Ctrl-D ends.")
    return (line.strip() for line in iter(sys.stdin.readline, "") if line.strip())


def _show(completion: Completion, strength: float | None, as_json: bool) -> None:
    if as_json:
        fields = asdict(completion)
        for verdict in fields["verdicts"]:
            verdict["score"] = verdict["score"] if math.isfinite(verdict["score"]) else None  # NaN is not JSON
        print(json.dumps({"requested_strength": strength, **fields}), flush=True)
        return
    label = "" if strength is None else f"[strength {strength:g}] "
    print(f"{label}{completion.text}", flush=True)
    for verdict in completion.verdicts:
        mark = "FLAGGED" if verdict.flagged else "passed"
        note(
            f"    {verdict.task} on the {verdict.reason}: {verdict.score:.3f} "
            f"(threshold {verdict.threshold:.3f}) {mark}"
        )
