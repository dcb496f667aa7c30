"""The engine: batches that change under way, fair endings, guards that fail, and what becomes of jobs nobody wants."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch

from safeside import Adapter, Base, Message, attach
from safeside.adapters.config import ModeCalibration, Promise
from safeside.errors import DeadlineError, LimitError, ServingError
from safeside.serve.effective import EffectivePolicy
from safeside.serve.engine import Engine
from safeside.serve.passes import Runner, Setting
from safeside.serve.row import Job
from safeside.serve.sampling import Sampling
from serving_for_tests import GREEDY, Listener, ask, effective, engine_of, marking, scripted

CLOSE_LOGITS = 1e-4  # float32: below this two tokens are a tie that the shape of the batch may decide
Make = Callable[..., Adapter]
STEER = {"action": "steer", "guard": "harm", "low": 0.2, "high": 0.8}
BLOCK = {"action": "block", "guard": "harm", "threshold": 0.5}
LONG = Sampling(max_tokens=200, temperature=0.0)


@pytest.fixture
def guard(tiny_base: Base, random_guard: Make) -> Adapter:
    return random_guard(tiny_base)


@pytest.fixture
def aligner(tiny_base: Base, random_aligner: Make) -> Adapter:
    return random_aligner(tiny_base)


def prompt(base: Base, text: str) -> tuple[int, ...]:
    return base.encode([Message("user", text)]).ids


def wait_for(condition: Callable[[], bool]) -> None:
    """Return once ``condition`` holds; a minute is a failure."""
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "it never came to that"
        time.sleep(0.002)


def policies_of(adapters: Sequence[Adapter]) -> list[EffectivePolicy]:
    return [
        effective(adapters, 0.0),
        effective(adapters, prompt=[STEER]),
        effective(adapters, 0.8),
        effective(adapters, answer=[{**STEER, "ceiling": 1.5}]),
        effective(adapters, prompt=[STEER], floor=0.3),
    ]


def test_an_answer_is_that_of_chat(tiny_base: Base, guard: Adapter, aligner: Adapter) -> None:
    messages = [Message("user", "the cat sat on the mat")]
    with attach(tiny_base, [aligner], [guard], strength=0.6):
        expected = tiny_base.chat(messages, max_new_tokens=12)
    with engine_of(tiny_base, [guard, aligner]) as engine:
        found = ask(
            engine,
            tiny_base.encode(messages).ids,
            effective([guard, aligner], 0.6, answer=[{**BLOCK, "action": "annotate", "threshold": 1.0}]),
        ).wait()
    assert found.text.strip() == expected.text
    assert found.ended.finish == expected.finish_reason
    assert found.ended.verdicts[0].score == pytest.approx(expected.verdicts[-1].score, abs=1e-5)


@pytest.mark.parametrize("judge_every", [1, 3, 100])
def test_answers_of_a_crowd_are_those_of_each_alone(
    tiny_base: Base, guard: Adapter, aligner: Adapter, judge_every: int
) -> None:
    """Greedy tokens differ only where the two likeliest are closer than float32 can tell."""
    adapters = [guard, aligner]
    policies = policies_of(adapters)
    prompts = [prompt(tiny_base, "the cat sat on the hat and " * (1 + row % 4) + str(row)) for row in range(10)]
    lengths = [replace(GREEDY, max_tokens=4 + row) for row in range(10)]
    with engine_of(tiny_base, adapters, max_rows=5, prefill_tokens=60, judge_every=judge_every) as engine:
        crowd = [ask(engine, ids, policies[row % 5], lengths[row]) for row, ids in enumerate(prompts)]
        together = [listener.wait().tokens for listener in crowd]
    with engine_of(tiny_base, adapters) as engine:
        alone = [ask(engine, ids, policies[row % 5], lengths[row]).wait().tokens for row, ids in enumerate(prompts)]
    for row, (one, other) in enumerate(zip(together, alone, strict=True)):
        if one != other:
            differs = next(index for index, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1])
            assert gap_after(tiny_base, adapters, prompts[row], policies[row % 5], other[:differs]) < CLOSE_LOGITS
    assert len({tuple(tokens) for tokens in alone}) > 5, "the rows are no test if they all say the same"


@torch.no_grad()
def gap_after(
    base: Base, adapters: Sequence[Adapter], ids: Sequence[int], policy: EffectivePolicy, tokens: Sequence[int]
) -> float:
    """Difference of the two highest logits after ``tokens``, of the row alone."""
    runner = Runner(base, adapters[:1], adapters[1:])
    setting = [Setting(len(ids), policy.strengths())]
    found = runner.prefill([ids], setting)
    for token in tokens:
        found = runner.step(found.rows, [token], setting)
    runner.detach()
    first, second = found.logits[0].topk(2).values.tolist()
    return first - second


def test_a_seed_gives_the_same_answer_in_any_company(tiny_base: Base) -> None:
    sampling = Sampling(max_tokens=12, temperature=1.5, top_p=0.9, seed=7)
    ids = prompt(tiny_base, "the cat")
    with engine_of(tiny_base) as engine:
        alone = ask(engine, ids, effective(), sampling).wait().tokens
        crowd = [ask(engine, ids, effective(), replace(sampling, seed=seed)) for seed in (3, 7, None, 7)]
        found = [listener.wait().tokens for listener in crowd]
    assert found[1] == found[3] == alone
    assert found[0] != alone


def test_stop_strings_and_lengths_end_answers(tiny_base: Base) -> None:
    ids, answer = prompt(tiny_base, "?"), tiny_base.tokenizer("the cat sat", add_special_tokens=False)["input_ids"]
    with engine_of(tiny_base) as engine, scripted(tiny_base, answer):
        stopped = ask(engine, ids, effective(), replace(LONG, stop=("t s",))).wait()
    with engine_of(tiny_base) as engine, scripted(tiny_base, answer):
        cut = ask(engine, ids, effective(), replace(LONG, max_tokens=2)).wait()
    with engine_of(tiny_base) as engine, scripted(tiny_base, [*answer, tiny_base.tokenizer.eos_token_id]):
        ended = ask(engine, ids, effective(), LONG).wait()
    assert (stopped.text, stopped.ended.finish) == ("the ca", "stop")
    assert (cut.text, cut.ended.finish, cut.ended.n_tokens) == (tiny_base.tokenizer.decode(answer[:2]), "length", 2)
    assert (ended.text, ended.ended.finish) == ("the cat sat", "stop")


@pytest.fixture
def harmful_midway(tiny_base: Base, guard: Adapter) -> tuple[Adapter, list[int], list[int]]:
    """A guard that scores each token, an answer that turns harmful, and its harmless beginning."""
    good = tiny_base.tokenizer("the hat on the mat ", add_special_tokens=False)["input_ids"]
    bad = tiny_base.tokenizer("KILL", add_special_tokens=False)["input_ids"]
    return marking(guard, tiny_base, bad), [*good, *bad, *bad], good


@pytest.mark.parametrize("hold_back", [1, 4, 8, 64])
@pytest.mark.parametrize("n_consecutive", [1, 3])
@pytest.mark.parametrize("judge_every", [1, 2, 7])
def test_held_back_nothing_harmful_is_ever_told(
    tiny_base: Base,
    harmful_midway: tuple[Adapter, list[int], list[int]],
    hold_back: int,
    n_consecutive: int,
    judge_every: int,
) -> None:
    guard, answer, good = harmful_midway
    policy = effective([guard], answer=[{**BLOCK, "n_consecutive": n_consecutive}], hold_back=hold_back)
    with engine_of(tiny_base, [guard], judge_every=judge_every) as engine, scripted(tiny_base, answer) as n_written:
        found = ask(engine, prompt(tiny_base, "?"), policy, LONG).wait()
    assert not set(found.tokens) & set(answer[len(good) :])
    assert tiny_base.tokenizer.decode(good).startswith(found.text)
    assert found.text or hold_back == 64
    assert found.ended.finish == "content_filter"
    assert found.ended.decision.action == "block"
    assert found.ended.stop is not None
    assert (found.ended.stop.guard, found.ended.stop.token) == ("harm", len(good) + n_consecutive - 1)
    n_judged = -(-(len(good) + n_consecutive) // judge_every) * judge_every  # whole groups
    assert n_written() == n_judged + 1, "the base stops as soon as the guard does"


@pytest.mark.parametrize("n_consecutive", [1, 3])
@pytest.mark.parametrize("judge_every", [1, 2, 3])
def test_sent_at_once_as_many_harmful_tokens_get_out_as_the_bound_says(
    tiny_base: Base, harmful_midway: tuple[Adapter, list[int], list[int]], n_consecutive: int, judge_every: int
) -> None:
    guard, answer, good = harmful_midway
    policy = effective([guard], answer=[{**BLOCK, "n_consecutive": n_consecutive}], hold_back=0)
    with engine_of(tiny_base, [guard], judge_every=judge_every) as engine, scripted(tiny_base, answer):
        found = ask(engine, prompt(tiny_base, "?"), policy, LONG).wait()
    assert found.tokens[: len(good)] == good
    assert found.ended.leak_bound == n_consecutive + judge_every - 1
    n_told = -(-(len(good) + n_consecutive) // judge_every) * judge_every  # whole groups
    assert len(found.tokens) - len(good) == n_told - len(good) <= found.ended.leak_bound
    assert found.ended.finish == "content_filter"


@pytest.mark.parametrize("judge_every", [1, 2, 100])
def test_the_last_token_is_scored_before_the_answer_ends(
    tiny_base: Base, harmful_midway: tuple[Adapter, list[int], list[int]], judge_every: int
) -> None:
    guard, answer, good = harmful_midway
    policy = effective([guard], answer=[BLOCK])
    with engine_of(tiny_base, [guard], judge_every=judge_every) as engine, scripted(tiny_base, answer):
        found = ask(engine, prompt(tiny_base, "?"), policy, replace(LONG, max_tokens=len(good) + 1)).wait()
    assert found.ended.finish == "content_filter"
    assert not set(found.tokens) - set(good)


def test_what_was_told_is_never_flagged_at_the_end(
    tiny_base: Base, harmful_midway: tuple[Adapter, list[int], list[int]]
) -> None:
    """Of a guard whose line for whole answers lies below that of its stop rule."""
    guard, answer, good = harmful_midway
    for mode, threshold in (("stream", 1.0), ("answer", 0.5)):
        promise = Promise(threshold=(threshold,), false_positive_rate=0.05)
        guard.set_mode(mode, ModeCalibration(n_harmless=320, presets={"strict": promise}))
    rule = {"action": "replace", "guard": "harm", "preset": "strict", "text": "No."}
    policy = effective([guard], answer=[rule], hold_back=1)
    with engine_of(tiny_base, [guard]) as engine, scripted(tiny_base, answer):
        found = ask(engine, prompt(tiny_base, "?"), policy, replace(LONG, max_tokens=len(answer))).wait()
    assert (found.ended.finish, found.ended.decision.text) == ("content_filter", "No.")
    assert [verdict.mode for verdict in found.ended.verdicts] == ["answer"]
    assert not set(found.tokens) & set(answer[len(good) :])


def test_a_flagged_prompt_has_no_answer(tiny_base: Base, guard: Adapter) -> None:
    marking(guard, tiny_base, prompt(tiny_base, "x")[-1:])  # the prompt's last token, of the template
    with engine_of(tiny_base, [guard]) as engine:
        blocked = ask(engine, prompt(tiny_base, "?"), effective([guard], prompt=[BLOCK])).wait()
        told = {**BLOCK, "action": "replace", "text": "No."}
        replaced = ask(engine, prompt(tiny_base, "?"), effective([guard], prompt=[told])).wait()
        watched = ask(engine, prompt(tiny_base, "?"), effective([guard], prompt=[BLOCK], mode="shadow")).wait()
        assert engine.n_cached_tokens == 0
    assert (blocked.text, blocked.ended.finish, blocked.judged.decision.action) == ("", "content_filter", "block")
    assert (replaced.ended.decision.text, replaced.text) == ("No.", "")
    assert (watched.judged.decision.action, watched.judged.decision.intended) == ("allow", "block")
    assert watched.text


@pytest.mark.parametrize(
    ("failure", "when", "judge_every"),
    [
        *((failure, when, 1) for failure in ("error", "nan", "timeout") for when in ("prompt", "answer")),
        *((failure, "answer", 3) for failure in ("error", "nan", "timeout")),
    ],
)
def test_a_guard_that_cannot_score_blocks_and_is_counted(
    tiny_base: Base, random_guard: Make, failure: str, when: str, judge_every: int
) -> None:
    """Rows that do not ask it go on; the policy's stated alternative lets its own go on too."""
    broken, fine = random_guard(tiny_base, "broken"), random_guard(tiny_base, "fine", seed=4)
    break_guard(broken, failure, when)
    allow = {"guard": "broken", "action": "annotate", "threshold": 1.0}
    strict = effective([broken, fine], prompt=[allow], answer=[allow])
    lenient = effective([broken, fine], prompt=[allow], answer=[allow], on_error="annotate")
    other = effective([broken, fine], prompt=[{**allow, "guard": "fine"}])
    ids = prompt(tiny_base, "?")
    limits = {"guard_timeout_s": 0.2 if failure == "timeout" else 60.0, "judge_every": judge_every}
    with engine_of(tiny_base, [broken, fine], **limits) as engine:
        rows = [ask(engine, ids, policy, replace(GREEDY, max_tokens=4)) for policy in (strict, lenient, other)]
        blocked, noted, untouched = (row.wait() for row in rows)
        count = engine.metrics.guard_failures.labels("broken", failure)._value.get()
    assert (blocked.ended.finish, blocked.ended.decision.action) == ("content_filter", "block")
    assert blocked.judged.decision.action == ("block" if when == "prompt" else "allow")
    assert all(math.isnan(verdict.score) and verdict.flagged for verdict in blocked.ended.verdicts)
    assert noted.ended.finish == untouched.ended.finish == "length"
    assert "annotate" in (noted.judged.decision.action, noted.ended.decision.action)
    assert untouched.ended.decision.action == "allow"
    assert count >= 1


