"""The server under load: with guard and aligner, without, and with a second guard model; under faults; and for long.

    python benchmarks/serve.py --soak 10    # 0.5B geometry with random weights, the built-in base, faults, rows, soak
    python benchmarks/serve.py --quick      # proves that everything runs, and writes to a temporary folder
    python benchmarks/serve.py --geometries --rows 0 --soak 0    # the faults alone

Every round loads all variants once, in an order that rotates.  ``throughput_ratio`` is the median over rounds of a
variant's tokens a second to the base's of the same round, with a bootstrap interval over rounds.  The time to the first
token begins before the second model's look at the prompt, and the guarded server's includes what it holds back.  The
inter-token latency is the time between two chunks with text.  The 99th percentile is by nearest rank, so that
of fewer than 100 samples it is the slowest; each row says of how many.

Clients, the servers and the second model are each in a process of their own with weights of its own, on the same
cores; only one of the servers is loaded at a time.  Every answer of a geometry has
the same number of tokens, and the second model reads as many.  Faults, rows and soak are those of ``safeside`` in
processes of its own.  All are parts of serve.json: what a run leaves out stays there as it was measured before.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from parts import SERVE, write_part
from safeside.provenance import config_hash
from safeside.terminal import note
from serve_batch import batch_rows
from serve_clients import Load, Timing, run_clients
from serve_faults import fault_rows
from serve_load import GUARDED, VARIANTS, Served, all_served
from serve_soak import soak
from tidy import RESULTS, Row, figure_row, ratio_figure, result_of

GOAL = 0.95  # guarded throughput on the 0.5B geometry
GEOMETRIES = ("Qwen2.5-0.5B", "builtin")
CLIENTS = (1, 8, 32)
REQUESTS, TOKENS = {"builtin": 24}, {"builtin": 48}  # of a round, of an answer; of other geometries
FEW_REQUESTS, FEW_TOKENS = 3, 32
N_FOR_P99 = 100
NOTE = (
    "Clients, base, guarded, second_model and the second model itself each in a process of their own, on the same "
    "cores. itl is the time between two chunks with text; guarded holds 8 tokens back, which come in one chunk at "
    "the end. What judges by eights sends chunks of eight, so its itl is that of as many tokens. The 99th percentile "
    "is by nearest rank: of fewer than 100 samples the slowest."
)
QUICK = {
    "geometries": ["builtin"], "clients": [2], "rounds": 1, "requests": 2, "tokens": 12,
    "faults": 2, "rows": 300, "soak": 0.1,
}  # fmt: skip


def measure(servers: Mapping[str, Served], load: Load, rounds: int) -> dict[str, list[Timing]]:
    """Timings by variant, one for each round; the first round tells how long the others take."""
    names = list(VARIANTS)
    found: dict[str, list[Timing]] = {name: [] for name in names}
    for round_ in range(rounds):
        started, shift = time.perf_counter(), round_ % len(names)
        for name in [*names[shift:], *names[:shift]]:
            timing = run_clients(replace(load, url=servers[name].url, judge=servers[name].judge))
            found[name].append(timing)
            note(f"{load.clients} clients, {name}: {timing.n_tokens / timing.seconds:.1f} tokens/s")
        if not round_:
            minutes = (time.perf_counter() - started) * (rounds - 1) / 60
            note(f"{load.clients} clients: {rounds - 1} more rounds will take about {minutes:.1f} minutes")
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
                value = float(np.percentile(values, share, method="linear" if share == 50 else "inverted_cdf"))
                rows.append(figure_row(mine, f"{metric}_p{share}", value, **{**counts, "n": len(values)}))
        value, interval = ratio_figure(rates[name], rates["base"])
        rows.append(figure_row(mine, "throughput_ratio", value, interval, **counts))
    return rows


def few_samples(rows: Sequence[Row]) -> list[Row]:
    """Where a 99th percentile is the slowest of all, for there are too few samples, and how many there were."""
    names = ("geometry", "clients", "variant", "metric", "n")
    return [
        {name: row[name] for name in names}
        for row in rows
        if str(row["metric"]).endswith("_p99") and int(str(row["n"])) < N_FOR_P99
    ]


def load_rows(geometry: str, options: argparse.Namespace) -> Iterator[tuple[list[Row], Row]]:
    """All figures of one geometry by number of clients, and what was asked of it."""
    n_requests = options.requests or REQUESTS.get(geometry, FEW_REQUESTS)
    n_tokens = options.tokens or TOKENS.get(geometry, FEW_TOKENS)
    with all_served(geometry, options.device, options.threads) as servers:
        for server in servers.values():  # what is done once is done before
            run_clients(Load(server.url, server.judge, 1, 1, n_tokens))
        sent: dict[str, int] = {}
        for clients in options.clients:
            load = Load("", "", clients, max(1, n_requests // clients), n_tokens)
            labels = {"geometry": geometry, "clients": clients}
            rows = rows_of(labels, measure(servers, load, options.rounds))
            sent[f"{clients} clients"] = load.n_requests * clients
            yield rows, {"requests": dict(sent), "tokens": n_tokens, "rounds": options.rounds}


def goals_of(rows: Sequence[Row]) -> list[Row]:
    """Whether the guarded server keeps its share of the throughput: at the lower end of the interval."""
    return [
        {name: row[name] for name in ("clients", "variant", "value")} | {"goal": GOAL, "met": bool(row["low"] >= GOAL)}
        for row in rows
        if row["metric"] == "throughput_ratio" and row["variant"] in GUARDED and row["geometry"] != "builtin"
    ]


def main(arguments: Sequence[str] | None = None) -> Path:
    """Run and write serve.json; returns its path."""
    parser = argparse.ArgumentParser(description="The server under load and under faults.")
    parser.add_argument("--geometries", nargs="*", default=list(GEOMETRIES))
    parser.add_argument("--clients", nargs="+", type=int, default=list(CLIENTS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, help="of a round (3; builtin 24), at least one of each client")
    parser.add_argument("--tokens", type=int, help="of each answer (32; builtin 48); the guard holds 8 back")
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
    path = options.output / SERVE.file
    for name, measured in (("load", _load), ("faults", _faults), ("batch", _batch), ("soak", _soak)):
        started = time.perf_counter()
        for found in measured(options):  # what was measured is kept if the rest fails
            path = write_part(options.output, result_of(name, time.perf_counter() - started, *found), SERVE)
    return path


Found = tuple[list[Row], Row]
"""The rows of a part so far, and its notes."""


def _load(options: argparse.Namespace) -> Iterator[Found]:
    rows, asked = list[Row](), {}
    for geometry in options.geometries:
        for found, told in load_rows(geometry, options):
            rows, asked[geometry] = rows + found, told
            yield rows, {"load": NOTE, "asked": asked, "goals": goals_of(rows), "few_samples": few_samples(rows)}


def _faults(options: argparse.Namespace) -> Iterator[Found]:
    if options.faults:
        rows, notes = fault_rows(options.faults)
        yield rows, {"faults": notes}


def _batch(options: argparse.Namespace) -> Iterator[Found]:
    if options.rows:
        rows, notes = batch_rows(options.rows)
        yield rows, {"guard": notes}


def _soak(options: argparse.Namespace) -> Iterator[Found]:
    if options.soak:
        yield [], {"soak": soak(options.soak)}


if __name__ == "__main__":
    print(main())
