"""The demo runs end to end on the packaged base, adapters and rows."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

import pytest

from safeside.demo import run_demo


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    return run_demo(tmp_path_factory.mktemp("demo"), quick=True, show=False)


def test_the_demo_trains_scores_and_answers(quick: dict[str, object]) -> None:
    assert quick["n_test"] == 100
    assert 0.0 <= float(str(quick["guard_auroc"])) <= 1.0
    refusal = quick["refusal"]
    assert isinstance(refusal, list)
    assert {(row["strength"], row["metric"]) for row in refusal} == {
        (strength, metric)
        for strength in ("0", "0.5", "1")
        for metric in ("refusal_rate_harmful", "refusal_rate_harmless")
    }


def test_the_guard_is_a_loadable_artifact(quick: dict[str, object]) -> None:
    folder = Path(str(quick["guard"]))
    assert (folder / "adapter.safetensors").is_file()
    assert (folder / "README.md").read_text().count("thresholds") == 1


def test_the_page_is_whole_and_needs_no_network(quick: dict[str, object]) -> None:
    page = Path(str(quick["report"])).read_text(encoding="utf-8")
    HTMLParser().feed(page)
    assert page.count("<svg") == 3
    assert "<script" not in page
    assert 'src="http' not in page
    assert 'href="http' not in page
