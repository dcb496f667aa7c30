"""Bulk scoring: the lines of ``safeside guard``, by workers, with no row lost or doubled whatever is killed."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

from bulk_for_tests import read_jsonl, without_ray
from command_line import Ran, write
from safeside import Adapter, Base, Message, load_adapter, save_adapter
from safeside.cli import main
from safeside.errors import InputError
from safeside.guards.lines import BaseScorer, guard_lines
from safeside.guards.score import judge
from safeside.scale import bulk
from safeside.scale.bulk import score_shard
from safeside.scale.ledger import QUARANTINE, open_ledger
from safeside.scale.places import Folder
from safeside.scale.reading import Shard, Span, open_reader

SAME_SCORE = 1e-5  # other rows of a batch: another order of sums
pytestmark = [
    pytest.mark.timeout(600),  # Ray, and processes that import torch, on a machine that may be busy
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of Ray's own defaults
]


@pytest.fixture(scope="module")
def guard(session_base: Base, random_guard: Callable[..., Adapter], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_adapter(random_guard(session_base), tmp_path_factory.mktemp("guards") / "harm", session_base)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """Ray with two cores, whatever this machine has."""
    ray.init(address="local", num_cpus=2, num_gpus=0, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def command_in_a_session_of_its_own(words: Sequence[str]) -> None:
    """The command line, with Ray and workers of its own behind it."""
    os.setsid()
    os.environ["RAY_ADDRESS"] = "local"
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    sys.argv = ["safeside", *words]
    main()


def test_a_run_that_is_killed_goes_on_and_loses_and_doubles_no_row(
    run: Callable[..., Ran], tiny_base: Base, guard: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL of the command, Ray and all workers in the midst of it; then the same command again.

    The process is a fork of this one, which has imported all that a command needs, and stands before every test that
    starts Ray here.  The second command's worker is in this process: what it goes on from is the folder alone.
    """
    rows = [{"id": index, "text": f"the cat sat {index * 7919}"} if index % 50 else "{odd" for index in range(1, 301)]
    path, output = write(tmp_path / "rows.jsonl", rows), tmp_path / "scored"
    words = [*map(str, ["score", "--input", path, "--output", output, "--guard", guard, "--shard-rows", 10])]
    killed = multiprocessing.get_context("fork").Process(
        target=command_in_a_session_of_its_own, args=[words], daemon=True
    )
    killed.start()
    try:
        while not list(output.glob("part-*")):
            assert killed.is_alive(), "it ended before it had scored anything"
            time.sleep(0.005)
    finally:
        os.killpg(killed.pid, signal.SIGKILL)
    killed.join()
    n_before = len(read_jsonl(output))
    assert 0 < n_before < len(rows), "it was not killed in the midst"

    without_ray(monkeypatch)
    ended = run(*words, "--json")
    assert ended.code == 1  # some rows are bad
    assert ended.json["rows"] == len(rows)
    assert n_before <= ended.json["rows_before"] < len(rows)
    assert ended.json["n_bad"] == 6
    assert ended.json["peak_bytes"] > 1e6

    scored = read_jsonl(output)
    expected = [line for line, _ in guard_lines(tiny_base, [load_adapter(guard, tiny_base)], path)]
    assert [row["line"] for row in scored] == list(range(1, 301))
    for row, line in zip(scored, expected, strict=True):
        (found,), (wanted,) = row["verdicts"], line["verdicts"]
        assert row.get("id") == (row["line"] if row["line"] % 50 else None)
        assert row["file"] == str(path)
        assert found["score"] == (None if wanted["score"] is None else pytest.approx(wanted["score"], abs=SAME_SCORE))
        assert {**found, "score": 0} == {**wanted, "score": 0}
    quarantined = [json.loads(line) for line in (output / QUARANTINE).read_text().splitlines()]
    assert [row["line"] for row in quarantined] == list(range(50, 301, 50))
    assert all(row["row"] == "{odd" and "not JSON" in row["problem"] for row in quarantined)
    assert sorted(path.name for path in output.iterdir() if not path.name.startswith("part-")) == [
        "_bad", "_manifest.json", "_quarantine.jsonl", "_writer",
    ]  # fmt: skip
    whole = run(*words, "--json")
    assert (whole.json["rows_before"], whole.json["n_bad"]) == (len(rows), 6)
    assert read_jsonl(output) == scored


