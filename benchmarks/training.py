"""What one optimiser step of a guard costs beside a LoRA and beside tuning all blocks: seconds, memory, parameters.

    python benchmarks/training.py                    a 0.5B geometry with random weights in bfloat16
    python benchmarks/training.py --dtype float32    the same for CPUs that only emulate bfloat16

Four ways to learn one label from the same texts, in turns (A B C D A B C D): ``lst_stored``, a guard on stored states;
``lst``, the same with the base run for every batch; ``lora_full``, a LoRA on every block; ``full``, every weight of the
blocks.  ``step_seconds`` are those of forward, backward and AdamW; ``ratio_to_full`` is of the same round.
``storing_seconds`` are paid once for all epochs and all guards on these layers.  ``peak_bytes`` is that of a process
of its own.  Trained weights are kept as each method keeps them: the base's in ``--dtype``, the others in float32.
Writes the part ``training`` of guards.json.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from overhead_variants import DTYPES, open_base, tapped_config, twin_of
from parts import write_part
from safeside.adapters.adapter import Adapter, GuardHead
from safeside.adapters.sizing import adapter_matmuls, base_matmuls
from safeside.base.model import Base
from safeside.base.taps import Tape
from safeside.lora import head_matmuls
from safeside.provenance import config_hash
from safeside.terminal import note
from safeside.train.lora import create_lora
from safeside.train.losses import guard_loss
from safeside.train.memory import PeakMemory
from safeside.train.taps import Batch, Forward, LiveTaps, Source, StoredTaps, TapStore, make_batch
from tidy import RESULTS, Row, figure_row, ratio_figure, result_of
from workers import numbers_alone

METHODS = ("lst_stored", "lst", "lora_full", "full")


class FullGuard(nn.Module):
    """Every weight of the base's blocks is trained, and a read-out of its final state.  It is a Source itself.

    The base is changed by training: it is one of random weights, made for this bench.
    """

    def __init__(self, base: Base) -> None:
        super().__init__()
        self.base = base
        self.decoder = base.decoder.requires_grad_(True)
        base.model.get_input_embeddings().requires_grad_(False)
        self.head = GuardHead(base.d_model, 1, pooled=False).to(base.device)

    def forward(self, batch: Batch) -> Forward:
        """Logits (B, T, 1) at every token."""
        final = self.decoder(input_ids=batch.ids, attention_mask=batch.keep, use_cache=False)[0]
        return Forward(self.head(final.float(), Tape(batch.keep, batch.ids.shape[1]), None, 0), None)

    @property
    def matmuls(self) -> int:
        """Multiply-adds a token of its own pass, no vocabulary."""
        return base_matmuls(self.base) - head_matmuls(self.base) + adapter_matmuls(self.head)


@dataclass(frozen=True, slots=True)
class Settings:
    """What a step reads, and how often it is timed."""

    geometry: str = "Qwen2.5-0.5B"
    n_rows: int = 2
    n_tokens: int = 256
    rounds: int = 10
    threads: int = 2
    dtype: str = "bfloat16"
    """Of the base's weights, and of autocast."""


@dataclass(slots=True)
class Student:
    """Something that is trained, where it gets its logits from, and what its forward pass costs for each token."""

    source: Source
    optimizer: torch.optim.Optimizer
    n_params: int
    matmuls: float

    @classmethod
    def of(cls, module: nn.Module, source: Source, matmuls: float) -> Student:
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        n_params = sum(parameter.numel() for parameter in trained)
        return cls(source, torch.optim.AdamW(trained, lr=1e-5), n_params, matmuls)

    def step(self, batch: Batch, labels: Tensor, dtype: str) -> float:
        """Seconds of one optimiser step, under autocast where ``dtype`` is not float32."""
        started = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            logits = self.source(batch).output.logits
        assert logits is not None
        guard_loss(logits[:, -1].float(), labels).backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return time.perf_counter() - started


@dataclass(slots=True)
class Bench:
    """A base, one batch of random texts and its stored states."""

    settings: Settings
    base: Base
    batch: Batch
    labels: Tensor
    folder: Path
    storing_seconds: float = 0.0

    @classmethod
    def open(cls, settings: Settings, folder: Path) -> Bench:
        torch.set_num_threads(settings.threads)
        base = open_base(settings.geometry, "cpu", settings.dtype)
        generator = torch.Generator().manual_seed(0)
        vocabulary = base.model.config.get_text_config().vocab_size
        ids = torch.randint(0, vocabulary, (settings.n_rows, settings.n_tokens), generator=generator)
        batch = make_batch(base, ids.tolist(), range(settings.n_rows))
        return cls(settings, base, batch, torch.arange(settings.n_rows)[:, None].float() % 2, folder)

    def student(self, method: str) -> Student:
        """A fresh student of one method, around a module tree of its own; only ``full`` has weights of its own."""
        base = copy_of(self.base) if method == "full" else twin_of(self.base)
        if method == "full":
            tuned = FullGuard(base)
            return Student.of(tuned, tuned, tuned.matmuls)
        if method == "lora_full":
            lora = create_lora(base)
            return Student.of(lora, lora, lora.matmuls)
        adapter = Adapter(tapped_config(base, None))
        cost = float(adapter_matmuls(adapter))
        if method == "lst":
            return Student.of(adapter, LiveTaps(base, adapter), base_matmuls(base) - head_matmuls(base) + cost)
        started = time.perf_counter()
        store = TapStore.build(base, self.batch.ids.tolist(), adapter.config.layers, self.folder)
        self.storing_seconds = time.perf_counter() - started
        return Student.of(adapter, StoredTaps(store, adapter), cost)


