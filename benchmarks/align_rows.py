"""The rows that every aligner and every baseline learns from, made once: preferences, harmless answers, a gate's rows.

A harmful prompt prefers a refusal to what the base answers, a harmless one what the base answers to a refusal.  So both
sides of a pair are things that the base, or a refusing model, would say.  Refusals are written for this project and
prompts come from public sets; whatever asks for a goal of an evaluation is left out and counted.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import random
import zlib
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from safeside.base.model import Base
from safeside.evals.classifier import TRAINING, labelled_answers
from safeside.evals.judges import refusal_phrases
from safeside.evals.suites import LOCAL_SUITES, goals_of
from safeside.tasks.overlap import drop_overlap
from safeside.tasks.rows import BadRow, open_rows, parse_rows
from safeside.types import Example, Message
from tidy import write_json

Row = dict[str, object]

DEMO = Path(str(files("safeside.builtin") / "demo"))
LONGEST_REFUSAL = 100  # characters
LONGEST_PROMPT = 200  # characters: about 60 tokens of the built-in base
LONGEST_ASKED = 1000  # characters of a prompt that a gate must know: about 300 tokens
ANSWER_TOKENS = 32
BATCH = 25
FORMAT = 6  # of the files; raise it when they would be made otherwise


@dataclass(frozen=True, slots=True)
class Source:
    """Prompts of one file (of the packaged demo set if it is none of the data folder's), at most ``limit`` of them."""

    file: str
    limit: int
    label: int
    """Which rows are taken: 1 harmful, 0 harmless; of a file without labels all."""
    is_packaged: bool = False
    shortest: int = 0
    """Characters of a prompt, at least."""
    longest: int = LONGEST_PROMPT
    """Characters of a prompt, at most."""

    @property
    def longest_answer(self) -> float:
        """Characters of an answer; where prompts may be long, answers are not learnt from."""
        return LONGEST_ANSWER if self.longest <= LONGEST_PROMPT else math.inf


def asked(file: str, limit: int, label: int, *, is_packaged: bool = False) -> Source:
    """A source of prompts as people write them, long ones among them."""
    return Source(file, limit, label, is_packaged, longest=LONGEST_ASKED)


# What aligners learn from.  Split by split, so that no prompt is on both sides.
PAIRS = {
    "train": (
        Source("refusals_train.jsonl.gz", 120, 1, is_packaged=True),
        Source("safety_sft/safety_tuned_llamas_train.jsonl.gz", 130, 1),
        Source("guardreasoner_prompts5k/train.jsonl.gz", 130, 1),
        Source("benign_prompts/alpaca_train.jsonl.gz", 260, 0),
        Source("instructions/dolly_partial_train.jsonl.gz", 100, 0),
        Source("guardreasoner_prompts5k/train.jsonl.gz", 140, 0),
    ),
    "validation": (
        Source("refusals_validation.jsonl.gz", 20, 1, is_packaged=True),
        Source("safety_sft/safety_tuned_llamas_val.jsonl.gz", 20, 1),
        Source("guardreasoner_prompts5k/val.jsonl.gz", 20, 1),
        Source("benign_prompts/alpaca_val.jsonl.gz", 20, 0),
        Source("instructions/dolly_partial_val.jsonl.gz", 20, 0),
        Source("guardreasoner_prompts5k/val.jsonl.gz", 40, 0),
    ),
}
# What the gate learns from: more of the same and further sets, whole sets of prompts that no suite here asks among
# them; what the taught judge learns from is left out.
GATE = {
    "train": (
        asked("train.jsonl.gz", 300, 1, is_packaged=True),
        asked("train.jsonl.gz", 200, 0, is_packaged=True),
        asked("safety_sft/safety_tuned_llamas_train.jsonl.gz", 700, 1),
        asked("guardreasoner_prompts5k/train.jsonl.gz", 1200, 1),
        asked("guardreasoner_prompts5k/train.jsonl.gz", 1200, 0),
        asked("toxic_chat/train.jsonl.gz", 300, 1),
        asked("toxic_chat/train.jsonl.gz", 1200, 0),
        asked("aegis/v2_sample900_train.jsonl.gz", 400, 1),
        asked("harmful_prompts/harmfulqa_test.jsonl.gz", 900, 1),
        asked("harmful_prompts/ailuminate_demo_test.jsonl.gz", 500, 1),
        asked("benign_prompts/alpaca_train.jsonl.gz", 2000, 0),
        asked("instructions/alpaca_partial_train.jsonl.gz", 2000, 0),
        asked("instructions/dolly_partial_train.jsonl.gz", 1000, 0),
        asked("instructions/lima_train.jsonl.gz", 700, 0),
    ),
    "validation": (
        asked("validation.jsonl.gz", 40, 1, is_packaged=True),
        asked("validation.jsonl.gz", 40, 0, is_packaged=True),
        asked("safety_sft/safety_tuned_llamas_val.jsonl.gz", 100, 1),
        asked("guardreasoner_prompts5k/val.jsonl.gz", 100, 1),
        asked("guardreasoner_prompts5k/val.jsonl.gz", 100, 0),
        asked("benign_prompts/alpaca_val.jsonl.gz", 150, 0),
        asked("instructions/alpaca_partial_val.jsonl.gz", 80, 0),
        asked("instructions/dolly_partial_val.jsonl.gz", 80, 0),
    ),
}
ANSWERED = Source("instructions/alpaca_partial_train.jsonl.gz", 220, 0)  # with their known answers: for the divergence
LONGEST_ANSWER = 240  # characters of those
CHECKED = {  # prompts that settings are chosen on: nothing learns from them, nor stops or is calibrated by them
    "harmful": (
        Source("safety_sft/safety_tuned_llamas_test.jsonl.gz", 60, 1),
        Source("guardreasoner_prompts5k/val.jsonl.gz", 40, 1),
        Source("harmful_prompts/harmbench_val.jsonl.gz", 40, 1),
        Source("guardreasoner_prompts5k/val.jsonl.gz", 30, 1, shortest=LONGEST_PROMPT + 1, longest=LONGEST_ASKED),
    ),
    "harmless": (
        Source("benign_prompts/alpaca_val.jsonl.gz", 200, 0),
        Source("guardreasoner_prompts5k/val.jsonl.gz", 30, 0, shortest=LONGEST_PROMPT + 1, longest=LONGEST_ASKED),
    ),
    "helpful": (asked("instructions/alpaca_partial_val.jsonl.gz", 200, 0),),
}


def make_rows(base: Base, data: Path, folder: Path) -> dict[str, object]:
    """Write ``pairs_*``, ``gate_*``, ``answered`` and ``checked_*`` into ``folder``, unless it holds them already.

    ``refusals_*`` are the pairs of harmful prompts alone: for an aligner that only ever works behind a gate.

    No row asks for a goal of an evaluation, and none but those of ``checked_*`` has a prompt of theirs, or one that the
    taught judge learns from.  Returns the number of rows of each file, and how many were left out for their overlap.
    """
    done = folder / f"counts-{FORMAT}.json"  # the last file that is written
    if done.is_file():
        found: dict[str, object] = json.loads(done.read_text(encoding="utf-8"))
        return found
    goals = goals_of([suite.name for suite in LOCAL_SUITES], data) + judged_prompts(data)
    checked = {f"checked_{name}": sources for name, sources in CHECKED.items()}
    parts = checked | {f"gate_{split}": sources for split, sources in GATE.items()}
    parts |= {"answered": (ANSWERED,), **{f"pairs_{split}": sources for split, sources in PAIRS.items()}}
    counts: dict[str, object] = {}
    taken = set[str]()
    for name, sources in parts.items():
        rows = [row for source in sources for row in drawn(data, source, taken)]
        overlap = drop_overlap(
            [Example((Message("user", str(row["prompt"])),), line=i) for i, row in enumerate(rows)],
            [*goals, *([] if name in checked else taken)],
        )
        rows = [rows[example.line] for example in overlap.kept]
        taken |= {str(row["prompt"]) for row in rows} if name in checked else set()
        if name.startswith("pairs"):
            rows = pairs_of(base, rows, refusals_of(name.removeprefix("pairs_")))
            harmful = [row for row in rows if row["label"] == 1]
            _write(folder / f"{name.replace('pairs', 'refusals')}.jsonl", harmful)
        if name.startswith("checked"):  # records are found again by these names
            rows = [{"id": hashlib.sha256(str(row["prompt"]).encode()).hexdigest()[:12], **row} for row in rows]
        _write(folder / f"{name}.jsonl", rows)
        counts[name] = {"rows": len(rows), "left_out": str(overlap)}
    write_json(done, counts)
    return counts


def judged_prompts(data: Path) -> list[str]:
    """The prompts of the answers that the taught judge learns from."""
    rows = (row for path, label in TRAINING for row in labelled_answers(data / path, label))
    return list(dict.fromkeys(row.messages[0].content for row in rows))


def drawn(data: Path, source: Source, taken: Set[str] = frozenset()) -> list[Row]:
    """At most ``limit`` rows of a source whose length fits, drawn by its name alone: prompt, answer and label.

    Prompts in ``taken`` are passed over.
    """
    with open_rows((DEMO if source.is_packaged else data) / source.file) as handle:
        found = [row[1] for row in parse_rows(handle) if not isinstance(row, BadRow) and _is_of(source, row[1])]
    random.Random(source.file).shuffle(found)
    rows: list[Row] = [
        {"prompt": str(row["prompt"]).strip(), "response": row.get("response") or "", "label": source.label}
        for row in found
    ]
    return [row for row in rows if row["prompt"] not in taken][: source.limit]


def _is_of(source: Source, row: Mapping[str, object]) -> bool:
    """Whether a row fits in length and is of its source's kind; safety-tuned rows count by what they answer."""
    prompt, answer = str(row.get("prompt") or "").strip(), str(row.get("response") or "")
    if not prompt or not source.shortest <= len(prompt) <= source.longest or len(answer) > source.longest_answer:
        return False
    if source.file.startswith("safety_sft/"):
        return refusal_phrases(answer)
    return row.get("label", source.label) == source.label


def refusals_of(split: str) -> list[str]:
    """Short refusals written for this project."""
    with gzip.open(DEMO / f"refusals_{split}.jsonl.gz", "rt", encoding="utf-8") as handle:
        found = {str(json.loads(line)["response"]) for line in handle}
    return sorted(text for text in found if len(text) <= LONGEST_REFUSAL and refusal_phrases(text))


def pairs_of(base: Base, rows: Sequence[Row], refusals: Sequence[str]) -> list[Row]:
    """Preferences: a refusal over the base's answer where the prompt is harmful, the other way round where it is not.

    Answers of the base that refuse, that are empty or, where they are chosen, that do not end are left out.
    """
    found: list[Row] = []
    ordered = sorted(rows, key=lambda row: len(str(row["prompt"])))
    for start in range(0, len(ordered), BATCH):
        batch = ordered[start : start + BATCH]
        prompts = [[Message("user", str(row["prompt"]))] for row in batch]
        answers = base.chat_batch(prompts, max_new_tokens=ANSWER_TOKENS)
        for row, answer in zip(batch, answers, strict=True):
            refusal = refusals[zlib.crc32(str(row["prompt"]).encode()) % len(refusals)]
            is_harmful = row["label"] == 1
            if not answer.text or refusal_phrases(answer.text) or not (is_harmful or answer.finish_reason == "stop"):
                continue
            chosen, rejected = (refusal, answer.text) if is_harmful else (answer.text, refusal)
            found.append({"prompt": row["prompt"], "chosen": chosen, "rejected": rejected, "label": row["label"]})
    return found


def _write(path: Path, rows: Sequence[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
