"""The server under load: with guard and aligner, without, and with a second guard model; under faults; and for long.

    python benchmarks/serve.py --soak 10    # 0.5B geometry with random weights, the built-in base, faults, rows, soak
    python benchmarks/serve.py --quick      # proves that everything runs, and writes to a temporary folder
    python benchmarks/serve.py --geometries --rows 0 --soak 0    # the faults alone

Every round loads all variants once, in an order that rotates.  ``throughput_ratio`` is the median over rounds of a
variant's tokens a second to the base's of the same round, with a bootstrap interval over rounds.  The time to the first
token begins before the second model's look at the prompt, and the guarded server's includes what it holds back.  Server
and clients share the machine.  Faults, rows and soak are those of ``safeside`` in processes of its own.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from overhead import ratio_figure
from safeside.provenance import config_hash
from safeside.terminal import note
from serve_batch import batch_rows, soak
from serve_faults import fault_rows
from serve_load import VARIANTS, Load, Served, Timing, all_served, run_load
from tidy import RESULTS, Row, figure_row, result_of, write_json

GOAL = 0.95  # guarded throughput on the 0.5B geometry
GEOMETRIES = ("Qwen2.5-0.5B", "builtin")
CLIENTS = (1, 8, 32)
QUICK = {
    "geometries": ["builtin"], "clients": [2], "rounds": 1, "requests": 2, "tokens": 12,
    "faults": 2, "rows": 300, "soak": 0.1,
}  # fmt: skip


def measure(servers: dict[str, Served], load: Load, rounds: int) -> dict[str, list[Timing]]:
    """Timings by variant, one for each round; one round before is thrown away."""
    names = list(VARIANTS)
    found: dict[str, list[Timing]] = {name: [] for name in names}
    for round_ in range(-1, rounds):
        shift = round_ % len(names)
        for name in [*names[shift:], *names[:shift]]:
            timing = run_load(servers[name], load)
            if round_ >= 0:
                found[name].append(timing)
                note(f"{load.clients} clients, {name}: {timing.n_tokens / timing.seconds:.1f} tokens/s")
    return found


def rows_of(labels: dict[str, object], found: dict[str, list[Timing]]) -> list[Row]:
    """All figures of one number of clients."""
    rows = []
    rates = {name: [each.n_tokens / each.seconds for each in timings] for name, timings in found.items()}
    for name, timings in found.items():
        mine = {**labels, "variant": name}
        counts = {"n": len(timings), "config_hash": config_hash(mine)}
        spread = (min(rates[name]), max(rates[name]))
        rows.append(figure_row(mine, "tokens_per_s", float(np.median(rates[name])), spread, **counts))
        waits = {"ttft": [t for each in timings for t in each.ttft], "itl": [t for each in timings for t in each.itl]}
        for metric, values in waits.items():
            for share in (50, 99) if values else ():
                value = float(np.percentile(values, share))
                rows.append(figure_row(mine, f"{metric}_p{share}", value, **{**counts, "n": len(values)}))
        value, interval = ratio_figure(rates[name], rates["base"])
        rows.append(figure_row(mine, "throughput_ratio", value, interval, **counts))
    return rows


def load_rows(geometry: str, options: argparse.Namespace) -> list[Row]:
    """All figures of one geometry."""
    rows = []
    with all_served(geometry, options.device) as servers:
        for clients in options.clients:
            load = Load(clients, max(1, options.requests // clients), options.tokens)
            labels = {"geometry": geometry, "clients": clients}
            rows += rows_of(labels, measure(servers, load, options.rounds))
    return rows


def goals_of(rows: Sequence[Row]) -> list[Row]:
    """Whether the guarded server keeps its share of the throughput: at the lower end of the interval."""
    return [
        {"clients": row["clients"], "goal": GOAL, "value": row["value"], "met": bool(row["low"] >= GOAL)}
        for row in rows
        if row["metric"] == "throughput_ratio" and row["variant"] == "guarded" and row["geometry"] != "builtin"
    ]


def main(arguments: Sequence[str] | None = None) -> Path:
    """Run and write serve.json; returns its path."""
    parser = argparse.ArgumentParser(description="The server under load and under faults.")
    parser.add_argument("--geometries", nargs="*", default=list(GEOMETRIES))
    parser.add_argument("--clients", nargs="+", type=int, default=list(CLIENTS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=8, help="of a round, and at least one of each client")
    parser.add_argument("--tokens", type=int, default=48, help="of each answer")
    parser.add_argument("--faults", type=int, default=8, help="clients beside each fault; 0 leaves faults out")
    parser.add_argument("--rows", type=int, default=10_000, help="through safeside guard; 0 leaves them out")
    parser.add_argument("--soak", type=float, default=0.0, help="minutes; 0 leaves it out")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="the smallest of everything, into a temporary folder")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    if options.quick:
        vars(options).update(QUICK, output=Path(tempfile.mkdtemp(prefix="serve_quick_")))
    torch.set_num_threads(options.threads)
    started, rows, notes = time.perf_counter(), [], {}
    for geometry in options.geometries:
        rows += load_rows(geometry, options)
    if options.faults:
        rows += fault_rows(options.faults)
    if options.rows:
        found, notes["guard"] = batch_rows(options.rows)
        rows += found
    if options.soak:
        notes["soak"] = soak(options.soak)
    notes["goals"] = goals_of(rows)
    result = result_of("serve", time.perf_counter() - started, rows, notes)
    return write_json(options.output / "serve.json", result)


if __name__ == "__main__":
    print(main())