def break_guard(guard: Adapter, failure: str, when: str) -> None:
    """Let the guard's trunk fail in passes over prompts, or in those over tokens behind them."""
    real = guard.trunk.forward

    def forward(tape: object, cache: object) -> torch.Tensor:
        if (tape.n_past == 0) != (when == "prompt"):
            return real(tape, cache)
        if failure == "error":
            raise RuntimeError("broken")
        if failure == "timeout":
            time.sleep(0.25)
        states = real(tape, cache)
        return states * math.nan if failure == "nan" else states

    guard.trunk.forward = forward  # type: ignore[method-assign]


def test_one_prompt_that_fails_does_not_fail_the_others(tiny_base: Base) -> None:
    fine, poison = prompt(tiny_base, "?"), (10_000,)
    with engine_of(tiny_base) as engine:
        listeners = [ask(engine, ids, effective()) for ids in (fine, poison, fine)]
        first, second, third = (listener.wait() for listener in listeners)
    assert first.text == third.text != ""
    assert isinstance(second.error, ServingError)


def test_a_pass_that_fails_ends_its_answers_and_the_engine_goes_on(tiny_base: Base) -> None:
    with engine_of(tiny_base) as engine:
        running = ask(engine, prompt(tiny_base, "?"), effective(), LONG)
        wait_for(lambda: bool(running.tokens))
        engine._runner.step = None  # type: ignore[method-assign, assignment]
        assert isinstance(running.wait().error, ServingError)
        del engine._runner.step
        assert ask(engine, prompt(tiny_base, "?"), effective()).wait().text


