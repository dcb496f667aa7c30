"""The page: one file without script or network, valid, and safe whatever the texts hold."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest

from safeside.evals.pictures import histogram_picture, roc_picture, strength_picture
from safeside.evals.report import Section, write_report

HOSTILE = "<script>alert('x')</script><img src=x onerror=alert(1)>\"'&amp;</table><!-- {{ title }} {% for %}"
SHORT = "--><script>&"
LABELS = np.array([0.0, 1.0] * 20)
SCORES = np.linspace(0, 1, 40)
_VOID = {"meta", "img", "br", "link"}


class Page(HTMLParser):
    """Raises on tags that do not close in order, and remembers tags, attributes and the text of cells."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.cells: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag == "td":
            self.cells.append("")
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "td" in self.open:
            self.cells[-1] += data


def read(path: Path) -> tuple[str, Page]:
    text, page = path.read_text(encoding="utf-8"), Page()
    page.feed(text)
    page.close()
    assert page.open == []
    return text, page


@pytest.fixture(scope="module")
def pictures() -> list[tuple[str, str]]:
    curves = {"harmful": [(0.1, 0.0, 0.2), (0.9, 0.8, 1.0)], SHORT: [(0.0, 0.0, 0.1), (0.2, 0.1, 0.3)]}
    return [
        ("ROC", roc_picture(LABELS, {"guard": SCORES, SHORT: 1 - SCORES})),
        (HOSTILE, histogram_picture(LABELS, SCORES, 0.5)),
        ("strengths", strength_picture([0.0, 1.0], curves)),
    ]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory, pictures: list[tuple[str, str]]) -> tuple[str, Page]:
    sections = [
        Section("Figures", "A text.", pictures, ("method", "AUROC"), [("guard", "0.91"), (HOSTILE, "0.5")]),
        Section(HOSTILE, HOSTILE, columns=(HOSTILE, "b"), rows=[("FLAGGED", HOSTILE), ("passed", "caf\u00e9 \u4f60")]),
        Section("Empty"),
    ]
    return read(write_report(tmp_path_factory.mktemp("report") / "new" / "report.html", HOSTILE, HOSTILE, sections))


def test_the_page_is_well_formed(page: tuple[str, Page]) -> None:
    text, parsed = page
    assert text.startswith("<!doctype html>")
    assert parsed.tags.count("svg") == 3
    assert parsed.tags.count("table") == 2
    assert parsed.tags.count("h2") == 3
    assert [tag for tag in parsed.tags if tag not in _VOID].count("html") == 1


def test_texts_are_shown_as_they_are_and_never_run(page: tuple[str, Page]) -> None:
    _, parsed = page
    assert "script" not in parsed.tags
    assert "img" not in parsed.tags
    assert not [name for name, _ in parsed.attributes if name.startswith("on")]
    assert parsed.cells == ["guard", "0.91", HOSTILE, "0.5", "FLAGGED", HOSTILE, "passed", "caf\u00e9 \u4f60"]


def test_the_page_names_no_address(page: tuple[str, Page]) -> None:
    text, parsed = page
    assert "http" not in text
    assert "url(" not in text.replace("url(#", "")
    assert "@import" not in text
    references = [value for name, value in parsed.attributes if name in ("src", "href", "xlink:href", "data", "action")]
    assert references
    assert all(value.startswith("#") for value in references)


def test_numbers_stand_right_and_flags_stand_out(page: tuple[str, Page]) -> None:
    text, _ = page
    assert '<td class="number">0.91</td>' in text
    assert '<td class="flagged">FLAGGED</td>' in text
    assert "<td>guard</td>" in text


def test_pictures_are_the_same_every_time_and_leave_no_settings_behind() -> None:
    before = dict(mpl.rcParams)
    assert roc_picture(LABELS, {"guard": SCORES}) == roc_picture(LABELS, {"guard": SCORES})
    assert dict(mpl.rcParams) == before
    assert not re.search(r"\d{4}-\d\d-\d\d", roc_picture(LABELS, {"guard": SCORES}))


def test_a_report_replaces_the_old_one(tmp_path: Path) -> None:
    path = write_report(tmp_path / "report.html", "first", "", [])
    assert "second" in write_report(path, "second", "", []).read_text()
    assert "first" not in path.read_text()
