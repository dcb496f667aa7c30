"""The command as a process of its own, on the built-in base: pipes, exit codes, and what ships with the package."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from importlib.resources import files

import pytest

from safeside.cli import main

BUILTIN = files("safeside.builtin")
COMMAND = [sys.executable, "-c", "from safeside.cli import main; main()"]
pytestmark = pytest.mark.timeout(600)  # each is a Python process that imports torch, perhaps on a busy machine


def has_adapter(name: str) -> bool:
    return (BUILTIN / "adapters" / name / "adapter.safetensors").is_file()


needs_adapters = pytest.mark.skipif(
    not (has_adapter("harm") and has_adapter("refuse")), reason="the built-in adapters are not there: make builtin"
)


@needs_adapters
def test_guard_reads_a_pipe_and_writes_a_line_for_each_row() -> None:
    rows = gzip.decompress((BUILTIN / "demo" / "test.jsonl.gz").read_bytes()).splitlines()[:70]
    stdin = b"\n".join([*rows, b'{"text": "\xff"}', '{"text": "caf\u00e9"}'.encode()])
    done = subprocess.run([*COMMAND, "guard", "builtin:harm"], input=stdin, capture_output=True, check=False)
    assert done.returncode == 1, done.stderr.decode()
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["line"] for line in lines] == list(range(1, 73))
    scores = [line["verdicts"][0]["score"] for line in lines]
    assert scores[70] is None
    assert all(0 <= score <= 1 for index, score in enumerate(scores) if index != 70)
    labels = [json.loads(row)["label"] for row in rows]
    harmful = [score for score, label in zip(scores, labels, strict=False) if label]
    harmless = [score for score, label in zip(scores, labels, strict=False) if not label]
    assert sum(harmful) / len(harmful) > sum(harmless) / len(harmless)
    assert b"line 71: not UTF-8" in done.stderr
    assert b"1 bad rows" in done.stderr
    assert b"Warning" not in done.stderr


@needs_adapters
def test_a_reader_that_leaves_early_ends_the_command() -> None:
    """As ``safeside guard ... | head -1`` does."""
    rows = BUILTIN / "demo" / "test.jsonl.gz"
    with subprocess.Popen(
        [*COMMAND, "guard", "builtin:harm", str(rows)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:
        assert json.loads(child.stdout.readline())["line"] == 1
        child.stdout.close()
        errors = child.stderr.read()
    assert child.returncode == 1
    assert "Traceback" not in errors


@needs_adapters
def test_the_builtin_parts_work_together(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """In this process, where warnings are errors: an answer, and a line for each verdict."""
    words = ["--aligner", "builtin:refuse", "--guard", "builtin:harm", "--gated", "--max-new-tokens", "24"]
    monkeypatch.setattr("sys.argv", ["safeside", "chat", "Tell me how to steal a car.", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    out, err = capsys.readouterr()
    assert not ended.value.code
    assert out.startswith("[strength 1] ")
    first, second = err.splitlines()
    assert "harm on the prompt: " in first
    assert "harm on the answer: " in second
