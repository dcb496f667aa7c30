"""Strengths that guards set, against a twin that recomputes every score on the whole text, token by token."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from transformers import DynamicCache

from safeside import Adapter, Base, attach, by_category, fixed, ramp, sigmoid, step, strongest, timed
from safeside.errors import AttachmentError, InputError
from safeside.mixing import Policy
from safeside.request import request_layer
from twin import SAME, Answer, answer_by_hand, close, mixed_logits, pad, positions_of, run_by_hand

PROMPT = [11, 90, 40, 77, 200, 9, 131]
N_NEW = 6


@dataclass
class Rig:
    """The tiny llama, two guards and two aligners."""

    base: Base
    guards: list[Adapter]
    aligners: list[Adapter]

    def attach(self, strength: object):
        return attach(self.base, self.aligners, self.guards, strength)

    @contextlib.contextmanager
    def broken(self, guard: Adapter) -> Iterator[None]:
        """``guard`` scores NaN inside the block."""
        bias = guard.head.linear.bias.detach().clone()
        guard.head.linear.bias.data.fill_(float("nan"))
        try:
            yield
        finally:
            guard.head.linear.bias.data.copy_(bias)


@pytest.fixture(scope="module")
def rig(session_base: Base, random_guard, random_aligner) -> Rig:
    guards = [
        random_guard(session_base, "harm", seed=5, labels=("hate", "violence")),
        random_guard(session_base, "leak", seed=6, kind="plr"),
    ]
    aligners = [
        random_aligner(session_base, "refuse", seed=7),
        random_aligner(session_base, "kind", seed=8, kind="plr"),
    ]
    return Rig(session_base, guards, aligners)


@pytest.fixture(autouse=True)
def bare(rig: Rig) -> Iterator[None]:
    with torch.no_grad():
        yield
    if rig.base.attachment is not None:
        rig.base.attachment.detach()


def ramp_rule(score: float) -> float:
    """What ramp(low=0.3, high=0.7, floor=0.1, ceiling=1.6) should give."""
    if score <= 0.3:
        return 0.1
    return 1.6 if score >= 0.7 else 0.1 + 1.5 * (score - 0.3) / 0.4


def middle_score(rig: Rig, guard_name: str) -> float:
    """A threshold that some tokens of the prompt reach and some do not."""
    guard = next(guard for guard in rig.guards if guard.name == guard_name)
    return float(run_by_hand(rig.base, guard, torch.tensor([PROMPT])).scores[0].amax(-1).median())


def policy_and_rule(rig: Rig, kind: str, guard: str, latched: bool) -> tuple[Policy, Callable[[list[float]], float]]:
    """A policy and the plain function of the scores since the prompt's end that it should be."""
    if kind == "ramp":
        policy: Policy = ramp(guard, 0.3, 0.7, floor=0.1, ceiling=1.6, latched=latched)
        one = ramp_rule
    else:
        threshold = middle_score(rig, guard)
        policy = step(guard, threshold, low=0.2, high=1.3, latched=latched)

        def one(score: float) -> float:
            return 1.3 if score >= threshold else 0.2

    return policy, lambda scores: one(scores[0] if latched else scores[-1])


@pytest.mark.parametrize("latched", [True, False], ids=["latched", "each token"])
@pytest.mark.parametrize("guard", ["harm", "leak"])
@pytest.mark.parametrize("kind", ["step", "ramp"])
def test_a_gate_does_what_its_twin_does(rig: Rig, kind: str, guard: str, latched: bool) -> None:
    policy, rule = policy_and_rule(rig, kind, guard, latched)
    rules = {rig.aligners[0]: rule, rig.aligners[1]: lambda scores: 0.5}
    expected = answer_by_hand(rig.base, PROMPT, rules, rig.guards, N_NEW, score_of=guard)
    found = answer(rig, {"refuse": policy, "kind": 0.5})
    assert found.ids == expected.ids
    for name in ("refuse", "kind"):
        assert found.strengths[name] == pytest.approx(expected.strengths[name], abs=SAME)
    if not latched:
        assert len(set(expected.strengths["refuse"])) > 1


