"""The command line in this process: fixtures and helpers of its tests."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from safeside import Adapter, Base, cli, save_adapter
from safeside.adapters.config import Calibration, ModeCalibration, Promise
from safeside.evals import runs
from safeside.evals.suites import SUITES, Suite


@dataclass(frozen=True)
class Ran:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> object:
        return json.loads(self.out)

    @property
    def lines(self) -> list[dict[str, object]]:
        return [json.loads(line) for line in self.out.splitlines()]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """``run("guard", folder, stdin=...)`` is the command in this process, as the console script runs it."""

    def command(*words: object, stdin: str = "") -> Ran:
        monkeypatch.setattr("sys.argv", ["safeside", *map(str, words)])
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin.encode(errors="surrogateescape"))))
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return Ran(ended.value.code or 0, *capsys.readouterr())

    return command


@pytest.fixture(scope="module")
def adapters(
    session_base: Base,
    random_guard: Callable[..., Adapter],
    random_aligner: Callable[..., Adapter],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A folder with the guards ``harm``, ``two`` and ``promised`` (with presets), and the aligner ``refuse``."""
    root = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(("harm", "two")):
        guard = random_guard(session_base, name=name, seed=seed + 1)
        guard.set_calibration(Calibration(scale=(1.0,), bias=(0.0,), threshold=(0.5 + seed / 10,)))
        save_adapter(guard, root / name, session_base)
    promised = random_guard(session_base, name="promised")
    presets = {
        "strict": Promise(threshold=(0.25,), false_positive_rate=0.05),
        "balanced": Promise(threshold=(0.75,), false_positive_rate=0.01),
    }
    promised.set_mode("prompt", ModeCalibration(n_harmless=320, presets=presets))
    save_adapter(promised, root / "promised", session_base)
    save_adapter(random_aligner(session_base), root / "refuse", session_base)
    return root


def texts(n: int = 12) -> list[str]:
    return [f"the cat sat {index * 7919}" for index in range(n)]


def write(path: Path, rows: Sequence[object]) -> Path:
    content = "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.write_bytes(gzip.compress(content.encode()) if path.suffix == ".gz" else content.encode())
    return path


def toy_recipe(folder: Path, base: Base) -> Path:
    """A recipe for a guard that learns from ``rows.jsonl`` beside it."""
    recipe = folder / "toy.toml"
    recipe.write_text(
        f"name = 'toy'\noutput = 'unused'\n[base]\nname = '{base.folder}'\n[data]\ntrain = ['rows.jsonl']\n"
        "validation = ['rows.jsonl']\n[adapter]\nkind = 'plr'\n[training]\nepochs = 2\nbatch_size = 8\n"
    )
    return recipe


@pytest.fixture
def small_suite(monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo suite with two prompts of each label, and very short answers."""
    demo = SUITES.get("demo")
    monkeypatch.setitem(SUITES._items, "demo", Suite("demo", demo.path, demo.judge, 2))
    monkeypatch.setattr(runs, "MAX_NEW_TOKENS", 4)
