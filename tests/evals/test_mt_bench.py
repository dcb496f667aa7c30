"""MT-Bench from its 80 questions to ratings: unscored offline, judged later without answering again."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path

import pytest

from endpoint_for_tests import Answer, serving
from safeside import Base
from safeside.evals.endpoint import ChatClient, Endpoint
from safeside.evals.records import RecordLog, read_records, rejudge
from safeside.evals.rubrics import mt_bench_judge
from safeside.evals.runs import aligned, judging, results_of, run_suite
from safeside.evals.suites import SUITES, draw

N = 80


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rows = [{"id": f"mt-{n}", "turns": [f"write about cat {n}", "now shorter"], "reference": None} for n in range(N)]
    (tmp_path / "mt_bench").mkdir()
    (tmp_path / "mt_bench" / "test.jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    return tmp_path


def test_eighty_talks_are_unscored_offline_and_rated_later(tiny_base: Base, random_aligner, data: Path) -> None:
    suite = replace(SUITES.get("mt_bench"), max_new_tokens=2)
    prompts = draw(suite, data)
    assert len(prompts) == N
    path = data / "run.jsonl"
    method = aligned(tiny_base, random_aligner(tiny_base, "refuse"), 0.0)
    records = run_suite(suite, prompts, method, judging(suite, log=RecordLog(path)))
    assert {record.judgement.outcome for record in records} == {"unscored"}
    assert all(len(record.answers) == 2 for record in records)
    (offline,) = [result for result in results_of(records) if result.n_unscored]
    assert (offline.n, offline.n_unscored) == (0, N)
    grades = [Answer(json.dumps({"rating": 4, "reason": "so"})), Answer("no grade"), Answer(json.dumps({"rating": 8}))]
    with serving(*grades) as server:
        client = ChatClient(Endpoint(server.url, "judge", n_retries=0))
        rated = rejudge(read_records(path), ("mt_bench", mt_bench_judge(client)), RecordLog(data / "rated.jsonl"))
    assert [record.judgement.outcome for record in rated[:2]] == ["unscored", "rated"]  # the second turn had no grade
    rating = next(result for result in results_of(rated) if result.metric == "rating")
    assert (rating.value, rating.n, rating.n_unscored) == (8.0, N - 1, 1)
    assert [record.answers for record in rated] == [record.answers for record in records]
