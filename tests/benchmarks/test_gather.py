"""guards.json holds the rows of every part, and a part that runs alone refreshes its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import gather
from safeside.errors import InputError
from tidy import figure_row, result_of


def part(name: str, *values: float) -> dict[str, object]:
    return result_of(name, 2.0, [figure_row({"task": "hate"}, "auroc", value) for value in values], {"of": name})


def rows(folder: Path) -> list[tuple[str, float]]:
    result = json.loads((folder / "guards.json").read_text())
    return [(row["part"], row["value"]) for row in result["rows"]]


def test_parts_are_merged_in_a_fixed_order_with_their_facts(tmp_path: Path) -> None:
    gather.write_part(tmp_path, part("stream", 0.5))
    path = gather.write_part(tmp_path, part("methods", 0.9, 0.8))
    assert path == tmp_path / "methods.json"
    assert json.loads(path.read_text()) == part("methods", 0.9, 0.8)
    assert rows(tmp_path) == [("methods", 0.9), ("methods", 0.8), ("stream", 0.5)]
    result = json.loads((tmp_path / "guards.json").read_text())
    assert (result["benchmark"], result["seconds"]) == ("guards", 4.0)
    for name in ("methods", "stream"):
        facts = {key: value for key, value in part(name).items() if key != "rows"}
        assert result["notes"]["parts"][name] == facts


def test_one_part_alone_replaces_its_rows_only(tmp_path: Path) -> None:
    for name in ("methods", "patch"):
        gather.write_part(tmp_path, part(name, 0.1))
    gather.write_part(tmp_path, part("patch", 0.2, 0.3))
    assert rows(tmp_path) == [("methods", 0.1), ("patch", 0.2), ("patch", 0.3)]


def test_the_command_gathers_what_is_there(tmp_path: Path) -> None:
    gather.write_part(tmp_path, part("port", 0.4))
    (tmp_path / "guards.json").unlink()
    assert gather.main(["--results", str(tmp_path)]) == tmp_path / "guards.json"
    assert rows(tmp_path) == [("port", 0.4)]


def test_a_folder_without_parts_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds none of methods"):
        gather.gather(tmp_path)


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", json.dumps({**part("port"), "rows": [{}]}), json.dumps(part("core", 0.5)), "null"]
)
def test_a_file_that_is_no_result_of_the_part_is_an_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "port.json").write_text(text)
    with pytest.raises(InputError, match=r"port\.json is not"):
        gather.gather(tmp_path)


def test_every_bench_of_the_makefile_is_a_part_and_the_other_way_round() -> None:
    makefile = (Path(__file__).parents[2] / "Makefile").read_text()
    recipe = makefile.split("\nbench-guards: setup $(SMALL)/config.json\n")[1].split("\n\n")[0]
    named = {name for name in gather.PARTS if f"benchmarks/{name}.py" in recipe}
    assert named == {*gather.PARTS} - {"methods"}
    assert "benchmarks/guards.py" in recipe
