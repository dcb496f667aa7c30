"""What a guard adds to its base in time and memory, beside a second pass and a standalone guard, in one run.

    python benchmarks/overhead.py                     # 0.5B geometry with random weights, and the built-in base
    python benchmarks/overhead.py --device cuda       # 7B geometry, batch 1 to 64

Every round times all variants once, in an order that rotates, so a machine that slows down slows all.  A ratio is the
median over rounds of a variant's time to the base's of the same round, with a bootstrap interval over rounds; a goal
is met only if the upper end meets it.  While times are taken the process keeps what it frees: otherwise a pass of the
base asks for up to 3 GB of fresh pages, or for none, as the heap happens to lie.  On CPU peak memory is that of a
process of its own for each variant, which gives back what it frees at once: what a heap happens to keep of it is
luck, and more than a guard takes.  Writes the parts ``time`` and ``peaks`` of overhead.json; a part that is not
measured keeps its rows.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import itertools
import json
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import DynamicCache

from overhead_variants import DTYPES, VARIANTS, Alone, Guarded, Plan, build
from parts import OVERHEAD, write_part
from safeside.provenance import config_hash
from safeside.terminal import note
from tidy import RESULTS, Row, figure_row, ratio_figure, result_of
from workers import numbers_alone

GOALS = {
    "flops_share": 0.01,
    "prefill": 1.03,
    "decode": 1.05,
    "peak_ratio": 1.02,
}  # for the guard, without the built-in
PHASES = ("prefill", "decode")
TAPS = (3,)  # guards of fewer and wider taps, beside that on all layers
GROUPS = (4,)  # of these guards also such whose heads share keys and values, so many each
EVERY = (
    8,
)  # tokens of an answer judged together, beside each by itself: while decoding alone, for prompts do not wait
MEANING = {
    "time": "ratio_to_base: 95% bootstrap over rounds of the median; seconds: 2.5% and 97.5% of the rounds",
    "peaks": "most resident memory of a process of its own (libraries and weights included), lowest of three",
}
# Settings of glibc's mallopt: no mmap, no trimming, grow by 256 MB; and a mapping of its own for all from 64 kB on.
KEEP_MEMORY = {-4: 0, -1: -1, -2: 1 << 28}
GIVE_BACK_AT_ONCE = {-3: 1 << 16}
_PARTS = 10**9  # of the base's compute, as processes tell it in whole numbers
N_PEAKS = 3  # processes for each peak; the lowest counts, for an allocator only ever adds


@dataclass(frozen=True, slots=True)
class Settings:
    """What is timed: prompts of ``n_tokens``, ``n_steps`` tokens of decoding, in ``pairs`` rounds."""

    n_tokens: int = 512
    n_steps: int = 16
    pairs: int = 30
    device: str = "cpu"
    threads: int = 2


def seconds_of(variant: Alone, ids: torch.Tensor, settings: Settings, caches: Sequence[DynamicCache] = ()) -> float:
    """Seconds of one prefill, or behind ``caches`` of one decoded token (the mean of ``n_steps``)."""
    if not caches:
        started = _now(settings.device)
        variant.prefill(ids)
        return _now(settings.device) - started
    n_rows, n_tokens = ids.shape
    mask = torch.ones(n_rows, n_tokens + settings.n_steps, dtype=torch.long, device=ids.device)
    started = _now(settings.device)
    for step in range(settings.n_steps):
        variant.step(ids[:, step : step + 1], mask[:, : n_tokens + step + 1], caches)
    seconds = _now(settings.device) - started
    for cache in caches:
        cache.crop(-settings.n_steps)
    return seconds / settings.n_steps


@torch.no_grad()
def measure(variants: dict[str, Alone], phase: str, batch: int, settings: Settings) -> dict[str, list[float]]:
    """Seconds by variant, one for each round; one round before is thrown away, and tells how long the others take."""
    ids = _prompt(variants, batch, settings)
    caches = {name: variant.prefill(ids) if phase == "decode" else [] for name, variant in variants.items()}
    names: list[str] = list(variants)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for round_ in range(-1, settings.pairs):
        started, shift = time.perf_counter(), round_ % len(names)
        for name in [*names[shift:], *names[:shift]]:
            taken = seconds_of(variants[name], ids, settings, caches[name])
            if round_ >= 0:
                seconds[name].append(taken)
        if round_ < 0:
            minutes = (time.perf_counter() - started) * settings.pairs / 60
            note(f"{phase} batch {batch}: {settings.pairs} rounds will take about {minutes:.1f} minutes")
    return seconds


def rows_of(
    labels: dict[str, object], seconds: dict[str, list[float]], variants: dict[str, Alone], settings: Settings
) -> list[Row]:
    """Seconds, ratio to the base and share of its compute of every variant."""
    rows = []
    for name, taken in seconds.items():
        mine = {**labels, "variant": name}
        costs = {"flops_share": variants[name].extra_matmuls, "config_hash": config_hash([mine, asdict(settings)])}
        middle = float(np.median(taken))
        spread = (float(np.quantile(taken, 0.025)), float(np.quantile(taken, 0.975)))
        rows.append(figure_row(mine, "seconds", middle, spread, **{**costs, "n": len(taken)}))
        if name != "base":
            value, interval = ratio_figure(taken, seconds["base"])
            rows.append(figure_row(mine, "ratio_to_base", value, interval, **{**costs, "n": len(taken)}))
            rows.append(figure_row(mine, "flops_share", variants[name].extra_matmuls, **costs))
    return rows


def goals_of(rows: Sequence[Row]) -> list[dict[str, object]]:
    """Which goals of the guard are met: at the upper end of the interval."""
    result = []
    for row in rows:
        goal = GOALS.get(str(row["phase"] if row["metric"] == "ratio_to_base" else row["metric"]))
        is_guard = str(row["variant"]).split("_")[0] == "guard"
        if is_guard and row["geometry"] != "builtin" and goal is not None:
            named = {name: row[name] for name in ("geometry", "phase", "batch", "variant", "metric", "value", "high")}
            result.append({**named, "goal": goal, "met": row["high"] <= goal})
    return result


def peak_rows(plan: Plan, batch: int, settings: Settings) -> list[Row]:
    """Peak memory of each variant over the base's, by phase; a process holds the base's weights and libraries too.

    That of decoding begins anew with what is held once the prompt is read, its caches among it.  The interval is from
    the lowest peak over the base's highest to the highest over its lowest.
    """
    peaks = {name: [_peaks(plan, name, batch, settings) for _ in range(N_PEAKS)] for name in plan.variants}
    note(f"peaks batch {batch}: done")
    rows = []
    for index, phase in enumerate(PHASES):
        ends = {
            name: (min(column), max(column)) for name, column in ((n, [p[index] for p in f]) for n, f in peaks.items())
        }
        base_low, base_high = ends["base"]
        for name, (low, high) in ends.items():
            if phase == "prefill" and "_every_" in name:  # as for times: prompts do not wait
                continue
            labels = {"geometry": plan.geometry, "phase": phase, "batch": batch, "variant": name}
            counts: dict[str, object] = {
                "n": N_PEAKS,
                "flops_share": peaks[name][0][-1] / _PARTS,
                "config_hash": config_hash([labels, asdict(settings), plan.dtype]),
            }
            rows.append(figure_row(labels, "peak_bytes", low, (low, high), **counts))
            if name != "base":
                span = (low / base_high, high / base_low)
                rows.append(figure_row(labels, "peak_ratio", low / base_low, span, **counts))
    return rows


def _peaks(plan: Plan, name: str, batch: int, settings: Settings) -> list[int]:
    job = {"geometry": plan.geometry, "dtype": plan.dtype, "name": name, "batch": batch, "settings": asdict(settings)}
    return numbers_alone(Path(__file__), job)


@torch.no_grad()
def print_peaks(job: dict[str, object]) -> None:
    """Run one variant in this process; print the most bytes it held by phase, and its extra compute in billionths."""
    tune_memory(GIVE_BACK_AT_ONCE)
    values = job["settings"]
    assert isinstance(values, dict)
    settings = Settings(**values)
    torch.set_num_threads(settings.threads)
    name, batch = str(job["name"]), int(str(job["batch"]))
    variants = build(Plan(str(job["geometry"]), (name,), settings.device, str(job["dtype"])))
    ids = _prompt(variants, batch, settings)
    _forget_peak(settings.device)
    caches = variants[name].prefill(ids)
    print(_peak_bytes(settings.device))
    _forget_peak(settings.device)
    seconds_of(variants[name], ids, settings, caches)
    print(_peak_bytes(settings.device))
    print(round(variants[name].extra_matmuls * _PARTS))


def _forget_peak(device: str) -> None:
    """Begin anew: making a variant takes more than having it, for weights are drawn in float32."""
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # Linux: the peak is what is held now


def _peak_bytes(device: str) -> int:
    """Of this process alone: what ``getrusage`` tells of a child is at least what its parent held when it began."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024


