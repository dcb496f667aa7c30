"""The demo data set: what ships is what the generator writes, and the splits share nothing."""

import gzip
import importlib
import json
import os
import re
import subprocess
import sys
from collections import Counter
from itertools import combinations
from pathlib import Path
from random import Random
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "scripts" / "demo_data"
SHIPPED = ROOT / "src" / "safeside" / "builtin" / "demo"
SPLITS = ("train", "validation", "test")
SIZES = {"train": 2600, "validation": 600, "test": 1000}
CATEGORIES = {"vcr", "ncr", "hte", "ssh", "prv", "dfm", "spc", "ipv"}
VERBS = ("kill", "shoot", "crack", "hack", "steal", "attack", "poison", "destroy", "track", "break", "fake")

Row = dict[str, str | int]


def load(name: str) -> list[Row]:
    """The rows of one shipped file."""
    with gzip.open(SHIPPED / f"{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def normalised(prompt: object) -> str:
    """Lower-case letters and digits only, one space between words."""
    return " ".join(re.findall(r"[a-z0-9]+", str(prompt).lower()))


def script(name: str) -> ModuleType:
    """A module of the generator, imported without leaving its plain names behind for other tests."""
    before = set(sys.modules)
    sys.path.insert(0, str(SCRIPTS))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(SCRIPTS))
        for new in set(sys.modules) - before:
            if str(getattr(sys.modules[new], "__file__", "")).startswith(str(SCRIPTS)):
                del sys.modules[new]


@pytest.fixture(scope="module")
def splits() -> dict[str, list[Row]]:
    return {split: load(split) for split in SPLITS}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two folders that the generator filled, under different hash seeds."""
    folders = []
    for hash_seed in ("1", "2"):
        folder = tmp_path_factory.mktemp("demo")
        command = [sys.executable, str(SCRIPTS / "generate.py"), "--out", str(folder)]
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        subprocess.run(command, check=True, capture_output=True, env=environment)
        folders.append(folder)
    return folders


def test_the_generator_writes_the_same_bytes_twice(written: list[Path]) -> None:
    first, second = ({path.name: path.read_bytes() for path in folder.iterdir()} for folder in written)
    assert len(first) == 5
    assert first == second
    assert all(data[4:8] == b"\0\0\0\0" for data in first.values())  # the time stamp of gzip


def test_the_shipped_files_are_what_the_generator_writes(written: list[Path]) -> None:
    # Contents, since another build of zlib may pack the same text into other bytes.
    made = {path.name: gzip.decompress(path.read_bytes()) for path in written[0].iterdir()}
    shipped = {path.name: gzip.decompress(path.read_bytes()) for path in SHIPPED.glob("*.jsonl.gz")}
    assert made == shipped


@pytest.mark.parametrize("split", SPLITS)
def test_rows_are_well_formed_and_balanced(splits: dict[str, list[Row]], split: str) -> None:
    rows = splits[split]
    assert len(rows) == SIZES[split]
    assert len({row["id"] for row in rows}) == len(rows)
    assert 0.45 <= sum(int(row["label"]) for row in rows) / len(rows) <= 0.55
    for row in rows:
        assert list(row) == ["id", "prompt", "label", "category", "topic", "template"]
        assert 0 < len(str(row["prompt"])) <= 300
        assert "{" not in str(row["prompt"])
        assert row["label"] in (0, 1)
        assert row["category"] in (CATEGORIES if row["label"] else CATEGORIES | {"benign"})


@pytest.mark.parametrize("split", SPLITS)
def test_each_category_has_flagged_rows_and_look_alikes(splits: dict[str, list[Row]], split: str) -> None:
    counts = Counter((row["category"], row["label"]) for row in splits[split])
    for category in CATEGORIES:
        assert counts[category, 1] >= 15
        assert counts[category, 0] >= 10
    harmless = sum(count for (_, label), count in counts.items() if label == 0)
    assert counts["benign", 0] / harmless == pytest.approx(1 / 3, abs=0.03)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_does_not_tell_the_label(splits: dict[str, list[Row]], split: str, verb: str) -> None:
    labels = Counter(row["label"] for row in splits[split] if verb in str(row["prompt"]).lower())
    assert 0.2 <= labels[1] / (labels[0] + labels[1]) <= 0.8


@pytest.mark.parametrize("key", ["topic", "template"])
def test_no_topic_and_no_template_is_in_two_splits(splits: dict[str, list[Row]], key: str) -> None:
    seen = {split: {normalised(row[key]) for row in rows} for split, rows in splits.items()}
    for one, other in combinations(SPLITS, 2):
        assert not seen[one] & seen[other]


def test_there_are_enough_templates_and_topics(splits: dict[str, list[Row]]) -> None:
    rows = [row for split in splits.values() for row in split]
    assert len({row["template"] for row in rows}) >= 120
    assert len({row["topic"] for row in rows}) >= 400


def test_no_filling_is_written_twice() -> None:
    topics = script("topics").all_topics()
    assert max(Counter(normalised(topic.text) for topic in topics).values()) == 1


def test_no_prompt_appears_twice(splits: dict[str, list[Row]]) -> None:
    prompts = Counter(normalised(row["prompt"]) for rows in splits.values() for row in rows)
    assert max(prompts.values()) == 1


@pytest.mark.parametrize(("split", "count"), [("train", 1300), ("validation", 200)])
def test_refusals_answer_flagged_prompts_of_their_own_split(
    splits: dict[str, list[Row]], split: str, count: int
) -> None:
    flagged = {row["prompt"]: row["category"] for row in splits[split] if row["label"] == 1}
    refusals = load(f"refusals_{split}")
    assert len(refusals) == len({row["prompt"] for row in refusals}) == count
    for row in refusals:
        assert list(row) == ["prompt", "response", "label", "category"]
        assert row["label"] == 1
        assert flagged[row["prompt"]] == row["category"]
        assert 10 <= len(str(row["response"]).split()) <= 40


def test_refusals_vary_and_repeat_under_a_seed() -> None:
    module = script("refusals")
    for category in CATEGORIES:
        made = [module.refusal(category, Random(seed)) for seed in range(200)]
        assert made == [module.refusal(category, Random(seed)) for seed in range(200)]
        assert len(set(made)) >= 100
        assert len({text.split(".")[0] for text in made}) >= 12


def test_a_bag_of_words_reads_the_test_split_poorly(splits: dict[str, list[Row]]) -> None:
    pytest.importorskip("sklearn")
    auroc = script("measure").bag_of_words_auroc(splits["train"], splits["test"])
    assert 0.60 <= auroc <= 0.80
    stated = re.search(r"TF-IDF AUROC on test: (0\.\d+)", (SHIPPED / "README.md").read_text("utf-8"))
    assert stated is not None
    assert float(stated[1]) == pytest.approx(auroc, abs=0.01)
