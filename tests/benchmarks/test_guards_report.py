"""The page of the guards benchmark: a section for each part that is there, and words for what is not."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

import guards
import guards_report
import part_sections
from guard_cells import Cell
from guard_figures import STANDALONES, probability_of, rows_of, threshold_of, wins_of
from guard_rows import Sources
from guards_report import METHODS, Page, split_of
from parts import GUARDS, read_parts, write_part
from tidy import figure_row, result_of


def row(metric: str, value: float, **labels: object) -> dict[str, object]:
    return figure_row(labels, metric, value, (value - 0.05, value + 0.05), n=40)


SOURCES = Sources(["a", "b"] * 15 + ["b", "a"] * 15, [str(place) for place in range(60)], [], {})  # of the test rows


def cell_values(seed: int, gain: float) -> dict[str, object]:
    """What a cell's file holds, on made-up rows; the higher ``gain`` is, the better the method."""
    generator = np.random.default_rng(seed)
    labels = {split: [0.0, 1.0] * 30 for split in ("validation", "test")}
    values = {split: (gain * np.array(some) + generator.normal(size=60)).tolist() for split, some in labels.items()}
    values["test"][0] = float("nan")  # a row that could not be cut
    return {
        "key": f"cell{seed}{gain:g}", "labels": labels, "values": {**values, "harmless": [0.1, -0.2]},
        "windowed": [False] * 60, "flops_share": 0.07, "train_seconds": 1.0, "peak_bytes": 5, "trainable_params": 9,
        "counts": {"test_too_long": 2}, "commit": "abc", "seconds": 1.0,
    }  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Results of all parts, and the cells behind the methods."""
    cells = {
        Cell("hate", "builtin", method, seed): cell_values(seed, gain)
        for method, gain in zip(("lst_distilled", *STANDALONES), (2.0, 1.0, 0.9, 0.8, 0.7), strict=True)
        for seed in (0, 1)
    }
    (tmp_path / "cells").mkdir()
    for values in cells.values():
        (tmp_path / "cells" / f"{values['key']}.json").write_text(json.dumps(values))
    methods = [found for cell, values in cells.items() for found in rows_of(cell, values, SOURCES)]
    parts = {"methods": [*methods, *wins_of(("hate", "builtin"), cells, SOURCES, (0, 1))], **other_parts()}
    for name, rows in parts.items():
        write_part(tmp_path, result_of(name, 1.0, rows, {}))
    return tmp_path


STEPS = ("states", "importance", "teacher", "lst", "lst_distilled", "lora_full")


def other_parts() -> dict[str, list[dict[str, object]]]:
    stream = []
    for targets in ("end", "prefixes"):
        labels = {"targets": targets, "false_positive_rate": 0.05, "n_consecutive": 2}
        shown = ("detection", "whole_detection", "detected_share", "delay_tokens", "delay_share", "false_stops")
        stream += [row(metric, 0.5, **labels) for metric in shown]
        stream += [row("stopped_by", share, written=share, **labels) for share in (0.5, 1.0)]
    presets = [
        row(
            metric,
            0.2,
            task="prompt_harm",
            base="builtin",
            fitted_on="validation",
            preset="strict",
            promised=0.05,
            suite=suite,
        )
        for metric, suite in (("tpr", "test"), ("fpr", "test"), ("over_refusal", "xstest"), ("over_refusal", "alpaca"))
    ]
    needle = [
        row(metric, 0.6, text=text, place=place)
        for text, place in (("alone", "alone"), ("inside", "start"))
        for metric in ("auroc", "tpr", "fpr")
    ]
    intercept = [row("auroc", 0.6 + block / 10, block=block, seed=0) for block in (1, 2)]
    intercept += [
        row("prefill_ratio", 0.9, block=block, batch=batch, blocked=blocked)
        for block in (1, 2)
        for batch in (1, 8)
        for blocked in (0.0, 0.1, 1.0)
    ]
    patch = [
        row(metric, 0.3, family="GCG", examples=size)
        for size in (16, 64)
        for metric in ("before", "after", "elsewhere_change", "seconds")
    ]
    port = [row(metric, 0.9, source="a", target="b", method="map") for metric in ("kept_auroc", "auroc")]
    training = [
        row(metric, 0.5, geometry="tiny", method=method)
        for method in ("lst", "full")
        for metric in ("step_seconds", "ratio_to_full", "peak_bytes", "trainable_params")
    ]
    resplits = [row(metric, 0.9, suite="alpaca", fit="bound", promised=0.01) for metric in ("kept_share", "fpr")]
    teaching = [row("seconds", 9.0, task="hate", base="builtin", method=name) for name in STEPS]
    return {
        "stream": stream, "presets": presets, "resplits": resplits, "needle": needle, "intercept": intercept,
        "patch": patch, "port": port, "training": training, "teaching": teaching,
    }  # fmt: skip


def test_every_part_has_a_section_with_pictures(folder: Path) -> None:
    path = guards_report.main(["--results", str(folder), "--cells", str(folder / "cells")])
    text = path.read_text()
    heads = re.findall("<h2>(.*?)</h2>", text)
    assert heads == [
        "Does reading the base beat a network of equal cost that does not?",
        "Hate speech (hate) on builtin",
        "Stopping an answer while it is written",
        "Detection and over-refusal at each preset: prompt_harm, builtin",
        "Promises on other rows of the same traffic",
        "A needle in a long text",
        "Blocking a prompt early",
        "Learning a new family of jailbreaks",
        "Porting a guard to another base",
        "The cost of training",
        "The cost of a guard with its teacher",
        "Where the figures come from",
    ]
    sections = text.split("<h2>")[1:]
    assert [section.count("<svg") for section in sections] == [2, 4, 4, 1, 1, 2, 2, 2, 1, 2, 1, 0]
    n_lines = [section.count("<tr>") for section in sections[2:11]]
    assert n_lines == [3, 2, 2, 3, 3, 3, 2, 3, 2]  # the head, and the figures
    assert "Not measured here" not in text
    assert "http" not in text
    assert path.stat().st_size < 2_000_000


@pytest.mark.parametrize("n_windowed", [0, 20])
def test_windowed_rows_stand_apart_where_there_are_any(tmp_path: Path, n_windowed: int) -> None:
    values = {**cell_values(0, 1.0), "windowed": [True] * n_windowed + [False] * (60 - n_windowed)}
    rows = rows_of(Cell("grounding", "builtin", "lst", 0), values, SOURCES)
    write_part(tmp_path, result_of("methods", 1.0, rows, {}))
    text = guards_report.write_page(tmp_path, tmp_path / "cells").read_text()
    assert (">of windowed texts</th>" in text) == bool(n_windowed)
    assert (">of texts that fit</th>" in text) == bool(n_windowed)
    assert ("59 test rows, 1 seed, 19 of the rows in windows." in text) == bool(n_windowed)  # one has no score


def test_what_is_missing_is_said_and_left_out(folder: Path) -> None:
    found = read_parts(folder / "guards.json")
    (folder / "guards.json").unlink()
    for name in found.keys() - {"port", "needle"}:
        write_part(folder, found[name])
    (folder / "cells" / "cell02.json").unlink()
    text = guards_report.write_page(folder, folder / "cells").read_text()
    assert "Not measured here: needle, port." in text
    assert "1 cells are gone" in text
    assert "Porting a guard" not in text
    for path in (folder / "cells").iterdir():
        path.unlink()
    text = guards_report.write_page(folder, folder / "cells").read_text()
    assert "10 cells are gone" in text
    assert text.split("Hate speech")[1].split("<h2>")[0].count("<svg") == 1  # figures without curves


def test_unscored_rows_are_in_no_curve(folder: Path) -> None:
    page = Page(json.loads((folder / "guards.json").read_text())["rows"], folder / "cells")
    cells = page.found_cells("hate", "builtin", "lst_distilled")
    assert len(cells) == 2
    labels, values = split_of(cells[0], "test")
    assert len(labels) == len(values) == 59
    assert np.isfinite(values).all()


def test_every_method_and_part_is_drawn() -> None:
    assert set(METHODS) == set(guards.METHODS)
    assert len({colour for colour, _ in METHODS.values()}) == len(METHODS)
    assert {*part_sections.SECTIONS, "methods"} == set(GUARDS.parts)


def test_the_threshold_and_the_calibration_error_are_those_of_validation_rows() -> None:
    labels, values = np.array([0.0] * 200 + [1.0] * 50), np.linspace(-1, 1, 250)
    threshold = threshold_of(labels, values)
    assert (values[:200] >= threshold).sum() == 2  # 1% of 200
    probability = probability_of(labels, values)(values)
    assert (np.diff(probability) >= 0).all()
    assert probability.mean() == pytest.approx(0.2, abs=0.01)


def test_the_page_names_the_cells_that_were_not_run(folder: Path) -> None:
    whole = guards_report.write_page(folder, folder / "cells").read_text()
    assert "Not run" not in whole
    methods = read_parts(folder / "guards.json")["methods"]
    methods["notes"] = {"not_run": ["hate minilm lst"], "left_out": ["hate builtin plr"]}
    write_part(folder, methods)
    text = guards_report.write_page(folder, folder / "cells").read_text()
    assert "Not run: hate minilm lst." in text
    assert "Left out, for not every schedule of them was run: hate builtin plr." in text
