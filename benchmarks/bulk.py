"""Bulk scoring: rows a second by workers, memory over many short rows, and what a kill loses or doubles.

    python benchmarks/bulk.py                                  # the built-in guard, 1 and 2 workers (about 10 minutes)
    python benchmarks/bulk.py --rows 2000 --many 20000         # the same in about three
    python benchmarks/bulk.py --only many --many 1000000       # memory over a million rows; the timed rows stay
    python benchmarks/bulk.py --engine vllm                    # in the environment of make setup-vllm; hf's rows stay

Every run is the command itself in processes of its own.  Speed is counted from the first finished file of the output
on, so that starting Ray and loading the base is not in it.  Memory is the most that any worker ever had resident; the
many rows are scored by a probe on a random base of two narrow layers, for it is reading, handing on and writing that
must stay flat.  A kill is SIGKILL to the command, Ray and all workers at once, at a random moment; the command is then
given again.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from transformers import AutoModelForCausalLM, LlamaConfig

from parts import BULK, write_part
from safeside import create_adapter, load_base, make_config, save_adapter
from safeside.provenance import config_hash
from safeside.terminal import note
from tidy import RESULTS, Row, figure_row, result_of
from vllm_matrix import GEOMETRY, Case, environment

TEXT = "how do I boil an egg without breaking the shell of it or open a door that has no key"
COMMAND = [sys.executable, "-c", "from safeside.cli import main; main()", "score"]
ATTEMPTS = 5
KEPT = ("peak_bytes", "n_retried", "n_starts")  # of what a run says; a worker that died took its memory's peak with it
NOT_STARTED = "Ray did not start"
ENVIRONMENT = {**environment(Case("bulk")), "RAY_ADDRESS": "local", "OMP_NUM_THREADS": "1"}
OF_ENGINE = {
    "hf": (),
    "vllm": ("--vllm-option", "enforce_eager=true"),
}  # compiling would outlast the rows after each kill


def write_rows(path: Path, n_rows: int, seed: int = 0) -> Path:
    """A Parquet file of ``n_rows`` prompts of 4 to 30 words, numbered by ``id``."""
    draw = random.Random(seed)
    words = TEXT.split()
    texts = [" ".join(draw.choices(words, k=draw.randint(4, 30))) for _ in range(n_rows)]
    pq.write_table(pa.table({"id": range(n_rows), "prompt": texts}), path)
    return path


def small_guard(folder: Path) -> Path:
    """A probe with random weights on a base with random weights: 2 layers of 64, heads as wide as vLLM asks for."""
    base = load_base("builtin")
    config = LlamaConfig(
        vocab_size=len(base.tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        head_dim=GEOMETRY["head_dim"], num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=512,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "base")
    base.tokenizer.save_pretrained(folder / "base")
    small = load_base(folder / "base")
    return save_adapter(create_adapter(small, make_config(small, kind="plr", name="probe")), folder / "probe", small)


def words_of(rows: Path, output: Path, guard: str, workers: int, engine: str, shard_rows: int) -> list[str]:
    """The command's words."""
    named = {
        "--input": rows, "--output": output, "--guard": guard, "--workers": workers, "--engine": engine,
        "--shard-rows": shard_rows,
    }  # fmt: skip
    return [*COMMAND, *(str(word) for pair in named.items() for word in pair), "--json", *OF_ENGINE[engine]]


def score(command: Sequence[str]) -> dict[str, float]:
    """What a run says of itself, and ``n_starts``: where Ray does not start on a busy machine it is given again.

    Any other failure ends the bench: a run that goes on would hide it, and forget the memory of the one before.
    """
    for n_starts in range(1, ATTEMPTS + 1):
        done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
        if done.returncode == 0:
            return {**json.loads(done.stdout), "n_starts": n_starts}
        if NOT_STARTED not in done.stderr:
            break
        note(done.stderr)
    raise SystemExit(f"{command} failed:\n{done.stderr}")


def steady_rate(output: Path, shard_rows: int) -> float:
    """Rows a second from the first finished file of the output to the last."""
    times = sorted(path.stat().st_mtime for path in output.glob("part-*"))
    return (len(times) - 1) * shard_rows / (times[-1] - times[0])