def test_what_waits_and_cannot_be_judged_ends_its_answers_and_not_those_that_join(
    tiny_base: Base, guard: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*rows: object) -> object:
        raise RuntimeError("broken")

    ids, policy = prompt(tiny_base, "?"), effective([guard], answer=[{**BLOCK, "threshold": 1.0}])
    with engine_of(tiny_base, [guard], judge_every=100) as engine:
        running = ask(engine, ids, policy, LONG)
        wait_for(lambda: engine.n_cached_tokens > len(ids) + 2)
        with monkeypatch.context() as patch:
            patch.setattr(engine._runner, "judge", failing)
            joining = ask(engine, ids, policy, GREEDY)
            assert isinstance(running.wait().error, ServingError)
        assert joining.wait().text


def test_a_guard_that_fails_at_a_tap_fails_its_group(tiny_base: Base, guard: Adapter, random_guard: Make) -> None:
    """And the guard beside it goes on, whose taps are all there."""
    broken, real, n_read = random_guard(tiny_base, "broken"), guard.trunk.read, 0

    def read(tape: object, layer: int, hidden: torch.Tensor) -> None:
        nonlocal n_read
        n_read += 1
        if n_read > 30:
            raise RuntimeError("broken")
        real(tape, layer, hidden)

    broken.trunk.read = read  # type: ignore[method-assign]
    rules = [{"guard": name, "action": "annotate", "threshold": 1.0} for name in ("broken", "harm")]
    policy = effective([broken, guard], answer=rules)
    with engine_of(tiny_base, [broken, guard], judge_every=4) as engine:
        found = ask(engine, prompt(tiny_base, "?"), policy, LONG).wait()
        assert engine.metrics.guard_failures.labels("broken", "error")._value.get() >= 1
        assert engine.metrics.guard_failures.labels("harm", "error")._value.get() == 0
    assert (found.ended.finish, found.ended.decision.action) == ("content_filter", "block")


