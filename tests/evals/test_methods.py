"""Ways to answer behind one seam: each gives what it promises and leaves the base as it was."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from safeside import Adapter, Base, Message, attach, ramp, step
from safeside.base.families import has_lora
from safeside.errors import InputError
from safeside.evals.likelihood import likelihoods
from safeside.evals.methods import (
    REFUSAL,
    Aligned,
    GuardedRefusal,
    Method,
    Oracle,
    PlainBase,
    WithLora,
    WithSystemPrompt,
    has_system_role,
    instructed,
)
from safeside.evals.runs import judging, run_suite
from safeside.evals.safe_decoding import Mix, SafeDecoding, candidates, mixed_scores
from safeside.evals.suites import Prompt, Suite, answered
from safeside.lora import LoraShape, add_lora, load_lora, save_lora
from safeside.mixing import as_policy

LONGEST = 6
SAME = 1e-4  # nats of a whole answer, in float32
TEXTS = ("the cat sat", "how can this be", "the other hat said that they")
QUESTIONS = [[Message("user", text)] for text in TEXTS]
ANSWERED = [[*question, Message("assistant", "they sat on the mat")] for question in QUESTIONS]
BEGUN = [[*question, Message("assistant", "they")] for question in QUESTIONS]


@pytest.fixture(scope="module")
def expert(session_base: Base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA that changes every answer."""
    with add_lora(session_base, LoraShape(rank=4), seed=3) as lora:
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for update in lora.updates:
                update.copy_(torch.randn(update.shape, generator=generator) / update.shape[1] ** 0.5)
        return save_lora(lora, tmp_path_factory.mktemp("expert"))


