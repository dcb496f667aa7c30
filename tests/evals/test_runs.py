"""Runs: what answering one prompt after the other gives, kept in records that a killed run goes on with."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from safeside import Adapter, Base, Message, attach, ramp
from safeside.adapters.config import Calibration
from safeside.errors import InputError, NotFiniteError
from safeside.evals import runs as module
from safeside.evals.judges import JUDGES, Exchange, Judgement, by_refusal, unscored
from safeside.evals.likelihood import Likelihood
from safeside.evals.methods import Aligned, aligned
from safeside.evals.records import Record, RecordLog, read_records
from safeside.evals.runs import Judging, judging, results_of, run_aligner_suite, run_suite, wilson
from safeside.evals.suites import Prompt, Suite, answered, draw, suite_prompts
from safeside.types import Completion

ROWS = [("the cat", 1), ("how can", 0), ("hat on mat", 1), ("they said", 0), ("then be", 1), ("sat", 0), ("other", 1)]


def has_even_length(text: str) -> bool:
    return len(text) % 2 == 0


@pytest.fixture(autouse=True)
def short_answers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(module, "MAX_NEW_TOKENS", 5)
    JUDGES.register("test/even", by_refusal(has_even_length))
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


def one_by_one(base: Base, prompts: list[str]) -> list[str]:
    return [base.chat([Message("user", prompt)], max_new_tokens=5).text for prompt in prompts]


def answers(records: list[Record]) -> list[str]:
    return [record.answers[-1] for record in records]


def alone(name: str = "test/even", log: RecordLog | None = None) -> Judging:
    """Judges one prompt at a time, so that no padding can move a tie."""
    judged = judging(Suite("toy", Path(), name), log=log)
    return Judging(judged.name, judged.judge, judged.log, batch_size=1)


def test_strength_zero_is_the_base(tiny_base: Base, aligner: Adapter, guard: Adapter, suite: Suite) -> None:
    prompts = draw(suite)
    base = one_by_one(tiny_base, [prompt.turns[0] for prompt in prompts])
    assert answers(run_suite(suite, prompts, aligned(tiny_base, aligner, 0.0), alone())) == base
    assert answers(run_suite(suite, prompts, aligned(tiny_base, aligner, 0.0, guard), alone())) == base
    assert answers(run_suite(suite, prompts, aligned(tiny_base, aligner, 1.0), alone())) != base


def test_a_guard_gates_the_aligner(tiny_base: Base, aligner: Adapter, guard: Adapter, suite: Suite) -> None:
    """Each prompt is answered at the strength that its own score asks for, and the record says which."""
    prompts = draw(suite)
    gated = run_suite(suite, prompts, aligned(tiny_base, aligner, 1.0, guard), alone())
    with attach(tiny_base, [aligner], [guard], strength=ramp(guard, 0.3, 0.6, 0.0, 1.0)):
        expected = [tiny_base.chat([Message("user", prompt.turns[0])], max_new_tokens=5) for prompt in prompts]
    assert answers(gated) == [completion.text for completion in expected]
    assert [record.traces for record in gated] == [(completion.traces,) for completion in expected]
    assert [record.verdicts for record in gated] == [(completion.verdicts,) for completion in expected]
    assert {(record.setting.policy, record.setting.strength) for record in gated} == {("ramp", 1.0)}


def test_an_answer_goes_on_from_the_beginning_it_was_given(tiny_base: Base, aligner: Adapter, suite: Suite) -> None:
    prompt = Prompt("one", ("the cat",), True, prefix="then they")
    (record,) = run_suite(suite, [prompt], aligned(tiny_base, aligner, 1.0), alone())
    ids = [*tiny_base.encode([Message("user", "the cat")]).ids, *tiny_base.tokenizer("then they").input_ids]
    with attach(tiny_base, [aligner], strength=1.0):
        for _ in range(5):
            ids.append(int(tiny_base.model(torch.tensor([ids])).logits[0, -1].argmax()))
    continued = tiny_base.tokenizer.decode(ids[-5:], skip_special_tokens=True).strip()
    assert record.exchange.own_answer == continued
    assert record.answers == (f"then they {continued}".strip(),)


def test_each_turn_is_answered_in_the_light_of_those_before(tiny_base: Base, aligner: Adapter, suite: Suite) -> None:
    prompts = [Prompt("two", ("the cat", "and then"), False), Prompt("one", ("how can",), False)]
    two, one = run_suite(suite, prompts, aligned(tiny_base, aligner, 0.0), alone())
    first = tiny_base.chat([Message("user", "the cat")], max_new_tokens=5).text
    talk = [Message("user", "the cat"), Message("assistant", first), Message("user", "and then")]
    assert two.answers == (first, tiny_base.chat(talk, max_new_tokens=5).text)
    assert len(one.answers) == 1
    together = judging(suite)
    assert run_suite(suite, prompts, aligned(tiny_base, aligner, 0.0), together) == [two, one]


class Counting:
    """A method that counts what it is asked, and dies after some batches."""

    def __init__(self, method: Aligned, dies_after: int | None = None) -> None:
        self.method, self.dies_after = method, dies_after
        self.asked: list[str] = []
        self.name, self.policy_name = method.name, method.policy_name
        self.strength, self.key = method.strength, method.key

    def answers(self, conversations: Sequence[Sequence[Message]], max_new_tokens: int) -> list[Completion]:
        if self.dies_after is not None and len(self.asked) >= self.dies_after:
            raise KeyboardInterrupt
        self.asked += [messages[0].content for messages in conversations]
        return self.method.answers(conversations, max_new_tokens)

    def likelihoods(self, conversations: Sequence[Sequence[Message]]) -> list[Likelihood]:
        return self.method.likelihoods(conversations)


def test_a_killed_run_goes_on_where_it_stopped(tiny_base: Base, aligner: Adapter, suite: Suite, tmp_path: Path) -> None:
    path, prompts = tmp_path / "new" / "records.jsonl", draw(suite)
    method = aligned(tiny_base, aligner, 1.0)
    whole = run_suite(suite, prompts, method, alone())
    killed = Counting(method, dies_after=4)
    with pytest.raises(KeyboardInterrupt):
        run_suite(suite, prompts, killed, alone(log=RecordLog(path)))
    with path.open("ab") as handle:  # killed in the middle of a line
        handle.write(whole[4].model_dump_json().encode()[:100])
    told: list[str] = []
    resumed, advanced = Counting(method), []
    found = run_suite(suite, prompts, resumed, alone(log=RecordLog(path, told.append)), advanced.append)
    assert resumed.asked == [prompt.turns[0] for prompt in prompts[4:]]
    assert found == whole == read_records(path)
    assert advanced == [1] * len(prompts)
    assert any("cut off" in text for text in told)
    again = Counting(method)
    assert run_suite(suite, prompts, again, alone(log=RecordLog(path))) == whole
    assert again.asked == []


def test_answers_that_a_judge_left_unscored_are_judged_again_and_not_made_again(
    tiny_base: Base, aligner: Adapter, suite: Suite, tmp_path: Path
) -> None:
    path, prompts = tmp_path / "records.jsonl", draw(suite)
    away = Judging("grader", lambda exchange: unscored("away"), RecordLog(path))
    first = run_suite(suite, prompts, aligned(tiny_base, aligner, 1.0), away)
    method, advanced = Counting(aligned(tiny_base, aligner, 1.0)), list[int]()
    back = Judging("grader", lambda exchange: Judgement("complied"), RecordLog(path))
    found = run_suite(suite, prompts, method, back, advanced.append)
    assert (method.asked, sum(advanced)) == ([], len(prompts))
    assert answers(found) == answers(first)
    assert {record.judgement.outcome for record in found} == {"complied"}
    assert read_records(path) == found


def test_what_was_judged_before_a_run_was_killed_in_a_batch_is_kept(
    tiny_base: Base, aligner: Adapter, suite: Suite, tmp_path: Path
) -> None:
    path, prompts = tmp_path / "records.jsonl", draw(suite)

    def dies(exchange: Exchange) -> Judgement:
        if exchange.turns == prompts[2].turns:
            raise KeyboardInterrupt
        return Judgement("complied")

    with pytest.raises(KeyboardInterrupt):
        run_suite(suite, prompts, aligned(tiny_base, aligner, 1.0), Judging("grader", dies, RecordLog(path)))
    assert len(read_records(path)) == 2


def test_answers_of_another_setting_are_not_taken(
    tiny_base: Base, aligner: Adapter, suite: Suite, tmp_path: Path, random_aligner: Callable[..., Adapter]
) -> None:
    """Another strength, other weights under one name, longer answers: all are made anew, beside the old ones."""
    path, prompts = tmp_path / "records.jsonl", draw(suite)[:2]
    retrained = random_aligner(tiny_base, seed=7)
    assert retrained.name == aligner.name
    for n, (adapter, strength) in enumerate([(aligner, 1.0), (aligner, 0.5), (retrained, 1.0)], 1):
        method = Counting(aligned(tiny_base, adapter, strength))
        run_suite(suite, prompts, method, alone(log=RecordLog(path)))
        assert len(method.asked) == 2
        assert len(read_records(path)) == 2 * n
    longer = Counting(aligned(tiny_base, aligner, 1.0))
    run_suite(replace(suite, max_new_tokens=7), prompts, longer, alone(log=RecordLog(path)))
    assert len(longer.asked) == 2


def test_records_of_other_prompts_or_of_another_judge_are_refused(
    tiny_base: Base, aligner: Adapter, suite: Suite, tmp_path: Path
) -> None:
    path, prompts = tmp_path / "records.jsonl", draw(suite)
    method = aligned(tiny_base, aligner, 1.0)
    run_suite(suite, prompts, method, alone(log=RecordLog(path)))
    with pytest.raises(InputError, match="was judged by 'test/even', not by 'refusal_phrases'"):
        run_suite(suite, prompts, method, alone("refusal_phrases", RecordLog(path)))
    changed = [replace(prompts[0], turns=("other",))]
    with pytest.raises(InputError, match="with other text"):
        run_suite(suite, changed, method, alone(log=RecordLog(path)))


def test_a_prompt_that_is_too_long_is_unscored_and_the_others_go_on(
    tiny_base: Base, aligner: Adapter, suite: Suite
) -> None:
    prompts = [*draw(suite), Prompt("long", ("cat " * 900,), True)]
    records = run_suite(suite, prompts, aligned(tiny_base, aligner, 1.0), judging(suite))
    assert records[:-1] == run_suite(suite, prompts[:-1], aligned(tiny_base, aligner, 1.0), judging(suite))
    assert records[-1].judgement.outcome == "unscored"
    assert "nothing is cut silently" in records[-1].judgement.reason
    harmful = results_of(records)[0]
    assert (harmful.metric, harmful.n, harmful.n_unscored) == ("refusal_rate_harmful", 3, 1)


def test_a_delta_that_is_not_a_number_ends_the_run(
    tiny_base: Base, random_aligner: Callable[..., Adapter], suite: Suite
) -> None:
    broken = random_aligner(tiny_base)
    with torch.no_grad():
        next(iter(broken.head.parameters())).fill_(float("nan"))
    with pytest.raises(NotFiniteError):
        run_suite(suite, draw(suite), aligned(tiny_base, broken, 1.0), judging(suite))


def test_figures_leave_out_what_is_unscored_and_count_it(tiny_base: Base, aligner: Adapter, suite: Suite) -> None:
    said = {
        "the cat": Judgement("refused", harm=0.0),
        "hat on mat": Judgement("complied", harm=0.75),
        "then be": Judgement("unscored", "the endpoint was away"),
        "how can": Judgement("rated", rating=7.0),
        "they said": Judgement("rated", rating=4.0),
        "sat": Judgement("unscored", "no"),
    }
    judged = Judging("told", lambda exchange: said[exchange.turns[0]], RecordLog())
    results = results_of(run_suite(suite, draw(suite), aligned(tiny_base, aligner, 1.0), judged))
    assert [(one.metric, one.value, one.n, one.n_unscored) for one in results] == [
        ("refusal_rate_harmful", 0.5, 2, 1),
        ("harm_score", 0.375, 2, 1),
        ("rating", 5.5, 2, 1),
    ]
    nothing = Judging("told", lambda exchange: Judgement("unscored", "away"), RecordLog())
    results = results_of(run_suite(suite, draw(suite), aligned(tiny_base, aligner, 1.0), nothing))
    assert [(one.n, one.n_unscored, one.low, one.high) for one in results] == [(0, 3, 0.0, 1.0)] * 2
    assert all(math.isnan(one.value) for one in results)


def test_utility_is_one_at_strength_zero(tiny_base: Base, aligner: Adapter, tmp_path: Path) -> None:
    path = tmp_path / "helpful.jsonl"
    rows = [{"prompt": prompt, "response": f"{prompt} and then"} for prompt, _ in ROWS]
    path.write_text("\n".join(json.dumps(row) for row in [*rows, {"prompt": "x", "response": "cat " * 900}]))
    helpful = Suite("toy", path, "", read=answered, holds="harmless", measure="likelihood")
    zero, one = run_aligner_suite(tiny_base, aligner, helpful, [0.0, 1.0])
    assert (zero.metric, zero.value, zero.low, zero.high) == ("utility", 1.0, 1.0, 1.0)
    assert (one.metric, one.n, one.n_unscored) == ("utility", len(ROWS), 1)
    assert one.value != 1.0
    assert one.low <= one.value <= one.high
    (alone,) = run_aligner_suite(tiny_base, aligner, helpful, [1.0])
    assert math.isnan(alone.value)
    assert (alone.n, alone.n_unscored) == (0, len(ROWS) + 1)
    with pytest.raises(InputError, match="has no answers to judge"):
        judging(helpful, "refusal_phrases")


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