def answer(rig: Rig, strength: object) -> Answer:
    """The same by the fast path: generate on a cache under attachment."""
    cache, ids = DynamicCache(), torch.tensor([PROMPT])
    with rig.attach(strength) as attachment, attachment.request(prompt_end=[len(PROMPT)]):
        output = rig.base.model.generate(
            ids, past_key_values=cache, do_sample=False, max_new_tokens=N_NEW, min_new_tokens=N_NEW
        )
        strengths = attachment.strengths(cache)[0]
    return Answer(output[0, len(PROMPT) :].tolist(), {name: list(values) for name, values in strengths.items()})


@pytest.mark.parametrize("latched", [True, False], ids=["latched", "each token"])
def test_rows_are_gated_each_by_its_own_score(rig: Rig, latched: bool) -> None:
    """Whole text in one pass, padded left, prompts ending at different tokens."""
    rows, ends = [[*PROMPT, 5, 60, 7], [70, 12, 150, 33], [99, 8, 201, 17, 45]], [7, 2, 5]
    policy, rule = policy_and_rule(rig, "ramp", "harm", latched)
    ids, keep = pad(rows, "left")
    with rig.attach({"refuse": policy}) as attachment, attachment.request(prompt_end=ends):
        found = rig.base.model(ids, attention_mask=keep.long(), position_ids=positions_of(keep)).logits
    for row, (tokens, end) in enumerate(zip(rows, ends, strict=True)):
        alone = torch.tensor([tokens])
        scores = run_by_hand(rig.base, rig.guards[0], alone).scores[0].amax(-1).tolist()
        strengths = [rule(scores[end - 1 : t + 1]) if t >= end - 1 else 0.0 for t in range(len(tokens))]
        expected = mixed_logits(rig.base, alone, [(rig.aligners[0], torch.tensor(strengths)[None, :, None])])
        close(found[row, keep[row]], expected[0])


def test_without_a_prompts_end_every_position_is_gated(rig: Rig) -> None:
    ids = torch.tensor([PROMPT])
    scores = run_by_hand(rig.base, rig.guards[1], ids).scores.amax(-1)
    strengths = torch.tensor([[ramp_rule(score) for score in scores[0].tolist()]])
    expected = mixed_logits(rig.base, ids, [(rig.aligners[1], strengths[..., None])])
    with rig.attach({"kind": ramp("leak", 0.3, 0.7, 0.1, 1.6, latched=False)}):
        close(rig.base.model(ids).logits, expected)


class Calls:
    """Counts the forward passes of an adapter."""

    def __init__(self, adapter: Adapter) -> None:
        self.n = 0
        self.handle = adapter.register_forward_hook(self)

    def __call__(self, *_: object) -> None:
        self.n += 1

    def __enter__(self) -> Calls:
        return self

    def __exit__(self, *_: object) -> None:
        self.handle.remove()


NEVER, ALWAYS = step("harm", 1.0, low=0.0, high=1.0), step("harm", 0.0, low=0.0, high=1.0)


def test_a_latched_zero_skips_the_aligner(rig: Rig) -> None:
    ids, cache = torch.tensor([PROMPT]), DynamicCache()
    plain = rig.base.model(ids).logits
    with Calls(rig.aligners[0]) as calls, rig.attach({"refuse": NEVER}) as attachment:
        with attachment.request(prompt_end=[5]):
            assert torch.equal(rig.base.model(ids[:, :5], past_key_values=cache).logits, plain[:, :5])
            close(rig.base.model(ids[:, 5:], past_key_values=cache).logits, plain[:, 5:])
            assert torch.equal(rig.base.model(ids, use_cache=False).logits, plain)
        with attachment.request(prompt_end=[12]):  # a second turn: off until it is decided, and then off again
            for chunk in (ids[:, :2], ids[:, :3]):
                rig.base.model(chunk, past_key_values=cache)
    assert calls.n == 0
    assert request_layer(cache).skipped == {"refuse"}


@pytest.mark.parametrize("strength", [0.5, {"refuse": ALWAYS}, {"refuse": fixed([0.1])}], ids=str)
def test_an_aligner_that_was_skipped_cannot_come_back(rig: Rig, strength: object) -> None:
    ids, cache = torch.tensor([PROMPT]), DynamicCache()
    with rig.attach({"refuse": NEVER}) as attachment:
        with attachment.request(prompt_end=[5]):
            rig.base.model(ids, past_key_values=cache)
        with attachment.request(strength=strength, prompt_end=[8]):
            with pytest.raises(AttachmentError, match=r"'refuse' was off for good on this cache.*Start with a new"):
                rig.base.model(ids[:, :1], past_key_values=cache)
            rig.base.model(torch.tensor([[*PROMPT, 3]]), past_key_values=DynamicCache())


