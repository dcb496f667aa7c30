"""MMLU through lm-eval, against likelihoods taken by hand.  The command's part is tested without it, too."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from safeside import Base, attach
from safeside.errors import InputError
from safeside.evals.methods import Aligned, aligned
from safeside.evals.suites import SUITES, Prompt, choices
from safeside.mixing import as_policy, step

needs_lm_eval = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="the extra bench is not here")
SUBJECTS = ("anatomy", "astronomy")


def question(index: int, text: str = "") -> dict[str, object]:
    return {
        "id": f"q{index}",
        "subject": SUBJECTS[index % 2],
        "question": text or f"which cat sat on mat {index}",
        "choices": ["the first", "that one", f"number {index}", "they all"],
        "answer": "ABCD"[index % 4],
    }


@pytest.fixture
def data(tmp_path: Path) -> Path:
    import gzip

    (tmp_path / "mmlu").mkdir()
    long = question(9, "how " * 400)
    for split, rows in (("test", [*map(question, range(8)), long]), ("dev", [question(n) for n in (20, 21)])):
        text = "\n".join(map(json.dumps, rows)).encode()
        (tmp_path / "mmlu" / f"{split}.jsonl.gz").write_bytes(gzip.compress(text))
    return tmp_path


def letters_by_hand(method: Aligned, row: dict[str, object], n_prompt_known: bool) -> str:
    """The letter with the highest likelihood behind lm-eval's prompt, run one by one."""
    subject, listed = row["subject"], row["choices"]
    shown = "\n".join(f"{letter}. {text}" for letter, text in zip("ABCD", listed, strict=True))
    prompt = (
        f"The following are multiple choice questions (with answers) about {subject}.\n\n"
        f"{row['question']}\n{shown}\nAnswer:"
    )
    base, totals = method.base, {}
    with attach(base, [method.aligner], list(method.guards), strength=method.policy) as attachment, torch.no_grad():
        for letter in "ABCD":
            context, whole = (base.tokenizer(text).input_ids for text in (prompt, f"{prompt} {letter}"))
            ids = torch.tensor([whole[:-1]])
            with attachment.request(prompt_end=[ids.shape[1]] if n_prompt_known else None):
                logits = base.model(ids).logits[0].log_softmax(-1)
            targets = whole[len(context) :]
            places = range(len(context) - 1, len(whole) - 1)
            totals[letter] = sum(float(logits[place, token]) for place, token in zip(places, targets, strict=True))
    return max(totals, key=totals.__getitem__)


@needs_lm_eval
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["fixed", "latched"])
def test_answers_are_those_of_likelihoods_by_hand(
    tiny_base: Base, random_aligner, random_guard, data: Path, kind: str
) -> None:
    from safeside.evals.mmlu import answer_questions, run_mmlu

    aligner, guard = random_aligner(tiny_base, "refuse"), random_guard(tiny_base, "harm")
    method = aligned(tiny_base, aligner, 1.0)
    if kind == "latched":
        method = Aligned(tiny_base, aligner, step(guard, 0.0, high=0.7), (guard,))
    found = {one.id: one.is_right for one in answer_questions(method, data)}
    expected = {
        str(row["id"]): letters_by_hand(method, row, kind == "latched") == row["answer"]
        for row in map(question, range(8))
    }
    assert found == {**expected, "q9": None}
    result = run_mmlu(method, data)
    assert (result.n, result.n_unscored, result.value) == (8, 1, sum(expected.values()) / 8)
    assert result.low <= result.value <= result.high


@needs_lm_eval
@pytest.mark.filterwarnings("ignore")
def test_an_unknown_subject_is_told(tiny_base: Base, random_aligner, data: Path) -> None:
    from safeside.evals.mmlu import run_mmlu

    path = data / "mmlu" / "test.jsonl.gz"
    path.unlink()
    import gzip

    path.write_bytes(gzip.compress(json.dumps({**question(0), "subject": "juggling"}).encode()))
    method = Aligned(tiny_base, random_aligner(tiny_base, "refuse"), as_policy(0.0))
    with pytest.raises(InputError, match="lm-eval knows no subject 'juggling'"):
        run_mmlu(method, data)


def test_a_question_has_four_choices_and_a_letter() -> None:
    assert choices(question(2), 1) == Prompt(
        "q2",
        ("which cat sat on mat 2\nA. the first\nB. that one\nC. number 2\nD. they all",),
        False,
        references=("C",),
    )
    for change, problem in (
        ({"choices": ["a"]}, "expected four texts"),
        ({"answer": 2}, "expected one of A, B, C, D"),
        ({"question": " "}, "must be text"),
    ):
        with pytest.raises(InputError, match=problem):
            choices({**question(0), **change}, 1)
    assert SUITES.get("mmlu").measure == "choices"


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is not None, reason="the extra bench is here")
def test_without_the_extra_the_line_that_installs_it_is_told(run, adapters: Path, data: Path) -> None:
    found = run("eval", adapters / "refuse", "--suite", "mmlu", "--data", data)
    assert found.code == 2
    assert "pip install 'safeside[bench]'" in found.err


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--judge", "refusal_phrases"], "has no answers; --judge is for others"),
        (["--records", "run.jsonl"], "has no answers; --records is for others"),
    ],
)
def test_what_a_suite_of_choices_does_not_read_is_refused(run, adapters: Path, data: Path, words, problem: str) -> None:
    found = run("eval", adapters / "refuse", "--suite", "mmlu", "--data", data, *words)
    assert (found.code, problem in found.err) == (2, True)
    assert "Add --data FOLDER" in run("eval", adapters / "refuse", "--suite", "mmlu").err
