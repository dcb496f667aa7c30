"""An engine whose guards judge tokens in groups tells everybody what one tells that judges each, turn by turn."""

from __future__ import annotations

import gc
import math
import random
import threading
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import nn

from safeside import Adapter, Base, Message
from safeside.base.taps import Tape
from safeside.serve.effective import EffectivePolicy
from safeside.serve.engine import Engine
from safeside.serve.row import Ended, Failed, Judged, Piece
from safeside.serve.sampling import Sampling
from safeside.serve.watch import Watch, WatchedGuard
from serving_for_tests import Listener, ask, effective, marking, scripted, still_engine

Make = Callable[..., Adapter]
BLOCK = {"guard": "harm", "action": "block", "threshold": 1.0}
MARKED = {**BLOCK, "threshold": 0.5}
STEER = {"action": "steer", "guard": "harm", "low": 0.2, "high": 0.8}
MOST_TURNS = 500
Visit = tuple[str, EffectivePolicy, int, int, bool, tuple[str, ...]]
"""Prompt, policy, most tokens, the turn of coming, whether the client leaves, stop strings."""


def prompt(base: Base, text: str) -> tuple[int, ...]:
    return base.encode([Message("user", text)]).ids


def greedy(n_tokens: int, **options: object) -> Sampling:
    return Sampling(max_tokens=n_tokens, temperature=0.0, **options)  # type: ignore[arg-type]


def finish(engine: Engine) -> None:
    for _ in range(MOST_TURNS):
        if not (engine._waiting or engine._running):
            return
        engine._turn()
    raise AssertionError("it never ends")


def told(heard: Listener) -> dict[str, object]:
    """All that a listener heard, scores to three digits: another shape is another order of sums."""
    traces = [
        (trace.token, {name: round(scores[0], 3) for name, scores in trace.risk.items()}, round(trace.strength, 3))
        for event in heard.events
        if isinstance(event, Piece)
        for trace in event.traces
    ]
    ends = [
        (
            end.finish,
            end.n_tokens,
            end.text,
            round(end.strength, 3),
            end.stop and (end.stop.guard, end.stop.token, end.stop.n_kept),
            (end.decision.action, end.decision.intended, end.decision.guard),
            [(each.task, each.label, round(each.score, 3), each.flagged, each.mode) for each in end.verdicts],
        )
        for end in heard.events
        if isinstance(end, Ended)
    ]
    judged = [event.decision.action for event in heard.events if isinstance(event, Judged)]
    failed = [str(event.error) for event in heard.events if isinstance(event, Failed)]
    return {
        "tokens": heard.tokens, "text": heard.text, "traces": traces, "ends": ends, "judged": judged, "failed": failed,
    }  # fmt: skip


def drawn_rule(generator: random.Random, stage: str) -> dict[str, object]:
    rule: dict[str, object] = {
        "guard": generator.choice(["harm", "hate"]),
        "action": generator.choice(["block", "annotate", "replace"]),
        "threshold": generator.choice([0.6, 0.8, 0.95]),
    }
    if rule["action"] == "replace":
        rule["text"] = "no"
    if stage == "answer":
        rule["n_consecutive"] = generator.choice([1, 2, 3])
    if generator.random() < 0.3:
        rule["mode"] = "shadow"
    return rule


def drawn_policy(generator: random.Random) -> dict[str, object]:
    answer = [drawn_rule(generator, "answer") for _ in range(generator.randint(0, 2))]
    answer += [STEER] if generator.random() < 0.3 else []
    steered = [STEER] if generator.random() < 0.5 else []
    return {"answer": answer, "prompt": steered, "hold_back": generator.choice([1, 2, 5])}


@pytest.mark.parametrize("seed", range(6))
def test_whoever_comes_and_goes_all_hear_the_same(
    tiny_base: Base, random_guard: Make, random_aligner: Make, seed: int
) -> None:
    """Random policies, lengths, stop strings and times of coming; some clients leave."""
    generator = random.Random(seed)
    kind = generator.choice(["plr", "rtb", "lst_plus"])
    guards = [random_guard(tiny_base, seed=3 + seed), random_guard(tiny_base, "hate", seed=40 + seed, kind=kind)]
    adapters = [*guards, random_aligner(tiny_base)]
    texts = ["hi", "the cat sat on the mat", "how can this be, they said there"]
    jobs = [
        (
            f"{generator.choice(texts)} {number}",
            effective(adapters, **drawn_policy(generator)),
            generator.randint(3, 25),
            generator.randint(0, 12),
            generator.random() < 0.2,
            tuple(generator.sample(["a", " t", "he", "is", "on"], generator.randint(0, 2))),
        )
        for number in range(8)
    ]
    found = {}
    for judge_every in (1, 2, 5, 100):
        with still_engine(tiny_base, adapters, judge_every=judge_every, max_rows=4) as engine:
            found[judge_every] = [told(one) for one in visited(engine, tiny_base, jobs)]
    stays = [number for number, job in enumerate(jobs) if not job[4]]
    for judge_every in (2, 5, 100):
        for number in stays:
            assert found[judge_every][number] == found[1][number]
    assert {end[0] for number in stays for end in found[1][number]["ends"]} > {"length"}


