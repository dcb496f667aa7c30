"""Ways to answer behind one seam: each gives what it promises and leaves the base as it was."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from safeside import Adapter, Base, Message, attach, ramp
from safeside.base.families import has_lora
from safeside.errors import InputError
from safeside.evals.methods import (
    REFUSAL,
    AnswerMethod,
    GuardedRefusal,
    PlainBase,
    Sampling,
    WithAligners,
    WithLora,
    WithSystemPrompt,
    has_system_role,
    instructed,
)
from safeside.evals.safe_decoding import Mix, SafeDecoding, candidates, mixed_scores
from safeside.lora import LoraShape, add_lora, load_lora, save_lora

SHORT = Sampling(max_new_tokens=6, batch_size=2)
QUESTIONS = [[Message("user", text)] for text in ("the cat sat", "how can this be", "the other hat said that they")]


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


def texts(method: AnswerMethod, seed: int = 0) -> list[str]:
    return [completion.text for completion in method.answer(QUESTIONS, seed)]


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


def test_every_method_leaves_the_base(
    tiny_base: Base, expert: Path, random_guard: Callable[..., Adapter], random_aligner: Callable[..., Adapter]
) -> None:
    guard, aligner = random_guard(tiny_base), random_aligner(tiny_base)
    methods: list[AnswerMethod] = [
        PlainBase(tiny_base, SHORT),
        WithAligners(tiny_base, [aligner], [guard], ramp(guard), SHORT),
        WithLora(tiny_base, expert, 1.0, SHORT),
        WithSystemPrompt(tiny_base, sampling=SHORT),
        SafeDecoding(tiny_base, expert, sampling=SHORT),
        GuardedRefusal(tiny_base, guard, sampling=SHORT),
    ]
    assert len({method.name for method in methods}) == len(methods)
    plain = one_by_one(tiny_base)
    for method in methods:
        assert len(texts(method)) == len(QUESTIONS)
        assert method.answer([]) == []
        assert tiny_base.attachment is None
        assert not has_lora(tiny_base.model)
        assert one_by_one(tiny_base) == plain


def test_the_base_alone(tiny_base: Base) -> None:
    assert texts(PlainBase(tiny_base, SHORT)) == one_by_one(tiny_base)


def test_seeds_decide_what_is_drawn(tiny_base: Base) -> None:
    method = PlainBase(tiny_base, replace(SHORT, temperature=1.0))
    state = torch.random.get_rng_state()
    first = texts(method, 1)
    assert texts(method, 1) == first
    assert texts(method, 2) != first
    assert torch.equal(torch.random.get_rng_state(), state)


def test_our_aligners_at_a_strength(tiny_base: Base, random_aligner: Callable[..., Adapter]) -> None:
    aligner = random_aligner(tiny_base)
    with attach(tiny_base, [aligner], strength=0.7):
        expected = one_by_one(tiny_base)
    method = WithAligners(tiny_base, [aligner], strength=0.7, sampling=SHORT)
    assert texts(method) == expected != one_by_one(tiny_base)
    for found in method.answer(QUESTIONS):
        assert found.strength["refuse"] == pytest.approx((0.7,) * found.n_new_tokens)
    assert texts(replace(method, strength=0.0)) == one_by_one(tiny_base)


def test_a_lora_at_a_scale(tiny_base: Base, expert: Path) -> None:
    plain = one_by_one(tiny_base)
    found = {scale: texts(WithLora(tiny_base, expert, scale, SHORT)) for scale in (0.0, 0.5, 1.0, 1.5)}
    assert found[0.0] == plain
    assert all(plain != answers for scale, answers in found.items() if scale)
    assert found[0.5] != found[1.0]
    with pytest.raises(InputError, match="scale lies between"):
        texts(WithLora(tiny_base, expert, -1.0, SHORT))


def test_a_system_prompt_stands_first(tiny_base: Base) -> None:
    told = [[Message("system", "be good"), *question] for question in QUESTIONS]
    expected = [tiny_base.chat(messages, max_new_tokens=6).text for messages in told]
    assert texts(WithSystemPrompt(tiny_base, "be good", SHORT)) == expected
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
        assert texts(WithSystemPrompt(tiny_base, "be good", SHORT)) == expected
    finally:
        tiny_base.tokenizer.chat_template = template


def test_flagged_prompts_get_the_refusal_exactly(tiny_base: Base, random_guard: Callable[..., Adapter]) -> None:
    always = GuardedRefusal(tiny_base, with_threshold(random_guard(tiny_base), 0.0), sampling=SHORT)
    found = always.answer(QUESTIONS)
    assert [(answer.text, answer.finish_reason) for answer in found] == [(REFUSAL, "blocked")] * 3
    assert all(answer.verdicts[0].flagged for answer in found)
    assert texts(replace(always, refusal="no.")) == ["no."] * 3
    never = GuardedRefusal(tiny_base, with_threshold(random_guard(tiny_base), 1.0), sampling=SHORT)
    assert texts(never) == one_by_one(tiny_base)


def test_a_mixed_batch_is_refused_row_by_row(tiny_base: Base, random_guard: Callable[..., Adapter]) -> None:
    guard = random_guard(tiny_base, seed=11)
    method = GuardedRefusal(tiny_base, guard, sampling=replace(SHORT, batch_size=3))
    with attach(tiny_base, guards=[guard]):
        flagged = [tiny_base.chat(question, max_new_tokens=1).verdicts[0].flagged for question in QUESTIONS]
    plain = one_by_one(tiny_base)
    assert texts(method) == [REFUSAL if blocked else text for blocked, text in zip(flagged, plain, strict=True)]


def test_a_guard_that_cannot_score_refuses(tiny_base: Base, random_guard: Callable[..., Adapter]) -> None:
    guard = random_guard(tiny_base)
    with torch.no_grad():
        guard.head.linear.weight.fill_(float("nan"))
    assert texts(GuardedRefusal(tiny_base, guard, sampling=SHORT)) == [REFUSAL] * 3


# ---- SafeDecoding ----------------------------------------------------------------------------------------------------


def test_an_expert_that_is_the_base_changes_nothing(tiny_base: Base, untrained: Path) -> None:
    for n_tokens in (1, 2, 6):
        assert texts(SafeDecoding(tiny_base, untrained, Mix(n_tokens), SHORT)) == one_by_one(tiny_base)


def test_weight_1_is_the_expert_at_the_first_tokens(tiny_base: Base, expert: Path) -> None:
    everything = Mix(n_tokens=6, weight=1.0, n_candidates=304)
    assert texts(SafeDecoding(tiny_base, expert, everything, SHORT)) == texts(WithLora(tiny_base, expert, 1.0, SHORT))
    assert texts(SafeDecoding(tiny_base, expert, replace(everything, weight=0.0), SHORT)) == one_by_one(tiny_base)


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
    found = texts(SafeDecoding(tiny_base, expert, mix, SHORT))
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


@pytest.mark.parametrize("values", [{"max_new_tokens": 0}, {"batch_size": 0}, {"temperature": float("nan")}])
def test_samplings_that_cannot_be(values: dict[str, float]) -> None:
    with pytest.raises(InputError, match="Sampling needs"):
        Sampling(**values)
