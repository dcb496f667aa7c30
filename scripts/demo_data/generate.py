"""Write the demo data set: `python scripts/demo_data/generate.py --out src/safeside/builtin/demo`.

The output depends on nothing but these files: the random numbers are seeded and the archives carry no time.
"""

import argparse
import gzip
import io
import json
from collections.abc import Iterable
from pathlib import Path
from random import Random

from refusals import refusal
from templates import TEMPLATES, fill
from topics import Topic, all_topics

Row = dict[str, str | int]

SEED = 7
SPLITS: tuple[str, ...] = ("train", "validation", "test")
FLAGGED_ROWS: dict[str, int] = {"train": 1300, "validation": 300, "test": 500}
BENIGN_SHARE = 1 / 3
REFUSAL_ROWS: dict[str, int] = {"train": 1300, "validation": 200}


def pair(topics: list[Topic], count: int, split: str, random: Random) -> list[tuple[Topic, str]]:
    """`count` different pairs of topic and template: every topic as often as any other, give or take one."""
    decks = {topic: list(TEMPLATES[topic.kind][split]) for topic in topics}
    for deck in decks.values():
        random.shuffle(deck)
    pairs: list[tuple[Topic, str]] = []
    while len(pairs) < count:
        ready = [topic for topic in topics if decks[topic]]
        if not ready:
            raise ValueError(f"{split}: {len(topics)} topics give only {len(pairs)} of {count} rows")
        random.shuffle(ready)
        pairs += [(topic, decks[topic].pop()) for topic in ready[: count - len(pairs)]]
    return pairs


def split_rows(topics: Iterable[Topic], split: str, random: Random) -> list[Row]:
    """The shuffled rows of one split: as many harmless rows as flagged ones, a third of them plain."""
    groups: dict[str, list[Topic]] = {"flagged": [], "alike": [], "plain": []}
    for topic in topics:
        if topic.split == split:
            name = "flagged" if topic.label else "plain" if topic.category == "benign" else "alike"
            groups[name].append(topic)
    total = FLAGGED_ROWS[split]
    plain = round(total * BENIGN_SHARE)
    counts = {"flagged": total, "alike": total - plain, "plain": plain}
    pairs = [both for name, members in groups.items() for both in pair(members, counts[name], split, random)]
    random.shuffle(pairs)
    return [
        {
            "id": f"{split}-{number:04d}",
            "prompt": fill(template, topic.text),
            "label": topic.label,
            "category": topic.category,
            "topic": topic.text,
            "template": template,
        }
        for number, (topic, template) in enumerate(pairs)
    ]


def refusal_rows(rows: Iterable[Row], count: int, random: Random) -> list[Row]:
    """Up to `count` flagged prompts, each with a refusal."""
    flagged = [row for row in rows if row["label"] == 1][:count]
    return [
        {
            "prompt": row["prompt"],
            "response": refusal(str(row["category"]), random),
            "label": row["label"],
            "category": row["category"],
        }
        for row in flagged
    ]


def packed(rows: Iterable[Row]) -> bytes:
    """The rows as gzipped JSON lines without a time stamp or a file name."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    buffer = io.BytesIO()
    with gzip.GzipFile(filename="", fileobj=buffer, mode="wb", mtime=0) as archive:
        archive.write(text.encode("utf-8"))
    return buffer.getvalue()


def build() -> dict[str, list[Row]]:
    """Every file's rows, by file name."""
    topics = all_topics()
    files: dict[str, list[Row]] = {}
    for number, split in enumerate(SPLITS):
        rows = split_rows(topics, split, Random(SEED + number))
        files[f"{split}.jsonl.gz"] = rows
        if split in REFUSAL_ROWS:
            random = Random(SEED + 100 + number)
            files[f"refusals_{split}.jsonl.gz"] = refusal_rows(rows, REFUSAL_ROWS[split], random)
    return files


def main() -> None:
    """Write the files into the folder that the command line names."""
    parser = argparse.ArgumentParser(description="Write the demo data set.")
    parser.add_argument("--out", type=Path, required=True, help="folder for the .jsonl.gz files")
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    for name, rows in build().items():
        (out / name).write_bytes(packed(rows))
        print(f"{name}: {len(rows)} rows, {sum(int(row['label']) for row in rows)} flagged")


if __name__ == "__main__":
    main()