def visited(engine: Engine, base: Base, jobs: list[Visit]) -> list[Listener]:
    """What each of the jobs hears that comes at its turn; those that leave do so three turns later."""
    heard: dict[int, Listener] = {}
    gone = [threading.Event() for _ in jobs]
    for turn in range(MOST_TURNS):
        for number, (text, policy, n_tokens, at, leaves, stop) in enumerate(jobs):
            if at == turn:
                options = {"cancelled": gone[number]}
                heard[number] = ask(engine, prompt(base, text), policy, greedy(n_tokens, stop=stop), **options)
            if leaves and at + 3 == turn:
                gone[number].set()
        if len(heard) == len(jobs) and not (engine._waiting or engine._running):
            return [heard[number] for number in range(len(jobs))]
        engine._turn()
    raise AssertionError("it never ends")


def test_tokens_that_were_judged_together_are_sent_together(
    tiny_base: Base, random_guard: Make, answer: list[int]
) -> None:
    guard = random_guard(tiny_base)
    policy, ids = effective([guard], answer=[BLOCK], hold_back=1), (answer * 4)[:20]
    one, eight = both(tiny_base, guard, lambda engine: written(engine, tiny_base, ids, policy, greedy(20)))
    assert one.tokens == eight.tokens == ids
    sizes = [
        [len(event.tokens) for event in heard.events if isinstance(event, Piece) and event.tokens]
        for heard in (one, eight)
    ]
    assert sizes == [[1] * 20, [8, 8, 4]]


def both(base: Base, guard: Adapter, run: Callable[[Engine], Listener], **limits: float) -> list[Listener]:
    """What is heard where each token is judged, and where eight are together."""
    heard = []
    for judge_every in (1, 8):
        with still_engine(base, [guard], judge_every=judge_every, **limits) as engine:
            heard.append(run(engine))
    return heard


def written(engine: Engine, base: Base, ids: list[int], policy: EffectivePolicy, sampling: Sampling) -> Listener:
    """What is heard where the base writes ``ids``."""
    with scripted(base, ids):
        heard = ask(engine, prompt(base, "?"), policy, sampling)
        finish(engine)
    return heard


@pytest.fixture
def answer(tiny_base: Base) -> list[int]:
    ids: list[int] = tiny_base.tokenizer("the cat sat on the mat and then", add_special_tokens=False)["input_ids"]
    return ids


@pytest.fixture
def marked(tiny_base: Base, random_guard: Make, answer: list[int]) -> Adapter:
    """A guard to which the third token is harm."""
    return marking(random_guard(tiny_base, layers=(0, 1)), tiny_base, [answer[2]])


def test_an_answer_ends_where_it_would_have(tiny_base: Base, marked: Adapter, answer: list[int]) -> None:
    """Tokens, text and strength are counted to the token that was judged; the base wrote more, and nobody hears."""
    policy = effective([marked], answer=[MARKED], hold_back=1)
    one, other = both(tiny_base, marked, lambda engine: written(engine, tiny_base, answer, policy, greedy(40)))
    assert told(one) == told(other)
    assert one.ended.n_tokens == 3


def test_what_is_clear_before_a_broken_score_is_told(tiny_base: Base, marked: Adapter, answer: list[int]) -> None:
    real = marked.trunk.forward

    def forward(tape: object, cache: object) -> torch.Tensor:
        states = real(tape, cache)
        return torch.where(states[..., :1] > 0, math.nan, states)

    marked.trunk.forward = forward  # type: ignore[method-assign]
    policy = effective([marked], answer=[MARKED], hold_back=1)
    one, other = both(tiny_base, marked, lambda engine: written(engine, tiny_base, answer, policy, greedy(40)))
    assert one.tokens == other.tokens == answer[:2]
    assert one.text == other.text
    assert one.ended.finish == other.ended.finish == "content_filter"


