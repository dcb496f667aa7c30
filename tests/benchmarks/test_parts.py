"""guards.json holds the rows of every part, and a part that runs alone refreshes its own."""

from __future__ import annotations

import fcntl
import json
import os
import threading
from pathlib import Path

import pytest

import parts
from safeside.errors import InputError
from tidy import figure_row, result_of


def part(name: str, *values: float) -> dict[str, object]:
    return result_of(name, 2.0, [figure_row({"task": "hate"}, "auroc", value) for value in values], {"of": name})


def rows(folder: Path) -> list[tuple[str, float]]:
    result = json.loads((folder / "guards.json").read_text())
    return [(row["part"], row["value"]) for row in result["rows"]]


def test_parts_are_merged_in_a_fixed_order_with_their_facts(tmp_path: Path) -> None:
    parts.write_part(tmp_path, part("stream", 0.5))
    path = parts.write_part(tmp_path, part("methods", 0.9, 0.8))
    assert [path.name for path in tmp_path.iterdir()] == [path.name] == ["guards.json"]
    assert parts.read_parts(path) == {"methods": part("methods", 0.9, 0.8), "stream": part("stream", 0.5)}
    assert rows(tmp_path) == [("methods", 0.9), ("methods", 0.8), ("stream", 0.5)]
    result = json.loads((tmp_path / "guards.json").read_text())
    assert (result["benchmark"], result["seconds"]) == ("guards", 4.0)
    for name in ("methods", "stream"):
        facts = {key: value for key, value in part(name).items() if key != "rows"}
        assert result["notes"]["parts"][name] == facts


def test_one_part_alone_replaces_its_rows_only(tmp_path: Path) -> None:
    for name in ("methods", "patch"):
        parts.write_part(tmp_path, part(name, 0.1))
    parts.write_part(tmp_path, part("patch", 0.2, 0.3))
    assert rows(tmp_path) == [("methods", 0.1), ("patch", 0.2), ("patch", 0.3)]


@pytest.mark.parametrize("text", ["{", "[]", "{}", "null", json.dumps(part("core", 0.5))])
def test_a_file_that_is_no_result_of_the_benchmark_is_kept(tmp_path: Path, text: str) -> None:
    (tmp_path / "guards.json").write_text(text)
    with pytest.raises(InputError, match=r"guards\.json is not a result of the guards benchmark"):
        parts.write_part(tmp_path, part("port", 0.5))
    assert (tmp_path / "guards.json").read_text() == text


def test_a_row_of_an_unknown_part_is_an_error(tmp_path: Path) -> None:
    path = parts.write_part(tmp_path, part("port", 0.5))
    path.write_text(path.read_text().replace('"part": "port"', '"part": "core"'))
    with pytest.raises(InputError, match="is not a result"):
        parts.read_parts(path)
    path.write_text(path.read_text().replace('"port"', '"core"'))
    with pytest.raises(InputError, match="holds parts other than methods"):
        parts.read_parts(path)


def test_every_bench_of_the_makefile_is_a_part_and_the_other_way_round() -> None:
    makefile = (Path(__file__).parents[2] / "Makefile").read_text()
    recipe = makefile.split("\nbench-guards: setup $(SMALL)/config.json\n")[1].split("\n\n")[0]
    named = {name for name in parts.GUARDS.parts if f"benchmarks/{name}.py" in recipe}
    assert named == {*parts.GUARDS.parts} - {"methods"}
    assert "benchmarks/guards.py" in recipe


def test_benches_that_end_together_wait_for_each_other(tmp_path: Path) -> None:
    handle = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)  # as another bench holds it while it writes
    other = threading.Thread(target=parts.write_part, args=(tmp_path, part("stream", 0.5)))
    other.start()
    other.join(0.3)
    assert other.is_alive()
    assert not (tmp_path / "guards.json").exists()
    os.close(handle)
    other.join(10)
    assert rows(tmp_path) == [("stream", 0.5)]