def tune_memory(options: Mapping[int, int]) -> bool:
    """Tell this process's allocator what to do with what is freed; whether its C library can (glibc alone)."""
    if platform.libc_ver()[0] != "glibc":
        return False
    library = ctypes.CDLL(None)
    return all(library.mallopt(option, value) == 1 for option, value in options.items())


def _prompt(variants: dict[str, Alone], batch: int, settings: Settings) -> torch.Tensor:
    base = next(iter(variants.values())).base
    n_tokens = min(settings.n_tokens, base.max_tokens - settings.n_steps)
    if n_tokens < settings.n_tokens:
        raise SystemExit(f"{base.name} holds {base.max_tokens} tokens; expected {settings.n_tokens} and more.")
    generator = torch.Generator().manual_seed(0)
    vocabulary = base.model.config.get_text_config().vocab_size
    return torch.randint(0, vocabulary, (batch, n_tokens), generator=generator).to(base.device)


def _now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def time_rows(plan: Plan, batches: Sequence[int], phases: Sequence[str], settings: Settings) -> list[Row]:
    """Seconds, ratios and shares of compute of one geometry."""
    variants, rows = build(plan), list[Row]()
    for phase, batch in itertools.product(phases, batches):
        labels: dict[str, object] = {"geometry": plan.geometry, "phase": phase, "batch": batch}
        timed = {name: made for name, made in variants.items() if phase == "decode" or "_every_" not in name}
        rows += rows_of(labels, measure(timed, phase, batch, settings), timed, settings)
    for variant in variants.values():
        if isinstance(variant, Guarded):
            variant.attachment.detach()
    del variants
    gc.collect()
    return rows