def test_rows_that_cannot_be_joined_end_and_the_engine_goes_on(
    tiny_base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*rows: object) -> object:
        raise RuntimeError("out of memory")

    with engine_of(tiny_base) as engine:
        running = ask(engine, prompt(tiny_base, "?"), effective(), LONG)
        wait_for(lambda: bool(running.tokens))
        with monkeypatch.context() as patch:
            patch.setattr("safeside.serve.engine.joined", failing)
            joining = ask(engine, prompt(tiny_base, "?"), effective(), LONG)
            assert isinstance(joining.wait().error, ServingError)
        assert isinstance(running.wait().error, ServingError)
        assert engine.n_cached_tokens == 0
        assert ask(engine, prompt(tiny_base, "?"), effective()).wait().text


def test_passes_compute_with_the_threads_that_they_are_given(tiny_base: Base) -> None:
    with engine_of(tiny_base, threads=1) as engine:
        assert engine.call(lambda runner: torch.get_num_threads()).result() == 1
    before = torch.get_num_threads()
    with engine_of(tiny_base) as engine:
        assert engine.call(lambda runner: torch.get_num_threads()).result() == before


def test_a_full_queue_is_told_when_to_come_back(tiny_base: Base) -> None:
    ids = prompt(tiny_base, "?")
    with engine_of(tiny_base, max_rows=1, max_waiting=2) as engine:
        first = ask(engine, ids, effective(), LONG)
        wait_for(lambda: engine.n_running == 1)
        others = [ask(engine, ids, effective()) for _ in range(2)]
        with pytest.raises(LimitError, match="2 requests wait already") as raised:
            ask(engine, ids, effective())
        assert raised.value.retry_after_s >= 1
        assert all(listener.wait().text for listener in (first, *others))


