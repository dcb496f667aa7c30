"""What ``safeside serve --engine vllm`` does: check everything, then become vLLM's own server."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from safeside.vllm_plugin.plan import check_version, installed_version, plan_engine


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
    settings = {"strength": options.strength, "spare_tokens": options.spare_tokens}
    plan = plan_engine(options.base, options.guards, options.aligner, **settings)  # type: ignore[arg-type]
    at = ["--host", options.host, "--port", str(options.port)]
    named = ["--served-model-name", options.model or options.base]
    typed = ["--dtype", options.dtype] if options.dtype is not None else []
    return plan.command([*at, *named, *typed, *options.more])


def serve_on_vllm(options: VllmOptions, *, only_prints: bool = False) -> None:
    """Become the server; with ``only_prints`` print the command, for a shell, and start nothing."""
    command = vllm_command(options)
    if only_prints:
        print(shlex.join(command))
        return
    os.execvp(command[0], command)
