"""The rows that the built-in adapters learn from: permissively licensed ones, and text written for this project.

Every source below states its licence in the SOURCES.md beside the data: MIT, Apache-2.0, CC-BY or CC-BY-SA.  No test
split, and no set that later serves as a benchmark of refusals, is read.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import random
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

Row = dict[str, object]
DEMO = Path("src/safeside/builtin/demo")
LONGEST = 1400  # characters of prompt and answer together: about 450 tokens of the built-in base


@dataclass(frozen=True)
class Source:
    """One file: how many rows at most, which columns, and the label when the file has none."""

    file: str
    licence: str
    limit: int
    answer: bool = True
    label: int | None = None


# Guard: prompts alone, and prompts with answers (the label is then the answer's).
GUARD_SOURCES = (
    Source("aegis/v2_sample900_train.jsonl.gz", "CC-BY-4.0", 900, answer=False, label=1),
    Source("gptfuzz_responses/train.jsonl.gz", "MIT", 1500),
    Source("diasafety/train.jsonl.gz", "Apache-2.0", 1500),
    Source("toxigen/train.jsonl.gz", "MIT, CDLA-Permissive-2.0", 1000),
    Source("instructions/dolly_partial_train.jsonl.gz", "CC-BY-SA-3.0", 700, answer=False, label=0),
    Source("instructions/dolly_partial_train.jsonl.gz", "CC-BY-SA-3.0", 500, label=0),
    Source("instructions/rasbt_train.jsonl.gz", "Apache-2.0", 300, label=0),
)
# Harmless rows behind the guard's presets: as many as the promise of 0.1% takes for prompts, 1% for answers.
PROMISE_SOURCES = (
    Source("instructions/dolly_partial_train.jsonl.gz", "CC-BY-SA-3.0", 4200, answer=False, label=0),
    Source("instructions/dolly_partial_train.jsonl.gz", "CC-BY-SA-3.0", 1050, label=0),
)
# Harmless prompts on which the aligner learns to leave the base's own answer alone.
KEPT_SOURCES = (
    Source("instructions/dolly_partial_train.jsonl.gz", "CC-BY-SA-3.0", 500, answer=False, label=0),
    Source("instructions/rasbt_train.jsonl.gz", "Apache-2.0", 150, answer=False, label=0),
)


# Whom to credit, by the folder of a source.
CREDITS = {
    "aegis": "NVIDIA, Aegis AI Content Safety Dataset 2.0 (nvidia/Aegis-AI-Content-Safety-Dataset-2.0)",
    "gptfuzz_responses": "Yu and others, GPTFuzzer (github.com/sherdencooper/GPTFuzz)",
    "diasafety": "Sun and others, DiaSafety (github.com/thu-coai/DiaSafety)",
    "toxigen": "Hartvigsen and others, Microsoft, ToxiGen (github.com/microsoft/TOXIGEN)",
    "instructions/dolly": "Databricks, databricks-dolly-15k (huggingface.co/datasets/databricks/databricks-dolly-15k)",
    "instructions/rasbt": "Raschka, LLMs-from-scratch (github.com/rasbt/LLMs-from-scratch)",
}
OWN = "written for safeside (scripts/demo_data/)"


def data_facts(train: Iterable[Row], validation: Iterable[Row], sources: Iterable[Source]) -> dict[str, str]:
    """For an adapter's card: of each source its rows, licence and authors."""
    counts = [Counter(row.get("source") for row in split) for split in (train, validation)]
    credited = {source.file: (source.licence, credit_of(source.file)) for source in sources}
    return {
        f"data, {credit.partition(' (')[0]}": f"{counts[0][file]:,} training and {counts[1][file]:,} validation rows, "
        f"texts unchanged; {licence}; {credit}"
        for file, (licence, credit) in {**credited, None: ("Apache-2.0", OWN)}.items()
    }