def test_a_cancelled_answer_frees_its_memory(tiny_base: Base, guard: Adapter, aligner: Adapter) -> None:
    """The others go on, and of the cache only theirs is left."""
    adapters = [guard, aligner]
    with engine_of(tiny_base, adapters) as engine:
        listener = Listener()
        long = prompt(tiny_base, "the cat " * 30)
        job = Job(long, LONG, effective(adapters, 0.5), listener)
        engine.submit(job)
        other = ask(engine, prompt(tiny_base, "?"), effective(adapters, 0.5), replace(LONG, max_tokens=100))
        wait_for(lambda: engine.n_running == 2 and bool(listener.tokens))
        wait_for(lambda: engine.n_cached_tokens >= 2 * len(long))
        job.cancelled.set()
        wait_for(lambda: engine.n_running == 1)
        assert engine.n_cached_tokens < len(long) + 100
        assert len(other.wait().tokens) in range(1, 101)
        wait_for(lambda: engine.n_cached_tokens == 0)
        assert engine._rows is None
    assert not any(type(event).__name__ in ("Ended", "Failed") for event in listener.events)


def test_an_answer_that_is_overdue_fails(tiny_base: Base) -> None:
    with engine_of(tiny_base, max_rows=1) as engine:
        late = ask(engine, prompt(tiny_base, "?"), effective(), LONG, deadline=time.monotonic() + 0.005)
        never = ask(engine, prompt(tiny_base, "?"), effective(), LONG, deadline=time.monotonic())
        assert isinstance(late.wait().error, DeadlineError)
        assert isinstance(never.wait().error, DeadlineError)
        assert engine.n_cached_tokens == 0


