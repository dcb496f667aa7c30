"""Tables of the parts of guards.json: a line for what was measured, and words for what was not."""

from __future__ import annotations

from pathlib import Path

from guard_tables import PART_TABLES, grounding_table, guards_table, part_table
from parts import GUARDS, write_part
from tidy import figure_row, result_of

Row = dict[str, object]


def row(metric: str, value: float, **labels: object) -> Row:
    return figure_row(labels, metric, value, (value - 0.25, value + 0.25))


def written(folder: Path, part: str, rows: list[Row]) -> str:
    """The lines of the table of a part that holds ``rows``."""
    path = write_part(folder, {**result_of(part, 1.0, rows, {}), "commit": "abc", "machine": "a CPU"})
    return part_table(path.with_name(f"{part}.json"), part)


def test_every_part_beside_the_methods_has_a_table(tmp_path: Path) -> None:
    assert {*PART_TABLES, "methods"} == set(GUARDS.parts)
    text = written(tmp_path, "port", [row("kept_auroc", 0.5, source="a", target="b", method="map", seed=0)])
    assert text.startswith("Measured with one seed (95% interval). Commit `abc`, a CPU.\n\n| source | target |")
    for part in PART_TABLES.keys() - {"port"}:
        words = f"*Not measured yet: `python benchmarks/{part}.py` writes it.*"
        assert part_table(tmp_path / f"{part}.json", part) == words


def test_a_part_of_several_runs_names_the_commit_of_each(tmp_path: Path) -> None:
    rows = [row("kept_auroc", 0.5, source="a", target="b", method="map", seed=0)]
    path = write_part(tmp_path, result_of("port", 1.0, rows, {"commits": {"a and b": "abc", "b and c": "def"}}))
    assert ". Commit a and b `abc`, b and c `def`, " in part_table(path, "port")


def test_stops_are_means_over_seeds_by_targets_and_rate(tmp_path: Path) -> None:
    rows = [
        row(
            metric,
            value,
            targets="end",
            rule="kept",
            false_positive_rate=0.05,
            n_consecutive=in_a_row,
            seed=seed,
            base="builtin",
        )
        for seed, in_a_row, value in ((0, 16, 8.0), (1, 2, 9.0))
        for metric in ("detection", "whole_detection", "detected_share", "delay_tokens", "false_stops")
    ]
    text = written(tmp_path, "stream", rows)
    assert "base `builtin`, means of 2 seeds (lowest to highest end of their 95% intervals)" in text
    figure, tokens = "8.500 (7.750 to 9.250)", "8 (8 to 9)"
    assert (
        text.splitlines()[-1]
        == f"| end | kept | 5% | 2, 16 | {figure} | {figure} | {figure} |  | {tokens} |  | {figure} |  |"
    )


def test_presets_tell_what_each_catches_and_refuses(tmp_path: Path) -> None:
    values = {
        ("tpr", "test"): 0.25,
        ("fpr", "test"): 0.5,
        ("over_refusal", "xstest"): 0.75,
        ("over_refusal", "alpaca"): 1,
    }
    rows = [
        row(metric, value, task="hate", base="builtin", preset="strict", promised=0.05, fitted_on=fitted, suite=suite)
        for fitted in ("validation", "instructions")
        for (metric, suite), value in values.items()
    ]
    lines = written(tmp_path, "presets", rows).splitlines()[-2:]
    figures = "0.250 (0.000 to 0.500) | 0.500 (0.250 to 0.750) | 0.750 (0.500 to 1.000) | 1.000 (0.750 to 1.250)"
    fits = ("validation", "instructions")
    assert lines == [f"| hate | builtin | strict | 5.0% | {fitted} | {figures} |" for fitted in fits]


def test_needles_have_a_line_for_each_guard_text_and_place(tmp_path: Path) -> None:
    places = [("alone", "alone"), ("inside", "start"), ("windowed", "end")]
    keys = [(base, method, *place) for base, method in (("builtin", "lst"), ("minilm", "more")) for place in places]
    rows = [
        row(metric, 0.5, base=base, method=method, text=text, place=place)
        for base, method, text, place in keys
        for metric in ("auroc", "tpr", "fpr")
    ]
    lines = written(tmp_path, "needle", rows).splitlines()[-6:]
    assert lines == [f"| {' | '.join(key)} |{' 0.500 (0.250 to 0.750) |' * 3}" for key in keys]


def test_interception_tells_auroc_and_times_by_block(tmp_path: Path) -> None:
    rows = [row("auroc", block / 16, block=block, seed=seed) for block in (10, 2) for seed in (0, 1)]
    rows += [
        row("prefill_ratio", block + blocked, block=block, batch=batch, blocked=blocked)
        for block in (10, 2)
        for batch in (1, 8)
        for blocked in (0.0, 1.0)
        if (block, batch) != (10, 8)  # a run that was cut off
    ]
    lines = written(tmp_path, "intercept", rows).splitlines()[-4:]
    ways = [f"{share} blocked, batch {batch}" for batch in (1, 8) for share in ("0%", "100%")]
    assert lines[0] == f"| blocks read | AUROC | {' | '.join(ways)} |"
    times = ["2.00 (1.75 to 2.25)", "3.00 (2.75 to 3.25)"] * 2
    assert lines[2] == f"| 2 | 0.125 (-0.125 to 0.375) | {' | '.join(times)} |"
    assert lines[3] == "| 10 | 0.625 (0.375 to 0.875) | 10.00 (9.75 to 10.25) | 11.00 (10.75 to 11.25) |  |  |"


