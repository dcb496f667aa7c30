"""Scores of every token, rules fitted on whole answers, and streams that never show what is flagged."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable

import pytest
import torch

from safeside import Adapter, Base, Message, attach
from safeside.errors import InputError, UnsupportedError
from safeside.guards.calibrate import n_allowed
from safeside.guards.stream import (
    ANSWERING,
    AnswerStream,
    StreamOptions,
    calibrate_stream,
    evaluate_stops,
    fit_stop_rule,
    score_answers,
    strongest_runs,
)
from safeside.stopping import StopRule
from safeside.types import Example
from twin import SAME, run_by_hand

PROMPT = [Message("system", "be good"), Message("user", "how can this be?")]
TALKS = [
    [Message("user", "how?"), Message("assistant", "the cat sat there and then the other cat sat")],
    [Message("user", "and why is this so, they said?"), Message("assistant", "no")],
    [Message("user", "one"), Message("assistant", "two"), Message("user", "three"), Message("assistant", "four, five")],
]
PLENTY = {"min_new_tokens": 12}


@pytest.fixture(scope="module")
def guard(session_base: Base, random_guard: Callable[..., Adapter]) -> Adapter:
    return random_guard(session_base, seed=11)


# ---- whole answers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 32])
def test_every_token_has_the_score_of_the_text_up_to_it(tiny_base: Base, random_guard, batch_size: int) -> None:
    """Each by a pass of its own over the text that ends there: what was seen while it was written."""
    guard = random_guard(tiny_base, labels=("hate", "violence"))
    counts: list[int] = []
    found = score_answers(tiny_base, guard, TALKS, batch_size=batch_size, advance=counts.append)
    for talk, answer in zip(TALKS, found, strict=True):
        encoded = tiny_base.encode(talk)
        lengths = range(encoded.answer_start + 1, len(encoded.ids) + 1)
        expected = [
            float(run_by_hand(tiny_base, guard, torch.tensor([encoded.ids[:length]])).scores[0, -1].max())
            for length in lengths
        ]
        assert answer.problem is None
        assert answer.scores.tolist() == pytest.approx(expected, abs=SAME)
    assert sum(counts) == len(TALKS)


def test_answers_that_cannot_be_scored_say_why(tiny_base: Base, tiny_family, random_guard, guard: Adapter) -> None:
    long = [Message("user", "how?"), Message("assistant", "the cat " * 200)]
    broken = [Message("user", "\ud800"), Message("assistant", "no")]
    empty = [Message("user", ""), Message("assistant", "\u200b")]
    found = score_answers(tiny_base, guard, [PROMPT, TALKS[1], long, broken, empty])
    assert [len(answer.scores) > 0 for answer in found] == [False, True, False, False, False]
    assert found[0].problem == "it has no answer"
    assert "for a context of 256" in str(found[2].problem)
    assert "not valid Unicode" in str(found[3].problem)
    assert "holds no text" in str(found[4].problem)
    encoder = tiny_family("bert")
    with pytest.raises(UnsupportedError, match="is an encoder"):
        score_answers(encoder, random_guard(encoder), TALKS)


# ---- fitting ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("share", "needed"), [(0.05, 59), (0.01, 299)])
def test_a_promise_needs_rows(share: float, needed: int) -> None:
    answers = [torch.tensor([0.1, 0.2, 0.3])] * needed
    assert fit_stop_rule(answers, share).threshold == pytest.approx(0.2, abs=1e-5)
    with pytest.raises(InputError, match=rf"{needed - 1} harmless rows cannot promise .*; it takes {needed}\. Add"):
        fit_stop_rule(answers[1:], share)


def test_no_rule_rests_on_answers_too_short_for_it() -> None:
    """Else its threshold would be 0, and every answer of more tokens would be stopped."""
    short, long = [torch.tensor([0.3])], [torch.tensor([0.4, 0.5])]
    with pytest.raises(InputError, match=r"60 of 60 harmless answers have fewer tokens .* fewer tokens in a row"):
        fit_stop_rule(short * 60, 0.05)
    assert fit_stop_rule(short * 60, 0.05, n_consecutive=1).threshold == pytest.approx(0.3, abs=1e-5)
    assert n_allowed(100, 0.05) == 1
    with pytest.raises(InputError, match=r"99 of 100 harmless answers"):
        fit_stop_rule(short * 99 + long, 0.05)
    assert fit_stop_rule(short * 98 + long * 2, 0.05).threshold == pytest.approx(0.4, abs=1e-5)


def test_a_trained_guard_has_no_preset_that_rests_on_short_answers(
    tiny_base: Base, random_guard: Callable[..., Adapter], capsys: pytest.CaptureFixture[str]
) -> None:
    """With 300 harmless answers 8 may be stopped at 5% and none at 1%; only 5 are long enough to be."""
    texts = ["no"] * 295 + ["the cat sat there and then the other cat sat"] * 5
    rows = [
        Example((Message("user", f"how {row}?"), Message("assistant", text)), (0.0,)) for row, text in enumerate(texts)
    ]
    guard = random_guard(tiny_base)
    calibrate_stream(tiny_base, guard, rows)
    assert set(guard.config.modes["stream"].presets) == {"balanced"}
    assert guard.config.modes["stream"].presets["balanced"].threshold[0] > 0.01
    told = " ".join(capsys.readouterr().err.split())
    assert "no stop rule at strict: 295 of 300 harmless answers have fewer than 8 tokens" in told
    calibrate_stream(tiny_base, guard, rows, n_consecutive=1)
    assert set(guard.config.modes["stream"].presets) == {"strict", "balanced"}
    assert capsys.readouterr().err == ""
    calibrate_stream(tiny_base, guard, [rows[0]] * 300, n_consecutive=1)
    assert guard.config.modes["stream"].presets == {}, "copies of one answer are one"


def test_a_rule_stops_as_many_benign_answers_as_allowed() -> None:
    generator = torch.Generator().manual_seed(0)
    answers = [torch.rand(int(n), generator=generator) for n in torch.randint(1, 30, (300,), generator=generator)]
    for n_consecutive in (1, 2, 4):
        rule = fit_stop_rule(answers, 0.05, n_consecutive=n_consecutive)
        stopped = sum(rule.first_stop(scores) is not None for scores in answers)
        assert stopped == n_allowed(300, 0.05) > 0
        assert rule.n_consecutive == n_consecutive


def test_answers_without_a_finite_score_count_as_stops() -> None:
    answers = [torch.tensor([0.1, 0.2])] * 95 + [torch.tensor([0.1, math.nan])] * 5
    assert strongest_runs(answers, 1)[-1] == math.inf
    assert strongest_runs([torch.tensor([0.3])], 2) == [-math.inf]
    with pytest.raises(InputError, match="no threshold can let them pass"):
        fit_stop_rule(answers, 0.05)
    assert fit_stop_rule(answers, 0.2, n_consecutive=1).threshold == pytest.approx(0.2, abs=1e-5)


# ---- measuring -------------------------------------------------------------------------------------------------------


def test_the_report_counts_by_hand() -> None:
    rows = [
        ([0.1, 0.9, 0.9, 0.9], True),  # stopped at its third token
        ([0.9, 0.9], True),  # at its second
        ([0.1, 0.9, 0.1, 0.9], True),  # never: but its last score is high
        ([0.2, 0.2], True),
        ([0.9, 0.9, 0.1], False),  # a false stop; the whole answer is fine
        ([0.1, 0.1, 0.9], False),  # fine; the whole answer is not
        ([0.1], False),
        ([], False),  # was not scored
    ]
    answers, labels = [torch.tensor(scores) for scores, _ in rows], [label for _, label in rows]
    report = evaluate_stops(StopRule(0.5, 2), 0.5, answers, labels)
    assert (report.detected_share, report.whole_detected_share) == (2 / 4, 3 / 4)
    assert (report.false_stops, report.whole_false_flags) == (1 / 3, 1 / 3)
    assert (report.delay_tokens, report.delay_share) == (2.5, (3 / 4 + 2 / 2) / 2)
    assert (report.n_harmful, report.n_benign, report.n_unscored) == (4, 3, 1)
    assert report.kept_detection == pytest.approx(2 / 3)


def test_a_report_without_harm_has_no_figures() -> None:
    report = evaluate_stops(StopRule(0.5, 1), 0.5, [torch.tensor([0.9, math.nan])], [False])
    assert math.isnan(report.detected_share)
    assert math.isnan(report.delay_tokens)
    assert math.isnan(report.kept_detection)
    assert (report.false_stops, report.whole_false_flags) == (1.0, 1.0)


# ---- live ------------------------------------------------------------------------------------------------------------


def options(stop: object = None, **generate: object) -> StreamOptions:
    return StreamOptions(stop=stop, max_new_tokens=12, generate={**PLENTY, **generate})


def middle(base: Base, guard: Adapter) -> float:
    """A threshold that some tokens of the answer reach."""
    with attach(base, guards=[guard]):
        prompt = list(base.encode(PROMPT).ids)
    output = base.model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=12, **PLENTY)
    scores = run_by_hand(base, guard, output).scores[0, len(prompt) :, 0]
    rising = scores.sort().values
    return float((rising[7] + rising[8]) / 2)


@pytest.mark.parametrize("n_consecutive", [1, 2, 12])
def test_a_stream_is_the_answer_piece_by_piece(tiny_base: Base, guard: Adapter, n_consecutive: int) -> None:
    rule = StopRule(middle(tiny_base, guard), n_consecutive)
    with attach(tiny_base, guards=[guard]):
        expected = tiny_base.chat(PROMPT, stop=rule, max_new_tokens=12, **PLENTY)
        stream = AnswerStream(tiny_base, PROMPT, options(rule))
        pieces = list(stream)
    assert "".join(pieces).strip() == expected.text
    assert stream.completion == expected
    assert (expected.finish_reason == "guard") == (n_consecutive < 12)


def test_nothing_flagged_is_ever_shown(tiny_base: Base, guard: Adapter) -> None:
    """Not even for a moment: the pieces hold only the tokens before the run, whenever they are read."""
    rule = StopRule(middle(tiny_base, guard), 1)
    with attach(tiny_base, guards=[guard]):
        stream = AnswerStream(tiny_base, PROMPT, options(rule))
        shown = "".join(stream)
    stop = stream.completion.stop
    assert stop is not None
    prompt = list(tiny_base.encode(PROMPT).ids)
    output = tiny_base.model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=12, **PLENTY)
    scores = run_by_hand(tiny_base, guard, output).scores[0, len(prompt) :, 0]
    assert (scores[: stop.n_kept] < rule.threshold).all()
    assert scores[stop.token] >= rule.threshold
    assert shown == tiny_base.tokenizer.decode(output[0, len(prompt) :][: stop.n_kept], skip_special_tokens=True)


def test_a_stream_without_guards_shows_all(tiny_base: Base) -> None:
    stream = AnswerStream(tiny_base, PROMPT, options())
    with pytest.raises(InputError, match="The stream has not ended"):
        _ = stream.completion
    assert "".join(stream).strip() == stream.completion.text == tiny_base.chat(PROMPT, max_new_tokens=12, **PLENTY).text


def test_a_blocked_prompt_is_a_stream_without_pieces(tiny_base: Base, random_guard) -> None:
    guard = random_guard(tiny_base, layers=(0, 1))
    guard.head.linear.bias.data.fill_(math.nan)
    with attach(tiny_base, intercept=guard):
        stream = AnswerStream(tiny_base, PROMPT, options())
        assert list(stream) == []
    assert stream.completion.finish_reason == "blocked"


def await_models() -> None:
    """Until no stream's model runs any more."""
    for thread in threading.enumerate():
        if thread.name == ANSWERING:
            thread.join(20)
            assert not thread.is_alive()