@pytest.fixture(scope="module")
def untrained(session_base: Base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA that is the base."""
    with add_lora(session_base, LoraShape(rank=2)) as lora:
        return save_lora(lora, tmp_path_factory.mktemp("untrained"))


def texts(method: Method) -> list[str]:
    return [completion.text for completion in method.answers(QUESTIONS, LONGEST)]


def one_by_one(base: Base) -> list[str]:
    return [base.chat(question, max_new_tokens=6).text for question in QUESTIONS]


def with_threshold(guard: Adapter, threshold: float) -> Adapter:
    config = guard.config.model_copy(update={"calibration": None})
    guard.config = config
    assert threshold in (0.0, 1.0)
    with torch.no_grad():  # scores of exactly this side of the default threshold
        guard.head.linear.weight.zero_()
        guard.head.linear.bias.fill_(20.0 if threshold == 0.0 else -20.0)
    return guard


def all_methods(base: Base, guard: Adapter, aligner: Adapter, expert: Path) -> list[Method]:
    return [
        PlainBase(base),
        Aligned(base, aligner, ramp(guard), (guard,)),
        Oracle(base, replace_name(aligner, "oracle"), 1.0, frozenset(TEXTS[:1])),
        WithLora(base, expert),
        WithSystemPrompt(base),
        SafeDecoding(base, expert),
        GuardedRefusal(base, with_threshold(guard, 1.0)),
    ]


def replace_name(adapter: Adapter, name: str) -> Adapter:
    adapter.config = adapter.config.model_copy(update={"name": name})
    return adapter


def test_every_method_leaves_the_base(
    tiny_base: Base, expert: Path, random_guard: Callable[..., Adapter], random_aligner: Callable[..., Adapter]
) -> None:
    methods = all_methods(tiny_base, random_guard(tiny_base), random_aligner(tiny_base), expert)
    plain = one_by_one(tiny_base)
    for method in methods:
        assert len(texts(method)) == len(method.likelihoods(ANSWERED)) == len(QUESTIONS)
        assert len(method.answers(BEGUN, LONGEST)) == len(BEGUN)
        assert method.answers([], LONGEST) == []
        assert method.policy_name in ("fixed", "ramp", "oracle")
        assert 0 <= method.strength <= 2
        assert tiny_base.attachment is None
        assert not has_lora(tiny_base.model)
        assert one_by_one(tiny_base) == plain
    keys = [json.dumps(method.key) for method in methods]
    assert len(set(keys)) == len({method.name for method in methods}) + 1 == len(methods)  # one aligner, two policies


def test_the_base_alone(tiny_base: Base) -> None:
    assert texts(PlainBase(tiny_base)) == one_by_one(tiny_base)
    assert PlainBase(tiny_base).likelihoods(ANSWERED) == likelihoods(tiny_base, ANSWERED)


def test_our_aligners_at_a_strength(tiny_base: Base, random_aligner: Callable[..., Adapter]) -> None:
    aligner = random_aligner(tiny_base)
    with attach(tiny_base, [aligner], strength=0.7):
        expected = one_by_one(tiny_base)
    method = Aligned(tiny_base, aligner, as_policy(0.7))
    assert texts(method) == expected != one_by_one(tiny_base)
    for found in method.answers(QUESTIONS, LONGEST):
        assert found.strength["refuse"] == pytest.approx((0.7,) * found.n_new_tokens)
    assert texts(replace(method, policy=as_policy(0.0))) == one_by_one(tiny_base)


def test_an_oracle_acts_on_what_it_was_told(tiny_base: Base, random_aligner: Callable[..., Adapter]) -> None:
    aligner = random_aligner(tiny_base)
    plain, full = (texts(Aligned(tiny_base, aligner, as_policy(strength))) for strength in (0.0, 1.0))
    method = Oracle(tiny_base, aligner, 1.0, frozenset(TEXTS[1:2]))
    assert texts(method) == [plain[0], full[1], plain[2]]
    likely = [Aligned(tiny_base, aligner, as_policy(strength)).likelihoods(ANSWERED) for strength in (0.0, 1.0)]
    for row, found in enumerate(method.likelihoods(ANSWERED)):
        assert found.nll == pytest.approx(likely[row == 1][row].nll, abs=SAME)


def test_a_step_picks_between_its_ends(
    tiny_base: Base, random_guard: Callable[..., Adapter], random_aligner: Callable[..., Adapter]
) -> None:
    """What a latched gate answers is what one of the two fixed strengths answers: benchmarks rest on it."""
    guard, aligner = random_guard(tiny_base, seed=11), random_aligner(tiny_base)
    with attach(tiny_base, guards=[guard]):
        scores = [tiny_base.chat(question, max_new_tokens=1).verdicts[0].score for question in QUESTIONS]
    threshold = sorted(scores)[1]
    ends = [Aligned(tiny_base, aligner, as_policy(strength)) for strength in (0.0, 1.0)]
    answers, likely = ([texts(end) for end in ends], [end.likelihoods(ANSWERED) for end in ends])
    gated = Aligned(tiny_base, aligner, step(guard, threshold), (guard,))
    is_open = [score >= threshold for score in scores]
    assert sum(is_open) == 2
    assert texts(gated) == [answers[opened][row] for row, opened in enumerate(is_open)]
    for row, found in enumerate(gated.likelihoods(ANSWERED)):
        assert found.nll == pytest.approx(likely[is_open[row]][row].nll, abs=SAME)


def test_a_lora_at_a_strength(tiny_base: Base, expert: Path) -> None:
    plain = one_by_one(tiny_base)
    found = {scale: texts(WithLora(tiny_base, expert, scale)) for scale in (0.0, 0.5, 1.0, 1.5)}
    assert found[0.0] == plain
    assert all(plain != answers for scale, answers in found.items() if scale)
    assert found[0.5] != found[1.0]
    with pytest.raises(InputError, match="scale lies between"):
        texts(WithLora(tiny_base, expert, -1.0))
    assert WithLora(tiny_base, expert, 0.0).likelihoods(ANSWERED) == likelihoods(tiny_base, ANSWERED)
    assert WithLora(tiny_base, expert).likelihoods(ANSWERED) != likelihoods(tiny_base, ANSWERED)


def test_a_system_prompt_stands_first(tiny_base: Base) -> None:
    told = [[Message("system", "be good"), *question] for question in QUESTIONS]
    expected = [tiny_base.chat(messages, max_new_tokens=6).text for messages in told]
    assert texts(WithSystemPrompt(tiny_base, "be good")) == expected
    told_answers = [[Message("system", "be good"), *messages] for messages in ANSWERED]
    assert WithSystemPrompt(tiny_base, "be good").likelihoods(ANSWERED) == likelihoods(tiny_base, told_answers)
    assert instructed(told[0], "and kind", True) == [Message("system", "and kind\n\nbe good"), *QUESTIONS[0]]
    assert instructed(QUESTIONS[0], "be good", False) == [Message("user", "be good\n\nthe cat sat")]
    with pytest.raises(InputError, match="at least one message"):
        instructed([], "be good", True)


def test_templates_without_a_system_role(tiny_base: Base) -> None:
    assert has_system_role(tiny_base)
    template = str(tiny_base.tokenizer.chat_template)
    refusing = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + template
    tiny_base.tokenizer.chat_template = refusing
    try:
        assert not has_system_role(tiny_base)
        told = [[Message("user", f"be good\n\n{question[0].content}")] for question in QUESTIONS]
        expected = [tiny_base.chat(messages, max_new_tokens=6).text for messages in told]
        assert texts(WithSystemPrompt(tiny_base, "be good")) == expected
    finally:
        tiny_base.tokenizer.chat_template = template


def test_flagged_prompts_get_the_refusal_exactly(tiny_base: Base, random_guard: Callable[..., Adapter]) -> None:
    always = GuardedRefusal(tiny_base, with_threshold(random_guard(tiny_base), 0.0))
    found = always.answers(QUESTIONS, LONGEST)
    assert [(answer.text, answer.finish_reason) for answer in found] == [(REFUSAL, "blocked")] * 3
    assert all(answer.verdicts[0].flagged for answer in found)
    assert texts(replace(always, refusal="no.")) == ["no."] * 3
    never = GuardedRefusal(tiny_base, with_threshold(random_guard(tiny_base), 1.0))
    assert texts(never) == one_by_one(tiny_base)


def test_a_mixed_batch_is_refused_row_by_row(tiny_base: Base, random_guard: Callable[..., Adapter]) -> None:
    guard = random_guard(tiny_base, seed=11)
    method = GuardedRefusal(tiny_base, guard)
    with attach(tiny_base, guards=[guard]):
        flagged = [tiny_base.chat(question, max_new_tokens=1).verdicts[0].flagged for question in QUESTIONS]
    plain = one_by_one(tiny_base)
    assert texts(method) == [REFUSAL if blocked else text for blocked, text in zip(flagged, plain, strict=True)]


def test_a_guard_that_cannot_score_refuses(tiny_base: Base, random_guard: Callable[..., Adapter]) -> None:
    guard = random_guard(tiny_base)
    with torch.no_grad():
        guard.head.linear.weight.fill_(float("nan"))
    assert texts(GuardedRefusal(tiny_base, guard)) == [REFUSAL] * 3


def test_a_blocked_prompt_has_no_likelihood(tiny_base: Base, random_guard: Callable[..., Adapter]) -> None:
    """A record says so, and the others are kept."""
    always, never = (with_threshold(random_guard(tiny_base), threshold) for threshold in (0.0, 1.0))
    suite = Suite("known", Path(), "", read=answered, measure="likelihood")
    prompts = [Prompt(text, (text,), False, references=("they sat",)) for text in TEXTS]
    for guard, n_scored in ((always, 0), (never, 3)):
        records = run_suite(suite, prompts, GuardedRefusal(tiny_base, guard), judging(suite))
        assert sum(record.nll is not None for record in records) == n_scored
        assert all("blocked the prompt" in record.judgement.reason for record in records if record.nll is None)


# ---- SafeDecoding ----------------------------------------------------------------------------------------------------


def test_an_expert_that_is_the_base_changes_nothing(tiny_base: Base, untrained: Path) -> None:
    for n_tokens in (1, 2, 6):
        assert texts(SafeDecoding(tiny_base, untrained, Mix(n_tokens))) == one_by_one(tiny_base)


def test_weight_1_is_the_expert_at_the_first_tokens(tiny_base: Base, expert: Path) -> None:
    everything = Mix(n_tokens=6, weight=1.0, n_candidates=304)
    assert texts(SafeDecoding(tiny_base, expert, everything)) == texts(WithLora(tiny_base, expert, 1.0))
    assert texts(SafeDecoding(tiny_base, expert, replace(everything, weight=0.0))) == one_by_one(tiny_base)


def test_it_is_the_obvious_loop(tiny_base: Base, expert: Path) -> None:
    """The oracle: no cache, no batch, no ``generate``; two whole passes at each of the first tokens."""
    mix = Mix(n_tokens=2, weight=3.0, n_candidates=4)
    stops = {int(token) for token in tiny_base.model.generation_config.eos_token_id}
    expected = []
    with load_lora(expert, tiny_base) as lora, torch.no_grad():
        for question in QUESTIONS:
            ids, answer = list(tiny_base.encode(question).ids), []
            for place in range(6):
                logits = {}
                for scale in (0.0, 1.0):
                    with lora.scaled(scale):
                        logits[scale] = tiny_base.model(input_ids=torch.tensor([ids + answer])).logits[0, -1].float()
                token = obvious_choice(logits, mix) if place < mix.n_tokens else int(logits[0.0].argmax())
                if token in stops:
                    break
                answer.append(token)
            expected.append(tiny_base.tokenizer.decode(answer, skip_special_tokens=True).strip())
    found = texts(SafeDecoding(tiny_base, expert, mix))
    assert found == expected
    assert found != one_by_one(tiny_base)


def obvious_choice(logits: dict[float, torch.Tensor], mix: Mix) -> int:
    of_base, of_expert = logits[0.0].softmax(-1), logits[1.0].softmax(-1)
    shared: set[int] = set()
    for k in range(1, len(of_base) + 1):
        shared = set(of_base.topk(k).indices.tolist()) & set(of_expert.topk(k).indices.tolist())
        if len(shared) >= mix.n_candidates:
            break
    value = {
        token: max(float(of_base[token] + mix.weight * (of_expert[token] - of_base[token])), 1e-8) for token in shared
    }
    return max(value, key=lambda token: value[token])


def test_candidates_are_those_of_the_growing_top() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, 5, 40, generator=generator)
    found = candidates(first, second, 5)
    for row in range(5):
        for k in range(1, 41):
            shared = set(first[row].topk(k).indices.tolist()) & set(second[row].topk(k).indices.tolist())
            if len(shared) >= 5:
                break
        assert set(found[row].nonzero().flatten().tolist()) == shared
    scores = mixed_scores(first, second, Mix())
    torch.testing.assert_close(scores.exp().sum(-1), torch.ones(5))
    assert torch.equal(scores.isfinite(), found)


@pytest.mark.parametrize("values", [{"n_tokens": 0}, {"n_candidates": 0}, {"weight": -1.0}, {"weight": float("nan")}])
def test_mixes_that_cannot_be(values: dict[str, float]) -> None:
    with pytest.raises(InputError, match="SafeDecoding needs"):
        Mix(**values)


def test_likelihoods_of_safe_decoding_by_hand(tiny_base: Base, expert: Path) -> None:
    """The oracle: one answer at a time, token by token, each distribution from a whole pass."""
    mix = Mix(n_tokens=2, weight=3.0)
    found = SafeDecoding(tiny_base, expert, mix).likelihoods(ANSWERED)
    with load_lora(expert, tiny_base) as lora, torch.no_grad():
        for messages, likelihood in zip(ANSWERED, found, strict=True):
            item, total = tiny_base.encode(messages), 0.0
            for place in range(item.answer_start, len(item.ids)):
                chances = []
                for scale in (0.0, 1.0):
                    with lora.scaled(scale):
                        logits = tiny_base.model(input_ids=torch.tensor([item.ids[:place]])).logits[0, -1]
                    chances.append(logits.double().softmax(-1))
                mixed = chances[0]
                if place - item.answer_start < mix.n_tokens:
                    mixed = (chances[0] + mix.weight * (chances[1] - chances[0])).clamp_min(1e-8)
                total -= math.log(float(mixed[item.ids[place]] / mixed.sum()))
            assert (likelihood.nll, likelihood.n_tokens) == (
                pytest.approx(total, abs=1e-3),
                len(item.ids) - item.answer_start,
            )
