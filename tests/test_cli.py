"""The command line: data on standard output, the rest on standard error, and exit codes that scripts can trust."""

from __future__ import annotations

import gzip
import inspect
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import typer

from command_line import Ran, texts, toy_recipe, write
from safeside import Adapter, Base, Message, cli, cli_shared
from safeside.cli import ReadMode
from safeside.cli_genes import Selection
from safeside.cli_serve import Engine
from safeside.errors import MissingExtraError
from safeside.guards.score import judge
from safeside.train.splits import find_data
from safeside.types import Preset

OPTIONS = Path(__file__).parent / "golden" / "cli_options.txt"
COMMANDS = (
    "demo", "train", "eval", "guard", "calibrate", "chat", "gene extract", "gene select", "gene fit", "gene port",
    "gene apply", "gene unapply", "gene inspect", "info", "key", "patch", "policy check", "policy simulate",
    "port", "push", "score", "serve",
)  # fmt: skip
SHAPES = {
    "prompt": lambda text: {"prompt": text},
    "answer": lambda text: {"prompt": "how?", "response": text},
    "text": lambda text: {"text": text},
    "summary": lambda text: {"document": "the cat sat there", "summary": text},
    "messages": lambda text: {"messages": [{"role": "user", "content": text}]},
}


# ---- options and start-up --------------------------------------------------------------------------------------------


KINDS = {
    str: "text",
    Path: "path",
    int: "integer",
    float: "number",
    bool: "flag",
    list[str]: "text, repeatable",
    list[Path]: "path, repeatable",
    Selection: "selection",
    Preset: "preset",
    ReadMode: "mode",
    Engine: "engine",
}


def options() -> str:
    """Every command with its arguments and options: spelling, type, default."""
    lines = []
    groups = {"": cli.app, **{f"{group.name} ": group.typer_instance for group in cli.app.registered_groups}}
    named = {
        prefix + (command.name or command.callback.__name__): command
        for prefix, group in groups.items()
        for command in group.registered_commands
    }
    for title, command in sorted(named.items()):
        lines.append(title)
        hints = get_type_hints(command.callback, include_extras=True)
        for name, parameter in inspect.signature(command.callback).parameters.items():
            if hints[name] is typer.Context:  # no option: what the others came from
                continue
            kind, declared = hints[name].__origin__, hints[name].__metadata__[0]
            kind = (
                next(part for part in get_args(kind) or (kind,) if part is not type(None))
                if kind not in KINDS
                else kind
            )
            written = [word for word in (declared.default, *(declared.param_decls or ())) if str(word).startswith("--")]
            is_option = isinstance(declared, typer.models.OptionInfo)
            spelling = (written or [f"--{name.replace('_', '-')}"])[0] if is_option else name.upper()
            default = "empty" if parameter.default == "" else parameter.default
            need = "required" if parameter.default is parameter.empty else f"default {default}"
            lines.append(f"    {spelling} ({KINDS[kind]}), {need}")
    return "\n".join(lines) + "\n"


def test_options_are_frozen() -> None:
    assert options() == OPTIONS.read_text(), (
        f"The options of the command line have changed, and scripts depend on them. If that is meant, tell it in "
        f"CHANGELOG.md and write the text above into {OPTIONS.relative_to(Path(__file__).parents[1])}."
    )
    assert [line for line in options().splitlines() if not line.startswith(" ")] == sorted(COMMANDS)


