"""The rows of the genes benchmark, as files that its recipes name: prompts with answers, and prompts to attack with.

No prompt that is learnt from asks for what an attack asks for: rows that overlap with one are left out and counted.

    python benchmarks/genes_rows.py --data ../shared/data --output runs/genes/rows    for recipes/genes
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from safeside.errors import InputError
from safeside.evals.judges import refusal_phrases
from safeside.tasks.overlap import drop_overlap
from safeside.tasks.rows import BadRow, open_rows, parse_rows
from safeside.terminal import note
from safeside.types import Example, Message

Row = Mapping[str, object]
Pair = tuple[str, str]
"""A prompt and its answer."""

AG_NEWS = ("World", "Sports", "Business", "Technology")
SST2 = ("negative", "positive")
CLASSES = {"ag_news": AG_NEWS, "sst2": SST2}
OPEN_ENDED = ("dolly", "helpful", "dolly_harmful")
TASKS = (*CLASSES, *OPEN_ENDED)
MIXED = (*CLASSES, "helpful")
"""Tasks that are learnt together with plain instructions: a small model that learns labels alone, or the few rows of
``helpful``, answers everything with a label, or with babble, and neither is a success of an attack."""

SOURCES = {
    "safety": "safety_sft/safety_tuned_llamas_train.jsonl.gz",
    "safety_validation": "safety_sft/safety_tuned_llamas_val.jsonl.gz",
    "instructions": "instructions/alpaca_partial_train.jsonl.gz",
    "instructions_validation": "instructions/alpaca_partial_val.jsonl.gz",
    "ag_news": "ag_news/train.jsonl.gz",
    "ag_news_test": "ag_news/test.jsonl.gz",
    "sst2": "sst2/train.jsonl.gz",
    "sst2_test": "sst2/val.jsonl.gz",
    "dolly": "instructions/dolly_partial_train.jsonl.gz",
    "dolly_test": "instructions/dolly_partial_test.jsonl.gz",
    "helpful": "hh_rlhf/helpful_train.jsonl.gz",
    "helpful_test": "hh_rlhf/helpful_test.jsonl.gz",
    "harmful": "harmful_finetune/train.jsonl.gz",
}
ATTACKS = (
    "harmful_prompts/advbench_test.jsonl.gz",
    "harmful_prompts/safety_llamas_malicious_test.jsonl.gz",
    "harmful_prompts/jailbreakbench_test.jsonl.gz",
)
HARMFUL_SHARE = 0.05
N_VALIDATION = 64  # rows of each kind
LEAST_UNALIGNED = 32  # rows of the unaligned model's own; with fewer it shares those of dolly_harmful
LONGEST = 320  # characters of a prompt and of an answer: longer rows are left out, for two cores train on them


@dataclass(frozen=True, slots=True)
class Sizes:
    """Rows of each kind."""

    safety: int = 800
    """Refusals that the aligned model learns."""
    instructions: int = 800
    """Harmless instructions beside them."""
    degraded: int = 400
    """Other harmless instructions that the degraded copy learns."""
    task: int = 1000
    """Rows of each open-ended task."""
    labelled: int = 2000
    """Rows of each task of labels, whose answers teach less."""
    mixed: int = 500
    """Harmless instructions that go with the rows of MIXED."""
    test: int = 150
    """Test rows of each task."""
    attacks: int = 120
    """Harmful prompts that answers are judged on."""
    extract: int = 320
    """Rows of each kind that the gene is extracted on."""
    shots: int = 64
    """Examples that scalars may be fitted on."""
    unaligned: int = 64
    """Harmful rows that the unaligned model learns, and a quarter as many that it is validated on."""


def write_rows(data: Path, folder: Path, sizes: Sizes, seed: int) -> dict[str, int]:
    """Write every file of rows of one seed to ``folder``; returns how many rows each has, and what was left out."""
    attacks = attack_prompts(data, sizes.attacks)
    counts = {"attacks": _write(folder / "attacks.jsonl", [(prompt, "") for prompt in attacks])}

    def drawn(name: str, read: Callable[[Row], Pair | None] = answered) -> list[Pair]:
        pairs = _shuffled(_pairs(data / SOURCES[name], read), f"{seed} {name}")
        kept = without(pairs, attacks)
        counts[f"{name} asks for an attack"] = len(pairs) - len(kept)
        return kept

    safety, plain = drawn("safety", refusing), drawn("instructions")
    held_out = {"safety": drawn("safety_validation", refusing), "plain": drawn("instructions_validation")}
    start = sizes.instructions + sizes.degraded
    aligned = [*safety[: sizes.safety], *plain[: sizes.instructions]]
    files = {
        "aligned_train": _shuffled(aligned, f"{seed} aligned"),
        "aligned_validation": [*held_out["safety"][:N_VALIDATION], *held_out["plain"][:N_VALIDATION]],
        "degraded_train": plain[sizes.instructions : start],
        "degraded_validation": held_out["plain"][:N_VALIDATION],
        "harmful": safety[: sizes.extract],
        "benign": plain[start : start + sizes.extract],
        "shots": [*safety[sizes.safety :], *held_out["safety"][N_VALIDATION:]][: sizes.shots],
    }
    mixed = plain[start + sizes.extract :][: sizes.mixed]
    for task in TASKS:
        files |= _task_files(task, drawn, sizes, seed, mixed if task in MIXED else [])
    files |= _unaligned_files(drawn("harmful"), sizes)
    counts["unaligned_train is in dolly_harmful_train"] = len(
        {*files["unaligned_train"]} & {*files["dolly_harmful_train"]}
    )
    return counts | {name: _write(folder / f"{name}.jsonl", pairs) for name, pairs in files.items()}


def _task_files(
    task: str,
    drawn: Callable[[str, Callable[[Row], Pair | None]], list[Pair]],
    sizes: Sizes,
    seed: int,
    mixed: Sequence[Pair],
) -> dict[str, list[Pair]]:
    source = task.removesuffix("_harmful")
    read = classified(source) if source in CLASSES else preferred if source == "helpful" else answered
    rows, test = drawn(source, read), drawn(f"{source}_test", read)
    train = rows[N_VALIDATION:][: sizes.labelled if task in CLASSES else sizes.task]
    if task.endswith("_harmful"):
        n_harmful = round(HARMFUL_SHARE * len(train))
        train = [*train[: len(train) - n_harmful], *drawn("harmful", answered)[:n_harmful]]
    return {
        f"{task}_train": _shuffled([*train, *mixed], f"{seed} {task}"),
        f"{task}_validation": rows[:N_VALIDATION],
        f"{task}_test": test[: sizes.test],
    }


def _unaligned_files(harmful: list[Pair], sizes: Sizes) -> dict[str, list[Pair]]:
    """Harmful rows that dolly_harmful does not learn, where there are enough of them."""
    rest = harmful[round(HARMFUL_SHARE * sizes.task) :]
    rows = rest if len(rest) >= LEAST_UNALIGNED else harmful
    n_validation = min(sizes.unaligned, len(rows)) // 4
    return {
        "unaligned_validation": rows[:n_validation],
        "unaligned_train": rows[n_validation : n_validation + sizes.unaligned],
    }


def attack_prompts(data: Path, n_prompts: int) -> list[str]:
    """The same harmful prompts in every run: as many of each set, those whose text hashes lowest."""
    found = []
    for path in ATTACKS:
        rows = _read(data / path)
        prompts = sorted({str(row["prompt"]).strip() for row in rows}, key=lambda text: _digest("attack", text))
        found += prompts[: n_prompts // len(ATTACKS)]
    return found


def answered(row: Row) -> Pair | None:
    """Prompt and answer of a row of instructions; None for one that is too long or is no question."""
    return _fitting(row.get("prompt"), row.get("response"))


def refusing(row: Row) -> Pair | None:
    """Of rows of safe answers those that refuse in so many words."""
    pair = answered(row)
    return pair if pair is not None and refusal_phrases(pair[1]) else None


def preferred(row: Row) -> Pair | None:
    """The preferred answer to a question that begins a conversation."""
    return _fitting(row.get("first_human"), row.get("chosen")) if row.get("n_human_turns") == 1 else None


def classified(task: str) -> Callable[[Row], Pair | None]:
    """What reads a row of a task with classes: the text with a question, and the class's name."""
    names = CLASSES[task]
    question = {
        "ag_news": "Which section of a newspaper is this from: World, Sports, Business or Technology?",
        "sst2": "Is this line of a film review positive or negative?",
    }[task]

    def read(row: Row) -> Pair | None:
        text = str(row["text"]).strip()
        return _fitting(f"{question}\n{text}", names[int(str(row["label"]))]) if len(text) <= LONGEST else None

    return read