def credit_of(file: str) -> str:
    """Authors and home of a source."""
    (credit,) = (text for start, text in CREDITS.items() if file.startswith(start))
    return credit


def read(path: Path) -> list[Row]:
    """All rows of one gzipped JSON-lines file."""
    with gzip.open(path, "rt", encoding="utf-8") as handle:
        return [json.loads(line) for line in handle]


def write(path: Path, rows: Iterable[Row]) -> None:
    """Write rows as gzipped JSON lines, byte for byte reproducible."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as raw, gzip.GzipFile(fileobj=raw, mode="wb", mtime=0) as handle:
        handle.writelines((json.dumps(row, ensure_ascii=False) + "\n").encode() for row in rows)


def shaped(source: Source, row: Row) -> Row | None:
    """The row as prompt (and answer) with its label, or None when it is too long or empty."""
    prompt = str(row.get("prompt") or row.get("text") or "").strip()
    answer = str(row.get("response") or "").strip() if source.answer else ""
    if not prompt or len(prompt) + len(answer) > LONGEST:
        return None
    label = row.get("label") if source.label is None else source.label
    return {"prompt": prompt, **({"response": answer} if answer else {}), "label": label, "source": source.file}


def drawn(data: Path, sources: Iterable[Source]) -> Iterator[Row]:
    """At most ``limit`` usable rows of each source, drawn by a seed of its own."""
    for source in sources:
        rows = [item for row in read(data / source.file) if (item := shaped(source, row)) is not None]
        random.Random(source.file + str(source.answer)).shuffle(rows)
        yield from rows[: source.limit]


def is_held_out(row: Row, share: float = 0.1) -> bool:
    """Whether the row's prompt belongs to validation: decided by a hash of the prompt, so prompts never cross."""
    digest = hashlib.sha256(str(row["prompt"]).encode()).digest()
    return int.from_bytes(digest[:4], "big") < share * 2**32


def guard_rows(data: Path) -> tuple[list[Row], list[Row]]:
    """Training and validation rows of ``builtin:harm``."""
    rows = list(drawn(data, GUARD_SOURCES))
    train = [row for row in rows if not is_held_out(row)]
    validation = [row for row in rows if is_held_out(row)]
    for split, into in (("train", train), ("validation", validation)):
        into += [{"prompt": row["prompt"], "label": row["label"]} for row in read(DEMO / f"{split}.jsonl.gz")]
        refused = read(DEMO / f"refusals_{split}.jsonl.gz")[: 600 if split == "train" else 60]
        into += [{"prompt": row["prompt"], "response": row["response"], "label": 0} for row in refused]
    seen = {str(row["prompt"]) + str(row.get("response", "")) for row in validation}
    return [row for row in train if str(row["prompt"]) + str(row.get("response", "")) not in seen], validation


def benign_rows(data: Path) -> list[Row]:
    """Harmless rows for the presets of ``builtin:harm``: prompts, and those with answers, that neither split holds."""
    known = {str(row["prompt"]) for split in guard_rows(data) for row in split}
    return [row for row in drawn(data, PROMISE_SOURCES) if str(row["prompt"]) not in known]


def kept_rows(data: Path) -> tuple[list[Row], list[Row]]:
    """Rows with harmless prompts for ``builtin:refuse``: training and validation."""
    rows = [row for row in drawn(data, KEPT_SOURCES) if len(str(row["prompt"])) <= 200]
    train = [row for row in rows if not is_held_out(row)]
    validation = [row for row in rows if is_held_out(row)]
    for split, into in (("train", train), ("validation", validation)):
        into += [{"prompt": row["prompt"]} for row in read(DEMO / f"{split}.jsonl.gz") if row["label"] == 0]
    return train, validation


def refusal_rows(split: str) -> list[Row]:
    """Harmful prompts with refusals written for this project."""
    rows = read(DEMO / f"refusals_{split}.jsonl.gz")
    return [{"prompt": row["prompt"], "response": row["response"]} for row in rows]