def measure_part(part: str, options: argparse.Namespace) -> Path:
    """Measure one part at every geometry and write its rows and goals."""
    started, on_gpu = time.perf_counter(), options.device == "cuda"
    tapped = [f"guard_{count}" for count in options.taps]
    guards = ["guard", *tapped, *(f"{guard}_group_{size}" for size in options.groups for guard in tapped)]
    grouped = [f"{guard}_every_{count}" for count in options.every for guard in guards]
    variants = ("base", *options.only, *guards[1:], *grouped)
    batches = options.batches or ([1, 4, 16, 64] if on_gpu else [1, 8])
    rows: list[Row] = []
    used = {}
    is_tuned = part == "time" and tune_memory(KEEP_MEMORY)
    for geometry in options.geometries or (["Qwen2.5-7B"] if on_gpu else ["Qwen2.5-0.5B", "builtin"]):
        n_tokens = min(options.tokens, 448) if geometry == "builtin" else options.tokens
        settings = Settings(n_tokens, options.steps, options.pairs, options.device, options.threads)
        used[geometry] = asdict(settings)
        plan = Plan(geometry, variants, options.device, options.dtype)
        if part == "time":
            rows += time_rows(plan, batches, options.phases, settings)
        else:
            found = [row for batch in batches for row in peak_rows(plan, batch, settings)]
            rows += [row for row in found if row["phase"] in options.phases]
    notes = {
        "goals": goals_of(rows),
        "settings": used,
        "dtype": options.dtype,
        "keeps_freed_memory": is_tuned,
        "meaning": MEANING[part],
    }
    return write_part(options.output, result_of(part, time.perf_counter() - started, rows, notes), OVERHEAD)


def main(arguments: Sequence[str] | None = None) -> Path:
    """Parse, measure, write."""
    options = _parser().parse_args(arguments)
    if options.peak:
        print_peaks(options.peak)
        sys.exit()
    torch.set_num_threads(options.threads)
    for every in options.every:
        if every < 2 or options.steps % every:
            raise SystemExit(f"--every {every} is not a number above 1 that divides --steps {options.steps}.")
    for part in options.parts:
        path = measure_part(part, options)
    note(f"wrote {path}")
    return path


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES, help="of what has random weights")
    parser.add_argument("--geometries", nargs="+", help="Qwen2.5-0.5B and builtin on CPU, Qwen2.5-7B on CUDA")
    parser.add_argument("--batches", nargs="+", type=int, help="1 and 8 on CPU, 1 to 64 on CUDA")
    parser.add_argument("--phases", nargs="+", default=PHASES, choices=PHASES)
    parser.add_argument("--parts", nargs="+", default=OVERHEAD.parts, choices=OVERHEAD.parts)
    parser.add_argument("--taps", nargs="*", type=int, default=TAPS, help="guards on so many layers, at equal FLOPs")
    parser.add_argument("--groups", nargs="*", type=int, default=GROUPS, help="heads that share keys, of those guards")
    parser.add_argument("--every", nargs="*", type=int, default=EVERY, help="guards that judge so many tokens together")
    parser.add_argument("--only", nargs="+", default=VARIANTS[1:], choices=VARIANTS[1:], help="variants beside base")
    parser.add_argument("--tokens", type=int, default=512, help="of the prompt; the built-in base takes 448 at most")
    parser.add_argument("--steps", type=int, default=16, help="decoded tokens of one timing")
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the result file")
    parser.add_argument("--peak", type=json.loads, help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    main()
