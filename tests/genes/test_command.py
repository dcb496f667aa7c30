"""``safeside gene`` from a pair of models to a model that is as it was."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from command_line import Ran
from genes_for_tests import random_gene
from safeside import Base, load_base
from safeside.genes.artifact import load_gene, save_gene
from safeside.genes.merge import model_hash

RECIPE = """
name = "safe"
conflicts = ["rival"]
[data]
harmful = ["harmful.jsonl"]
benign = ["benign.jsonl"]
[extract]
rank = 2
steps = 2
batch_size = 4
max_new_tokens = 4
[select]
keep = 2
[fit]
steps = 2
"""


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A folder with a recipe and its rows, and a task's."""
    (tmp_path / "gene.toml").write_text(RECIPE)
    for name, answer in (("harmful", None), ("benign", "the mat"), ("refusals", "the hat"), ("task", "the cat")):
        rows = [{"prompt": f"the {name} {row}", **({"response": answer} if answer else {})} for row in range(4)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def test_from_extraction_to_a_copy_and_back(
    run: Callable[..., Ran], files: Path, session_base: Base, degraded: Base
) -> None:
    folder, before = session_base.folder, model_hash(session_base)
    models = ["--aligned", folder, "--degraded", degraded.folder]
    made = run("gene", "extract", files / "gene.toml", *models, "--output", files / "all", "--json")
    assert made.code == 0, made.err
    assert made.json["layers"] == [1, 2, 3]
    rows = ["--harmful", files / "harmful.jsonl", "--benign", files / "benign.jsonl"]
    kept = run("gene", "select", files / "all", "--base", degraded.folder, *rows, "--output", files / "kept", "--json")
    assert len(kept.json["layers"]) == 2, kept.err
    rows = ["--refusals", files / "refusals.jsonl", "--task", files / "task.jsonl"]
    options = ["--shots", 2, "--output", files / "fitted", "--json"]
    fitted = run("gene", "fit", files / "kept", "--base", folder, *rows, *options)
    assert fitted.json["fit_shots"] == 2, fitted.err
    assert fitted.json["trainable_params"] == 2
    seen = run("gene", "inspect", files / "fitted", "--base", folder, "--json")
    assert [row["layer"] for row in seen.json["layers"]] == [*map(str, kept.json["layers"]), "all"]
    assert seen.json["conflicts"] == ["rival"]
    table = run("gene", "inspect", files / "fitted")
    assert "coefficient" in table.out
    answered = run("gene", "apply", folder, "--gene", files / "fitted", "--prompt", "the cat", "--json")
    assert answered.json["genes"] == {"safe": 1.0}
    merged = run("gene", "apply", folder, "--gene", files / "fitted", "--weights", "0.5", "--output", files / "merged")
    assert merged.code == 0, merged.err
    assert model_hash(load_base(files / "merged")) != before
    back = run("gene", "unapply", files / "merged", "--output", files / "back", "--json")
    assert back.json["taken_out"] == ["safe"]
    assert model_hash(load_base(files / "back")) == before


def test_a_port_to_another_family(
    run: Callable[..., Ran], files: Path, session_base: Base, tiny_folder: Callable[[str], Path]
) -> None:
    save_gene(random_gene(session_base), files / "gene")
    target = tiny_folder("gemma2")
    rows = ["--harmful", files / "harmful.jsonl", "--benign", files / "benign.jsonl"]
    options = ["--rank", 1, "--steps", 2, "--layer", "o_proj", "--output", files / "ported", "--json"]
    made = run("gene", "port", files / "gene", "--from", session_base.folder, "--to", target, *rows, *options)
    assert made.code == 0, made.err
    assert made.json["ported_from"] == session_base.name
    ported = load_gene(files / "ported")
    assert {(point.rank, point.name.rpartition(".")[2]) for point in ported.config.modules} == {(1, "o_proj")}
    assert ported.config.recipe.data.harmful == (str(files / "harmful.jsonl"),)
    assert ported.config.recipe.aligned == ""
    seen = run("gene", "inspect", files / "ported", "--base", target)
    assert seen.code == 0, seen.err


def test_weights_by_a_policy(run: Callable[..., Ran], tmp_path: Path, session_base: Base) -> None:
    for seed, name in enumerate(("privacy", "violence")):
        save_gene(random_gene(session_base, name, seed), tmp_path / name)
    genes = ["--gene", tmp_path / "privacy", "--gene", tmp_path / "violence"]
    (tmp_path / "policy.toml").write_text("[clinic]\nprivacy = 1.5\n")
    how = ["--policy", tmp_path / "policy.toml", "--context", "clinic", "--prompt", "the cat", "--json"]
    found = run("gene", "apply", session_base.folder, *genes, *how)
    assert found.json["genes"] == {"privacy": 1.5, "violence": 0.0}
    assert load_gene(tmp_path / "privacy").name == "privacy"


@pytest.mark.parametrize(
    ("line", "message", "code"),
    [
        ("inspect none", "none has no gene.json, adapter_config.json, adapter_model", 1),
        ("apply BASE --gene none --prompt a", "none has no gene.json, adapter_config.json, adapter_model", 1),
        ("extract none.toml --output new", "There is no recipe", 2),
        ("extract bad.toml --output new", "surprise", 2),
        ("extract itself.toml --output new", "got 'safe', which is the gene itself", 2),
        ("extract same.toml --output new", "ok is given both for harmful and for harmless rows", 2),
        ("apply BASE --gene gene --prompt EMPTY", "--prompt is empty; expected text", 2),
        ("apply BASE --gene gene --prompt BLANK", "--prompt is empty; expected text", 2),
        ("apply BASE --gene gene", "one of --output FOLDER", 2),
        ("apply BASE --gene gene --prompt a --output new", "one of --output FOLDER", 2),
        ("apply BASE --gene gene --prompt a --weights 1,2", "each of 1 genes; got 2", 2),
        ("apply BASE --gene gene --prompt a --weights much", "must be numbers", 2),
        ("apply BASE --gene gene --prompt a --policy bad.toml", "go together", 2),
        ("apply BASE --gene gene --prompt a --policy no --context b", "cannot be read", 2),
        ("apply BASE --gene gene --prompt a --policy bad.toml --context b", "bad.toml is not a policy", 2),
        ("apply BASE --gene gene --gene rival --prompt a", "declares a conflict", 2),
        ("unapply gene --output new", "has no gene_merged.json", 2),
        ("fit gene --base BASE --refusals empty --task ok --output new", "at least", 2),
        ("fit gene --base BASE --refusals bad --task ok --output new", "line 1", 2),
        ("fit gene --base BASE --refusals no --task no --output gene", "exists already", 2),
        ("fit gene --base BASE --refusals ok --task spaced --shots 4 --output new", "1 refusals; got shots = 4", 2),
        (
            "fit gene --base BASE --refusals ok --task ./ok --output new",
            "ok is given both for refusals and for task",
            2,
        ),
        (
            "fit gene --base BASE --refusals ok --task link --output new",
            "ok is given both for refusals and for task",
            2,
        ),
        ("fit gene --base BASE --refusals spaced --task ok --output new", "spaced: line 2 has no answer", 2),
        ("select gene --base BASE --harmful ok --benign spaced --method all --keep 2 --output new", "keeps every", 2),
        ("select gene --base BASE --harmful ok --benign ok --output new", "both for harmful and for harmless rows", 2),
        ("port gene --from builtin --to BASE --harmful ok --benign spaced --output new", "does not fit", 1),
        ("port gene --from BASE --to BASE --harmful ok --benign ok --output new", "both for harmful and for", 2),
        ("port gene --from BASE --to BASE --harmful empty --benign ok --output new", "no harmful prompts", 2),
    ],
)
def test_mistakes_are_one_line(
    run: Callable[..., Ran],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    session_base: Base,
    line: str,
    message: str,
    code: int,
) -> None:
    monkeypatch.chdir(tmp_path)
    save_gene(random_gene(session_base, conflicts=("rival",)), "gene")
    save_gene(random_gene(session_base, "rival"), "rival")
    Path("bad.toml").write_text("surprise = 1")
    Path("itself.toml").write_text(RECIPE.replace("rival", "safe"))
    Path("same.toml").write_text(RECIPE.replace("harmful.jsonl", "ok").replace("benign.jsonl", "ok"))
    Path("link").symlink_to("ok")
    Path("empty").write_text("")
    Path("bad").write_text("{")
    Path("ok").write_text(json.dumps({"prompt": "the cat"}))
    Path("spaced").write_text("\n" + json.dumps({"prompt": "the cat"}))
    words = {"BASE": str(session_base.folder), "EMPTY": "", "BLANK": " "}
    found = run("gene", *[words.get(word, word) for word in line.split()])
    assert found.code == code, found.err
    assert message in found.err
    assert found.err.startswith("safeside: ")
    assert found.err.count("\n") == 1
    assert not Path("new").exists()