def test_a_job_is_overdue_or_cancelled_while_it_waits_too(tiny_base: Base) -> None:
    with engine_of(tiny_base, max_rows=1, max_waiting=1) as engine:
        first = ask(engine, prompt(tiny_base, "?"), effective(), replace(LONG, max_tokens=400))
        wait_for(lambda: engine.n_running == 1)
        late = ask(engine, prompt(tiny_base, "?"), effective(), deadline=time.monotonic())
        assert isinstance(late.wait().error, DeadlineError)
        engine.submit(job := Job(prompt(tiny_base, "?"), LONG, effective(), Listener()))
        job.cancelled.set()
        wait_for(lambda: engine.n_waiting == 0)
        assert engine.n_running == 1
        assert len(first.wait().tokens) > 1


def test_adapters_change_between_answers_never_within_one(tiny_base: Base, guard: Adapter, aligner: Adapter) -> None:
    policy = effective([guard], prompt=[{**BLOCK, "threshold": 1.0}])
    with engine_of(tiny_base, [guard]) as engine:
        running = ask(engine, prompt(tiny_base, "?"), policy, replace(LONG, max_tokens=60))
        wait_for(lambda: bool(running.tokens))
        changed = engine.change([guard, aligner])
        after = ask(engine, prompt(tiny_base, "?"), effective([guard, aligner], 1.0))
        changed.result(timeout=60)
        assert len(running.wait().tokens) >= 1
        assert set(engine.adapters) == {"harm", "refuse"}
        assert after.wait().ended.strength == 1.0


def test_adapters_that_do_not_fit_change_nothing(
    tiny_base: Base, guard: Adapter, tiny_family: Callable[[str], Base], random_guard: Make
) -> None:
    with engine_of(tiny_base, [guard]) as engine:
        with pytest.raises(ValueError, match="names must differ"):
            engine.change([guard, random_guard(tiny_base)]).result(timeout=60)
        assert list(engine.adapters) == ["harm"]
        assert ask(engine, prompt(tiny_base, "?"), effective([guard], prompt=[{**BLOCK, "threshold": 1.0}])).wait().text