def test_parquet_comes_back_with_verdicts(tiny_base: Base, guard: Path, tmp_path: Path) -> None:
    """Of conversations too, and of a row that cannot be scored; another file system does as well."""
    talks: list[object] = [None, [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}], None]
    path = tmp_path / "rows.parquet"
    table = pa.table({"text": ["one", None, " "], "messages": talks, "id": [3, 5, 8]})
    pq.write_table(table, path)
    ledger = open_ledger(str(path), "memory://scored", {}, 10)
    scorer = BaseScorer(tiny_base, [load_adapter(guard, tiny_base)])
    (shard,) = ledger.shards
    score_shard(scorer, open_reader(shard.file), shard, ledger.folder)
    (tmp_path / "scored.parquet").write_bytes(ledger.folder.read(shard.part))
    scored = pq.read_table(tmp_path / "scored.parquet").to_pylist()
    assert [(row["id"], row["line"], row["messages"]) for row in scored] == [
        (values["id"], line, values["messages"]) for line, values in enumerate(table.to_pylist(), 1)
    ]
    one, talk, blank = ([verdict] for row in scored for verdict in row["verdicts"])
    asked = [(Message("user", "one"),), tuple(Message(**message) for message in talks[1])]
    for (found,), (wanted,) in zip((one, talk), judge(tiny_base, scorer.guards, asked), strict=True):
        assert found["score"] == pytest.approx(wanted.score, abs=SAME_SCORE)
        assert (found["task"], found["flagged"], found["threshold"]) == ("harm", wanted.flagged, wanted.threshold)
    assert (blank[0]["score"], blank[0]["flagged"]) == (None, True)
    assert ledger.done() == {0}
    assert ledger.finish() == 1
    assert json.loads(ledger.folder.read(QUARANTINE)) == {
        "file": str(path), "line": 3, "problem": "'text' must be text that is not empty; got ' '",
        "row": {"text": " ", "id": 8},
    }  # fmt: skip


