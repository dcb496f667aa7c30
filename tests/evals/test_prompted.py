"""The prompted base: one cache for the conversation and all questions against a pass of the whole text for each."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from safeside import Adapter, Base, Message, attach
from safeside.errors import AttachmentError, ConfigError, InputError, UnsupportedError
from safeside.evals.metrics import auroc
from safeside.evals.prompted import QUESTIONS, answer_tokens, asked, choose_question, prompted_scores
from safeside.guards.windows import windows
from safeside.types import Example
from tiny import FAMILY_NAMES

TALKS = [
    [Message("user", "the cat sat on the mat")],
    [Message("user", "how can this be"), Message("assistant", "they said there and then.")],
    [Message("system", "be kind"), Message("user", "the other cat"), Message("assistant", "hat"), Message("user", "a")],
]
ASK = ("is it bad?", "is this text one that should never be seen?")
TOLERANCE = 1e-4  # of a probability in float32: cached keys and other batch shapes round differently


def slow_scores(base: Base, messages: list[Message], question: str) -> float:
    """The same probability from one pass over all tokens, without a cache and without a batch."""
    yes, no = answer_tokens(base)
    ids = base.encode(asked(messages, question)).ids
    with torch.no_grad():
        logits = base.model(input_ids=torch.tensor([ids])).logits[0, -1].double()
    odds = logits.softmax(-1)
    return float(odds[yes].sum() / (odds[yes].sum() + odds[no].sum()))


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_a_shared_cache_gives_the_scores_of_whole_passes(tiny_family: Callable[[str], Base], family: str) -> None:
    base = tiny_family(family)
    result = prompted_scores(base, TALKS, ASK)
    expected = [[slow_scores(base, talk, question) for question in ASK] for talk in TALKS]
    np.testing.assert_allclose(result.scores, expected, atol=TOLERANCE)
    assert np.ptp(result.scores) > 10 * TOLERANCE  # they differ by rows, or the test could not fail
    assert result.problems == (None, None, None)


def test_batches_of_any_size_give_the_same_scores(tiny_base: Base) -> None:
    whole = prompted_scores(tiny_base, TALKS, ASK).scores
    np.testing.assert_allclose(prompted_scores(tiny_base, TALKS, ASK, batch_size=1).scores, whole, atol=TOLERANCE)
    alone = prompted_scores(tiny_base, TALKS, ASK[1:]).scores
    np.testing.assert_allclose(alone, whole[:, 1:], atol=TOLERANCE)


def test_only_the_tokens_of_the_question_are_paid_for(tiny_base: Base) -> None:
    talk = [Message("user", "the cat sat on the mat"), Message("assistant", "and then the other cat")]
    own, whole = (len(tiny_base.encode(turns).ids) for turns in (talk, asked(talk, ASK[0])))
    result = prompted_scores(tiny_base, [talk], ASK[:1])
    assert result.flops_share == pytest.approx(((whole - own) / own,))


def test_a_long_conversation_counts_by_its_riskiest_window(tiny_base: Base) -> None:
    talk = [Message("user", "the cat sat on the mat and then the other cat sat on the hat. " * 40)]
    result = prompted_scores(tiny_base, [talk], ASK[:1])
    longest = len(tiny_base.encode([Message("user", ASK[0])]).ids)
    parts = windows(tiny_base, talk, tiny_base.max_tokens - longest - 16)
    assert len(parts) > 1
    assert result.scores[0, 0] == pytest.approx(
        max(slow_scores(tiny_base, list(part), ASK[0]) for part in parts), abs=TOLERANCE
    )


def test_a_claim_counts_by_the_window_that_supports_it_best(tiny_base: Base) -> None:
    document = "the cat sat on the mat and then the other cat sat on the hat. " * 40
    talk = [Message("user", document), Message("assistant", "the cat sat on the hat")]
    result = prompted_scores(tiny_base, [talk], ASK[:1], combine="min")
    longest = len(tiny_base.encode([Message("user", ASK[0])]).ids)
    parts = windows(tiny_base, talk, tiny_base.max_tokens - longest - 16, combine="min")
    assert len(parts) > 1
    assert {part[-1] for part in parts} == {talk[-1]}
    scores = [slow_scores(tiny_base, list(part), ASK[0]) for part in parts]
    assert max(scores) > min(scores) + TOLERANCE
    assert result.scores[0, 0] == pytest.approx(min(scores), abs=TOLERANCE)


def test_rows_that_cannot_be_asked_are_counted_and_stop_no_other(tiny_base: Base) -> None:
    uncut = [Message("user", "cat " * 100), *[Message("assistant", "hat " * 100)] * 3]
    result = prompted_scores(tiny_base, [TALKS[0], [], uncut], ASK)
    assert result.n_unscored == 2
    assert np.isfinite(result.scores[0]).all()
    assert np.isnan(result.scores[1:]).all()
    assert "at least one message" in str(result.problems[1])
    assert "cannot be cut" in str(result.problems[2])


def test_the_question_is_chosen_on_validation_rows(tiny_base: Base) -> None:
    texts = ["the cat", "a hat and a mat", "then they said", "how can this be", "there and then", "on the mat"]
    rows = [Example((Message("user", text),), (float(index % 2),)) for index, text in enumerate(texts)]
    areas = {
        question: auroc(
            np.array([0.0, 1.0] * 3), np.array([slow_scores(tiny_base, list(row.messages), question) for row in rows])
        )
        for question in (*ASK, "or what?")
    }
    question, area = choose_question(tiny_base, rows, list(areas))
    assert area == pytest.approx(max(areas.values()))
    assert areas[question] == pytest.approx(area)
    with pytest.raises(ConfigError, match="both harmful and harmless rows"):
        choose_question(tiny_base, rows[::2], ASK)


def test_yes_and_no_never_share_a_token(tiny_base: Base) -> None:
    yes, no = answer_tokens(tiny_base)
    assert {tiny_base.tokenizer.decode([token]) for token in yes} == {"Y", "y"}
    assert {tiny_base.tokenizer.decode([token]) for token in no} == {"N", "n"}


def test_every_task_has_questions_of_its_own() -> None:
    assert set(QUESTIONS) == {"hate", "prompt_harm", "response_harm", "grounding"}
    everything = [question for questions in QUESTIONS.values() for question in questions]
    assert len(set(everything)) == len(everything)


def test_what_cannot_be_asked_is_refused(
    tiny_base: Base, tiny_family: Callable[[str], Base], random_guard: Callable[..., Adapter]
) -> None:
    with pytest.raises(UnsupportedError, match="is an encoder and answers nothing"):
        prompted_scores(tiny_family("bert"), TALKS, ASK)
    with pytest.raises(InputError, match="at least one question"):
        prompted_scores(tiny_base, TALKS, [])
    with attach(tiny_base, guards=[random_guard(tiny_base)]), pytest.raises(AttachmentError, match="Detach"):
        prompted_scores(tiny_base, TALKS, ASK)