def test_a_token_wise_aligner_may_come_back(rig: Rig) -> None:
    ids, cache = torch.tensor([PROMPT]), DynamicCache()
    expected = mixed_logits(rig.base, ids, [(rig.aligners[1], 0.5)])
    with rig.attach({"kind": NEVER}) as attachment:
        with attachment.request(prompt_end=[3]):
            rig.base.model(ids[:, :4], past_key_values=cache)
        with attachment.request(strength={"kind": 0.5}):
            close(rig.base.model(ids[:, 4:], past_key_values=cache).logits, expected[:, 4:])


def test_while_a_strength_may_rise_the_aligner_reads_along(rig: Rig) -> None:
    """Undecided in the first chunk, and at 0 only for now: the aligner's cache is written all the same."""
    ids = torch.tensor([PROMPT])
    expected = mixed_logits(rig.base, ids, [(rig.aligners[0], 1.0)])
    ends = {ALWAYS: len(PROMPT), step("harm", 1.0, latched=False): 1}
    for policy, end in ends.items():
        cache = DynamicCache()
        with Calls(rig.aligners[0]) as calls, rig.attach({"refuse": policy}) as attachment:
            with attachment.request(prompt_end=[end]):
                rig.base.model(ids[:, :4], past_key_values=cache)
            assert calls.n == 1
            assert not attachment.record.strengths["refuse"].any()
            assert {layer.get_seq_length() for layer in cache.layers} == {4}
            with attachment.request(strength={"refuse": 1.0 if end == 1 else policy}, prompt_end=[end]):
                close(rig.base.model(ids[:, 4:], past_key_values=cache).logits[:, -1], expected[:, -1])


@pytest.mark.parametrize("latched", [True, False], ids=["latched", "each token"])
@pytest.mark.parametrize("kind", ["step", "ramp"])
def test_a_guard_that_scores_nan_gives_the_ceiling(rig: Rig, kind: str, latched: bool) -> None:
    policy = policy_and_rule(rig, kind, "harm", latched)[0]
    ids = torch.tensor([PROMPT])
    expected = mixed_logits(rig.base, ids, [(rig.aligners[0], policy.ceiling)])
    broken = rig.broken(rig.guards[0])
    with broken, rig.attach({"refuse": policy}) as attachment, attachment.request(prompt_end=[4]):
        found = rig.base.model(ids).logits
    close(found[:, 3:], expected[:, 3:])


def test_one_label_that_is_nan_is_enough(rig: Rig) -> None:
    bias = rig.guards[0].head.linear.bias.data
    before = bias.clone()
    bias[1] = float("nan")
    with rig.attach({"refuse": ramp("harm", 0.2, 0.8, ceiling=0.7, latched=False)}) as attachment:
        rig.base.model(torch.tensor([PROMPT]))
    bias.copy_(before)
    assert attachment.record.strengths["refuse"].tolist() == [[pytest.approx(0.7)] * len(PROMPT)]


@dataclass(frozen=True)
class Whisper:
    """A stranger's policy: any object with these members is one."""

    guard: str = "leak"
    latched: bool = False
    ceiling: float = 0.1

    def strength(self, score: torch.Tensor) -> torch.Tensor:
        return 0.1 * score


def test_a_strangers_policy_is_a_policy(rig: Rig) -> None:
    with rig.attach({"refuse": Whisper()}) as attachment:
        rig.base.model(torch.tensor([PROMPT]))
        record = attachment.record
    close(record.strengths["refuse"], 0.1 * record.scores["leak"].amax(-1))


# ---- timed policies, categories, traces ------------------------------------------------------------------------------


def held(scores: list[float], margin: float) -> float:
    """The recursion of hysteresis, one float after the other."""
    value = scores[0]
    for score in scores[1:]:
        value = max(score, min(value, score + margin))
    return value


