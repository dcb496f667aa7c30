"""What ``safeside serve --engine vllm`` does: check everything, then become vLLM's own server."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from safeside.errors import InputError
from safeside.vllm_plugin.plan import check_version, installed_version, plan_engine

OWN_FLAGS = (
    "--model", "--tokenizer", "--hf-overrides", "--additional-config", "--logits-processors", "--middleware",
    "--logprobs-mode", "--worker-extension-cls", "--config",
)  # fmt: skip
"""Flags of vLLM that only the plan sets.  Of two of a name vLLM takes the last, and ``--config`` is a file of flags."""

PROCESSES = "VLLM_ENABLE_V1_MULTIPROCESSING"
"""vLLM's switch for an engine in a process of its own, which is its default."""


@dataclass(frozen=True, slots=True)
class VllmOptions:
    """The options of ``safeside serve --engine vllm``."""

    base: str
    guards: Sequence[str] = ()
    aligner: str | None = None
    strength: float | dict[str, Any] = 1.0
    host: str = "127.0.0.1"
    port: int = 8000
    model: str | None = None
    dtype: str | None = None
    spare_tokens: Sequence[str] = ()
    """Control tokens that the base never writes, to carry scores."""
    more: Sequence[str] = ()
    """Flags of vLLM's own."""


def vllm_command(options: VllmOptions) -> list[str]:
    """The command that serves; whatever does not fit together is an error before anything is started."""
    check_version(installed_version())
    _check_environment()
    _check_flags(options.more)
    settings = {"strength": options.strength, "spare_tokens": options.spare_tokens}
    plan = plan_engine(options.base, options.guards, options.aligner, **settings)  # type: ignore[arg-type]
    at = ["--host", options.host, "--port", str(options.port)]
    named = ["--served-model-name", options.model or options.base]
    typed = ["--dtype", options.dtype] if options.dtype is not None else []
    return plan.command([*at, *named, *typed, *options.more])


def _check_environment() -> None:
    """Raise an InputError where vLLM's engine would share the server's process: kept scores are lost there."""
    if os.environ.get(PROCESSES) == "0":
        raise InputError(
            f"{PROCESSES}=0 is set: the engine would run in the server's own process, where the scores of structured "
            "output are lost and every such answer is flagged. Expected it to be unset, or 1. Unset it."
        )


def _check_flags(words: Sequence[str]) -> None:
    """Raise an InputError for a flag of OWN_FLAGS as vLLM reads it: with ``_``, with ``.key`` or cut short too."""
    for word in words:
        name = re.split(r"[=.]", word, maxsplit=1)[0].replace("_", "-")
        if name.startswith("--") and any(own.startswith(name) for own in OWN_FLAGS):
            raise InputError(
                f"{word!r} would be read in place of what serves guards and aligners, and could take them out. "
                f"Expected none of {', '.join(OWN_FLAGS)} among the flags of vLLM's own. Leave it out."
            )


def serve_on_vllm(options: VllmOptions, *, only_prints: bool = False) -> None:
    """Become the server; with ``only_prints`` print the command, for a shell, and start nothing."""
    command = vllm_command(options)
    if only_prints:
        print(shlex.join(command))
        return
    os.execvp(command[0], command)