def test_help_and_mistakes_do_not_wait_for_torch() -> None:
    script = """
import sys
from safeside.cli import main
for words in (["--help"], *([*name.split(), "--help"] for name in sys.argv[1:]), ["guard"], ["eval", "x"], ["nothing"]):
    sys.argv = ["safeside", *words]
    try:
        main()
    except SystemExit as ended:
        print(words, ended.code, file=sys.stderr)
slow = {"torch", "transformers", "numpy", "sklearn", "matplotlib"} & set(sys.modules)
sys.exit(f"imported {slow}" if slow else 0)
"""
    done = subprocess.run([sys.executable, "-c", script, *COMMANDS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name in COMMANDS:
        assert f"{[*name.split(), '--help']} 0" in done.stderr
    for mistake in ("['guard'] 2", "['eval', 'x'] 2", "['nothing'] 2"):
        assert mistake in done.stderr


# ---- exit codes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["guard", "ADAPTERS/harm", "--no-such-flag"], "No such option"),
        (["guard", "ADAPTERS/harm", "none.jsonl"], "There is no file none.jsonl"),
        (["guard", "ADAPTERS/refuse", "ROWS"], "has role 'align' but was passed as 'guard'"),
        (["guard", "ADAPTERS/harm", "ROWS", "--also", "ADAPTERS/harm"], "Adapter names must differ"),
        (["guard", "builtin:none"], "There is no built-in adapter 'builtin:none'"),
        (["guard", "ADAPTERS/harm", "--base", "no/such/folder/here"], "Cannot load a base"),
        (["guard", "ADAPTERS/harm", "--allow-mismatch", "all"], "allow_mismatch can be 'weights'"),
        (["eval", "ADAPTERS/harm"], "eval needs one of --data FILE and --suite NAME"),
        (["eval", "ADAPTERS/harm", "--data", "ROWS", "--suite", "demo"], "brings its own prompts"),
        (
            ["eval", "ADAPTERS/harm", "--suite", "dmeo"],
            "strongreject, xstest. Did you mean 'demo'?",
        ),
        (["eval", "ADAPTERS/harm", "--data", "none.jsonl"], "There is no file none.jsonl"),
        (["eval", "ADAPTERS/refuse", "--data", "ROWS"], "is an aligner; measure it with --suite"),
        (["eval", "ADAPTERS/refuse", "--suite", "demo", "--strengths", "0,much"], "Strengths must be numbers"),
        (["eval", "ADAPTERS/harm", "--data", "ROWS", "--gate", "ADAPTERS/two"], "'harm' is a guard; --gate is for"),
        (["eval", "ADAPTERS/harm", "--data", "ROWS", "--strengths", "0.3"], "'harm' is a guard; --strengths is for"),
        (["eval", "ADAPTERS/harm", "--suite", "demo", "--strengths", "1"], "'harm' is a guard; --strengths is for"),
        (["chat", "hi", "--gated"], "--gated needs a guard"),
        (["chat", "hi", "--strengths", "0.7"], "Strengths need an aligner"),
        (["chat", "hi", "--guard", "ADAPTERS/harm", "--gated"], "Strengths need an aligner"),
        (["chat", "hi", "--guard", "ADAPTERS/harm", "--gated", "--strengths", "0.7"], "Strengths need an aligner"),
        (["chat", "hi", "--base", "BASE", "--strengths", "0,1"], "Strengths need an aligner"),
        (
            ["chat", "hi", "--base", "BASE", "--aligner", "ADAPTERS/refuse", "--strengths", "3"],
            "must lie in \\[0, 2\\]",
        ),
        (["chat", "hi", "--max-new-tokens", "0"], "Invalid value for '--max-new-tokens'"),
        (["chat", "hi", "--base", "BASE", "--max-new-tokens", "999"], "nothing is cut silently"),
        (["train", "none.toml"], "There is no recipe none.toml"),
        (["train", "RECIPE", "--output", "ROWS"], "rows.jsonl cannot be a folder: File exists"),
        (["train", "RECIPE", "--output", "ROWS/x"], "rows.jsonl/x cannot be a folder: Not a directory"),
        (["info", "builtin:none"], "There is no built-in adapter"),
        (["guard", "ADAPTERS/harm", "ROWS", "--preset", "lax"], "Invalid value for '--preset'"),
        (["guard", "ADAPTERS/harm", "ROWS", "--preset", "strict"], "needs 59 harmless rows of a mode"),
        (["guard", "ADAPTERS/promised", "ROWS", "--preset", "permissive"], "needs 2,995 harmless rows of a mode"),
        (["eval", "ADAPTERS/harm", "--data", "ROWS", "--preset", "balanced"], "needs 299 harmless rows of a mode"),
        (["eval", "ADAPTERS/refuse", "--suite", "demo", "--preset", "strict"], "--preset needs a guard"),
        (["chat", "hi", "--base", "BASE", "--preset", "strict"], "--preset chooses a guard's thresholds"),
        (["calibrate", "ADAPTERS/harm"], "Missing option '--benign'"),
        (["calibrate", "ADAPTERS/harm", "--benign", "ROWS"], "labelled harmful; expected harmless rows only"),
        (["calibrate", "ADAPTERS/harm", "--benign", "BENIGN"], "20 harmless rows cannot promise a false-positive"),
        (["calibrate", "ADAPTERS/harm", "--benign", "BENIGN", "--fpr", "2"], "lie between 0 and 1"),
        (["calibrate", "ADAPTERS/harm", "--benign", "BENIGN", "--output", "ADAPTERS/two"], "exists already"),
        (["calibrate", "ADAPTERS/harm", "--benign", "BENIGN", "--mode", "aloud"], "Invalid value for '--mode'"),
        (["calibrate", "ADAPTERS/refuse", "--benign", "BENIGN"], "only guards are calibrated"),
    ],
)
def test_misuse_is_exit_2_and_one_line(
    run: Callable[..., Ran], adapters: Path, tiny_base: Base, tmp_path: Path, words: list[str], problem: str
) -> None:
    rows = write(tmp_path / "rows.jsonl", [{"text": text, "label": index % 2} for index, text in enumerate(texts())])
    benign = write(tmp_path / "benign.jsonl", [{"text": text} for text in texts(20)])
    places = {"ADAPTERS": str(adapters), "ROWS": str(rows), "BASE": str(tiny_base.folder), "BENIGN": str(benign)}
    places["RECIPE"] = str(toy_recipe(tmp_path, tiny_base))
    for place, found in places.items():
        words = [word.replace(place, found) for word in words]
    ran = run(*words)
    assert ran.code == 2
    assert ran.out == ""
    assert problem.replace("\\", "") in " ".join(ran.err.split())
    assert "Traceback" not in ran.err