@pytest.mark.parametrize("stop", [("STOP",), ("STOP", "bX"), ("bS",), ("TO",), ("PcX", "dX")])
def test_stop_strings_are_met_by_what_was_judged(tiny_base: Base, random_guard: Make, stop: tuple[str, ...]) -> None:
    """Also those that are complete behind the token that ends the answer, in the same group."""
    ids = [tiny_base.tokenizer(letter, add_special_tokens=False)["input_ids"][0] for letter in "abSTOPcdefgh"]
    guard = marking(random_guard(tiny_base, layers=(0, 1)), tiny_base, [ids[3]])
    policy = effective([guard], answer=[MARKED], hold_back=1)
    sampling = greedy(30, stop=stop)
    one, other = both(tiny_base, guard, lambda engine: written(engine, tiny_base, ids, policy, sampling))
    assert told(one) == told(other)
    assert one.text == {"STOP": "ab", "bS": "a"}.get(stop[0], "abS")


def test_harm_that_was_sent_at_once_is_found_before_the_deadline_ends_it(
    tiny_base: Base, marked: Adapter, answer: list[int]
) -> None:
    policy = effective([marked], answer=[MARKED], hold_back=0)
    with still_engine(tiny_base, [marked], judge_every=8) as engine, scripted(tiny_base, answer):
        heard = ask(engine, prompt(tiny_base, "?"), policy, greedy(40))
        for _ in range(6):
            engine._turn()
        assert engine.n_running
        object.__setattr__(engine._running[0].job, "deadline", 0.0)
        engine._turn()
    assert heard.ended.finish == "content_filter"
    assert not [event for event in heard.events if isinstance(event, Failed)]


def test_rows_without_a_guard_have_their_traces(tiny_base: Base, random_guard: Make) -> None:
    def run(engine: Engine) -> Listener:
        heard = ask(engine, prompt(tiny_base, "the cat"), effective(), greedy(12))
        finish(engine)
        return heard

    one, other = (
        [trace for event in heard.events if isinstance(event, Piece) for trace in event.traces]
        for heard in both(tiny_base, random_guard(tiny_base), run)
    )
    assert [trace.token for trace in one] == [trace.token for trace in other]
    assert len(one) == 11, "the last token is never read"


def test_a_row_that_leaves_takes_no_slot_from_what_waits(tiny_base: Base, random_guard: Make) -> None:
    """The longest row leaves while one token of each waits, and another row comes."""
    guard = random_guard(tiny_base)
    policy = effective([guard], answer=[BLOCK])

    def run(engine: Engine) -> Listener:
        gone = threading.Event()
        long = prompt(tiny_base, "the cat sat on the mat and then the other cat sat")
        ask(engine, long, policy, greedy(40), cancelled=gone)
        stays = ask(engine, prompt(tiny_base, "hi"), policy, greedy(40))
        engine._turn()
        gone.set()
        comes = ask(engine, prompt(tiny_base, "how"), policy, greedy(5))
        finish(engine)
        assert comes.ended.finish == "length"
        assert engine.metrics.guard_failures.labels("harm", "error")._value.get() == 0
        return stays

    one, other = both(tiny_base, guard, run)
    assert told(one) == told(other)


def test_many_rows_become_few_while_tokens_wait(tiny_base: Base, random_guard: Make) -> None:
    guard = random_guard(tiny_base)
    policy = effective([guard], answer=[BLOCK])

    def run(engine: Engine) -> Listener:
        gone = threading.Event()
        rows = [
            ask(engine, prompt(tiny_base, "hi"), policy, greedy(20), **({"cancelled": gone} if number < 10 else {}))
            for number in range(40)
        ]
        engine._turn()
        engine._turn()
        gone.set()
        finish(engine)
        assert engine.metrics.guard_failures.labels("harm", "error")._value.get() == 0
        return rows[-1]

    one, other = both(tiny_base, guard, run, max_rows=64, max_waiting=100)
    assert told(one) == told(other)


class Summing(nn.Module):
    """Adds up what its taps give: after one that failed there is a sum, but not the whole one."""

    n_cache_layers = 0

    def __init__(self, width: int, last: int) -> None:
        super().__init__()
        self.width, self.last = width, last
        self.fails: list[int] = []

    def read(self, tape: object, layer: int, hidden: torch.Tensor) -> None:
        if self.fails and tape.n_past and layer == self.last:
            raise RuntimeError(self.fails.pop())
        tape.hidden[0] = tape.hidden.get(0, 0) + hidden[..., : self.width]

    def forward(self, tape: object, cache: object) -> torch.Tensor:
        return tape.hidden[0]


@pytest.mark.parametrize("judge_every", [1, 8])
def test_a_tap_that_fails_is_its_own_rows_failure(tiny_base: Base, random_guard: Make, judge_every: int) -> None:
    """Another prompt is judged in between: neither is that one blocked, nor is the failure forgotten."""
    guard = random_guard(tiny_base, kind="plr")
    guard.config = guard.config.model_copy(update={"layers": (1, 2, 3)})
    guard.trunk = trunk = Summing(guard.trunk.width, 3)
    policy = effective([guard], prompt=[BLOCK], answer=[BLOCK])
    with still_engine(tiny_base, [guard], judge_every=judge_every) as engine:
        running = ask(engine, prompt(tiny_base, "the cat"), policy, greedy(40))
        engine._turn()
        trunk.fails.append(1)
        engine._turn()
        comes = ask(engine, prompt(tiny_base, "how"), policy, greedy(5))
        finish(engine)
    assert running.ended.finish == "content_filter"
    assert (comes.judged.decision.action, comes.ended.finish) == ("allow", "length")


