"""What ``safeside chat`` does: answers at one or several strengths, with verdicts."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass

from safeside.adapters.adapter import Adapter
from safeside.artifact import base_of, load_adapter
from safeside.attach import attach
from safeside.base.model import BUILTIN_NAME, Base, load_base
from safeside.errors import InputError
from safeside.mixing import ramp
from safeside.terminal import note
from safeside.types import Completion, Message, Preset


@dataclass(frozen=True, slots=True)
class ChatOptions:
    """The options of ``safeside chat``."""

    base: str | None
    aligners: list[str]
    guards: list[str]
    strengths: list[float] | None
    gated: bool
    max_new_tokens: int
    allow_mismatch: str | None = None
    preset: Preset | None = None
    stop: bool = False


def chat_command(options: ChatOptions, prompt: str | None, as_json: bool) -> bool:
    """Answer ``prompt``, or each line of standard input in one conversation for each strength.

    True when everything was answered.  A typed line that cannot be is reported, and the session goes on.
    """
    if options.gated and not options.guards:
        raise InputError("--gated needs a guard that sets the strength; add --guard builtin:harm.")
    if options.preset and not options.guards:
        raise InputError("--preset chooses a guard's thresholds; add --guard builtin:harm.")
    if options.stop and not options.guards:
        raise InputError("--stop ends answers by a guard's own rule; add --guard FOLDER.")
    if not options.aligners and (options.strengths is not None or options.gated):
        raise InputError(
            "Strengths need an aligner; add --aligner builtin:refuse, or leave --strengths and --gated out."
        )
    names = [*options.aligners, *options.guards]
    base = base_of(names[0], options.base) if names else load_base(options.base or BUILTIN_NAME)
    aligners, guards = (
        [load_adapter(name, base, allow_mismatch=options.allow_mismatch) for name in some]
        for some in (options.aligners, options.guards)
    )
    guards = [guard.with_preset(options.preset) for guard in guards]
    strengths = (options.strengths or [1.0]) if aligners else [None]
    stop = True if options.stop else None
    conversations = [
        _Conversation(base, options.max_new_tokens, _policy(options, guards, value), stop) for value in strengths
    ]
    with attach(base, aligners, guards) if names else nullcontext():
        if prompt is not None:
            for strength, conversation in zip(strengths, conversations, strict=True):
                _show(conversation.answer(prompt), strength, as_json)
            return True
        all_read = _talk(conversations, strengths, as_json)
    return all_read and not any(conversation.n_problems for conversation in conversations)


def _talk(conversations: list[_Conversation], strengths: Sequence[float | None], as_json: bool) -> bool:
    """Answer typed lines until they end; whether all of them could be read."""
    all_read = True
    for text in _typed_lines():
        if text is None:
            all_read = False
            continue
        for strength, conversation in zip(strengths, conversations, strict=True):
            completion = conversation.answer_if_possible(text)
            if completion is not None:
                _show(completion, strength, as_json)
    return all_read


class _Conversation:
    """One conversation at one strength, and how often it could not go on."""

    def __init__(self, base: Base, max_new_tokens: int, policy: object, stop: object = None) -> None:
        self.base, self.max_new_tokens, self.policy, self.stop = base, max_new_tokens, policy, stop
        self.history: list[Message] = []
        self.n_problems = 0

    def answer(self, text: str) -> Completion:
        """The answer to ``text``; both join the history once there is one."""
        asked = [*self.history, Message("user", text)]
        completion = self.base.chat(asked, strength=self.policy, stop=self.stop, max_new_tokens=self.max_new_tokens)
        self.history = [*asked, Message("assistant", completion.text)]
        return completion

    def answer_if_possible(self, text: str) -> Completion | None:
        """The answer, in a new conversation where the old one cannot take ``text``; None where neither can."""
        try:
            return self.answer(text)
        except InputError as error:
            self.n_problems += 1
            note(f"safeside: {error}")
        if not self.history:
            note("safeside: the message was left out.")
            return None
        note("safeside: a new conversation starts with this message.")
        self.history = []
        return self.answer_if_possible(text)


def _policy(options: ChatOptions, guards: list[Adapter], strength: float | None) -> object:
    if not options.gated or not strength:
        return strength
    return ramp(guards[0], ceiling=strength)


def _typed_lines() -> Iterator[str | None]:
    """The lines of standard input that are not empty; None for one that is not UTF-8, once that was told."""
    if sys.stdin.isatty():
        note("Type a message; Ctrl-D ends.")
    for number, line in enumerate(iter(sys.stdin.buffer.readline, b""), 1):
        try:
            text = line.decode().strip()
        except UnicodeDecodeError as error:
            note(f"safeside: line {number} is not UTF-8 ({error.reason} at byte {error.start}); it was left out.")
            yield None
            continue
        if text:
            yield text


def _show(completion: Completion, strength: float | None, as_json: bool) -> None:
    if as_json:
        fields = asdict(completion)
        for verdict in fields["verdicts"]:
            for key in ("score", "probability"):
                verdict[key] = verdict[key] if math.isfinite(verdict[key]) else None  # NaN is not JSON
        for trace in fields["traces"]:
            trace["scores"] = [score if math.isfinite(score) else None for score in trace["scores"]]
        print(json.dumps({"requested_strength": strength, **fields}), flush=True)
        return
    label = "" if strength is None else f"[strength {strength:g}] "
    print(f"{label}{completion.text}", flush=True)
    for verdict in completion.verdicts:
        mark = "FLAGGED" if verdict.flagged else "passed"
        reason = f"; {verdict.reason}" if verdict.reason else ""
        note(
            f"    {verdict.task} on the {verdict.mode}: {verdict.score:.3f} "
            f"(threshold {verdict.threshold:.3f}) {mark}{reason}"
        )