def test_a_damaged_adapter_is_exit_1(run: Callable[..., Ran], tmp_path: Path) -> None:
    ran = run("info", tmp_path)
    assert ran.code == 1
    assert "has no safeside_config.json" in ran.err
    assert ran.err.startswith("safeside: ")
    assert ran.err.count("\n") == 1


def test_interrupts_and_missing_extras_are_told(run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        pytest.raises(
            MissingExtraError, match=r"needs 'sklearn', which is not installed. Run: pip install 'safeside\[x\]'"
        ),
        cli_shared.extra("x"),
    ):
        raise ModuleNotFoundError(name="sklearn")

    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "app", interrupted)
    ran = run("info")
    assert (ran.code, ran.err) == (1, "safeside: interrupted\n")


# ---- guard -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "-"])
def test_guard_writes_a_line_for_each_row(
    run: Callable[..., Ran],
    adapters: Path,
    tiny_base: Base,
    random_guard: Callable[..., Adapter],
    tmp_path: Path,
    name: str,
) -> None:
    rows = [{"prompt": text} for text in texts()]
    stdin = "\n".join(map(json.dumps, rows))
    files = [] if name == "-" else [write(tmp_path / name, rows)]
    ran = run("guard", adapters / "harm", *files, "--also", adapters / "two", stdin=stdin)
    assert (ran.code, ran.err) == (0, "")
    assert [line["line"] for line in ran.lines] == list(range(1, 13))
    for line, text in zip(ran.lines, texts(), strict=True):
        assert list(line) == ["line", "verdicts"]
        assert [verdict["task"] for verdict in line["verdicts"]] == ["harm", "two"]
        for seed, found in enumerate(line["verdicts"]):
            assert list(found) == ["task", "score", "threshold", "flagged", "reason"]
            guard = random_guard(tiny_base, name=found["task"], seed=seed + 1)
            ((verdict,),) = judge(tiny_base, [guard], [[Message("user", text)]])
            assert found["score"] == pytest.approx(verdict.score, abs=1e-5)
            assert found["threshold"] == 0.5 + seed / 10
            assert found["flagged"] == (found["score"] >= found["threshold"])


