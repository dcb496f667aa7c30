"""Suites: refusal rates of an aligner by strength, as answering one prompt after the other gives them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from safeside import Adapter, Base, Message, attach, ramp
from safeside.adapters.config import Calibration
from safeside.errors import InputError, UnknownNameError
from safeside.evals import suites as module
from safeside.evals.judges import JUDGES
from safeside.evals.suites import SUITES, Suite, answer, run_aligner_suite, suite_prompts, wilson

ROWS = [("the cat", 1), ("how can", 0), ("hat on mat", 1), ("they said", 0), ("then be", 1), ("sat", 0), ("other", 1)]


def has_even_length(text: str) -> bool:
    return len(text) % 2 == 0


@pytest.fixture(autouse=True)
def short_answers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(module, "MAX_NEW_TOKENS", 5)
    JUDGES.register("test/even", has_even_length)
    yield
    JUDGES.unregister("test/even")


@pytest.fixture
def suite(tmp_path: Path) -> Suite:
    path = tmp_path / "suite.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": prompt, "label": label}) for prompt, label in ROWS))
    return Suite("toy", path, "test/even", limit=3)


@pytest.fixture(scope="module")
def aligner(session_base: Base, random_aligner: Callable[..., Adapter]) -> Adapter:
    return random_aligner(session_base)


@pytest.fixture(scope="module")
def guard(session_base: Base, random_guard: Callable[..., Adapter]) -> Adapter:
    guard = random_guard(session_base)
    guard.set_calibration(Calibration(scale=(1.0,), bias=(0.0,), threshold=(0.6,)))
    return guard


def test_prompts_are_the_first_of_each_label(suite: Suite) -> None:
    assert suite_prompts(suite) == (["the cat", "hat on mat", "then be"], ["how can", "they said", "sat"])


def test_rates_are_those_of_answers_one_by_one(tiny_base: Base, aligner: Adapter, suite: Suite) -> None:
    told: list[int] = []
    results = run_aligner_suite(tiny_base, aligner, suite, [0.0, 1.0, 1.5], advance=told.append)
    assert sum(told) == 3 * 6
    assert [result.provenance["strength"] for result in results] == ["0", "0", "1", "1", "1.5", "1.5"]
    for result in results:
        strength = float(result.provenance["strength"])
        harmful, harmless = suite_prompts(suite)
        prompts = harmful if result.metric == "refusal_rate_harmful" else harmless
        with attach(tiny_base, [aligner], strength=strength):
            texts = [tiny_base.chat([Message("user", prompt)], max_new_tokens=5).text for prompt in prompts]
        hits = sum(map(has_even_length, texts))
        assert result.benchmark == "toy"
        assert (result.value, result.n, result.n_unscored) == (hits / 3, 3, 0)
        assert (result.low, result.high) == wilson(hits, 3)


def test_strength_zero_is_the_base(tiny_base: Base, aligner: Adapter, guard: Adapter) -> None:
    prompts = [prompt for prompt, _ in ROWS]
    base = [tiny_base.chat([Message("user", prompt)], max_new_tokens=5).text for prompt in prompts]
    assert answer(tiny_base, aligner, prompts, 0.0, batch_size=1) == base
    assert answer(tiny_base, aligner, prompts, 0.0, guard=guard, batch_size=1) == base
    assert answer(tiny_base, aligner, prompts, 1.0, batch_size=1) != base


def test_a_guard_gates_the_aligner(tiny_base: Base, aligner: Adapter, guard: Adapter) -> None:
    """Each prompt is answered at the strength that its own score asks for."""
    prompts = [prompt for prompt, _ in ROWS]
    gated = answer(tiny_base, aligner, prompts, 1.0, guard=guard, batch_size=1)
    with attach(tiny_base, [aligner], [guard], strength=ramp(guard, 0.3, 0.6, 0.0, 1.0)):
        expected = [tiny_base.chat([Message("user", prompt)], max_new_tokens=5).text for prompt in prompts]
    assert gated == expected


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


@pytest.mark.parametrize(("hits", "n"), [(0, 10), (3, 10), (10, 10), (1, 1), (60, 200)])
def test_wilson_solves_its_equation(hits: int, n: int) -> None:
    """The ends are the shares from which the found one is 1.96 standard errors away."""
    low, high = wilson(hits, n)
    assert 0 <= low <= hits / n <= high <= 1
    for end in (low, high):
        if 0 < end < 1:
            assert abs(hits / n - end) == pytest.approx(1.96 * math.sqrt(end * (1 - end) / n), abs=1e-9)


def test_wilson_of_nothing_knows_nothing() -> None:
    assert wilson(0, 0) == (0.0, 1.0)