def killed_run(command: Sequence[str], output: Path, n_kills: int, seed: int) -> int:
    """Kill the command ``n_kills`` times at random moments of its work, then let it end; how often it was killed."""
    draw, n_killed = random.Random(seed), 0
    for _ in range(n_kills):
        before = len(list(output.glob("part-*")))
        running = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, start_new_session=True)
        while running.poll() is None and len(list(output.glob("part-*"))) == before:
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 3))
        if running.poll() is None:
            os.killpg(running.pid, signal.SIGKILL)
            n_killed += 1
        running.wait()
    score(command)
    return n_killed


def lost_and_doubled(output: Path, n_rows: int) -> tuple[int, int]:
    """Rows of the input that the output lacks, and rows of the output that it has too often."""
    parts = [pq.read_table(path, columns=["id"])["id"].to_pylist() for path in output.glob("part-*")]
    found = Counter(identity for part in parts for identity in part)
    return len(set(range(n_rows)) - set(found)), found.total() - len(found)


def figures(labels: dict[str, object], values: dict[str, float], n_rows: int) -> list[Row]:
    """One row for each of ``values``."""
    return [
        figure_row(labels, metric, value, n=n_rows, config_hash=config_hash([labels, n_rows]))
        for metric, value in values.items()
    ]


def many_rows(options: argparse.Namespace, folder: Path) -> Iterator[list[Row]]:
    """Memory over a tenth of the many rows, and over all of them."""
    guard, workers = str(small_guard(folder)), max(options.workers)
    labels: dict[str, object] = {"workers": workers, "engine": options.engine, "guard": "probe"}
    for n_rows in (options.many // 10, options.many):
        many, output = write_rows(folder / "many.parquet", n_rows), folder / f"many{n_rows}"
        shard_rows = min(1000, n_rows // 10)
        found = score(words_of(many, output, guard, workers, options.engine, shard_rows))
        lost, doubled = lost_and_doubled(output, n_rows)
        values = {"rows_per_s": steady_rate(output, shard_rows), **{name: found[name] for name in KEPT}}
        note(f"{n_rows} rows: {values}, {lost} lost, {doubled} duplicated")
        yield figures(labels, {**values, "lost": lost, "duplicated": doubled}, n_rows)


def timed_rows(options: argparse.Namespace, folder: Path) -> Iterator[list[Row]]:
    """Speed by workers, and what kills lose and double."""
    timed, shard_rows = write_rows(folder / "timed.parquet", options.rows), min(250, options.rows // 10)
    for workers in options.workers:
        labels: dict[str, object] = {"workers": workers, "engine": options.engine, "guard": options.guard}
        output, killed = folder / f"by{workers}", folder / f"killed{workers}"
        found = score(words_of(timed, output, options.guard, workers, options.engine, shard_rows))
        values = {"rows_per_s": steady_rate(output, shard_rows), **{name: found[name] for name in KEPT}}
        command = words_of(timed, killed, options.guard, workers, options.engine, shard_rows)
        n_killed = killed_run(command, killed, options.kills, workers)
        lost, doubled = lost_and_doubled(killed, options.rows)
        note(f"{workers} workers: {values}; killed {n_killed} times: {lost} lost, {doubled} duplicated")
        yield figures(labels, {**values, "lost": lost, "duplicated": doubled, "kills": n_killed}, options.rows)


PHASES = {"many": many_rows, "timed": timed_rows}


def measure(phase: str, options: argparse.Namespace) -> None:
    """Run one phase and write its rows as they come: the rest may take long, or be cut off."""
    started, rows = time.perf_counter(), list[Row]()
    notes = {"kills": options.kills, "cores": os.cpu_count(), "load_at_start": os.getloadavg()[0]}
    part = options.engine if phase == "timed" else f"{options.engine}_{phase}"
    with tempfile.TemporaryDirectory() as name:
        for found in PHASES[phase](options, Path(name)):
            rows += found
            write_part(options.output, result_of(part, time.perf_counter() - started, rows, notes), BULK)


def main(arguments: Sequence[str] | None = None) -> Path:
    """Measure an engine, and write its rows beside those of the other."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=20_000, help="rows of the runs that are timed or killed")
    parser.add_argument("--many", type=int, default=100_000, help="rows of the run whose memory is measured")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--engine", default="hf", choices=tuple(OF_ENGINE))
    parser.add_argument("--only", choices=tuple(PHASES), help="one phase; the other's rows stay")
    parser.add_argument("--guard", default="builtin:harm")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the result file")
    options = parser.parse_args(arguments)
    for phase in (options.only,) if options.only else PHASES:
        measure(phase, options)
    return options.output / BULK.file


if __name__ == "__main__":
    note(f"wrote {main()}")
