"""Records: written at once, read strictly, judged again without generating."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from safeside.errors import InputError
from safeside.evals.judges import Exchange, Judgement
from safeside.evals.records import Record, RecordLog, Setting, read_records, rejudge
from safeside.evals.suites import Prompt
from safeside.types import StrengthTrace, Verdict

SETTING = Setting("toy", "refuse", "fixed", 1.0, "abc")


def record(name: str, **changes: object) -> Record:
    values: dict[str, object] = {
        "setting": SETTING,
        "prompt": Prompt(name, (f"Do {name}",), True, goal="do", prefix="Sure", references=("x",)),
        "answers": (f"Sure {name}",),
        "finish_reasons": ("stop",),
        "verdicts": ((Verdict("harm", math.nan, 0.5, "harm", True, reason="broken"),),),
        "traces": ((StrengthTrace("refuse", (0.5, 1.0), "harm", (0.25, math.inf), ("harm", "harm")),),),
        "judge": "rules",
        "judgement": Judgement("refused", "a \u2028 line\nbreak", harm=0.25),
    }
    return Record.model_validate({**values, **changes})


def test_a_record_comes_back_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "new" / "records.jsonl"
    written = [record("a"), record("b", nll=1.5, n_tokens=3), record("c", judgement=Judgement("unscored", "why"))]
    log = RecordLog(path)
    log.append(written[:1])
    log.append(written[1:])
    assert len(path.read_bytes().splitlines()) == 3
    found = read_records(path)
    assert [one.model_dump_json() for one in found] == [one.model_dump_json() for one in written]
    assert math.isnan(found[0].verdicts[0][0].score)
    assert found[0].traces[0][0].scores == (0.25, math.inf)
    assert found[0].exchange == Exchange(("Do a",), ("Sure a",), True, "do", "Sure", ("x",))


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{broken", "line 2: not a record"),
        ("[]", "line 2: not a record"),
        ('{"setting": 1}', "line 2: not a record"),
        (json.dumps({**json.loads(record("b").model_dump_json()), "more": 1}), "more: Extra inputs"),
        (record("a").model_dump_json(), "line 2: prompt 'a' is there already"),
    ],
)
def test_a_bad_line_is_an_error(tmp_path: Path, line: str, problem: str) -> None:
    path = tmp_path / "records.jsonl"
    path.write_text(f"{record('a').model_dump_json()}\n{line}\n")
    for read in (read_records, RecordLog):
        with pytest.raises(InputError, match=problem):
            read(path)


def test_only_a_line_that_was_cut_off_is_made_again(tmp_path: Path) -> None:
    path, told = tmp_path / "records.jsonl", list[str]()
    whole = record("a").model_dump_json() + "\n"
    path.write_text(whole + record("b").model_dump_json()[:-30])
    with pytest.raises(InputError, match="line 2: not a record"):
        read_records(path)
    log = RecordLog(path, told.append)
    assert path.read_text() == whole
    assert log.find(record("a")) is not None
    assert log.find(record("b")) is None
    assert ["cut off" in text for text in told] == [True, False]


def test_what_cannot_be_read_or_written_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Cannot read records"):
        read_records(tmp_path / "none.jsonl")
    with pytest.raises(InputError, match="Cannot read records"):
        RecordLog(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="Cannot write records"):
        RecordLog(tmp_path / "file" / "records.jsonl").append([record("a")])


class Asked:
    """A judge that remembers what it was asked, and is away for some."""

    def __init__(self, *away: str) -> None:
        self.away, self.prompts = away, list[str]()

    def __call__(self, exchange: Exchange) -> Judgement:
        self.prompts.append(exchange.turns[0])
        if exchange.turns[0] in self.away:
            return Judgement("unscored", "away")
        return Judgement("complied", "said so", harm=1.0)


def test_records_are_judged_again_without_losing_the_old(tmp_path: Path) -> None:
    old, new, newer = (tmp_path / f"{name}.jsonl" for name in ("old", "new", "newer"))
    RecordLog(old).append([record(name) for name in "abc"])
    before = old.read_bytes()
    first = Asked("Do b")
    judged = rejudge(read_records(old), ("other", first), RecordLog(new))
    assert old.read_bytes() == before
    assert [one.judgement.outcome for one in judged] == ["complied", "unscored", "complied"]
    assert {one.judge for one in judged} == {"other"}
    assert [one.answers for one in judged] == [one.answers for one in read_records(old)]
    assert [one.model_dump_json() for one in read_records(new)] == [one.model_dump_json() for one in judged]
    again = Asked()
    mended = rejudge(read_records(new), ("other", again), RecordLog(newer))
    assert again.prompts == ["Do b"]  # only what was unscored is asked, and paid, again
    assert [one.judgement.outcome for one in mended] == ["complied"] * 3


def test_the_same_command_judges_what_it_left_unscored_and_the_last_line_counts(tmp_path: Path) -> None:
    records, path = [record(name) for name in "abc"], tmp_path / "new.jsonl"
    rejudge(records, ("other", Asked("Do a", "Do b")), RecordLog(path))
    still, told = Asked("Do b"), list[str]()
    judged = rejudge(records, ("other", still), RecordLog(path, told.append))
    assert still.prompts == ["Do a", "Do b"]
    assert [one.judgement.outcome for one in judged] == ["complied", "unscored", "complied"]
    assert told == [f"{path} holds 3 records, 2 of them unscored: they are judged again"]
    assert len(path.read_text().splitlines()) == 4  # what is unscored for the same reason is there already
    assert [one.model_dump_json() for one in read_records(path)] == [one.model_dump_json() for one in judged]
    rejudge(records, ("other", Asked()), RecordLog(path))
    done = Asked()
    judged = rejudge(records, ("other", done), RecordLog(path))
    assert (done.prompts, [one.judgement.outcome for one in judged]) == ([], ["complied"] * 3)
    path.write_text(path.read_text() + judged[0].model_dump_json() + "\n")
    with pytest.raises(InputError, match="prompt 'a' is there already"):  # it was scored
        read_records(path)


def test_a_judge_that_fails_leaves_its_record_unscored_and_the_others_are_kept(tmp_path: Path) -> None:
    def fails(exchange: Exchange) -> Judgement:
        if exchange.turns == ("Do b",):
            raise ZeroDivisionError("by \ud83d")
        return Judgement("complied", "so \ud83d")

    path = tmp_path / "new.jsonl"
    rejudge([record(name) for name in "abc"], ("other", fails), RecordLog(path))
    said = [(one.judgement.outcome, one.judgement.reason) for one in read_records(path)]
    right = ("complied", "so \ufffd")
    assert said == [right, ("unscored", "the judge failed: ZeroDivisionError: by \ufffd"), right]


def test_judging_that_is_killed_keeps_what_was_paid_for(tmp_path: Path) -> None:
    records, path = [record(name) for name in "abc"], tmp_path / "new.jsonl"

    def dies(exchange: Exchange) -> Judgement:
        if exchange.turns == ("Do c",):
            raise KeyboardInterrupt
        return Judgement("complied")

    with pytest.raises(KeyboardInterrupt):
        rejudge(records, ("other", dies), RecordLog(path))
    rest = Asked()
    assert len(rejudge(records, ("other", rest), RecordLog(path))) == 3
    assert rest.prompts == ["Do c"]


def test_what_was_never_answered_stays_unscored_and_likelihoods_are_refused() -> None:
    asked = Asked()
    empty = record("a", answers=(), finish_reasons=(), judgement=Judgement("unscored", "not answered: too long"))
    (judged,) = rejudge([empty], ("other", asked), RecordLog())
    assert judged.judgement == Judgement("unscored", "not answered: too long")
    assert asked.prompts == []
    with pytest.raises(InputError, match="1 records are likelihoods"):
        rejudge([record("a", judge="", nll=1.0, n_tokens=1)], ("other", asked), RecordLog())
