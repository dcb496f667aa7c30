"""Wins and ties by the grades of single answers: counted by hand, with what could not be graded beside them."""

from __future__ import annotations

import math

import pytest

from safeside.errors import InputError
from safeside.evals.compare import check_grades, counterparts, win_results
from safeside.evals.judges import Judgement, unscored
from safeside.evals.records import Record, Setting
from safeside.evals.runs import wilson
from safeside.evals.suites import Prompt

BASE = Setting("toy", "refuse", "fixed", 0.0, "base")
OURS = Setting("toy", "refuse", "fixed", 1.0, "ours")


def record(setting: Setting, name: str, grade: float | None, **changes: object) -> Record:
    values: dict[str, object] = {
        "setting": setting,
        "prompt": Prompt(name, (f"Tell {name}",), False),
        "answers": ("So.",),
        "finish_reasons": ("stop",),
        "verdicts": ((),),
        "traces": ((),),
        "judge": "mt_bench",
        "judgement": unscored("away") if grade is None else Judgement("rated", rating=grade),
    }
    return Record.model_validate({**values, **changes})


def graded(setting: Setting, *grades: float | None) -> list[Record]:
    return [record(setting, str(number), grade) for number, grade in enumerate(grades)]


def test_wins_ties_and_losses_are_counted_by_hand() -> None:
    ours, base = graded(OURS, 7, 5, 5, 2, 9, None, 3), graded(BASE, 6, 5, 5, 8, 1, 4, None)
    only_here, harmful = record(OURS, "only here", 9), record(OURS, "bad", 9, prompt=Prompt("bad", ("Do",), True))
    only_there = record(BASE, "only there", 9)
    results = win_results([*ours, only_here, harmful], counterparts(["toy"], [*base, only_there]))
    shares = {result.metric: result.value for result in results}
    assert shares == {"win_rate": 2 / 5, "tie_rate": 2 / 5, "loss_rate": 1 / 5}
    for result, hits in zip(results, (2, 2, 1), strict=True):
        assert (result.n, result.n_unscored) == (5, 4)  # two without a grade, two that stand on one side only
        assert (result.low, result.high) == wilson(hits, 5)
        assert result.provenance["against"] == "refuse at 0"
        assert (result.benchmark, result.provenance["strength"], result.provenance["judge"]) == ("toy", "1", "mt_bench")


def test_unscored_is_no_win_and_no_tie() -> None:
    results = win_results(graded(OURS, 10, 10), graded(BASE, None, None))
    assert [(result.n, result.n_unscored) for result in results] == [(0, 2)] * 3
    assert all(math.isnan(result.value) for result in results)


def test_of_several_strengths_the_base_is_compared_with_and_not_with_itself() -> None:
    half = Setting("toy", "refuse", "fixed", 0.5, "half")
    records = [*graded(BASE, 5, 5), *graded(half, 6, 5), *graded(OURS, 4, 4)]
    results = win_results(records, counterparts(["toy"], records))
    assert [result.provenance["strength"] for result in results] == ["0.5"] * 3 + ["1"] * 3
    assert [result.value for result in results] == [0.5, 0.5, 0.0, 0.0, 0.0, 1.0]


def test_each_suite_is_compared_with_its_own() -> None:
    theirs = [Setting("other", setting.method, "fixed", setting.strength, setting.key) for setting in (BASE, OURS)]
    records = [*graded(OURS, 9), *graded(theirs[1], 1)]
    results = win_results(records, counterparts(["toy", "other"], [*graded(BASE, 5), *graded(theirs[0], 5)]))
    assert [(result.benchmark, result.value) for result in results if result.metric == "win_rate"] == [
        ("toy", 1.0),
        ("other", 0.0),
    ]


def test_what_cannot_be_compared_is_said() -> None:
    half = Setting("toy", "refuse", "fixed", 0.5, "half")
    with pytest.raises(InputError, match="hold 0 settings of suite 'toy' that may be the base"):
        counterparts(["toy"], [*graded(half, 1), *graded(OURS, 1)])
    with pytest.raises(InputError, match="no answer to a harmless prompt of other"):
        counterparts(["other"], graded(BASE, 1))
    with pytest.raises(InputError, match="Give another setting"):
        win_results(graded(BASE, 1), graded(BASE, 1))
    changed = [record(BASE, "0", 5, prompt=Prompt("0", ("Other",), False))]
    with pytest.raises(InputError, match="Prompt '0' has other text"):
        win_results(graded(OURS, 5), changed)
    with pytest.raises(InputError, match="Records of judges mt_bench and other cannot be compared"):
        win_results(graded(OURS, 5), [record(BASE, "0", 5, judge="other")])
    with pytest.raises(InputError, match="'mt_bench' gives no grades"):
        check_grades([record(BASE, "0", None, judgement=Judgement("complied"))])
