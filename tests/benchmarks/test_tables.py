"""Tables come from result files, and a block that differs from its file is found."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import guard_tables
import parts
import scale_tables
import tables
from tidy import result_of

PAGE = "# Title\n\n<!-- table:core -->\nold\n<!-- /table:core -->\n\nThe end.\n"


def figure(metric: str, value: float, **labels: object) -> dict[str, object]:
    row = {"metric": metric, "value": value, "low": value - 0.1, "high": value + 0.1, "n": 90, "n_unscored": 0}
    return {"flops_share": 0.0755, "config_hash": "h", "base": "builtin", "seed": 0, **row, **labels}


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """A folder with a core.json of one task, two methods and two seeds."""
    rows = [
        figure("auroc", value, task="toxigen", method=method, seed=seed)
        for method, values in {"lst": (0.8, 0.82), "plr": (0.6, 0.7)}.items()
        for seed, value in enumerate(values)
    ]
    rows += [figure("trainable_params", 1234, task="toxigen", method=method) for method in ("lst", "plr")]
    rows.append(figure("flops_share", 0.5, task="geometry", method="lst", base="Big-7B"))
    write(tmp_path / "core.json", rows)
    return tmp_path


def write(path: Path, rows: list[dict[str, object]]) -> None:
    path.write_text(json.dumps({"commit": "abc", "machine": "a CPU", "rows": rows}))


def test_core_table_holds_the_mean_and_the_widest_interval(results: Path) -> None:
    table = tables.core_table(results / "core.json")
    assert "| task | plr | lst |" in table
    assert "| toxigen (90 test rows) | 0.650 (0.500 to 0.800) | 0.810 (0.700 to 0.920) |" in table
    assert "| multiply-adds, share of the base | 7.55% | 7.55% |" in table
    assert "| trainable parameters | 1,234 | 1,234 |" in table
    assert "2 seeds" in table
    assert "Big-7B" not in table


def test_geometry_table_has_a_line_for_each_base(results: Path) -> None:
    shares = {"plr": 5e-7, "lst": 0.00999}
    rows = [
        figure("flops_share", share, method=method, base="Big-7B", flops_share=share)
        for method, share in shares.items()
    ]
    write(results / "geometry.json", rows)
    assert "| Big-7B | under 0.01% | 0.999% |" in tables.geometry_table(results / "geometry.json")


def test_taps_table_tells_the_speed_up(results: Path) -> None:
    rows = [figure("train_seconds", 40.0, method="live"), figure("train_seconds", 20.0, method="stored")]
    write(results / "taps.json", [*rows, figure("speed_up", 2.0, method="stored", n=10)])
    table = tables.taps_table(results / "taps.json")
    assert "| states stored once (storing included) | 20.0 | 2.00x (1.90 to 2.10) |" in table


def test_guards_table_tells_means_and_the_gain(results: Path) -> None:
    place = {"part": "methods", "task": "hate"}
    rows = [
        figure("auroc", value, **place, base=base, method=method, seed=seed)
        for base, offset in (("builtin", 0.0), ("minilm", 0.1))
        for method, values in {"lst_distilled": (0.8, 0.82), "tfidf": (0.7,)}.items()
        for seed, value in enumerate(offset + value for value in values)
    ]
    rows.append(figure("auroc_within", 0.6, **place, base="builtin", method="lst_distilled", seed=0))
    gain = {**figure("gain_over_best_standalone", 0.02, **place, method="lst_distilled"), "against": "standalone"}
    other = {**figure("auroc", 0.1, method="map"), "part": "port", "source": "builtin", "target": "minilm"}
    path = results / "guards.json"
    facts = {"commit": "abc", "machine": "a CPU"}
    for left_out in (["hate builtin lst seed 0"], []):
        parts = {"methods": {**facts, "notes": {"left_out": left_out}}}
        path.write_text(json.dumps({"rows": [*rows, gain, other], "notes": {"parts": parts}}))
        table = tables.guards_table(path)
        assert ("a CPU. 1 cells are left out: not every schedule" in table) == bool(left_out)
    assert "a CPU.\n\n| method" in table
    assert "| method | hate, builtin | hate, minilm |" in table
    assert "| lst_distilled | 0.810 | 0.910 |" in table
    assert "| tfidf | 0.700 | 0.800 |" in table
    assert "over the best standalone | +0.020 (-0.080 to +0.120) (standalone) |  |" in table
    assert "mean of 2 seeds" in table
    assert "map" not in table
    assert "|\n\nAUROC within sources" in table  # a table ends before a line of words begins
    assert "| lst_distilled | 0.600 |  |" in table


def test_overhead_table_tells_ratios_goals_and_shares(results: Path) -> None:
    place = {"geometry": "Big-7B", "phase": "decode", "batch": 8}
    rows = [
        figure("seconds", 2.0, variant="base", **place),
        figure("ratio_to_base", 1.04, variant="guard", **place, flops_share=0.0097),
        figure("ratio_to_base", 2.0, variant="second_pass", **place, flops_share=0.9),
        {**figure("peak_ratio", 1.01, variant="guard", **place), "low": 1.01, "high": 1.01, "flops_share": 0.0},
    ]
    goal = {**place, "metric": "ratio_to_base", "variant": "guard", "value": 1.04, "goal": 1.05, "met": False}
    share = {**goal, "metric": "flops_share", "value": 0.0097, "met": True}
    goals = [
        goal,
        {**goal, "batch": 1, "met": True},
        share,
        {**share, "batch": 1},
        {**share, "value": 0.02, "met": False},
    ]
    timed = [row for row in rows if row["metric"] != "peak_ratio"]
    parts.write_part(results, result_of("time", 1.0, timed, {"goals": goals}), parts.OVERHEAD)
    of_two_runs = {"goals": [], "commits": {"Big-7B": "0123456789", "builtin": "abcdefabcd"}}
    path = parts.write_part(results, result_of("peaks", 1.0, rows[-1:], of_two_runs), parts.OVERHEAD)
    table = tables.overhead_table(path)
    assert re.search(r"Commits: time `[^`]+`; peaks Big-7B `0123456789`, builtin `abcdefabcd`; ", table)
    assert "| over the base | guard | second_pass | goal of the guards |" in table
    assert "| Big-7B, decode, batch 8: time | 1.040 (0.940 to 1.140) | 2.000 (1.900 to 2.100) | 1.05 |" in table
    assert "| Big-7B, decode, batch 8: peak memory | 1.010 |  |  |" in table
    assert "| Big-7B: multiply-adds | 0.97% | 90% | 1% |" in table
    assert "meets it: 1 of 2 of time, 1 of 2 of multiply-adds are." in table


def test_serve_table_tells_load_faults_and_the_soak(results: Path) -> None:
    place = {"geometry": "Small", "clients": 8, "variant": "guarded"}
    counts = {"injected": 1, "lost": 0, "leaked": 0}
    values = {"tokens_per_s": 41.23, "ttft_p50": 0.5, "ttft_p99": 1.5, "itl_p50": 0.0201, "throughput_ratio": 0.96}
    soak = {"minutes": 10, "clients": 8, "answers": 5000, "growth": 0.004, "met": True}
    for name, found, notes in (
        ("load", [figure(metric, value, **place) for metric, value in values.items()], {"goals": [{"met": True}]}),
        ("faults", [figure(name, value, fault="sigkill") for name, value in counts.items()], {}),
        ("batch", [], {"guard": {"rows": 10_000, "rows_per_s": 123.4}}),
        ("soak", [], {"soak": soak}),
    ):
        path = parts.write_part(results, result_of(name, 1.0, found, notes), parts.SERVE)
    table = tables.serve_table(path)
    assert "| Small, 8 clients, guarded | 41.2 | 0.960 (0.860 to 1.060) | 0.5 (1.5) | 20.1 |" in table
    assert "1 of 1 are" in table
    assert "| sigkill | 1 | 0 | 0 | 90 |" in table
    assert "10,000 rows at 123 a second" in table
    assert "Load is not measured yet" not in table
    assert "memory of the server grew by +0.40% (goal within 2%: met)" in table


def test_a_missing_result_file_is_said(tmp_path: Path) -> None:
    benches = {
        **{name: name for name in tables.TABLES},
        "decode": "align",
        "capacity": "geometry",
        "grounding": "guards",
    }
    benches |= dict.fromkeys(guard_tables.PART_TABLES, "guards")
    for name, table in tables.TABLES.items():
        assert f"make bench-{benches[name]}" in table(tmp_path / f"{name}.json")


def test_a_stale_block_fails_the_check_and_is_written_anew(
    results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    assert tables.main(["--check", "--results", str(results), str(page)]) == 1
    assert "stale" in capsys.readouterr().err
    assert page.read_text() == PAGE
    assert tables.main(["--write", "--results", str(results), str(page)]) == 0
    assert tables.main(["--check", "--results", str(results), str(page)]) == 0
    written = page.read_text()
    assert "0.810" in written
    assert written.startswith("# Title\n\n<!-- table:core -->\n")
    assert written.endswith("<!-- /table:core -->\n\nThe end.\n")


def test_a_new_figure_makes_the_block_stale(results: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    tables.main(["--write", "--results", str(results), str(page)])
    result = json.loads((results / "core.json").read_text())
    result["rows"][0]["value"] = 0.9
    (results / "core.json").write_text(json.dumps(result))
    assert tables.main(["--check", "--results", str(results), str(page)]) == 1


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("<!-- table:core -->\nno end\n", "partner"),
        ("<!-- /table:core -->\n", "partner"),
        ("<!-- table:cost -->\n<!-- /table:cost -->\n", "no table 'cost'"),
    ],
)
def test_a_broken_block_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, problem: str) -> None:
    page = tmp_path / "page.md"
    page.write_text(text)
    assert tables.main(["--write", str(page)]) == 1
    assert problem in capsys.readouterr().err
    assert page.read_text() == text


def test_a_page_without_blocks_is_left_alone(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# No tables\n")
    assert tables.main(["--check", str(page)]) == 0


def test_capacity_tells_flops_weights_and_cache(tmp_path: Path) -> None:
    assert "make bench-geometry" in tables.capacity_table(tmp_path / "capacity.json")
    base = {"matmuls": 7e9, "params": 7.5e9, "cache_bytes": 57344}
    guard = {"flops_share": 0.01, "matmuls": 7e7, "params": 7e7, "cache_bytes": 20480}
    rows = [
        {**figure(metric, value, method=method), "base": name}
        for name in scale_tables.CAPACITY
        for method, values in {"base": base, "lst": guard}.items()
        for metric, value in values.items()
    ]
    write(tmp_path / "geometry.json", rows)
    table = tables.capacity_table(tmp_path / "capacity.json")
    assert "| Qwen2.5-7B | 14 |  | 15 | 56 | 7.52 |" in table
    assert "| Qwen2.5-7B, one `lst` | 0.14 | 7.55% | 0.14 | 20 | 2.68 |" in table


def test_bulk_tells_what_kills_lost(tmp_path: Path) -> None:
    place = {"guard": "builtin:harm", "workers": 2}
    values = {"rows_per_s": 1234.4, "peak_bytes": 6e8, "lost": 0, "duplicated": 1, "kills": 3}
    for engine, load in (("hf", 8.21), ("vllm", 0.5)):
        rows = [figure(metric, value, **place, engine=engine) for metric, value in values.items()]
        parts.write_part(tmp_path, result_of(engine, 1.0, rows, {"cores": 2, "load_at_start": load}), parts.BULK)
    table = tables.bulk_table(tmp_path / "bulk.json")
    assert "2 cores, load average 8.2 at the start; vllm at commit" in table
    for engine in ("hf", "vllm"):
        assert f"| builtin:harm, 90 rows | {engine} | 2 | 1,234 | 600 MB | 3 | 0 | 1 |" in table
    assert "No figures yet" in tables.bulk_table(tmp_path / "none.json")