def test_bad_rows_are_told_and_the_run_goes_on(run: Callable[..., Ran], adapters: Path) -> None:
    stdin = '{"text": "hi"}\n{broken\n\n{"question": "x"}\n{"text": "\\ud800"}\n{"text": "there"}'
    ran = run("guard", adapters / "harm", stdin=stdin)
    assert ran.code == 1
    assert [line["line"] for line in ran.lines] == [1, 2, 4, 5, 6]
    flagged = {line["line"]: line["verdicts"][0] for line in ran.lines}
    for number in (2, 4, 5):
        assert flagged[number]["flagged"] is True
        assert flagged[number]["score"] is None
        assert f"safeside: line {number}: " in ran.err
    assert "3 bad rows; each was flagged" in ran.err
    collected = run("guard", adapters / "harm", "--json", stdin=stdin)
    assert collected.code == 1
    assert collected.json == {"rows": ran.lines, "n_bad": 3}


def test_guard_flags_and_counts_what_holds_no_text(run: Callable[..., Ran], adapters: Path) -> None:
    ran = run("guard", adapters / "harm", stdin='{"text": "hi"}\n{"text": "\\u200b\\u200b"}')
    assert ran.code == 1
    (good,), (empty,) = (line["verdicts"] for line in ran.lines)
    assert isinstance(good["score"], float)
    assert (empty["score"], empty["flagged"]) == (None, True)
    assert "must be text that is not empty" in empty["reason"]
    assert "1 bad rows; each was flagged" in ran.err


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_guard_says_that_there_was_no_row(
    run: Callable[..., Ran], adapters: Path, tmp_path: Path, content: str
) -> None:
    """No line for no row, and no error: but nobody may take it for texts that passed."""
    path = tmp_path / "rows.jsonl"
    path.write_text(content)
    said = f"safeside: 0 rows in {path}: nothing was judged\n"
    ran = run("guard", adapters / "harm", path)
    assert (ran.code, ran.lines, ran.err) == (0, [], said)
    kept = run("guard", adapters / "harm", path, "--output", tmp_path / "kept.jsonl")
    assert kept.code == 0
    assert said in kept.err
    piped = run("guard", adapters / "harm", "--json", stdin=content)
    assert piped.json == {"rows": [], "n_bad": 0}
    assert piped.err == "safeside: 0 rows in standard input: nothing was judged\n"
    path.write_text('{"text": "hi"}')
    for _ in range(2):  # a run that goes on with nothing left has its rows
        assert "0 rows" not in run("guard", adapters / "harm", path, "--output", tmp_path / "kept.jsonl").err


def test_guard_flags_at_the_preset(run: Callable[..., Ran], adapters: Path) -> None:
    lines = {
        preset: run("guard", adapters / "promised", "--preset", preset, stdin='{"text": "hi"}').lines[0]["verdicts"][0]
        for preset in ("strict", "balanced")
    }
    assert [found["threshold"] for found in lines.values()] == [0.25, 0.75]
    assert {tuple(found) for found in lines.values()} == {("task", "score", "threshold", "flagged", "reason")}
    assert {found["reason"] for found in lines.values()} == {""}


# ---- calibrate -------------------------------------------------------------------------------------------------------


