"""Records: one JSON line for each answer, with all that is needed to judge it again without generating it again.

Lines are only ever appended.  A run that was killed goes on where it stopped: a last line that was cut off is made
again, and any other line that cannot be read is an error, for a figure over the rest would be another figure.  Answers
that a judge left unscored are judged again when the run goes on; the line that is added then takes the place of the
former.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from safeside.errors import InputError, problems_of
from safeside.evals.endpoint import encodable
from safeside.evals.judges import Exchange, Judge, Judgement, unscored
from safeside.evals.suites import Prompt
from safeside.types import StrengthTrace, Verdict


@dataclass(frozen=True, slots=True)
class Setting:
    """What was measured, in words for tables, and a hash of all that decides an answer."""

    suite: str
    """Name of the suite."""
    method: str
    """Name of the aligner, or of what else answered."""
    policy: str
    """What set its strength: ``fixed``, or ``ramp`` by a guard."""
    strength: float
    """The strength, of a ramp the ceiling."""
    key: str
    """Hash of base, adapters, policy and options: answers of another key are never taken for this setting's."""


class Record(BaseModel):
    """One answer and what was said of it."""

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")

    setting: Setting
    """What was measured."""
    prompt: Prompt
    """The prompt, its goal and whether it is harmful."""
    answers: tuple[str, ...]
    """One for each turn; the last one includes the beginning that it was given."""
    finish_reasons: tuple[str, ...]
    """Why each answer ended (see ``Completion``)."""
    verdicts: tuple[tuple[Verdict, ...], ...]
    """Of the guards, for each answer."""
    traces: tuple[tuple[StrengthTrace, ...], ...]
    """Strengths token by token, for each answer."""
    judge: str
    """Name of the judge; empty where a likelihood was taken."""
    judgement: Judgement
    """What it said, and why."""
    nll: float | None = None
    """Negative log-likelihood of the known answer in nats, summed over its tokens."""
    n_tokens: int | None = None
    """Tokens of the known answer."""

    @property
    def place(self) -> tuple[str, str, str]:
        """What is there once in a file: setting, prompt."""
        return (self.setting.suite, self.setting.key, self.prompt.id)

    @property
    def is_answered(self) -> bool:
        """Whether there is something to judge: an answer to each turn, or a block."""
        return len(self.answers) >= len(self.prompt.turns) or "blocked" in self.finish_reasons

    @property
    def is_open(self) -> bool:
        """Whether its answers wait for a judge: the last one that was asked could not tell."""
        return bool(self.judge) and self.is_answered and self.judgement.outcome == "unscored"

    @property
    def exchange(self) -> Exchange:
        """What a judge sees."""
        prompt = self.prompt
        return Exchange(
            turns=prompt.turns,
            answers=self.answers,
            is_harmful=prompt.is_harmful,
            goal=prompt.goal,
            prefix=prompt.prefix,
            references=prompt.references,
            is_blocked="blocked" in self.finish_reasons,
        )