@pytest.mark.parametrize("n_failures", [1, 2])
def test_a_change_that_fails_never_leaves_answers_unjudged(
    tiny_base: Base, guard: Adapter, monkeypatch: pytest.MonkeyPatch, n_failures: int
) -> None:
    """Whatever the error: the adapters before are attached again, or nothing is answered by what a pass left behind."""
    policy, made = effective([guard], prompt=[{**BLOCK, "threshold": 1.0}]), iter(range(n_failures))

    def breaking(*args: object, **options: object) -> object:
        if next(made, None) is not None:
            raise RuntimeError("out of memory")
        return attach(*args, **options)  # type: ignore[arg-type]

    with engine_of(tiny_base, [guard]) as engine:
        before = ask(engine, prompt(tiny_base, "the cat"), policy).wait()
        monkeypatch.setattr("safeside.serve.passes.attach", breaking)
        with pytest.raises(RuntimeError, match="memory"):
            engine.change([guard]).result(timeout=60)
        after = ask(engine, prompt(tiny_base, "the cat"), policy).wait()
        if n_failures == 2:
            assert isinstance(after.error, ServingError)
        else:
            assert after.judged.verdicts == before.judged.verdicts


@pytest.mark.parametrize("kept", ["guard", "aligner"])
def test_a_job_is_never_answered_by_other_adapters_than_its_policys(
    tiny_base: Base, guard: Adapter, aligner: Adapter, random_guard: Make, kept: str
) -> None:
    """Its thresholds are those of the guard that was loaded when it came, and its strength is of that aligner."""
    policy = effective([guard, aligner], floor=0.7, prompt=[{**BLOCK, "threshold": 1.0}])
    others = [guard] if kept == "guard" else [random_guard(tiny_base, seed=5), aligner]
    with engine_of(tiny_base, [guard, aligner]) as engine:
        running = ask(engine, prompt(tiny_base, "?"), policy, LONG)
        wait_for(lambda: bool(running.tokens))
        changed = engine.change(others)
        after = ask(engine, prompt(tiny_base, "?"), policy)
        changed.result(timeout=60)
        assert isinstance(after.wait().error, ServingError)
        assert running.wait().ended.strength == pytest.approx(0.7)


def test_closing_lets_answers_end_and_refuses_new_ones(tiny_base: Base, guard: Adapter) -> None:
    engine = Engine(tiny_base, [guard])
    running = ask(engine, prompt(tiny_base, "?"), effective(), replace(LONG, max_tokens=40))
    engine.close(drain_s=60)
    assert running.wait().ended.finish in ("stop", "length")
    assert tiny_base.attachment is None
    assert not engine.is_ready
    with pytest.raises(ServingError, match="shutting down"):
        ask(engine, prompt(tiny_base, "?"), effective())


def test_closing_at_once_tells_everybody(tiny_base: Base) -> None:
    engine = Engine(tiny_base)
    running = ask(engine, prompt(tiny_base, "?"), effective(), LONG)
    wait_for(lambda: engine.n_running == 1)
    engine.close()
    assert isinstance(running.wait().error, ServingError)


def test_a_pass_that_never_ends_does_not_hold_up_the_end(
    tiny_base: Base, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("safeside.serve.engine._LAST_PASS_S", 0.05)
    free = threading.Event()
    engine = Engine(tiny_base)
    engine.call(lambda runner: free.wait(30))
    wait_for(lambda: engine.turn_s > 0)
    engine.close()
    assert engine.is_alive
    assert engine.has_ended
    assert "is left behind" in caplog.text
    free.set()
    wait_for(lambda: not engine.is_alive)
    assert engine.turn_s == 0


def test_a_fixed_strength_is_the_policys(tiny_base: Base, aligner: Adapter) -> None:
    with engine_of(tiny_base, [aligner]) as engine:
        assert ask(engine, prompt(tiny_base, "?"), effective([aligner], floor=0.4)).wait().ended.strength == (
            pytest.approx(0.4)
        )
