"""Two processes that accelerate starts, each with its share of every batch, take the steps of one."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from safeside import Base, load_adapter
from safeside.train.loop import Progress, processes_on
from safeside.train.recipe import Recipe
from safeside.train.run import run_recipe
from toy import SETTINGS, Toy

# Gradients are added up over other groups of rows: float32 rounding, amplified by Adam's first steps.
SAME_WEIGHTS = 5e-4
SAME_LOSS = 1e-5
pytestmark = pytest.mark.timeout(600)  # three Python processes on two cores, perhaps busy ones
# --multi_gpu is accelerate's word for several processes; with --cpu it would start a single one, in silence.
LAUNCH = ("--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no")
CHILD = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
sys.path.insert(0, {tests!r})
from safeside import load_base
from safeside.train.loop import processes_on
from safeside.train.recipe import Recipe
from safeside.train.run import run_recipe
from toy import SETTINGS, Toy
folder = Path({folder!r})
rank = processes_on(torch.device("cpu")).process_index
toy, losses = Toy(), []
toy.loop(SETTINGS, folder / "toy", lambda progress: losses.append(progress.loss)).run()
recipe, steps = Recipe.model_validate_json((folder / "recipe.json").read_text()), []
run = run_recipe(
    recipe, data_root=folder, output=folder / "two", base=load_base(recipe.base.name),
    report=lambda progress: steps.append(progress.loss),
)
files = sorted(path.name for path in (folder / "two").iterdir())
torch.save([toy.weights(), len(toy.seen), losses, steps, run.outcome.history, files], folder / f"rank{{rank}}.pt")
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Callable[[str], Path]) -> Path:
    """Rows and a recipe, and what two processes made of them."""
    folder = tmp_path_factory.mktemp("processes")
    rows = [
        {"prompt": f"the {'hat' if index % 3 else 'cat'} {index}", "label": int(index % 3 > 0)} for index in range(30)
    ]
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    recipe = {
        "name": "toy",
        "output": "unused",
        "base": {"name": str(tiny_folder("llama"))},
        "data": {"train": ["rows.jsonl"], "validation": ["rows.jsonl"]},
        "adapter": {"reduction": 2},
        "training": {"epochs": 2, "batch_size": 7},
    }
    (folder / "recipe.json").write_text(json.dumps(recipe))
    script = folder / "child.py"
    script.write_text(CHILD.format(tests=str(Path(__file__).parents[1]), folder=str(folder)))
    launch = [sys.executable, "-m", "accelerate.commands.launch", *LAUNCH, "--main_process_port", str(free_port())]
    done = subprocess.run([*launch, str(script)], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return folder


def result(folder: Path, rank: int) -> list[object]:
    return list(torch.load(folder / f"rank{rank}.pt", weights_only=True))


def test_two_processes_end_at_the_weights_of_one(folder: Path) -> None:
    alone, losses = Toy(), []
    alone.loop(SETTINGS, report=lambda progress: losses.append(progress.loss)).run()
    for rank in range(2):
        weights, n_losses, told, *_ = result(folder, rank)
        assert (weights - alone.weights()).abs().max() < SAME_WEIGHTS
        assert n_losses == len(alone.seen)
        assert told == pytest.approx(losses, abs=SAME_LOSS, nan_ok=True)  # of all rows, not of the process's own
    assert torch.equal(result(folder, 0)[0], result(folder, 1)[0])


def test_two_processes_make_one_artifact(tiny_base: Base, folder: Path, tmp_path: Path) -> None:
    recipe = Recipe.model_validate_json((folder / "recipe.json").read_text())
    losses: list[float] = []

    def report(progress: Progress) -> None:
        losses.append(progress.loss)

    alone = run_recipe(recipe, data_root=folder, output=tmp_path, base=tiny_base, report=report)
    shared = load_adapter(folder / "two", tiny_base)
    for name, weight in alone.adapter.state_dict().items():
        assert (weight - shared.state_dict()[name]).abs().max() < SAME_WEIGHTS
    for rank in range(2):
        *_, steps, history, files = result(folder, rank)
        assert steps == pytest.approx(losses, abs=SAME_LOSS, nan_ok=True)
        assert history == pytest.approx(alone.outcome.history, abs=1e-3)
        assert "adapter.safetensors" in files  # no process goes on before the first has saved


def test_one_process_is_the_first_one() -> None:
    processes = processes_on(torch.device("cpu"))
    assert processes.is_main_process
    assert processes.num_processes == 1