def read_records(path: Path) -> list[Record]:
    """All records of a file, in order; a line that is not one, or is there twice, is an InputError.

    Of a record that was left unscored and judged again the last line counts.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"Cannot read records from {path}: {error.strerror}. Check the path.") from error
    return _parsed(path, content)


def _parsed(path: Path, content: bytes) -> list[Record]:
    records: dict[tuple[str, str, str], Record] = {}
    for number, line in enumerate(content.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            record = Record.model_validate_json(line)
        except ValidationError as error:
            raise InputError(
                f"{path}: line {number}: not a record ({problems_of(error)}). Take the line out, and its answer is "
                "made again."
            ) from error
        if record.place in records and not records[record.place].is_open:
            raise InputError(f"{path}: line {number}: prompt {record.prompt.id!r} is there already. Take one out.")
        records[record.place] = record
    return list(records.values())


class RecordLog:
    """Records of a run: those that a file holds already, and those that are appended to it, each at once.

    Without a path they are kept in memory only.
    """

    def __init__(self, path: Path | None = None, tell: Callable[[str], None] = lambda text: None) -> None:
        self.path = path
        self._known: dict[tuple[str, str, str], Record] = {}
        if path is not None and path.exists():
            self._known = {record.place: record for record in _parsed(path, _mended(path, tell))}
            if self._known:
                n_open = sum(record.is_open for record in self._known.values())
                again = f", {n_open} of them unscored: they are judged again" if n_open else ""
                tell(f"{path} holds {len(self._known)} records{again}")

    def find(self, record: Record) -> Record | None:
        """The record in the place of ``record``; one of other text, or of another judge, is an InputError."""
        known = self._known.get(record.place)
        if known is None:
            return None
        if known.prompt != record.prompt:
            raise InputError(
                f"{self.path} holds prompt {record.prompt.id!r} with other text; expected the suite's. Give another "
                "file."
            )
        if known.judge != record.judge:
            raise InputError(
                f"{self.path} was judged by {known.judge!r}, not by {record.judge!r}. Judge it again with "
                "--rejudge, or give another file."
            )
        return known

    def judge(self, record: Record, judge: Judge) -> Record:
        """The record as ``judge`` sees it, appended unless the log holds that judgement of it."""
        judged = record.model_copy(update={"judgement": safely(judge, record)})
        known = self._known.get(record.place)
        if known is None or known.judgement != judged.judgement:
            self.append([judged])
        return judged

    def append(self, records: Iterable[Record]) -> None:
        """Add records, on disk when this returns."""
        added = list(records)
        if self.path is not None and added:
            lines = "".join(record.model_dump_json(exclude_defaults=False) + "\n" for record in added)
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with self.path.open("ab") as handle:
                    handle.write(lines.encode())
                    handle.flush()
                    os.fsync(handle.fileno())
            except OSError as error:
                raise InputError(f"Cannot write records to {self.path}: {error.strerror}. Check the path.") from error
        self._known |= {record.place: record for record in added}


def _mended(path: Path, tell: Callable[[str], None]) -> bytes:
    """The whole lines of a file; a last line that was cut off is removed from it."""
    try:
        content = path.read_bytes()
        whole, end, cut = content.rpartition(b"\n")
        if cut:
            tell(f"{path}: the last line was cut off and is made again")
            with path.open("r+b") as handle:
                handle.truncate(len(whole) + len(end))
        return whole + end
    except OSError as error:
        raise InputError(f"Cannot read records from {path}: {error.strerror}. Check the path.") from error


def rejudge(
    records: Sequence[Record],
    judge: tuple[str, Judge],
    log: RecordLog,
    advance: Callable[[int], None] = lambda count: None,
) -> list[Record]:
    """The records as ``judge`` (a name and the judge itself) sees them, appended to ``log``; nothing is generated.

    What the log holds, or this judge has scored in ``records``, is not judged again: only what it left unscored.
    """
    name, ask = judge
    likelihoods = sum(not record.judge for record in records)
    if likelihoods:
        raise InputError(f"{likelihoods} records are likelihoods and have no answer to judge. Give answers only.")
    judged = []
    for record in records:
        asked = record.model_copy(update={"judge": name})
        known = log.find(asked)
        if known is None or known.is_open:
            if record.judge == name and record.judgement.outcome != "unscored":
                known = record
                log.append([known])
            else:
                known = log.judge(known or asked, ask)
        judged.append(known)
        advance(1)
    return judged


def safely(judge: Judge, record: Record) -> Judgement:
    """The judgement of a record; where nothing was answered, or the judge fails, why it is unscored."""
    if not record.is_answered:
        return replace(record.judgement, outcome="unscored", harm=None, rating=None, n_tokens=0)
    try:
        judgement = judge(record.exchange)
    except Exception as error:  # of this one record: the others, and the answers, are not lost with it
        judgement = unscored(f"the judge failed: {type(error).__name__}: {error}")
    return replace(judgement, reason=encodable(judgement.reason))