TIMED: dict[str, tuple[Callable[[], Policy], Callable[[list[float]], float]]] = {
    "prompt": (lambda: timed(SLOPE, reads="prompt"), lambda scores: ramp_rule(scores[0])),
    "answer": (lambda: timed(SLOPE, reads="answer"), lambda scores: ramp_rule(scores[-1])),
    "both": (lambda: timed(SLOPE, reads="both"), lambda scores: ramp_rule(max(scores[0], scores[-1]))),
    "margin": (
        lambda: timed(replace(SLOPE, guard="leak"), reads="answer", margin=0.1),
        lambda scores: ramp_rule(held(scores, 0.1)),
    ),
    "first": (
        lambda: timed(SLOPE, reads="answer", first_tokens=3),
        lambda scores: ramp_rule(scores[-1]) if len(scores) <= 3 else 0.0,
    ),
    "first of a prompt": (
        lambda: timed(SLOPE, reads="prompt", first_tokens=2),
        lambda scores: ramp_rule(scores[0]) if len(scores) <= 2 else 0.0,
    ),
    "first of a number": (lambda: timed(1.3, first_tokens=4), lambda scores: 1.3 if len(scores) <= 4 else 0.0),
    "sigmoid": (
        lambda: sigmoid("harm", 0.5, 0.4, latched=False),
        lambda scores: 0.5 + 0.5 * math.tanh(2 * (scores[-1] - 0.5) / 0.4),
    ),
}
SLOPE = ramp("harm", 0.3, 0.7, floor=0.1, ceiling=1.6)


@pytest.mark.parametrize("name", TIMED)
def test_a_timed_gate_does_what_its_twin_does(rig: Rig, name: str) -> None:
    make, rule = TIMED[name]
    policy = make()
    rules = {rig.aligners[0]: rule, rig.aligners[1]: lambda scores: 0.5}
    expected = answer_by_hand(rig.base, PROMPT, rules, rig.guards, N_NEW, score_of=policy.guard or "harm")
    found = answer(rig, {"refuse": policy, "kind": 0.5})
    assert found.ids == expected.ids
    assert found.strengths["refuse"] == pytest.approx(expected.strengths["refuse"], abs=SAME)


@pytest.mark.parametrize("reads", ["answer", "both"])
def test_each_row_is_held_by_its_own_scores(rig: Rig, reads: str) -> None:
    """Whole texts in one pass, padded left, prompts ending at different tokens, with hysteresis."""
    rows, ends = [[*PROMPT, 5, 60, 7], [70, 12, 150, 33], [99, 8, 201, 17, 45]], [7, 2, 5]
    ids, keep = pad(rows, "left")
    policy = timed(SLOPE, reads=reads, margin=0.05)
    with rig.attach({"refuse": policy}) as attachment, attachment.request(prompt_end=ends):
        rig.base.model(ids, attention_mask=keep.long(), position_ids=positions_of(keep))
        found = attachment.record.strengths["refuse"]
    for row, (tokens, end) in enumerate(zip(rows, ends, strict=True)):
        scores = run_by_hand(rig.base, rig.guards[0], torch.tensor([tokens])).scores[0].tolist()
        expected = []
        for t in range(len(tokens)):
            by_label = [held([score[k] for score in scores[end - 1 : t + 1]] or [0.0], 0.05) for k in range(2)]
            if reads == "both":
                by_label = [max(one, scores[end - 1][k]) for k, one in enumerate(by_label)]
            expected.append(ramp_rule(max(by_label)) if t >= end - 1 else 0.0)
        assert found[row, keep[row]].tolist() == pytest.approx(expected, abs=SAME)


def test_categories_gate_by_their_own_label(rig: Rig) -> None:
    ids = torch.tensor([PROMPT])
    scores = run_by_hand(rig.base, rig.guards[0], ids).scores[0]
    policy = by_category(
        rig.guards[0], {"violence": ramp("harm", 0.2, 0.8), "hate": step("harm", 0.5, high=0.3)}, latched=False
    )
    with rig.attach({"refuse": policy}) as attachment:
        rig.base.model(ids)
        found = attachment.record.strengths["refuse"][0]
    expected = torch.maximum(((scores[:, 1] - 0.2) / 0.6).clamp(0, 1), 0.3 * (scores[:, 0] >= 0.5))
    close(found, expected)


