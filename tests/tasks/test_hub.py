"""The hub's sets by name and pinned revision, read from a copy on disk: the same call as over the network."""

from __future__ import annotations

import sys
from pathlib import Path

import datasets
import pytest

from safeside.errors import ConfigError, InputError, MissingExtraError
from safeside.tasks.sources import READERS, read_rows
from safeside.tasks.task import load_task
from tasks.conformance import write_place

REVISION = "0123456789abcdef0123456789abcdef01234567"
PLACE = f"hub:some-one/a.set@{REVISION}#train"
ROWS = [{"text": "caf\u00e9", "label": 1}, {"text": "tea", "label": 0}]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    datasets.disable_progress_bars()


def test_rows_have_numbers_from_one(tmp_path: Path) -> None:
    write_place(PLACE, ROWS, tmp_path)
    assert list(read_rows(PLACE, tmp_path)) == list(enumerate(ROWS, 1))


def test_configurations_and_splits_are_told_apart(tmp_path: Path) -> None:
    place = f"hub:some/set:annotated@{REVISION}#30k_test"
    write_place(place.replace("30k_test", "train"), ROWS[:1], tmp_path)
    write_place(place, ROWS, tmp_path)
    assert len(list(read_rows(place, tmp_path))) == 2
    assert len(list(read_rows(place.replace("30k_test", "train"), tmp_path))) == 1


def test_without_a_copy_the_hub_is_asked_for_that_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def load(*names: object, **options: object) -> list[dict[str, object]]:
        asked.append((names, options))
        return ROWS

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert len(list(read_rows(PLACE, tmp_path))) == 2
    assert asked == [(("some-one/a.set", None), {"split": "train", "revision": REVISION})]


@pytest.mark.parametrize(
    "place",
    [
        "hub:set@main#train",
        "hub:a/b@main#train",
        f"hub:a/b@{REVISION}",
        f"hub:a/b@{REVISION[:8]}#train",
        "hub:a/b#train",
    ],
)
def test_what_is_not_pinned_is_refused(place: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="names no pinned set; expected hub:owner/name@REVISION#split"):
        list(read_rows(place, tmp_path))


def test_a_set_that_cannot_be_had_is_an_error_with_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_place(PLACE, ROWS, tmp_path)
    with pytest.raises(InputError, match=r"#test cannot be read: .*Check name, split and network"):
        list(read_rows(PLACE.replace("#train", "#test"), tmp_path))

    def offline(*names: object, **options: object) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(InputError, match="cannot be read: no network"):
        list(read_rows(PLACE, tmp_path))


def test_without_datasets_the_line_that_installs_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.delitem(sys.modules, "safeside.tasks.hub", raising=False)
    with pytest.raises(MissingExtraError, match=r"pip install 'safeside\[data\]'"):
        list(read_rows(PLACE, tmp_path))
    assert "file" in READERS


def test_the_papers_sets_are_read_by_their_columns(tmp_path: Path) -> None:
    """Rows as the hub's pages show them."""
    aegis = "hub:nvidia/Aegis-AI-Content-Safety-Dataset-2.0@d86bb8bedff51d25ac834ab7838f1cc61acb7a2c#"
    for split in ("train", "validation", "test"):
        rows = [
            {"prompt": f"how do I steal a bike {split}?", "response": None, "prompt_label": "unsafe",
             "response_label": None, "violated_categories": "Fraud/Deception, Malware"},
            {"prompt": f"how do I mend a bike {split}?", "response": "With care.", "prompt_label": "safe",
             "response_label": "safe", "violated_categories": ""},
            {"prompt": "REDACTED", "response": "Call someone.", "prompt_label": "unsafe",
             "response_label": "safe", "violated_categories": "Suicide and Self Harm"},
        ]  # fmt: skip
        write_place(aegis + split, rows, tmp_path)
    found = load_task("hub_aegis2", tmp_path, labels=("harm", "non_violent_crimes"))
    assert found.task.labels == ("harm", "non_violent_crimes")
    assert [row.labels for row in found.rows["aegis2_prompts", "test"]] == [(1.0, 1.0), (0.0, 0.0)]
    assert [len(row.messages) for row in found.rows["aegis2_responses", "test"]] == [2]
    assert found.left_out["aegis2_responses", "test"].not_of_part == 2
