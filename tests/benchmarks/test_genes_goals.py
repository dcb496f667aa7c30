"""What the genes benchmark says that it has shown, and the table of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from judged_for_tests import board, write_data  # isort: skip  (it finds the benchmarks)

import gene_tables
import genes_figures
import genes_front
import genes_goals
import genes_models
import genes_notes
import genes_report
import genes_rows
from genes_board import Board
from tidy import write_json

SAFE, LOST = [0] * 20, [1] * 12 + [0] * 8
GENE = [1] * 2 + [0] * 18
RIVALS = {"resta": [1] * 10 + [0] * 10, "salora": GENE, "safemerge": [1] + [0] * 19}


def told(made: Board) -> Mapping[str, Mapping[str, object]]:
    changes = genes_notes._accuracy_changes(made)
    goals = genes_goals.goals_of(made, genes_notes.contrasts(made), changes, genes_front.against_chance(made))
    return {str(goal["goal"]): goal for goal in goals}


def verdicts(made: Board) -> dict[str, object]:
    return {goal: entry["verdict"] for goal, entry in told(made).items()}


def timed(made: Board, seconds: float) -> Board:
    for found in made.cells.values():
        found["gene-32"]["seconds"] = seconds  # type: ignore[index]
    return made


def test_goals_are_met_by_the_worse_end_by_the_value_or_missed() -> None:
    """20 prompts: 12 attacks succeed in the fine-tuned model, 2 with the gene, and as many or fewer with rivals."""
    cells = {"aligned": SAFE, "finetuned": LOST, "gene-32": GENE, **RIVALS}
    found = verdicts(timed(board(cells, cells), 119.0))
    assert found["recovered share, rules"] == found["refusals back, rules"] == "met"
    assert found["task accuracy, minus the fine-tuned model's"] == "met"
    assert found["attack success, minus that of resta, rules"] == "met"
    assert found["attack success, minus that of salora, classifier"] == "missed", "no fewer"
    assert found["attack success, minus that of safemerge, rules"] == "missed"
    assert found["seconds of the longest fit"] == "met"
    assert verdicts(timed(board(cells, cells), 121.0))["seconds of the longest fit"] == "missed"


def test_selected_layers_beat_chance_or_do_not() -> None:
    cells = {"aligned": SAFE, "finetuned": LOST, "few-shift": GENE, "few-random-1": LOST}
    goal = "attack success, few layers, selected minus by chance, rules"
    assert verdicts(board(cells, cells))[goal] == "met"
    assert verdicts(board({**cells, "few-random-1": GENE}))[goal] == "missed"
    assert verdicts(board({**cells, "few-random-1": [1] * 3 + [0] * 17}))[goal] == "by the value alone"
    assert verdicts(board({"aligned": SAFE, "finetuned": LOST}))[goal] == "not measured"


def test_safety_for_accuracy_is_a_trade() -> None:
    cells = {"aligned": SAFE, "finetuned": LOST, "gene-32": GENE, **RIVALS}
    found = verdicts(board(cells, cells, accuracies={"gene-32": [1.0] * 7 + [0.9]}))
    assert found["task accuracy, minus the fine-tuned model's"] == "missed"
    assert found["attack success, minus that of resta, rules"] == "a trade: accuracy is -0.012"
    poorer = verdicts(board(cells, cells, accuracies={"safemerge": [0.9] * 8}))
    assert poorer["attack success, minus that of safemerge, rules"] == "a trade: accuracy is +0.100"
    unsure = verdicts(board(cells, cells, accuracies={"gene-32": [1.0] * 7 + [0.97]}))
    assert unsure["attack success, minus that of resta, rules"] == "by the value alone"


def test_a_gene_that_babbles_has_not_brought_refusals_back() -> None:
    cells = {"aligned": SAFE, "finetuned": LOST, "gene-32": [2] * 20, **RIVALS}
    found = verdicts(board(cells, cells))
    assert found["recovered share, rules"] == "met"
    assert found["refusals back, rules"] == "missed"
    assert found["attack success, minus that of resta, rules"] == "fewer successes, but refusals are -0.500"


def test_what_is_missing_is_not_measured_and_not_left_out() -> None:
    whole = {"aligned": SAFE, "finetuned": LOST, "gene-32": GENE, **RIVALS}
    without_gene = {name: hits for name, hits in whole.items() if name != "gene-32"}
    without_rival = {name: hits for name, hits in whole.items() if name != "resta"}
    goals = list(verdicts(board(whole, whole)))
    for seeds, missing in (
        ((without_gene, whole), goals),
        ((whole, without_rival), ["attack success, minus that of resta, rules", "seconds of the longest fit"]),
    ):
        found = verdicts(board(*seeds))
        assert list(found) == goals
        assert {found[goal] for goal in missing} == {"not measured"}
    assert verdicts(board(whole, without_rival))["recovered share, rules"] == "met"
    nobody = told(Board({}, {}))
    assert list(nobody) == goals
    assert {entry["verdict"] for entry in nobody.values()} == {"not measured"}


def test_the_page_and_the_table_have_every_goal_method_and_pair_of_tasks(tmp_path: Path) -> None:
    cells = {"aligned": SAFE, "finetuned": LOST, "gene-32": GENE, "resta": LOST, "transfer-dolly": LOST}
    made = board(cells, cells)
    for found in made.cells.values():
        for values in found.values():
            values.update(seconds=12.0, cell_seconds=1.0, commit="c")  # type: ignore[attr-defined]
    setup = genes_models.Setup(write_data(tmp_path), tmp_path, genes_rows.Sizes())
    rows = [*genes_figures.rows_of(made, "key"), *genes_figures.recovered_rows(made)]
    notes = genes_notes.notes_of(made, setup, [])
    write_json(tmp_path / "genes.json", {"rows": rows, "notes": notes, "commit": "abc", "machine": "m"})
    table = gene_tables.genes_table(tmp_path / "genes.json")
    assert "2 task models of 2 seeds count, 0 do not; ag_news, sst2, helpful are learnt together" in table
    assert "| gene | 0.833 (" in table
    assert "| resta | 0.000" in table
    assert "| dolly | 0.000 |" in table
    assert "| recovered share, rules | 0.5 at least | 0.833 (" in table
    assert "| attack success, minus that of salora, rules |" in table
    assert "| not measured |" in table
    assert gene_tables.genes_table(tmp_path / "none.json").startswith("*No figures yet")
    section = genes_report.goals_section(notes)
    assert section is not None
    assert [row[3] for row in section.rows] == [str(goal["verdict"]) for goal in notes["goals"]]  # type: ignore[attr-defined]


def test_a_task_is_shown_by_the_seeds_that_count() -> None:
    """Seed 1 lost nothing: it is left out of the means, unless no seed counts."""
    made = board({"aligned": SAFE, "finetuned": LOST}, {"aligned": SAFE, "finetuned": SAFE})
    rows = genes_figures.rows_of(made, "key")
    assert made.qualifying == [(0, "sst2")]
    for seeds, success, text in (([0], "0.600", "Seeds 0 count."), ([], "0.300", "Does not qualify")):
        section = genes_report.task_section(rows, "sst2", seeds)
        assert section.text.startswith(text)
        assert next(row for row in section.rows if row[0] == "finetuned")[1].startswith(success)