@pytest.mark.parametrize("threshold", [1.0, 0.0])
def test_a_stream_that_is_left_ends_its_model(tiny_base: Base, guard: Adapter, threshold: float) -> None:
    """Without waiting for the token that is being made, also where a rule holds all tokens back."""
    entered, go_on, passes = threading.Event(), threading.Event(), []

    def hold(*_: object) -> None:
        passes.append(1)
        if len(passes) == 3:
            entered.set()
            assert go_on.wait(20)

    handle = tiny_base.decoder.register_forward_pre_hook(hold)
    with attach(tiny_base, guards=[guard]):
        rule = StopRule(threshold, 1 if threshold else 200)
        stream = AnswerStream(tiny_base, PROMPT, StreamOptions(rule, None, 200, {"min_new_tokens": 200}))
        assert entered.wait(20)
        closing = threading.Thread(target=stream.close, daemon=True)
        closing.start()
        closing.join(5)
        assert not closing.is_alive()  # though the model is in the middle of a pass
        assert list(stream) == []
        go_on.set()
        await_models()
    handle.remove()
    assert len(passes) == 3
    with pytest.raises(InputError, match="has not ended"):
        _ = stream.completion


def test_a_stream_may_be_left_by_its_block_and_the_base_used_again(tiny_base: Base, guard: Adapter) -> None:
    long = StreamOptions(StopRule(1.0, 1), None, 200, {"min_new_tokens": 200})
    with attach(tiny_base, guards=[guard]), AnswerStream(tiny_base, PROMPT, long) as stream:
        next(stream)
    with attach(tiny_base, guards=[guard]):
        expected = tiny_base.chat(PROMPT, max_new_tokens=12, **PLENTY)
    await_models()
    assert list(stream) == []
    assert tiny_base.chat(PROMPT, max_new_tokens=12, **PLENTY).text == expected.text


def test_errors_come_where_the_stream_is_read(tiny_base: Base) -> None:
    stream = AnswerStream(tiny_base, PROMPT, options(StopRule(0.5)))
    with pytest.raises(InputError, match="nothing is attached"):
        next(stream)
    assert list(stream) == []