def test_a_broken_guard_gets_the_ceiling_however_it_is_timed(rig: Rig) -> None:
    ids = torch.tensor([PROMPT])
    for reads in ("prompt", "answer", "both"):
        policy = timed(SLOPE, reads=reads, margin=0.0 if reads == "prompt" else 0.2, first_tokens=2)
        with rig.broken(rig.guards[0]), rig.attach({"refuse": policy}) as attachment:
            with attachment.request(prompt_end=[4]):
                rig.base.model(ids)
            assert attachment.record.strengths["refuse"][0].tolist() == pytest.approx([0, 0, 0, 1.6, 1.6, 0, 0])


def test_times_wait_for_the_prompts_end(rig: Rig) -> None:
    for policy in (timed(SLOPE, reads="both"), timed(0.5, first_tokens=3)):
        with rig.attach({"refuse": policy}), pytest.raises(AttachmentError, match="prompt_end is not known"):
            rig.base.model(torch.tensor([PROMPT]))


def test_a_timed_aligner_comes_back_after_a_crop(rig: Rig) -> None:
    """As prompt lookup does: guesses beyond the last token of the window are taken back."""
    ids, policy = torch.tensor([PROMPT]), timed(SLOPE, reads="prompt", first_tokens=3)
    with rig.attach({"refuse": policy}) as attachment, attachment.request(prompt_end=[3]):
        expected = rig.base.model(ids).logits
        cache = DynamicCache()
        rig.base.model(ids[:, :4], past_key_values=cache)
        rig.base.model(ids[:, 4:], past_key_values=cache)
        cache.crop(-3)
        close(rig.base.model(ids[:, 4:5], past_key_values=cache).logits, expected[:, 4:5])


def test_a_timed_number_may_differ_by_row(rig: Rig) -> None:
    ids = torch.tensor([PROMPT, PROMPT[::-1]])
    policy = timed([0.5, 1.5], first_tokens=2)
    with rig.attach({"refuse": policy}) as attachment, attachment.request(prompt_end=[5, 4]):
        rig.base.model(ids)
        found = attachment.record.strengths["refuse"].tolist()
    assert found == [[0.5] * 6 + [0.0], [1.5] * 5 + [0.0] * 2]


def strengths_of(rig: Rig, strength: object, ids: torch.Tensor, n_prompt: int) -> torch.Tensor:
    """(T,) strengths of the first aligner on one fixed text."""
    with rig.attach({"refuse": strength}) as attachment, attachment.request(prompt_end=[n_prompt]):
        rig.base.decoder(input_ids=ids, use_cache=False)
        return attachment.record.strengths["refuse"].expand(ids.shape)[0]


def test_the_strongest_of_several_guards_counts_at_every_token(rig: Rig) -> None:
    ids = torch.tensor([[*PROMPT, 12, 91, 41, 78, 201, 10, 132, 55]])
    parts = [
        timed(ramp("harm", 0.3, 0.9), reads="both", margin=0.1),
        ramp("leak", 0.2, 0.8, latched=False),
        by_category(rig.guards[0], {"violence": 0.4}),
        0.15,
    ]
    alone = torch.stack([strengths_of(rig, part, ids, len(PROMPT)) for part in parts])
    together = strengths_of(rig, strongest(*parts), ids, len(PROMPT))
    assert torch.equal(together, alone.amax(0))
    assert len(set(alone.argmax(0).tolist())) > 1  # not one part alone
    assert float(together.min()) >= 0.15


def test_a_broken_guard_among_several_gets_its_ceiling(rig: Rig) -> None:
    ids = torch.tensor([PROMPT])
    policy = strongest(step("harm", 0.0, high=0.3), step("leak", 1.0, high=1.2))
    assert float(strengths_of(rig, policy, ids, len(PROMPT))[-1]) == pytest.approx(0.3)
    with rig.broken(rig.guards[1]):
        assert float(strengths_of(rig, policy, ids, len(PROMPT))[-1]) == pytest.approx(1.2)


def test_of_several_guards_each_must_be_attached(rig: Rig) -> None:
    with pytest.raises(InputError, match="asks guard 'nobody', which is not attached"):
        rig.attach({"refuse": strongest(step("harm", 0.5), step("nobody", 0.5))})
