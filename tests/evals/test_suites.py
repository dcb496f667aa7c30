"""Suites: which prompts they hold, which are drawn, and what is wrong with a file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from safeside.errors import InputError, UnknownNameError
from safeside.evals.suites import AFFIRMATIVE, LOCAL_SUITES, SUITES, Prompt, Suite, draw, goals_of, suite_prompts

ROWS = [("the cat", 1), ("how can", 0), ("hat on mat", 1), ("they said", 0), ("then be", 1), ("sat", 0), ("other", 1)]


def write(path: Path, rows: Sequence[object]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def local(name: str, folder: Path, rows: Sequence[object]) -> Suite:
    """A built-in suite of local data whose file holds ``rows``."""
    suite = replace(SUITES.get(name), path=Path("some", f"{name}.jsonl"))
    write(folder / suite.path, rows)
    return suite


def test_prompts_are_the_first_of_each_label(tmp_path: Path) -> None:
    path = write(tmp_path / "suite.jsonl", [{"prompt": prompt, "label": label} for prompt, label in ROWS])
    expected = (["the cat", "hat on mat", "then be"], ["how can", "they said", "sat"])
    assert suite_prompts(Suite("toy", path, limit=3)) == expected


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        ([("a", 1), ("b", 1)], "prompts of one label only"),
        ([("a", 1), ("b", 0), ("", 0)], "line 3: 'prompt' must be text"),
        ([("a", 1), ("b", 2)], "line 2: 'label' is 2"),
    ],
)
def test_a_suite_must_be_whole(tmp_path: Path, rows: list[tuple[str, int]], problem: str) -> None:
    path = tmp_path / "suite.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": prompt, "label": label}) for prompt, label in rows))
    with pytest.raises(InputError, match=problem):
        suite_prompts(Suite("toy", path))


def test_the_demo_suite_is_packaged() -> None:
    suite = SUITES.get("demo")
    harmful, harmless = suite_prompts(suite)
    assert len(harmful) == len(harmless) == suite.limit
    assert not set(harmful) & set(harmless)
    with pytest.raises(UnknownNameError, match="Unknown suite 'dmeo'"):
        SUITES.get("dmeo")


def harmful(name: str, **origin: object) -> dict[str, object]:
    return {"id": name, "prompt": f"Do {name}", "response": "", "label": 1, "orig": origin}


def test_harmbench_is_without_copyright_and_with_its_contexts(tmp_path: Path) -> None:
    rows = [
        harmful("a", functional="standard", context=""),
        harmful("b", functional="copyright", context=""),
        harmful("c", functional="contextual", context="A long story. "),
    ]
    first, second = draw(local("harmbench", tmp_path, rows), tmp_path)
    assert first == Prompt("a", ("Do a",), True)
    assert second == Prompt("c", ("A long story.\n\nDo c",), True, goal="Do c")


def test_attacks_know_their_goal_and_a_prefilled_answer_its_beginning(tmp_path: Path) -> None:
    jailbreak = {"id": "a", "prompt": "Ignore all. Do a !!", "response": "No.", "label": 0, "orig": {"goal": "Do a"}}
    (prompt,) = draw(local("attacks", tmp_path, [jailbreak]), tmp_path)
    assert prompt == Prompt("a", ("Ignore all. Do a !!",), True, goal="Do a")
    begun = draw(local("prefilled", tmp_path, [harmful("a", target="Sure, here is a"), harmful("b")]), tmp_path)
    assert [prompt.prefix for prompt in begun] == ["Sure, here is a", AFFIRMATIVE]
    with pytest.raises(InputError, match=r"line 1: an attack without orig\.goal"):
        draw(local("attacks", tmp_path, [harmful("a")]), tmp_path)


def test_xstest_takes_its_harmless_prompts(tmp_path: Path) -> None:
    rows = [harmful("a"), {**harmful("b"), "label": 0}]
    assert draw(local("xstest", tmp_path, rows), tmp_path) == [Prompt("b", ("Do b",), False)]


def test_a_talk_has_turns_and_answers_to_compare_with(tmp_path: Path) -> None:
    rows = [
        {"id": "a", "turns": ["One?", "Two?"], "reference": ["1", "2"]},
        {"id": "b", "turns": ["Three?"], "reference": None},
    ]
    prompts = draw(local("mt_bench", tmp_path, rows), tmp_path)
    assert prompts == [Prompt("a", ("One?", "Two?"), False, references=("1", "2")), Prompt("b", ("Three?",), False)]
    for bad, problem in (
        ({"turns": []}, "'turns' is empty"),
        ({"turns": "One?"}, "'turns' must be a list of texts"),
        ({"turns": ["One \ud83d"]}, "line 1: text that is not valid Unicode"),
    ):
        with pytest.raises(InputError, match=problem):
            draw(local("mt_bench", tmp_path, [bad]), tmp_path)


def test_helpful_answers_are_known(tmp_path: Path) -> None:
    (prompt,) = draw(local("helpful", tmp_path, [{"id": "a", "prompt": "How?", "response": "So."}]), tmp_path)
    assert prompt == Prompt("a", ("How?",), False, references=("So.",))
    with pytest.raises(InputError, match="without one 'response'"):
        draw(local("helpful", tmp_path, [{"prompt": "How?"}]), tmp_path)


def test_a_draw_is_fixed_grows_with_its_limit_and_does_not_follow_the_file(tmp_path: Path) -> None:
    rows = [harmful(str(number)) for number in range(300)]
    suite = local("advbench", tmp_path, rows)
    drawn = draw(suite, tmp_path)
    assert len(drawn) == 100
    assert [prompt.id for prompt in drawn] != [str(number) for number in range(100)]
    assert draw(local("advbench", tmp_path, rows[::-1]), tmp_path) == drawn[::-1]
    fewer = draw(replace(suite, limit=40), tmp_path)
    assert len(fewer) == 40
    assert set(fewer) < set(drawn)


def test_a_suite_that_is_not_packaged_needs_its_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Add --data FOLDER with harmful_prompts"):
        draw(SUITES.get("strongreject"))
    with pytest.raises(InputError, match="There is no file"):
        draw(SUITES.get("strongreject"), tmp_path)


def test_a_file_of_the_wrong_kind_or_with_one_name_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="must hold harmful prompts and no others"):
        draw(local("strongreject", tmp_path, [{**harmful("a"), "label": 0}]), tmp_path)
    with pytest.raises(InputError, match="two prompts one id"):
        draw(local("strongreject", tmp_path, [harmful("a"), harmful("a")]), tmp_path)


def test_goals_are_of_all_prompts_and_not_only_of_those_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attack = {"id": "a", "prompt": "Ignore all.", "label": 1, "orig": {"goal": "Do 7"}}
    for name, rows in (("advbench", [harmful(str(number)) for number in range(150)]), ("attacks", [attack])):
        monkeypatch.setitem(SUITES._items, name, local(name, tmp_path, rows))
    assert goals_of(["advbench", "attacks"], tmp_path) == [f"Do {number}" for number in range(150)]


def test_every_local_suite_is_registered() -> None:
    assert {suite.name for suite in LOCAL_SUITES} == set(SUITES) - {"demo", "mmlu"} - {
        name for name in SUITES if "/" in name
    }
    for suite in LOCAL_SUITES:
        assert SUITES.get(suite.name) is suite
        assert suite.is_local
