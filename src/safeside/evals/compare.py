"""Wins and ties: one method's answers beside another's to the same prompts, by the grade that a judge gave each.

Grades are of single answers, from 1 to 10 (``mt_bench``), and not of pairs: no answer stands first, so there is no bias
of position to cancel; the base is graded once, whatever number of strengths and methods is compared with it; and grades
stay in the records, so that a comparison asks for nothing that was paid for before.  The price is more ties: what two
answers differ in by less than a grade is not seen.
"""

from __future__ import annotations

from collections.abc import Sequence

from safeside.errors import InputError
from safeside.evals.records import Record, Setting
from safeside.evals.runs import wilson
from safeside.types import Result


def counterparts(suites: Sequence[str], others: Sequence[Record]) -> list[Record]:
    """Those of ``others`` that records of ``suites`` are compared with: answers to harmless prompts.

    Of each suite they are of one setting: the only one, or of several the one at strength 0, the base.  Another number
    of settings, and nothing to compare, are an InputError.
    """
    found: list[Record] = []
    for suite in dict.fromkeys(suites):
        there = [record for record in _comparable(others) if record.setting.suite == suite]
        settings = list(dict.fromkeys(record.setting for record in there))
        if not settings:
            continue
        if len(settings) > 1:
            settings = [setting for setting in settings if setting.strength == 0]
        if len(settings) != 1:
            raise InputError(
                f"The records to compare with hold {len(settings)} settings of suite {suite!r} that may be the base; "
                "expected one, or one at strength 0. Give a file with the answers of one method."
            )
        found += [record for record in there if record.setting == settings[0]]
    if not found:
        raise InputError(
            f"The records to compare with hold no answer to a harmless prompt of {', '.join(suites)}. Give others."
        )
    return found


def win_results(records: Sequence[Record], against: Sequence[Record]) -> list[Result]:
    """Shares of harmless prompts on which an answer was graded higher, the same or lower than that of ``against``.

    They are ``win_rate``, ``tie_rate`` and ``loss_rate`` with 95% intervals, for each setting of ``records`` but
    that of ``against``, which are the ``counterparts`` of its suite.  A prompt that has no grade on one side, or stands
    on one side only, is unscored.  Other text under one name, other judges, and a judge that gives no grades are an
    InputError.
    """
    results: list[Result] = []
    own = {record.setting for record in against}
    for setting in dict.fromkeys(record.setting for record in _comparable(records)):
        ours = [record for record in _comparable(records) if record.setting == setting]
        theirs = [record for record in against if record.setting.suite == setting.suite]
        if theirs and setting not in own:
            results += _shares(setting, ours, theirs)
    if not results:
        raise InputError("Nothing but the records to compare with answers their prompts. Give another setting's too.")
    return results


def _comparable(records: Sequence[Record]) -> list[Record]:
    return [record for record in records if record.judge and not record.prompt.is_harmful]


def _shares(setting: Setting, ours: Sequence[Record], theirs: Sequence[Record]) -> list[Result]:
    check_grades([*ours, *theirs])
    first, second = ({record.prompt.id: record for record in side} for side in (ours, theirs))
    names = {**first, **second}
    pairs = [(first[name], second[name]) for name in names if name in first and name in second]
    changed = [one.prompt.id for one, other in pairs if one.prompt != other.prompt]
    if changed:
        raise InputError(f"Prompt {changed[0]!r} has other text in the records to compare with; expected the same one.")
    grades = [(one.judgement.rating, other.judgement.rating) for one, other in pairs]
    signs = [(a > b) - (a < b) for a, b in grades if a is not None and b is not None]
    where = {
        "method": setting.method,
        "policy": setting.policy,
        "strength": f"{setting.strength:g}",
        "judge": ours[0].judge,
        "against": f"{theirs[0].setting.method} at {theirs[0].setting.strength:g}",
    }
    results = []
    for metric, sign in (("win_rate", 1), ("tie_rate", 0), ("loss_rate", -1)):
        hits, n = signs.count(sign), len(signs)
        value = hits / n if n else float("nan")
        results.append(Result(setting.suite, metric, value, *wilson(hits, n), n, len(names) - n, where))
    return results


def check_grades(records: Sequence[Record]) -> None:
    """That one judge saw all of ``records`` and that it gives grades; else an InputError."""
    judges = sorted({record.judge for record in records})
    if len(judges) > 1:
        raise InputError(f"Records of judges {' and '.join(judges)} cannot be compared. Judge both by the same one.")
    for record in records:
        if record.judgement.outcome != "unscored" and record.judgement.rating is None:
            raise InputError(f"Judge {judges[0]!r} gives no grades to compare. Use one that does, such as 'mt_bench'.")
