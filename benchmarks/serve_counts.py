"""What a fault cost: requests that were lost, and answers that hold what is another client's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from serve_crowd import Asked, Outcome
from serve_process import LINES, Decisions, Json

Expected = Mapping[tuple[str, int], Json]
"""By kind and number the longest answer, given while nothing went wrong."""
_COMPLETE = ["prompt", "answer"]
_HALF = "\ufffd"  # of a character that the last token began


@dataclass(frozen=True, slots=True)
class Right:
    """What is right under a fault, and so not lost."""

    refusals: frozenset[str] = frozenset()
    """Codes of errors."""
    may_cut: bool = False
    """Whether an answer that was begun may end with one of them; the log says so then, where it can be written."""
    can_log: bool = True
    is_kill: bool = False
    """Whether requests may break: lost are decisions that a client was told of."""


NOTHING = Right()


def lost(right: Right, outcomes: Sequence[Outcome], decisions: Decisions, expected: Expected) -> int:
    """How many requests a fault cost.

    That is requests without their own whole answer or an error that is right, requests that were begun and came to no
    end, and answers and prompts that a client was told of and whose decisions are not in the audit log.
    """
    told = [outcome for outcome in outcomes if outcome.answer is not None]
    n_missing = sum(not _is_audited(_answer(outcome), decisions) for outcome in told)
    n_missing += sum(outcome.answer is None and outcome.trace_id not in {*decisions, ""} for outcome in outcomes)
    if right.is_kill:
        return n_missing
    n_other = sum(not is_own(outcome, expected) for outcome in told if _is_audited(_answer(outcome), decisions))
    numbers = {outcome.asked.number for outcome in outcomes}
    return n_missing + n_other + sum(_n_cut(right, number, outcomes, decisions) for number in numbers)


def _n_cut(right: Right, number: int, outcomes: Sequence[Outcome], decisions: Decisions) -> int:
    """Requests of one client that came to no right end, as the client saw it or as the log says, whichever is more."""
    mine = [outcome for outcome in outcomes if outcome.asked.number == number]
    told = {_answer(outcome)["safety"]["trace_id"] for outcome in mine if outcome.answer is not None}
    untold = [
        [step.action for step in steps if step.stage == "answer"]
        for trace_id, steps in decisions.items()
        if trace_id not in told and (steps[0].stage, steps[0].text) == ("prompt", Asked(number).text)
    ]
    n_failed, n_ended = untold.count(["failed"]), sum(bool(actions) for actions in untold)
    n_right = sum(outcome.refusal in right.refusals and outcome.refusal != "unreachable" for outcome in mine)
    n_cut = sum(outcome.n_put_off for outcome in mine) + (n_right if right.may_cut else 0)
    n_excused = min(n_cut, n_failed if right.can_log else len(untold))
    n_excused += min(sum(outcome.is_left for outcome in mine), n_ended - min(n_excused, n_ended))
    n_wrong = sum(bool(outcome.refusal) and outcome.refusal not in right.refusals for outcome in mine)
    return max(len(untold) - n_excused, n_wrong + sum(outcome.is_broken for outcome in mine))


def is_own(outcome: Outcome, expected: Expected) -> bool:
    """Whether an answer has the text that the request has alone, and all of its tokens."""
    answer, asked = _answer(outcome), outcome.asked
    longest = expected[asked.kind, asked.number]
    n_tokens = min(asked.n_tokens, longest["usage"]["completion_tokens"])
    is_whole = answer["usage"]["completion_tokens"] == n_tokens
    return is_whole and text_of(longest).startswith(text_of(answer).rstrip(_HALF))


def is_foreign(outcome: Outcome, expected: Expected, decisions: Decisions) -> bool:
    """Whether an answer holds another client's text or verdict, or stands in the log as another's."""
    if outcome.answer is None:
        return False
    asked, safety, own = outcome.asked, outcome.answer["safety"], expected[outcome.asked.kind, outcome.asked.number]
    verdicts, owns = (
        [each for each in some["verdicts"] if each["stage"] == "prompt"] for some in (safety, own["safety"])
    )
    is_other_verdict = any(
        abs(one["score"] - other["score"]) > 1e-4 or one["threshold"] != LINES[asked.tenant]
        for one, other in zip(verdicts, owns, strict=True)
    )
    text = text_of(outcome.answer).rstrip(_HALF)
    others = [answer for (_, number), answer in expected.items() if number != asked.number]
    is_other_text = not text_of(own).startswith(text) and any(text_of(other).startswith(text) for other in others)
    steps = decisions.get(safety["trace_id"], [])
    is_other_record = any(
        step.tenant != asked.tenant or (step.stage == "prompt" and step.text != asked.text) for step in steps
    )
    return is_other_verdict or is_other_text or is_other_record or safety["policy"] != own["safety"]["policy"]


def text_of(answer: Json) -> str:
    """What the model wrote."""
    return str(answer["choices"][0]["message"]["content"])


def _answer(outcome: Outcome) -> Json:
    assert outcome.answer is not None, outcome.refusal
    return outcome.answer


def _is_audited(answer: Json, decisions: Decisions) -> bool:
    steps = decisions.get(answer["safety"]["trace_id"], [])
    return [step.stage for step in steps] == _COMPLETE and steps[-1].action not in ("failed", "abandoned")
