"""Traces of strengths, against scores that are taken by hand."""

from __future__ import annotations

import math

import pytest
import torch

from safeside import Base, Message, attach, by_category, ramp, step, strongest, timed
from safeside.types import StrengthTrace
from twin import SAME, run_by_hand

QUESTION = [Message("user", "how can this be")]
LABELS = ("hate", "violence")


@pytest.fixture(scope="module")
def guard(session_base: Base, random_guard):
    return random_guard(session_base, "harm", seed=5, labels=LABELS)


@pytest.fixture(scope="module")
def aligners(session_base: Base, random_aligner):
    return [random_aligner(session_base, "refuse", seed=7), random_aligner(session_base, "kind", seed=8)]


def asked(base: Base, guard, aligners, strength: object):
    """The completion, and the guard's scores (n, K) behind each of its tokens."""
    with attach(base, aligners, [guard], strength):
        completion = base.chat(QUESTION, max_new_tokens=5, min_new_tokens=5)
    prompt = base.encode(QUESTION).ids
    with attach(base, aligners, [guard], strength) as attachment, attachment.request(prompt_end=[len(prompt)]):
        ids = base.model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=5, min_new_tokens=5,
            do_sample=False,
        )  # fmt: skip
    return completion, run_by_hand(base, guard, ids[:, :-1]).scores[0, len(prompt) - 1 :]


def test_a_trace_tells_guard_score_label_and_strength(tiny_base: Base, guard, aligners) -> None:
    strength = {"refuse": ramp(guard, 0.2, 0.8, latched=False), "kind": 0.5}
    completion, scores = asked(tiny_base, guard, aligners, strength)
    refuse, kind = completion.traces
    assert (refuse.aligner, refuse.guard, kind) == ("refuse", "harm", StrengthTrace("kind", (0.5,) * 5))
    assert refuse.scores == pytest.approx(scores.amax(-1).tolist(), abs=SAME)
    assert refuse.labels == tuple(LABELS[column] for column in scores.argmax(-1).tolist())
    assert refuse.strengths == completion.strength["refuse"]
    assert refuse.strengths == pytest.approx([min(1, max(0, (s - 0.2) / 0.6)) for s in refuse.scores], abs=SAME)
    assert len(set(refuse.scores)) > 1


@pytest.mark.parametrize("reads", ["prompt", "both"])
def test_what_was_read_at_the_prompts_end_is_told_for_every_token(tiny_base: Base, guard, aligners, reads) -> None:
    completion, scores = asked(tiny_base, guard, aligners, {"refuse": timed(ramp(guard, 0.2, 0.8), reads=reads)})
    counted = scores[:1].expand_as(scores) if reads == "prompt" else torch.maximum(scores, scores[:1])
    assert completion.traces[0].scores == pytest.approx(counted.amax(-1).tolist(), abs=SAME)


def test_a_category_is_named_by_what_it_asked_for(tiny_base: Base, guard, aligners) -> None:
    policy = by_category(
        guard, {"violence": step(guard, 0.0, high=0.7), "hate": step(guard, 0.0, high=0.2)}, latched=False
    )
    completion, scores = asked(tiny_base, guard, aligners, {"refuse": policy})
    assert set(completion.traces[0].labels) == {"violence"}
    assert completion.traces[0].scores == pytest.approx(scores[:, 1].tolist(), abs=SAME)


def test_of_several_guards_the_one_that_called_loudest_is_told(tiny_base: Base, guard, random_guard, aligners) -> None:
    other = random_guard(tiny_base, "leak", seed=6, kind="plr")
    policy = {"refuse": strongest(step(guard, 0.0, high=0.2), step(other, 0.0, high=0.7), 0.1)}
    with attach(tiny_base, aligners, [guard, other], policy):
        completion = tiny_base.chat(QUESTION, max_new_tokens=3)
    trace = completion.traces[0]
    assert trace.guard == "harm + leak"
    assert set(trace.labels) == {"leak/harm"}
    assert trace.strengths == pytest.approx([0.7] * len(trace.strengths))
    assert trace.scores[0] == pytest.approx(next(v for v in completion.verdicts if v.task == "leak").score, abs=SAME)


def test_a_score_that_is_not_a_number_is_told(tiny_base: Base, random_guard, aligners) -> None:
    broken = random_guard(tiny_base, "broken")
    broken.head.linear.bias.data.fill_(math.nan)
    with attach(tiny_base, aligners, [broken], {"refuse": step(broken, 0.5, high=1.2)}):
        trace = tiny_base.chat(QUESTION, max_new_tokens=3).traces[0]
    assert trace.strengths == pytest.approx([1.2] * len(trace.strengths))
    assert all(map(math.isnan, trace.scores))
    assert set(trace.labels) == {"harm"}


def test_a_trace_can_be_cut() -> None:
    trace = StrengthTrace("refuse", (0.1, 0.2), "harm", (0.5, 0.6), ("a", "b"))
    assert trace.first(1) == StrengthTrace("refuse", (0.1,), "harm", (0.5,), ("a",))
    assert StrengthTrace("refuse", (0.1, 0.2)).first(1) == StrengthTrace("refuse", (0.1,))