def copy_of(base: Base) -> Base:
    """The same base with weights of its own."""
    return Base(copy.deepcopy(base.model), base.tokenizer, base.family, base.name, base.folder)


def measure(bench: Bench) -> tuple[dict[str, list[float]], dict[str, Student]]:
    """Seconds of a step by method, one for each round behind one that is thrown away."""
    students = {method: bench.student(method) for method in METHODS}
    seconds: dict[str, list[float]] = {method: [] for method in METHODS}
    for round_ in range(-1, bench.settings.rounds):
        started, shift = time.perf_counter(), round_ % len(METHODS)
        for method in [*METHODS[shift:], *METHODS[:shift]]:
            taken = students[method].step(bench.batch, bench.labels, bench.settings.dtype)
            if round_ >= 0:
                seconds[method].append(taken)
        if round_ < 0:
            minutes = (time.perf_counter() - started) * bench.settings.rounds / 60
            note(f"{bench.settings.rounds} rounds will take about {minutes:.1f} minutes")
    return seconds, students


def peak_of(settings: Settings, method: str, folder: Path) -> int:
    """Most bytes that a process held which took two steps of one method and nothing else."""
    job = {"method": method, "folder": str(folder), "settings": asdict(settings)}
    return numbers_alone(Path(__file__), job)[0]


def print_peak(job: dict[str, object]) -> None:
    """What ``peak_of`` runs.  Stored states are there already."""
    values = job["settings"]
    assert isinstance(values, dict)
    bench = Bench.open(Settings(**values), Path(str(job["folder"])))
    student = bench.student(str(job["method"]))
    if job["method"] in ("lst_stored", "full"):
        bench.base.model.to("meta")  # the first needs no base, the second has its own
    gc.collect()
    with PeakMemory(torch.device("cpu")) as memory:
        for _ in range(2):  # from the second on the optimiser's state is there
            student.step(bench.batch, bench.labels, bench.settings.dtype)
    print(memory.n_bytes)


def rows_of(
    bench: Bench, seconds: dict[str, list[float]], students: dict[str, Student], peaks: dict[str, int]
) -> list[Row]:
    """Every figure of every method."""
    rows = []
    for method, taken in seconds.items():
        labels = {"geometry": bench.settings.geometry, "method": method}
        share = students[method].matmuls / base_matmuls(bench.base)
        costs: dict[str, object] = {"flops_share": share, "config_hash": config_hash([labels, asdict(bench.settings)])}
        spread = (float(np.quantile(taken, 0.025)), float(np.quantile(taken, 0.975)))
        rows.append(figure_row(labels, "step_seconds", float(np.median(taken)), spread, **{**costs, "n": len(taken)}))
        value, interval = ratio_figure(taken, seconds["full"])
        rows.append(figure_row(labels, "ratio_to_full", value, interval, **{**costs, "n": len(taken)}))
        rows.append(figure_row(labels, "peak_bytes", peaks[method], **costs))
        rows.append(figure_row(labels, "trainable_params", students[method].n_params, **costs))
        if method == "lst_stored":
            rows.append(figure_row(labels, "storing_seconds", round(bench.storing_seconds, 3), **costs))
    return rows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What every bench of a training step can be told; ``--peak`` is for the process that it measures."""
    usual = Settings()
    parser.add_argument("--geometry", default=usual.geometry, help="as in overhead.py")
    parser.add_argument("--tokens", type=int, default=usual.n_tokens, help="of a row")
    parser.add_argument("--threads", type=int, default=usual.threads)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the result file")
    parser.add_argument("--peak", type=json.loads, help=argparse.SUPPRESS)


def main(arguments: Sequence[str] | None = None) -> Path:
    """Parse, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    usual = Settings()
    add_arguments(parser)
    parser.add_argument("--rows", type=int, default=usual.n_rows, help="of a batch")
    parser.add_argument("--rounds", type=int, default=usual.rounds)
    parser.add_argument("--dtype", default=usual.dtype, choices=DTYPES, help="of the base")
    options = parser.parse_args(arguments)
    if options.peak:
        print_peak(options.peak)
        sys.exit()
    settings = Settings(options.geometry, options.rows, options.tokens, options.rounds, options.threads, options.dtype)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench.open(settings, Path(folder))
        seconds, students = measure(bench)
        peaks = {method: peak_of(settings, method, Path(folder)) for method in METHODS}
        rows = rows_of(bench, seconds, students, peaks)
    notes = {
        "settings": asdict(settings),
        "interval": "ratio_to_full: 95% bootstrap over rounds of the median; seconds: 2.5% and 97.5% of the rounds",
        "peak": "anonymous memory of a process of its own, libraries and weights included",
    }
    path = write_part(options.output, result_of("training", time.perf_counter() - started, rows, notes))
    note(f"wrote {path}")
    return path


if __name__ == "__main__":
    main()
