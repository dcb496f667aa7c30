"""The command line on aligners: suites, judges, records and what can be wrong with them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from command_line import Ran, texts, write
from endpoint_for_tests import Answer, serving
from safeside.evals import runs
from safeside.evals.records import read_records
from safeside.evals.suites import SUITES


@pytest.fixture
def suite_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of local data with some suites, and very short answers."""
    monkeypatch.setattr(runs, "MAX_NEW_TOKENS", 4)
    rows = [{"id": f"row {index}", "prompt": text, "label": 1} for index, text in enumerate(texts())]
    talks = [{"id": "a", "turns": ["the cat", "and then"], "reference": None}]
    helpful = [{"id": row["id"], "prompt": row["prompt"], "response": "sat on the mat"} for row in rows]
    for name, values in (("strongreject", rows), ("mt_bench", talks), ("helpful", helpful)):
        path = tmp_path / "data" / SUITES.get(name).path
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, values)
    monkeypatch.setitem(SUITES._items, "mt_bench", replace(SUITES.get("mt_bench"), max_new_tokens=4))
    return tmp_path / "data"


def test_eval_keeps_records_goes_on_and_judges_them_again(
    run: Callable[..., Ran], adapters: Path, suite_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run.jsonl"
    words = ("eval", adapters / "refuse", "--suite", "strongreject", "--data", suite_folder, "--strengths", "0,1")
    first = run(*words, "--limit", 5, "--records", path, "--json")
    assert first.code == 0
    assert [(row["strength"], row["metric"], row["judge"], row["n"]) for row in first.json] == [
        (strength, "refusal_rate_harmful", "refusal_phrases", 5) for strength in (0.0, 1.0)
    ]
    lines = path.read_text().splitlines(keepends=True)
    assert len(lines) == 10
    path.write_text("".join(lines[:7]) + lines[7][:50])
    again = run(*words, "--limit", 5, "--records", path, "--json")
    assert again.json == first.json
    assert path.read_text() == "".join(lines)
    assert "the last line was cut off" in again.err
    monkeypatch.setenv("SAFESIDE_JUDGE_KEY", "secret-key")
    with serving(Answer('{"refused": 0, "convincing": 3, "specific": 3}'), Answer("garbage")) as server:
        asked = ("--judge", "strongreject", "--endpoint", server.url, "--judge-model", "grader", "--json")
        judged = run("eval", "--rejudge", path, *asked)
        assert server.asked[0]["authorization"] == "Bearer secret-key"
    assert judged.code == 1  # nine replies were garbage
    figures = {(row["strength"], row["metric"]): row for row in judged.json}
    assert figures[0.0, "harm_score"]["value"] == 0.5
    assert [figures[strength, "refusal_rate_harmful"]["n_unscored"] for strength in (0.0, 1.0)] == [4, 5]
    kept = (tmp_path / "run.strongreject.jsonl").read_text()
    assert len(kept.splitlines()) == 10
    assert "secret-key" not in kept
    back = Answer('{"refused": 1, "convincing": 1, "specific": 1, "reason": "cut \\ud83d"}')
    with serving(back) as server:  # the endpoint is back: the same command asks it for what was unscored, and no more
        recovered = run("eval", "--rejudge", path, *asked[:3], server.url, *asked[4:])
        assert len(server.asked) == 9
    assert recovered.code == 0
    assert {row["n_unscored"] for row in recovered.json} == {0}
    assert [one.judgement.reason for one in read_records(tmp_path / "run.strongreject.jsonl")[1:]] == ["cut \ufffd"] * 9
    assert path.read_text() == "".join(lines)


def test_eval_of_talks_offline_is_unscored(run: Callable[..., Ran], adapters: Path, suite_folder: Path) -> None:
    words = ("eval", adapters / "refuse", "--suite", "mt_bench", "--data", suite_folder, "--strengths", "1", "--json")
    offline = run(*words)
    assert offline.code == 1
    assert [(row["value"], row["n"], row["n_unscored"]) for row in offline.json] == [(None, 0, 1)]
    with serving(Answer('{"rating": 6}')) as server:
        graded = run(*words, "--endpoint", server.url, "--judge-model", "grader")
    assert graded.code == 0
    assert [(row["metric"], row["value"], row["n"]) for row in graded.json] == [("rating", 6.0, 1)]


def test_eval_counts_wins_and_ties_against_records(
    run: Callable[..., Ran], adapters: Path, suite_folder: Path, tmp_path: Path
) -> None:
    talks = [{"id": name, "turns": ["the cat"], "reference": None} for name in "abc"]
    write(suite_folder / SUITES.get("mt_bench").path, talks)
    words = ("eval", adapters / "refuse", "--suite", "mt_bench", "--data", suite_folder, "--json")
    base, path = tmp_path / "base.jsonl", tmp_path / "run.jsonl"
    offline = run(*words, "--strengths", "0", "--records", base)
    assert offline.code == 1
    unscored = run(*words, "--strengths", "1", "--compare", base)
    rates = [row for row in unscored.json if row["metric"] == "win_rate"]
    assert [(row["value"], row["n"], row["n_unscored"]) for row in rates] == [(None, 0, 3)]
    assert unscored.code == 1
    with serving(*(Answer(json.dumps({"rating": grade})) for grade in (5, 5, 5, 6, 5, 4))) as server:
        asked = ("--endpoint", server.url, "--judge-model", "grader")
        graded = run(*words, "--strengths", "1", "--records", path, "--compare", base, *asked)
        assert len(server.asked) == 6
        assert graded.code == 0
        again = run(*words, "--strengths", "1", "--records", path, "--compare", base, *asked)
        later = run("eval", "--rejudge", path, "--judge", "mt_bench", "--compare", base, *asked, "--json")
        assert len(server.asked) == 6  # every grade is kept
    assert graded.json == again.json == later.json
    rates = {row["metric"]: (row["value"], row["n"], row["n_unscored"], row["against"]) for row in graded.json[-3:]}
    assert rates == dict.fromkeys(("win_rate", "tie_rate", "loss_rate"), (1 / 3, 3, 0, "refuse at 0"))
    path.write_text(path.read_text() + (tmp_path / "base.mt_bench.jsonl").read_text())  # a run of several strengths
    alone = run("eval", "--rejudge", path, "--judge", "mt_bench", "--compare", path, "--json")
    assert alone.json[-3:] == graded.json[-3:]


def test_eval_of_likelihoods_compares_with_strength_zero(
    run: Callable[..., Ran], adapters: Path, suite_folder: Path
) -> None:
    ran = run("eval", adapters / "refuse", "--suite", "helpful", "--data", suite_folder, "--strengths", "1", "--json")
    assert ran.code == 0
    zero, one = ran.json
    assert (zero["metric"], zero["strength"], zero["value"]) == ("utility", 0.0, 1.0)
    assert (one["strength"], one["n"]) == (1.0, len(texts()))
    assert one["low"] <= one["value"] <= one["high"] != 1.0


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["eval"], "one of ADAPTER and --rejudge FILE; got neither or both"),
        (["eval", "ADAPTERS/refuse", "--rejudge", "x.jsonl"], "one of ADAPTER and --rejudge FILE"),
        (["eval", "--rejudge", "x.jsonl", "--suite", "demo"], "--suite is for adapters"),
        (["eval", "--rejudge", "x.jsonl"], "--rejudge needs --judge NAME"),
        (["eval", "--rejudge", "x.jsonl", "--judge", "refusal_phrases"], "Cannot read records from x.jsonl"),
        (["eval", "--rejudge", "x", "--judge", "refusal_phrases", "--records", "x"], "would be written while it is"),
        (["eval", "ADAPTERS/refuse", "--suite", "xstest"], "not packaged. Add --data FOLDER"),
        (["eval", "ADAPTERS/refuse", "--suite", "demo", "--judge", "strongreject"], "Add --endpoint URL"),
        (["eval", "ADAPTERS/refuse", "--suite", "demo", "--judge", "none"], "Unknown judge 'none'"),
        (["eval", "ADAPTERS/refuse", "--suite", "demo", "--endpoint", "http://x/v1"], "needs --endpoint URL and"),
        (["eval", "ADAPTERS/refuse", "--suite", "demo", "--endpoint", "x", "--judge-model", "y"], "is an address such"),
        (["eval", "ADAPTERS/harm", "--suite", "demo", "--judge", "refusal_phrases"], "--judge is for aligners"),
        (["eval", "ADAPTERS/harm", "--suite", "demo", "--records", "x.jsonl"], "--records is for aligners"),
        (["eval", "ADAPTERS/harm", "--suite", "demo", "--compare", "x.jsonl"], "--compare is for aligners"),
        (["eval", "ADAPTERS/refuse", "--suite", "demo", "--compare", "x.jsonl"], "Cannot read records from x.jsonl"),
        (["eval", "ADAPTERS/harm", "--suite", "xstest", "--data", "x"], "suite 'xstest' is for aligners"),
        (["eval", "ADAPTERS/refuse", "--suite", "demo", "--limit", "0"], "Invalid value for '--limit'"),
    ],
)
def test_eval_mistakes_are_explained(run: Callable[..., Ran], adapters: Path, words: list[str], problem: str) -> None:
    ran = run(*(word.replace("ADAPTERS", str(adapters)) for word in words))
    assert ran.code == 2
    assert problem in ran.err
