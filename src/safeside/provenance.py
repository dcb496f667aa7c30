"""Where a result came from: command, commit, versions, machine, seeds."""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch

_PACKAGES = ("safeside", "torch", "transformers", "safetensors")


def provenance(seed: int | None = None, **details: str | float) -> dict[str, str]:
    """What is needed to make the thing beside it again.  Folders of this machine are left out of the command."""
    command = [
        Path(sys.argv[0]).name,
        *(Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:]),
    ]
    stamp = {
        "command": " ".join(command),
        "commit": git_commit(),
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine(),
        **{package: version(package) for package in _PACKAGES},
    }
    if seed is not None:
        stamp["seed"] = str(seed)
    return {**stamp, **{key: str(value) for key, value in details.items()}}


def git_commit() -> str:
    """Commit of the source tree, with ``+`` when it has uncommitted changes; ``unknown`` outside a checkout."""
    here = Path(__file__).parent
    try:
        commit = _git("rev-parse", "--short=10", "HEAD", cwd=here)
        return commit + ("+" if _git("status", "--porcelain", "--untracked-files=no", cwd=here) else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*arguments: str, cwd: Path) -> str:
    result = subprocess.run(["git", *arguments], cwd=cwd, capture_output=True, text=True, check=True)
    return result.stdout.strip()


def machine() -> str:
    """Cores and accelerator, without any name of the host."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return f"{platform.machine()}, {torch.get_num_threads()} threads, {device}"


def config_hash(values: object) -> str:
    """First 16 hex digits of the sha256 of a JSON-able value: equal settings, equal hash."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:16]