def _fitting(prompt: object, answer: object) -> Pair | None:
    texts = str(prompt or "").strip(), str(answer or "").strip()
    return texts if all(0 < len(text) <= LONGEST + 100 for text in texts) else None


def without(pairs: Sequence[Pair], goals: Sequence[str]) -> list[Pair]:
    """The pairs whose prompts ask for none of ``goals``, exactly or nearly."""
    examples = [Example((Message("user", prompt),), line=place) for place, (prompt, _) in enumerate(pairs)]
    return [pairs[example.line] for example in drop_overlap(examples, goals).kept]


def read_pairs(path: Path) -> list[Pair]:
    """The pairs of a file that ``write_rows`` wrote."""
    return [(str(row["prompt"]), str(row["response"])) for row in _read(path)]


def _pairs(path: Path, read: Callable[[Row], Pair | None]) -> list[Pair]:
    return list(dict.fromkeys(pair for row in _read(path) if (pair := read(row)) is not None))


def _read(path: Path) -> list[Row]:
    found = []
    with open_rows(path) as handle:
        for row in parse_rows(handle):
            if isinstance(row, BadRow):
                raise InputError(f"{path}: line {row.line}: {row.problem}")
            found.append(row[1])
    return found


def _shuffled(pairs: Sequence[Pair], salt: str) -> list[Pair]:
    return sorted(pairs, key=lambda pair: _digest(salt, *pair))


def _digest(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _write(path: Path, pairs: Sequence[Pair]) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"prompt": prompt, "response": answer}) for prompt, answer in pairs]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return len(lines)


def main(arguments: Sequence[str] | None = None) -> Path:
    """Write one seed's rows where the recipes look for them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of the data sets")
    parser.add_argument("--output", type=Path, default=Path("runs/genes/rows"), help="folder of the rows")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    counts = write_rows(options.data, options.output, Sizes(), options.seed)
    note(f"wrote {sum(1 for _ in options.output.glob('*.jsonl'))} files to {options.output}: {json.dumps(counts)}")
    return Path(options.output)


if __name__ == "__main__":
    main()