def test_groups_come_back_once_nobody_is_steered_by_the_answer(
    tiny_base: Base, random_guard: Make, random_aligner: Make
) -> None:
    adapters = [random_guard(tiny_base), random_aligner(tiny_base)]
    followed = effective(adapters, answer=[{**STEER, "ceiling": 1.5}])
    with still_engine(tiny_base, adapters, judge_every=8) as engine:
        ask(engine, prompt(tiny_base, "the cat"), effective(adapters, answer=[BLOCK]), greedy(60))
        ask(engine, prompt(tiny_base, "hi"), followed, greedy(5))
        lengths: list[int] = []
        guard = engine._runner.guards[0]
        guard.register_forward_hook(lambda module, args, output: lengths.append(output.scores.shape[1]))
        finish(engine)
    assert lengths[2:6] == [1] * 4, "beside a strength that follows the answer"
    assert 8 in lengths


@pytest.mark.parametrize("on_error", ["block", "annotate"])
def test_a_tap_that_fails_costs_its_own_token_alone(tiny_base: Base, random_guard: Make, on_error: str) -> None:
    """Harm behind it is found all the same, where the policy goes on without the token that could not be read."""
    ids = [tiny_base.tokenizer(letter, add_special_tokens=False)["input_ids"][0] for letter in "abSTOPcdefgh"]
    guard = marking(random_guard(tiny_base, layers=(0, 1)), tiny_base, [ids[3]])
    policy = effective([guard], answer=[MARKED], hold_back=1, on_error=on_error)
    real = guard.trunk.read

    def run(engine: Engine) -> Listener:
        n_read = 0

        def read(tape: object, layer: int, hidden: torch.Tensor) -> None:
            nonlocal n_read
            n_read += tape.n_past > 0 and layer == 0
            if n_read == 2 and layer == 0:
                raise RuntimeError("broken")
            real(tape, layer, hidden)

        guard.trunk.read = read  # type: ignore[method-assign]
        return written(engine, tiny_base, ids, policy, greedy(30))

    one, other = both(tiny_base, guard, run)
    assert told(one)["text"] == told(other)["text"]
    assert one.ended.n_tokens == other.ended.n_tokens == (2 if on_error == "block" else 4)
    assert one.ended.finish == other.ended.finish == "content_filter"


def test_a_complete_answer_without_a_guard_is_told_though_its_time_is_over(tiny_base: Base, random_guard: Make) -> None:
    def run(engine: Engine) -> Listener:
        heard = ask(engine, prompt(tiny_base, "the cat"), effective(), greedy(3))
        engine._turn()
        engine._turn()
        for row in engine._running:
            object.__setattr__(row.job, "deadline", 0.0)
        engine._turn()
        return heard

    one, other = both(tiny_base, random_guard(tiny_base), run)
    assert told(one) == told(other)
    assert one.ended.finish == "length"


def test_nobody_is_told_twice_that_it_failed(tiny_base: Base, random_guard: Make) -> None:
    guard = random_guard(tiny_base)
    policy = effective([guard], answer=[BLOCK])

    def failing(*rows: object) -> object:
        raise RuntimeError("broken")

    with still_engine(tiny_base, [guard], judge_every=8) as engine:
        heard = [ask(engine, prompt(tiny_base, text), policy, greedy(12)) for text in ("hi", "how")]
        engine._turn()
        engine._running[0].draw = failing
        engine._runner.judge = failing
        finish(engine)
    for one in heard:
        assert sum(isinstance(event, Ended | Failed) for event in one.events) == 1


def test_what_fails_at_a_tap_is_not_kept_alive(tiny_base: Base, random_guard: Make) -> None:
    """No reference leads from the failure to the states that it was raised over: they are as wide as the base."""
    guard = random_guard(tiny_base)
    guard.trunk.read = lambda *_: 1 // 0
    watched, keep = WatchedGuard(guard, Watch(60.0)), torch.ones(1, 3, dtype=torch.bool)
    tape, hidden = Tape(keep, 3), torch.ones(1, 3, tiny_base.d_model)
    gone = weakref.ref(hidden)
    gc.disable()
    try:
        watched.read(tape, 0, hidden)
        assert watched(tape).scores.isnan().all()
        del hidden
        assert gone() is None
    finally:
        gc.enable()
