"""Scores of whole texts: the same one by one and in any batch, the highest of a text's windows, never a lost row."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from pydantic import ValidationError
from tokenizers import Regex, normalizers

from safeside import Adapter, Base, Message, attach
from safeside.adapters.config import AdapterConfig, Calibration
from safeside.errors import AttachmentError, InputError
from safeside.guards.score import Scoring, judge, score_conversations
from safeside.guards.windows import windows
from twin import run_by_hand

# Padding to another length changes the order of float32 sums; scores differ in their last digits.
SAME_SCORE = 1e-5
TEXTS = ["how can this be?", "the cat", "a" * 60, "they said there and then " * 5, "no", "sat on the hat; 123"]
LONG = "the cat sat on the mat and then " * 40


def user(*texts: str) -> list[list[Message]]:
    return [[Message("user", text)] for text in texts]


@pytest.fixture(scope="module")
def guards(session_base: Base, random_guard: Callable[..., Adapter]) -> list[Adapter]:
    second = random_guard(session_base, name="two", seed=5, kind="rtb", labels=("a", "b"))
    return [random_guard(session_base, readout="attention"), second]


def by_hand(base: Base, guard: Adapter, messages: list[Message]) -> torch.Tensor:
    """The guard's scores (K,) at a text's last token, without hooks, padding or batches."""
    return run_by_hand(base, guard, torch.tensor([base.encode(messages).ids])).scores[0, -1]


def spoilt(guard: Adapter) -> Adapter:
    """The guard with a weight that is not a number."""
    with torch.no_grad():
        guard.head.linear.weight[0, 0] = math.nan
    return guard


def test_scores_are_those_of_the_slow_twin_in_order(tiny_base: Base, guards: list[Adapter]) -> None:
    scored = score_conversations(tiny_base, guards, user(*TEXTS), batch_size=4)
    assert len(scored) == len(TEXTS)
    for row, messages in zip(scored, user(*TEXTS), strict=True):
        for guard in guards:
            expected = by_hand(tiny_base, guard, messages)
            assert row.by_guard[guard.name] == pytest.approx(expected.tolist(), abs=SAME_SCORE)
        assert (row.n_windows, row.problem) == (1, None)
    assert len({row.by_guard["harm"] for row in scored}) == len(TEXTS)  # they differ, so their order is seen


@pytest.mark.parametrize("batch_size", [1, 2, 5, 32])
def test_other_rows_of_a_batch_change_nothing(tiny_base: Base, guards: list[Adapter], batch_size: int) -> None:
    whole = score_conversations(tiny_base, guards, user(*TEXTS))
    turned = score_conversations(tiny_base, guards, user(*TEXTS[::-1]), batch_size=batch_size)[::-1]
    for first, second in zip(whole, turned, strict=True):
        for name, values in first.by_guard.items():
            assert second.by_guard[name] == pytest.approx(values, abs=SAME_SCORE)


def test_an_answer_is_scored_at_its_end(tiny_base: Base, guards: list[Adapter]) -> None:
    talk = [
        Message("user", "how?"),
        Message("assistant", "like this"),
        Message("user", "and?"),
        Message("assistant", "no"),
    ]
    (row,) = score_conversations(tiny_base, guards, [talk])
    assert row.by_guard["harm"] == pytest.approx(by_hand(tiny_base, guards[0], talk).tolist(), abs=SAME_SCORE)


def test_a_long_text_gets_the_highest_score_of_its_windows(tiny_base: Base, guards: list[Adapter]) -> None:
    (message,) = user(LONG)
    parts = windows(tiny_base, message)
    scored = score_conversations(tiny_base, guards, [message, *user(*TEXTS)], batch_size=3)
    assert [row.n_windows for row in scored] == [len(parts)] + [1] * len(TEXTS)
    for guard in guards:
        expected = torch.stack([by_hand(tiny_base, guard, list(part)) for part in parts]).amax(0)
        assert scored[0].by_guard[guard.name] == pytest.approx(expected.tolist(), abs=SAME_SCORE)
    (verdicts, *_) = judge(tiny_base, guards, [message])
    assert all(f"highest of {len(parts)} windows" in verdict.reason for verdict in verdicts)


CLAIM = Message("assistant", "the cat is on it")


def test_of_a_documents_windows_the_lowest_score_counts(
    tiny_base: Base, random_guard: Callable[..., Adapter], guards: list[Adapter]
) -> None:
    grounded = random_guard(tiny_base, name="grounded", seed=7, windows="min")
    talk = [Message("user", LONG * 2), CLAIM]
    parts = windows(tiny_base, talk, combine="min")
    assert len(parts) > 2
    expected = torch.stack([by_hand(tiny_base, grounded, list(part)) for part in parts]).amin(0)
    (alone,) = score_conversations(tiny_base, [grounded], [talk], batch_size=2)
    assert alone.by_guard["grounded"] == pytest.approx(expected.tolist(), abs=SAME_SCORE)
    assert alone.n_windows == len(parts)
    ((verdict,),) = judge(tiny_base, [grounded], [talk])
    assert verdict.reason == f"lowest of {len(parts)} windows"
    both = judge(tiny_base, [guards[0], grounded], [talk])[0]
    assert "highest of" in both[0].reason
    assert "lowest of" in both[1].reason
    assert both[1].score == pytest.approx(verdict.score, abs=SAME_SCORE)


def test_each_label_may_combine_its_windows_otherwise(tiny_base: Base, random_guard: Callable[..., Adapter]) -> None:
    """As two guards of the same weights would, of which one goes by the highest score and one by the lowest."""
    labels = ("harm", "unsupported", "hate")
    mixed, highest, lowest = (
        random_guard(tiny_base, name=name, seed=3, labels=labels, windows=ways)
        for name, ways in (("mixed", ("max", "min", "max")), ("highest", "max"), ("lowest", "min"))
    )
    answer = [Message("user", "the cat " * 20), Message("assistant", LONG[:400])]
    talks = [[Message("user", "hi")], [Message("user", LONG * 2), CLAIM], answer, [Message("user", LONG)]]
    found = score_conversations(tiny_base, [mixed], talks, batch_size=3)
    expected = [score_conversations(tiny_base, [guard], talks, batch_size=3) for guard in (highest, lowest)]
    for row, high, low in zip(found, *expected, strict=True):
        harm, unsupported, hate = row.by_guard["mixed"]
        assert (harm, hate) == pytest.approx(high.by_guard["highest"][::2], abs=SAME_SCORE)
        assert unsupported == pytest.approx(low.by_guard["lowest"][1], abs=SAME_SCORE, nan_ok=True)
        assert row.mode_for(mixed) == high.mode_for(highest)
        assert row.n_windows == max(high.n_windows, low.n_windows)
    assert math.isnan(found[3].by_guard["mixed"][1])
    assert not math.isnan(found[3].by_guard["mixed"][0])
    verdicts = [row[0] for row in judge(tiny_base, [mixed], talks)]
    assert verdicts[1].reason == f"highest and lowest of {found[1].n_windows} windows"
    assert verdicts[3].flagged, "what cannot be cut for one label fails closed"
    loaded = AdapterConfig.model_validate_json(mixed.config.model_dump_json())
    assert loaded.windows_by_label == ("max", "min", "max")
    with pytest.raises(ValidationError, match="windows has 2 entries for 3 labels"):
        AdapterConfig.model_validate({**mixed.config.model_dump(), "windows": ("max", "min")})


def test_guards_that_combine_otherwise_do_not_touch_each_other(
    tiny_base: Base, random_guard: Callable[..., Adapter], guards: list[Adapter]
) -> None:
    """Texts that fit, one cut alike for both, one cut apart, one that only one of them can be given."""
    grounded = random_guard(tiny_base, name="grounded", seed=7, windows="min")
    answer = [Message("user", "the cat " * 20), Message("assistant", LONG[:400])]
    talks = [[Message("user", "hi")], [Message("user", LONG), CLAIM], answer, [Message("user", LONG)]]
    together = score_conversations(tiny_base, [guards[0], grounded], talks, batch_size=3)
    for guard in (guards[0], grounded):
        for row, alone in zip(together, score_conversations(tiny_base, [guard], talks), strict=True):
            assert row.by_guard[guard.name] == pytest.approx(alone.by_guard[guard.name], abs=SAME_SCORE, nan_ok=True)
            assert row.windows_of[guard.name] == alone.n_windows
    assert math.isnan(together[3].by_guard["grounded"][0])
    sound, closed = judge(tiny_base, [guards[0], grounded], talks)[3]
    assert "document" not in sound.reason
    assert closed.flagged
    assert "Send the document as a message of its own" in closed.reason


@pytest.mark.parametrize("combine", ["max", "min"])
def test_a_window_that_is_not_a_number_fails_closed_either_way(
    tiny_base: Base, random_guard: Callable[..., Adapter], combine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    guard = random_guard(tiny_base, windows=combine)
    talk = [Message("user", LONG), CLAIM]
    forward = Adapter.forward
    for broken_row in range(len(windows(tiny_base, talk, combine=combine))):

        def spoil(self: Adapter, *args: object, broken_row: int = broken_row) -> object:
            output = forward(self, *args)
            output.scores[broken_row] = math.nan
            return output

        monkeypatch.setattr(Adapter, "forward", spoil)
        ((verdict,),) = judge(tiny_base, [guard], [talk])
        assert verdict.flagged
        assert math.isnan(verdict.score)
        monkeypatch.undo()


def test_every_turn_of_a_conversation_counts(tiny_base: Base, guards: list[Adapter]) -> None:
    """Changing any message changes the score; and it is that of the whole conversation."""
    turns = [Message("user", "how?"), Message("assistant", "so"), Message("user", "and?"), Message("assistant", "no")]
    changed = [[*turns[:place], Message(turns[place].role, "hat"), *turns[place + 1 :]] for place in range(4)]
    scored = score_conversations(tiny_base, guards[:1], [turns, *changed])
    assert len({row.by_guard["harm"] for row in scored}) == 5
    for row, talk in zip(scored, [turns, *changed], strict=True):
        assert row.by_guard["harm"] == pytest.approx(by_hand(tiny_base, guards[0], talk).tolist(), abs=SAME_SCORE)


@pytest.mark.parametrize("place", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("shape", ["text", "turns"])
def test_a_needle_in_a_long_text_counts_wherever_it_is(
    tiny_base: Base, guards: list[Adapter], shape: str, place: float
) -> None:
    """The text gets at least the score of each window that holds it, and one holds it whole."""
    needle = "hat; hat; 123 hat"
    hay = [f"they said there and then {index}" for index in range(40)]
    hay.insert(int(place * len(hay)), needle)
    messages = user(" ".join(hay))[0] if shape == "text" else [turn for (turn,) in user(*hay)]
    parts = [part for part in windows(tiny_base, messages) if any(needle in turn.content for turn in part)]
    assert parts
    (row,) = score_conversations(tiny_base, guards[:1], [messages])
    assert row.n_windows > 2
    for part in parts:
        assert row.by_guard["harm"][0] >= by_hand(tiny_base, guards[0], list(part)).item() - SAME_SCORE


@pytest.mark.parametrize("text", ["", "   ", "\n\t" * 200, "\u200b\u200b", "\x00\x00", "\xad"])
def test_what_holds_no_text_has_no_score_and_flags(tiny_base: Base, guards: list[Adapter], text: str) -> None:
    conversations = [*user("hi", text), [Message("system", text), Message("user", text)], *user("no")]
    told: list[int] = []
    first, *empty, last = score_conversations(tiny_base, guards, conversations, advance=told.append)
    assert first.problem is last.problem is None
    assert sum(told) == len(conversations)
    for row in empty:
        assert "holds no text" in str(row.problem)
        assert all(math.isnan(score) for scores in row.by_guard.values() for score in scores)
    for verdict in judge(tiny_base, guards, conversations)[1]:
        assert verdict.flagged
        assert math.isnan(verdict.score)
        assert "holds no text" in verdict.reason


@pytest.mark.parametrize("text", ["\ufffd\u0301", "\ue000"])
def test_what_becomes_no_token_has_no_score(
    tiny_family: Callable[[str], Base], random_guard: Callable[..., Adapter], text: str
) -> None:
    base = tiny_family("bert")
    base.tokenizer.backend_tokenizer.normalizer = normalizers.Replace(Regex("[\ufffd\u0301\ue000]"), "")
    row, mixed = score_conversations(base, [random_guard(base)], user(text, f"{text}the cat"))
    assert "makes no token" in str(row.problem)
    assert math.isnan(row.by_guard["harm"][0])
    assert mixed.problem is None
    assert math.isfinite(mixed.by_guard["harm"][0])


def test_what_spells_padding_and_empty_messages_beside_others_are_scored(
    tiny_base: Base, guards: list[Adapter]
) -> None:
    conversations = [
        [Message("user", "<|pad|>")],
        [Message("user", ""), Message("assistant", "the cat")],
        [Message("user", "how?"), Message("assistant", "")],
        [Message("system", ""), Message("user", "the cat")],
    ]
    for row, messages in zip(score_conversations(tiny_base, guards, conversations), conversations, strict=True):
        assert row.problem is None
        assert row.by_guard["harm"] == pytest.approx(by_hand(tiny_base, guards[0], messages).tolist(), abs=SAME_SCORE)


def test_a_score_that_is_not_a_number_wins_and_flags(
    tiny_base: Base, random_guard: Callable[..., Adapter], guards: list[Adapter]
) -> None:
    broken = spoilt(random_guard(tiny_base, name="broken"))
    texts = user(LONG, "hi")
    for row in score_conversations(tiny_base, [guards[0], broken], texts):
        assert math.isnan(row.by_guard["broken"][0])
        assert math.isfinite(row.by_guard["harm"][0])
        assert row.problem == "a score is not a number"
    for sound, verdict in judge(tiny_base, [guards[0], broken], texts):
        assert verdict.flagged
        assert math.isnan(verdict.score)
        assert verdict.reason.startswith("the score is not a number: failing closed")
        assert "not a number" not in sound.reason


def test_one_bad_window_is_enough(tiny_base: Base, guards: list[Adapter], monkeypatch: pytest.MonkeyPatch) -> None:
    """A text of which one window cannot be scored has no score, wherever that window stands."""
    n_windows = len(windows(tiny_base, user(LONG)[0]))
    for broken_row in range(n_windows):
        forward = Adapter.forward

        def spoil(self: Adapter, *args: object, forward=forward, broken_row: int = broken_row) -> object:
            output = forward(self, *args)
            output.scores[broken_row] = math.nan
            return output

        monkeypatch.setattr(Adapter, "forward", spoil)
        (row,) = score_conversations(tiny_base, guards[:1], user(LONG))
        assert math.isnan(row.by_guard["harm"][0])
        monkeypatch.undo()


def test_a_conversation_that_cannot_be_encoded_stops_no_other(tiny_base: Base, guards: list[Adapter]) -> None:
    too_large = [Message("user", LONG), *[Message("assistant", LONG)] * 3]
    conversations = [*user("hi"), too_large, *user("\ud800"), [], *user("the cat")]
    first, large, surrogate, empty, last = score_conversations(tiny_base, guards, conversations)
    assert first.problem is last.problem is None
    for row, words in ((large, "cannot be cut"), (surrogate, "not valid Unicode"), (empty, "at least one message")):
        assert words in str(row.problem)
        assert all(math.isnan(score) for scores in row.by_guard.values() for score in scores)
    verdicts = judge(tiny_base, guards, conversations)
    assert all(verdict.flagged and "cannot be cut" in verdict.reason for verdict in verdicts[1])


def test_progress_counts_every_conversation_once(tiny_base: Base, guards: list[Adapter]) -> None:
    told: list[int] = []
    conversations = [*user(LONG, *TEXTS, LONG), []]
    score_conversations(tiny_base, guards, conversations, batch_size=2, advance=told.append)
    assert sum(told) == len(conversations)


def test_batches_hold_every_window_within_their_bounds(tiny_base: Base, guards: list[Adapter]) -> None:
    """One that is longer than the bound is alone; a text is finished with its last window, whatever is read between."""
    conversations = [*user(LONG, *TEXTS), []]
    scoring = Scoring(tiny_base, guards, conversations)
    whole = [window for batch in scoring.batches() for window in batch]
    assert scoring.n_tokens == sum(len(window.ids) for window in whole)
    for batch_size, max_tokens in ((2, None), (32, 40), (3, 1)):
        batches = list(scoring.batches(batch_size, max_tokens))
        assert [window for batch in batches for window in batch] == whole
        for batch in batches:
            assert len(batch) <= batch_size
            assert len(batch) == 1 or max_tokens is None or len(batch[-1].ids) * len(batch) <= max_tokens
    assert scoring.n_finished == 1
    with attach(tiny_base, guards=guards) as attachment:
        for batch in scoring.batches(1):
            with torch.no_grad():
                tiny_base.model(torch.tensor([[1, 2, 3]]))
            scoring.read(batch, attachment)
    assert scoring.n_finished == len(conversations)
    for row, expected in zip(scoring.scores(), score_conversations(tiny_base, guards, conversations), strict=True):
        assert row.windows_of == expected.windows_of
        for name, values in expected.by_guard.items():
            assert row.by_guard[name] == pytest.approx(values, abs=SAME_SCORE, nan_ok=True)


def test_no_conversation_is_no_score(tiny_base: Base, guards: list[Adapter]) -> None:
    assert score_conversations(tiny_base, guards, []) == []
    assert judge(tiny_base, guards, []) == []


def test_verdicts_carry_calibration_and_label(tiny_base: Base, random_guard: Callable[..., Adapter]) -> None:
    guard = random_guard(tiny_base, labels=("a", "b"))
    guard.set_calibration(Calibration(scale=(1e-6, 1e-6), bias=(0.0, 2.0), threshold=(0.4, 0.99)))
    ((verdict,),) = judge(tiny_base, [guard], user("hi"))
    assert (verdict.label, verdict.flagged, verdict.threshold) == ("a", True, 0.4)
    assert verdict.score == pytest.approx(0.5, abs=1e-3)


def test_encoders_are_scored_too(tiny_family: Callable[[str], Base], random_guard: Callable[..., Adapter]) -> None:
    base = tiny_family("bert")
    guard = random_guard(base)
    texts = user("the cat", LONG, "no")
    scored = score_conversations(base, [guard], texts)
    assert scored[1].n_windows > 1
    assert scored[0].by_guard["harm"] == pytest.approx(by_hand(base, guard, texts[0]).tolist(), abs=SAME_SCORE)


def test_nothing_is_left_attached(
    tiny_base: Base, guards: list[Adapter], random_aligner: Callable[..., Adapter]
) -> None:
    score_conversations(tiny_base, guards, user("hi"))
    assert tiny_base.attachment is None
    with pytest.raises(InputError, match="has role 'align' but was passed as 'guard'"):
        score_conversations(tiny_base, [random_aligner(tiny_base)], user("hi"))
    with attach(tiny_base, guards=guards), pytest.raises(AttachmentError, match="already has an attachment"):
        score_conversations(tiny_base, guards, user("hi"))