def test_calibrate_writes_an_adapter_with_a_promise(run: Callable[..., Ran], adapters: Path, tmp_path: Path) -> None:
    benign = write(tmp_path / "traffic.jsonl", [{"prompt": text} for text in texts(70)])
    harmful = write(tmp_path / "bad.jsonl", [{"prompt": f"hat {text}"} for text in texts(40)])
    words = ("calibrate", adapters / "harm", "--benign", benign, "--fpr", 0.1, "--harmful", harmful)
    ran = run(*words, "--output", tmp_path / "mine", "--json")
    assert ran.code == 0
    assert " ".join(ran.err.split()).endswith(
        "keeps no record of the rows that it learnt from; make sure that yours are not among them"
    )
    assert ran.json["n_learnt"] is None
    rows = ran.json["thresholds"]
    assert [(row["mode"], row["preset"], row["false_positive_rate"], row["n_harmless"]) for row in rows] == [
        ("prompt", "default", 0.1, 70),
        ("prompt", "strict", 0.05, 70),
    ]
    assert (ran.json["adapter"], ran.json["in_place"]) == (str(tmp_path / "mine"), False)
    assert [fit["method"] for fit in ran.json["calibration_error"]["prompt"]] == ["platt"]
    (line,) = run("guard", tmp_path / "mine", stdin='{"text": "hi"}').lines
    assert [line["verdicts"][0]["threshold"]] == rows[0]["threshold"]
    facts = run("info", tmp_path / "mine", "--json").json
    assert facts["mode prompt"].startswith(f"default {rows[0]['threshold'][0]:.4f} (at most 0.1 of harmless texts")
    assert "70 harmless rows of traffic.jsonl" in facts["provenance"]["calibrated for prompt"]
    plain = run("calibrate", tmp_path / "mine", "--benign", benign, "--fpr", 0.2, "--output", tmp_path / "mine")
    assert (plain.code, "was changed in place" in plain.err) == (0, True)
    write(benign, [*({"prompt": text} for text in texts(70)), {"prompt": "how?", "response": "so"}])
    one = run(*words, "--mode", "prompt", "--output", tmp_path / "one")
    assert one.code == 0
    assert "1 rows were left out: they are read in other modes than prompt" in one.err
    assert "0.2000" in plain.out


def test_calibrate_counts_rows_that_it_cannot_read(run: Callable[..., Ran], adapters: Path, tmp_path: Path) -> None:
    benign = write(tmp_path / "traffic.jsonl", [*({"prompt": text} for text in texts(30)), "{broken"])
    ran = run("calibrate", adapters / "harm", "--benign", benign, "--fpr", 0.2, "--output", tmp_path / "mine", "--json")
    assert (ran.code, ran.json["n_skipped"]) == (1, 1)
    assert "line 31 was left out: traffic.jsonl: not JSON" in ran.err


# ---- eval ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_eval_reads_every_shape(run: Callable[..., Ran], adapters: Path, tmp_path: Path, shape: str) -> None:
    rows = [{**SHAPES[shape](text), "label": index % 2} for index, text in enumerate(texts())]
    ran = run("eval", adapters / "harm", "--data", write(tmp_path / "rows.jsonl.gz", rows), "--json")
    assert ran.code == 0
    assert [row["metric"] for row in ran.json] == ["auroc", "auprc", "f1", "tpr", "fpr", "ece"]
    for row in ran.json:
        assert (row["label"], row["n"], row["n_skipped"]) == ("harm", 12, 0)
        assert 0 <= row["low"] <= row["value"] <= row["high"] <= 1