def test_a_value_that_cannot_be_read_costs_its_own_row_alone(
    run: Callable[..., Ran], adapters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Text that is none, where it is read; a day too far off and an unknown time zone, where they are not."""
    without_ray(monkeypatch)
    whole = pa.array([b"one", b"\xff\xfe", b"two"], pa.binary())
    table = pa.table({
        "text": pa.Array.from_buffers(pa.string(), 3, whole.buffers()),
        "day": pa.array([10**9] * 3, pa.int32()).cast(pa.date32()),
        "when": pa.array([0, 1, 2], pa.timestamp("us", tz="Mars/Olympus")),
        "share": [float("nan")] * 3,
    })  # fmt: skip
    path, output = tmp_path / "rows.parquet", tmp_path / "out"
    pq.write_table(table, path)
    ended = run("score", "--input", path, "--output", output, "--guard", adapters / "harm", "--json")
    assert (ended.code, ended.json["rows"], ended.json["n_bad"]) == (1, 3, 1)
    scored = pq.read_table(output / "part-000000.parquet")
    assert scored.select(["text", "day", "when"]).equals(table.select(["text", "day", "when"]))
    verdicts = [verdict for (verdict,) in scored["verdicts"].to_pylist()]
    assert [verdict["score"] is None for verdict in verdicts] == [False, True, False]
    assert (verdicts[1]["flagged"], "column 'text' cannot be read" in verdicts[1]["reason"]) == (True, True)
    (kept,) = (json.loads(line) for line in (output / QUARANTINE).read_text().splitlines())
    assert kept["line"] == 2
    assert kept["row"] == {
        "text": "\ufffd\ufffd", "day": "<value out of range: 1000000000>", "when": "1970-01-01 00:00:00.000001Z",
        "share": None,
    }  # fmt: skip


def test_an_error_of_others_in_a_worker_says_where_it_was(
    run: Callable[..., Ran], adapters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_ray(monkeypatch)

    def breaking(scorer: BaseScorer, rows: object) -> None:
        raise ZeroDivisionError("no rows a second")

    monkeypatch.setattr(bulk, "judge_rows", breaking)
    path = write(tmp_path / "rows.jsonl", [{"text": "hi"}] * 4)
    ended = run("score", "--input", path, "--output", tmp_path / "out", "--guard", adapters / "harm", "--shard-rows", 3)
    assert ended.code == 2
    assert f"Scoring lines 1 to 3 of {path} failed: ZeroDivisionError: no rows a second" in ended.err


def test_a_shard_whose_rows_are_gone_is_an_error(tiny_base: Base, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [{"text": "one"}])
    shard = Shard(0, str(path), Span(1, 2, 2))
    with pytest.raises(InputError, match="has 1 rows from line 1 on where it had 2"):
        score_shard(BaseScorer(tiny_base, []), open_reader(str(path)), shard, Folder("memory://x"))


def test_mistakes_are_told(run: Callable[..., Ran], cluster: None, adapters: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [{"text": "hi"}])
    for more, problem in (
        (
            [adapters / "harm", "--engine", "vllm"],
            "This command needs 'vllm', which is not installed. Run: pip install 'safeside[vllm]'",
        ),
        ([adapters / "harm", "--vllm-option", "a=1"], "Engine 'hf' reads no --vllm-option"),
        ([adapters / "refuse"], "is an aligner and gives no scores"),
        ([adapters / "harm", "--workers", 3], "3 workers need a CPU each; Ray has 2"),
        ([adapters / "harm", "--device", "cuda"], "1 workers need a GPU each; Ray has 0"),
    ):
        ended = run("score", "--input", path, "--output", tmp_path / "out", "--guard", *more)
        assert (ended.code, problem in ended.err) == (2, True), ended.err


def test_shards_of_workers_that_died_are_counted(
    run: Callable[..., Ran], adapters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each shard is begun once more, as Ray has it where a worker is gone."""
    without_ray(monkeypatch, n_deaths=1)
    path = write(tmp_path / "rows.jsonl", [{"text": "hi"}] * 4)
    words = ["--input", path, "--output", tmp_path / "out", "--guard", adapters / "harm", "--shard-rows", 2, "--json"]
    assert run("score", *words).json["n_retried"] == 2


def test_guards_in_another_order_are_another_run(
    run: Callable[..., Ran], adapters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Verdicts stand in the order of the guards, and all parts of a run have one order."""
    without_ray(monkeypatch)
    words = ["--input", write(tmp_path / "rows.jsonl", [{"text": "hi"}]), "--output", tmp_path / "out"]
    assert run("score", *words, "--guard", adapters / "harm", "--guard", adapters / "two").code == 0
    again = run("score", *words, "--guard", adapters / "two", "--guard", adapters / "harm")
    assert (again.code, "a run with guards" in again.err) == (2, True), again.err


def test_ray_hands_every_shard_to_a_worker_and_gives_back_what_came_of_it(
    cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the end, with a worker that imports nothing: the real one is in the run that is killed."""

    class Echo:
        def __init__(self, options: object, claim: object, make: object) -> None:
            assert make.__name__ == "base_scorer", "of the engine that was asked for"
            self.claim = claim

        def __call__(self, values: dict[str, object]) -> dict[str, object]:
            number = values["number"]
            return {
                "error": "",
                "n_rows": number,
                "peak_bytes": number,
                "attempt": 1 + number // 9,
                "claim": self.claim,
            }

    monkeypatch.setattr(bulk, "Worker", Echo)
    advanced: list[int] = []
    options = SimpleNamespace(workers=1, engine="hf", setup=SimpleNamespace(device="cpu"))
    shards = [Shard(number, "rows.jsonl", Span(1, 1, 1)) for number in range(10)]
    ran = bulk._run(options, ("out", "writer"), shards, advanced.append)
    assert sorted(advanced) == list(range(10))
    assert ran == (9, 1)


def test_what_goes_wrong_in_a_worker_is_told_as_it_is(
    run: Callable[..., Ran],
    adapters: Path,
    tiny_folder: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An adapter of another base, which only the worker that loads both finds out."""

    without_ray(monkeypatch)
    path = write(tmp_path / "rows.jsonl", [{"text": "hi"}])
    words = ["--input", path, "--output", tmp_path / "out", "--guard", adapters / "harm"]
    refused = run("score", *words, "--base", tiny_folder("qwen2"))
    assert refused.code == 1
    assert "Load the base that it was made for" in refused.err
    assert run("score", *words, "--preset", "strict").code == 2
    assert run("score", *words).code == 0  # another run may have the folder: those kept nothing