def test_patches_tell_what_was_held_out_and_every_suite_elsewhere(tmp_path: Path) -> None:
    """In rows as the bench writes them: what was held out is told of caught prompts alone."""
    names = {"family": "GCG", "examples": 16}
    rows = [
        row(metric, value, **names, held_out=held)
        for held, both in {"goal": (0.25, 0.5), "template": (0.5, 0.75)}.items()
        for metric, value in zip(("before", "after"), both, strict=True)
        if (held, metric) != ("template", "before")  # too few prompts
    ]
    rows += [row("benign_flagged", 0.75, **names), row("seconds", 40.0, **names)]
    rows += [row("after_in_force", 0.25, **names, held_out=held) for held in ("goal", "template")]
    rows += [row(f"harmless_{when}_in_force", value, **names) for when, value in (("before", 0.5), ("after", 0.75))]
    rows += [row("elsewhere_change", value, **names, suite=suite) for suite, value in {"demo": 0, "chat": -1}.items()]
    head, _, line = written(tmp_path, "patch", rows).splitlines()[-3:]
    caught = "before, by goal | after, by goal | before, by template | after, by template"
    in_force = "after, by goal, in force | harmless flagged before, in force | harmless flagged after, in force"
    changes = "change on demo | change on chat"
    assert head == f"| family | examples | {caught} | benign flagged | {in_force} | {changes} | seconds |"
    figures = [
        "0.250 (0.000 to 0.500)", "0.500 (0.250 to 0.750)", "", "0.750 (0.500 to 1.000)", "0.750 (0.500 to 1.000)",
        "0.250 (0.000 to 0.500)", "0.500 (0.250 to 0.750)", "0.750 (0.500 to 1.000)",
        "+0.0000 (-0.2500 to +0.2500)", "-1.0000 (-1.2500 to -0.7500)", "40",
    ]  # fmt: skip
    assert line == f"| GCG | 16 | {' | '.join(figures)} |"


def test_ports_and_training_have_a_line_for_each_method(tmp_path: Path) -> None:
    rows = [row(metric, 0.5, source="a", target="b", method="map") for metric in ("kept_auroc", "auroc")]
    rows = [{**each, "flops_share": 0.076} for each in rows]
    figure = "0.500 (0.250 to 0.750)"
    assert written(tmp_path, "port", rows).splitlines()[-1] == f"| a | b | map | 1 | {figure} | {figure} | 7.6% |"
    values = {"step_seconds": 2.0, "ratio_to_full": 0.5, "peak_bytes": 3e9, "trainable_params": 5e5}
    rows = [figure_row({"method": "lst", "geometry": "tiny"}, metric, value) for metric, value in values.items()]
    assert written(tmp_path, "training", rows).splitlines()[-1] == "| lst | tiny | 2.00 | 0.5000 |  | 3.00 | 0.50 |"


def test_resplits_have_a_line_for_each_set_rate_and_fit(tmp_path: Path) -> None:
    labels = {"suite": "alpaca", "fit": "bound", "promised": 0.01, "fitted_rows": 500}
    rows = [figure_row(labels, metric, value) for metric, value in {"kept_share": 0.95, "fpr": 0.0061}.items()]
    assert written(tmp_path, "resplits", rows).splitlines()[-1] == "| alpaca | 500 | 1% | bound | 0.950 | 0.0061 |"


def test_a_first_distilled_guard_costs_what_comes_before_it_too(tmp_path: Path) -> None:
    seconds = {"states": 1, "importance": 2, "teacher": 40, "lst": 8, "lst_distilled": 16, "lora_full": 64}
    rows = [figure_row({"task": "hate", "base": "a", "method": name}, "seconds", s) for name, s in seconds.items()]
    assert written(tmp_path, "teaching", rows).splitlines()[-1] == "| hate | a | 1 | 2 | 40 | 9 | 59 | 16 | 64 |"


def methods_of(folder: Path, rows: list[Row]) -> Path:
    """A result file of the methods."""
    facts = {"commit": "abc", "machine": "a CPU"}
    return write_part(folder, {**result_of("methods", 1.0, rows, {"left_out": [], "not_run": ["hate b lst"]}), **facts})


def test_claims_stand_apart_by_fit_and_source(tmp_path: Path) -> None:
    place = {"task": "grounding", "base": "builtin", "method": "lst"}
    values = {"auroc_fit": (0.8, 10), "auroc_windowed": (0.5, 7)}
    rows = [
        figure_row({**place, "seed": seed}, metric, value + seed / 10, n=n)
        for seed in (0, 2)
        for metric, (value, n) in values.items()
    ]
    rows += [figure_row({**place, "seed": 0, "source": name}, "auroc_source", 0.6) for name in ("wice", "cliff")]
    rows.append(figure_row({**place, "task": "hate", "seed": 0}, "auroc_fit", 0.1))
    path = methods_of(tmp_path, rows)
    assert grounding_table(path).splitlines() == [
        "| method | base | document fits | windowed | cliff | wice |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        "| claims | builtin | 10 | 7 |  |  |",
        "| lst | builtin | 0.900 (0.800 to 1.000) | 0.600 (0.500 to 0.700) | 0.600 | 0.600 |",
    ]
    path.unlink()
    assert "No figures yet" in grounding_table(path)


def test_calibration_is_told_before_and_after_and_what_was_not_run(tmp_path: Path) -> None:
    place = {"task": "hate", "base": "builtin", "seed": 0}
    rows = [figure_row({**place, "method": method}, "auroc", 0.8) for method in ("lst", "tfidf")]
    rows += [figure_row({**place, "method": "lst"}, name, value) for name, value in (("ece_before", 0.2), ("ece", 0.1))]
    rows.append(figure_row({**place, "method": "tfidf"}, "ece", 0.3))
    text = guards_table(methods_of(tmp_path, rows))
    assert text.endswith("| method | hate, builtin |\n| --- | ---: |\n| lst | 0.200 to 0.100 |")
    assert "Empty cells were not run" in text