def read_lines(split: str, n: int) -> list[object]:
    """Rows from all over a split of the demo set."""
    lines = gzip.decompress(find_data(f"demo:{split}.jsonl.gz", Path()).read_bytes()).decode().splitlines()
    return [json.loads(line) for line in lines[:: len(lines) // n]][:n]


def test_eval_leaves_out_what_the_guard_learnt_from(run: Callable[..., Ran], tmp_path: Path) -> None:
    """Of the packaged guard's training rows none is left; a file of others loses only those, and is told of them."""
    seen = read_lines("train", 30)
    ran = run("eval", "builtin:harm", "--data", write(tmp_path / "seen.jsonl", seen))
    assert (ran.code, ran.out) == (2, "")
    assert "The guard learnt from every one of the 30 rows" in " ".join(ran.err.split())
    mixed = write(tmp_path / "mixed.jsonl", [*read_lines("test", 40), *seen])
    ran = run("eval", "builtin:harm", "--data", mixed, "--json")
    assert ran.code == 0
    assert {(row["n"], row["n_skipped"], row["n_learnt"]) for row in ran.json} == {(40, 0, 30)}
    assert "30 rows were left out: the guard learnt from them" in " ".join(ran.err.split())
    assert " n_learnt " in run("eval", "builtin:harm", "--data", mixed).out


def test_eval_counts_bad_rows_and_fails(run: Callable[..., Ran], adapters: Path, tmp_path: Path) -> None:
    rows = [*({"text": text, "label": index % 2} for index, text in enumerate(texts())), "{broken", {"text": "x"}]
    path = write(tmp_path / "rows.jsonl", rows)
    ran = run("eval", adapters / "harm", "--data", path, "--json")
    assert ran.code == 1
    assert {(row["n"], row["n_skipped"]) for row in ran.json} == {(12, 2)}
    assert "line 13 was skipped: not JSON" in ran.err
    assert "line 14 was skipped: no 'label'" in ran.err
    plain = run("eval", adapters / "harm", "--data", path)
    assert plain.code == 1
    for word in ("auroc", "auprc", "f1", "tpr", "fpr", "ece", "low", "high", "n_skipped"):
        assert word in plain.out


@pytest.mark.usefixtures("small_suite")
@pytest.mark.parametrize("gate", [[], ["--gate", "ADAPTERS/harm"]])
def test_eval_measures_an_aligner_by_strength(run: Callable[..., Ran], adapters: Path, gate: list[str]) -> None:
    gate = [word.replace("ADAPTERS", str(adapters)) for word in gate]
    ran = run("eval", adapters / "refuse", "--suite", "demo", "--strengths", "0,0.5,1", *gate, "--json")
    assert ran.code == 0
    assert [(row["strength"], row["metric"]) for row in ran.json] == [
        (strength, f"refusal_rate_{kind}") for strength in (0.0, 0.5, 1.0) for kind in ("harmful", "harmless")
    ]
    for row in ran.json:
        assert (row["suite"], row["n"], row["n_unscored"]) == ("demo", 2, 0)
        assert 0 <= row["low"] <= row["value"] <= row["high"] <= 1


# ---- chat, info, push, train -----------------------------------------------------------------------------------------


def test_chat_answers_one_prompt_at_several_strengths(run: Callable[..., Ran], adapters: Path, tiny_base: Base) -> None:
    words = ("chat", "how?", "--base", tiny_base.folder, "--aligner", adapters / "refuse", "--max-new-tokens", 6)
    ran = run(*words, "--guard", adapters / "harm", "--strengths", "0,1", "--json")
    assert ran.code == 0
    first, second = ran.lines
    assert [first["requested_strength"], second["requested_strength"]] == [0.0, 1.0]
    assert first["text"] == tiny_base.chat([Message("user", "how?")], max_new_tokens=6).text != second["text"]
    assert set(second["strength"]["refuse"]) == {1.0}
    assert [(verdict["mode"], verdict["reason"]) for verdict in second["verdicts"]] == [("prompt", ""), ("answer", "")]
    plain = run(*words, "--guard", adapters / "harm", "--strengths", "0,1")
    assert plain.out.startswith("[strength 0] ")
    assert "harm on the prompt: 0." in plain.err
    strict = run(*words, "--guard", adapters / "promised", "--strengths", "0", "--preset", "strict", "--json").json
    assert [verdict["threshold"] for verdict in strict["verdicts"]] == [0.25, 0.5]
    assert "no preset 'strict' for mode 'answer'" in strict["verdicts"][1]["reason"]
    gated = run(*words, "--guard", adapters / "two", "--strengths", "1", "--gated", "--json").json
    score, used = gated["verdicts"][0]["score"], gated["strength"]["refuse"]
    assert used == [pytest.approx(min(1.0, max(0.0, (score - 0.3) / 0.3)), abs=1e-4)] * len(used)


def test_chat_reads_a_conversation_from_standard_input(run: Callable[..., Ran], tiny_base: Base) -> None:
    ran = run("chat", "--base", tiny_base.folder, "--max-new-tokens", 5, "--json", stdin="how?\n\n  and then?\n")
    first, second = ran.lines
    history = [Message("user", "how?"), Message("assistant", first["text"]), Message("user", "and then?")]
    assert second["text"] == tiny_base.chat(history, max_new_tokens=5).text
    assert first["requested_strength"] is None


def test_info_tells_the_cost(run: Callable[..., Ran], adapters: Path, tiny_base: Base) -> None:
    facts = run("info", adapters / "harm", "--json").json
    assert (facts["adapter"], facts["role"], facts["thresholds"]) == ("harm", "guard", [0.5])
    assert (
        facts["flops_share"]
        == facts["matmuls_per_token"] / run("info", "--base", tiny_base.folder, "--json").json["matmuls_per_token"]
    )
    assert "times the 1% target" in facts["cost"]
    assert run("info", adapters / "refuse", "--json").json["role"] == "align"
    assert "flops_share" in run("info", adapters / "harm").out


def test_patch_learns_and_rolls_back(run: Callable[..., Ran], adapters: Path, tmp_path: Path) -> None:
    new = write(tmp_path / "new.jsonl", [{"prompt": f"#%*! {text}", "label": 1} for text in texts()])
    replay = write(
        tmp_path / "replay.jsonl", [{"prompt": text, "label": index % 2} for index, text in enumerate(texts(40))]
    )
    folder = tmp_path / "patched"
    done = run("patch", adapters / "harm", "--examples", new, "--replay", replay, "--output", folder, "--json")
    assert done.code == 0
    assert done.json["adapter"] == str(folder)
    assert done.json["patch examples"] == "9"
    assert run("guard", folder, stdin='{"text": "hi"}').code == 0
    assert run("patch", folder, "--rollback", "--json").json == {"adapter": str(folder), "versions_before": 0}
    for name in ("adapter.safetensors", "safeside_config.json", "provenance.json", "README.md"):
        assert (folder / name).read_bytes() == (adapters / "harm" / name).read_bytes()
    again = run("patch", folder, "--rollback")
    assert (again.code, again.out) == (2, "")
    assert "keeps no earlier version" in again.err
    assert "--rollback; got neither or both" in run("patch", folder).err


def test_port_carries_a_guard_over(
    run: Callable[..., Ran], adapters: Path, tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    text = write(tmp_path / "text.jsonl", [{"text": text} for text in texts(100)])
    words = ("port", adapters / "harm", "--to", tiny_folder("gpt2"), "--text", text, "--output")
    done = run(*words, tmp_path / "ported", "--method", "map", "--json")
    assert done.code == 0
    assert done.json["port method"] == "map"
    assert run("guard", tmp_path / "ported", stdin='{"text": "hi"}').code == 0
    assert "expected one of map, distill, both" in run(*words, tmp_path / "other", "--method", "mop").err


def test_push_uploads_a_checked_folder(
    run: Callable[..., Ran], adapters: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[dict[str, object]] = []

    class Hub:
        def create_repo(self, *words: object, **options: object) -> None:
            calls.append({"repository": words[0], **options})

        def upload_folder(self, **options: object) -> str:
            calls.append(options)
            return "https://hub/org/harm"

    monkeypatch.setattr("safeside.artifact.HfApi", Hub)
    assert run("push", adapters / "harm", "org/harm", "--private").out == "https://hub/org/harm\n"
    assert run("push", adapters / "harm", "org/harm", "--json").json == {"address": "https://hub/org/harm"}
    assert [call.get("private") for call in calls[::2]] == [True, False]
    assert run("push", adapters, "org/harm").code == 1  # no adapter: nothing may be uploaded
    assert len(calls) == 4


def test_train_makes_an_adapter(run: Callable[..., Ran], tiny_base: Base, tmp_path: Path) -> None:
    rows = [{"text": f"the {'hat' if index % 2 else 'cat'} {index}", "label": index % 2} for index in range(24)]
    write(tmp_path / "rows.jsonl", [*rows, "{broken"])
    recipe = toy_recipe(tmp_path, tiny_base)
    ran = run("train", recipe, "--output", tmp_path / "toy", "--json")
    assert ran.code == 1  # a row was bad, yet the run went on and saved
    assert (ran.json["adapter"], ran.json["train_rows"], ran.json["bad_rows"]) == (str(tmp_path / "toy"), 24, 2)
    assert ran.json["trainable_params"] > 0
    assert "line 25 was left out: rows.jsonl: not JSON" in ran.err
    assert "epoch 2: validation" in ran.err
    write(tmp_path / "rows.jsonl", rows)
    again = run("train", recipe, "--data", tmp_path, "--output", tmp_path / "toy", "--resume")
    assert again.code == 0
    assert "best validation auroc" in again.out
    assert "there is no checkpoint to resume from" in again.err
    assert "MB in" in again.err  # the size of the stored states, said before they are stored
    scored = run("guard", tmp_path / "toy", tmp_path / "rows.jsonl")
    assert len(scored.lines) == 24
