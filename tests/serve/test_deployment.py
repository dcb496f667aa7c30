"""The Dockerfile: what a linter says, and its start and health commands, run without Docker."""

from __future__ import annotations

import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from safeside.serve.keys import make_key

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "Dockerfile"
MAIN = [sys.executable, "-c", "from safeside.cli import main; main()"]
START_S = 120


def command(instruction: str) -> list[str]:
    """The words of the last CMD, or of the health check's."""
    text = DOCKERFILE.read_text().replace("\\\n", " ")
    (line,) = re.findall(rf"^{instruction}\s.*?(\[.*\])$", text, re.MULTILINE)
    words: list[str] = json.loads(line)
    return words


def test_the_linter_has_nothing_to_say() -> None:
    linter = Path(sys.executable).with_name("hadolint")
    found = str(linter) if linter.exists() else shutil.which("hadolint")
    if found is None:
        pytest.skip("hadolint is not installed")
    done = subprocess.run([found, str(DOCKERFILE)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_versions_are_pinned_and_no_registry_is_named() -> None:
    text = DOCKERFILE.read_text().replace("\\\n", " ")
    installs = re.findall(r"pip install [^&\n]*", text)
    assert installs
    assert all("--constraint constraints.txt" in install for install in installs)
    assert any(line.startswith("torch==") for line in (ROOT / "constraints.txt").read_text().split())
    assert set(re.findall(r"\w+://([\w.]+)", text)) == {"127.0.0.1"}


def test_the_image_starts_and_is_healthy(tmp_path: Path) -> None:
    """The same start command in a folder as it would be mounted; only the port and the address differ."""
    shutil.copytree(ROOT / "policies", tmp_path, dirs_exist_ok=True)
    (tmp_path / "standard.yaml").rename(tmp_path / "policy.yaml")
    key = make_key(tmp_path / "keys.yaml", "web", {"tenant": "school"})
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    program, *words = command("CMD")
    assert program == "safeside"
    words = [{"0.0.0.0": "127.0.0.1", "8000": port}.get(word, word) for word in words]
    log = (tmp_path / "log").open("wb")
    with log, subprocess.Popen([*MAIN, *words], cwd=tmp_path, stdout=log, stderr=log) as server:
        try:
            wait_until_ready(server, f"http://127.0.0.1:{port}", tmp_path / "log")
            python, *check = (word.replace(":8000", f":{port}") for word in command("HEALTHCHECK"))
            assert python == "python"
            subprocess.run([sys.executable, *check], check=True, timeout=60)
            models = f"http://127.0.0.1:{port}/v1/models"
            assert httpx.get(models).status_code == 401
            assert httpx.get(models, headers={"Authorization": f"Bearer {key}"}).json()["data"][0]["id"] == "builtin"
            server.send_signal(getattr(signal, re.findall(r"^STOPSIGNAL (\w+)$", DOCKERFILE.read_text(), re.M)[0]))
            assert server.wait(60) in (0, -signal.SIGTERM)
        finally:
            server.kill()
    assert (tmp_path / "audit.db").stat().st_mode & 0o077 == 0


def wait_until_ready(server: subprocess.Popen[bytes], url: str, log: Path) -> None:
    end = time.monotonic() + START_S
    while time.monotonic() < end:
        assert server.poll() is None, log.read_text()
        try:
            if httpx.get(f"{url}/readyz").status_code == 200:
                return
        except httpx.ConnectError:
            time.sleep(0.3)
    pytest.fail(log.read_text())


def test_what_is_copied_into_the_image_exists() -> None:
    sources = re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE.read_text(), re.MULTILINE)
    assert sources
    assert all((ROOT / name).exists() for line in sources for name in line.split())
