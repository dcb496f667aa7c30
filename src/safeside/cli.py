"""The command line: it parses, calls one function and prints.

Data goes to standard output, everything else to standard error.  Exit codes: 0 done, 1 failed, 2 misused.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from safeside.cli_genes import app as gene_app
from safeside.cli_serve import key, policy_app, score, serve
from safeside.cli_shared import (
    BaseName,
    Json,
    Mismatch,
    PresetName,
    cell,
    extra,
    load_with_base,
    print_json,
    print_rows,
    print_summary,
)
from safeside.errors import ConfigError, InputError, MissingExtraError, SafesideError, UnknownNameError

app = typer.Typer(
    name="safeside",
    help="Safety adapters for frozen language models: guards score, aligners steer, the base stays as it is.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

JudgeKey = Annotated[
    str | None, typer.Option(envvar="SAFESIDE_JUDGE_KEY", help="The endpoint's key; better not on a command line.")
]
EvalData = Annotated[
    Path | None, typer.Option(help="Labelled rows, .jsonl or .jsonl.gz; with a suite the folder of its data.")
]
Strengths = Annotated[
    str | None, typer.Option(help="For an aligner: strengths, comma-separated; 0,0.5,1 unless given.")
]
ReadMode = Literal["prompt", "answer", "stream", "windowed"]
_MISUSE = (InputError, ConfigError, UnknownNameError, MissingExtraError)


def main() -> None:
    """Entry point: SafesideErrors become one line on standard error and exit code 1 or 2."""
    try:
        app()
    except SafesideError as error:
        sys.stdout.flush()
        print(f"safeside: {error}", file=sys.stderr)
        raise SystemExit(2 if isinstance(error, _MISUSE) else 1) from error
    except KeyboardInterrupt as error:
        print("safeside: interrupted", file=sys.stderr)
        raise SystemExit(1) from error
    except BrokenPipeError as error:
        raise SystemExit(1) from error


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder for the trained guard and report.html.")] = Path("demo_output"),
    quick: Annotated[bool, typer.Option("--quick", help="Fewer rows and answers: a smoke test, not figures.")] = False,
    as_json: Json = False,
) -> None:
    """Train a guard on the built-in base, score prompts, chat, write report.html."""
    with extra("train,eval"):
        from safeside.demo import run_demo
    result = run_demo(output, quick=quick, show=not as_json)
    if as_json:
        print_json(result)


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="A TOML recipe.")],
    data: Annotated[Path | None, typer.Option(help="Folder that the recipe's data paths start from.")] = None,
    output: Annotated[Path | None, typer.Option(help="Where the adapter goes (default: the recipe's).")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a run that was killed.")] = False,
    dry: Annotated[
        bool, typer.Option("--dry-run", help="Only check shapes, memory and data; loads no weights.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Train the adapter that a recipe describes, calibrate it and save it. Bad rows are reported, and exit 1."""
    with extra("train"):
        from safeside.train.command import train_command
        from safeside.train.dry_run import dry_run
    if dry:
        if resume or output is not None:
            raise InputError("--dry-run writes nothing and reads no checkpoint; leave --resume and --output out.")
        found = dry_run(recipe, data or recipe.parent)
        print_summary(found, str(recipe), as_json)
        if found["problems"]:
            raise typer.Exit(1)
        return
    summary = train_command(recipe, data or recipe.parent, output, resume)
    if summary is None:
        return
    print_summary(summary, str(recipe), as_json)
    if summary["bad_rows"]:
        raise typer.Exit(1)


@app.command("eval")
def evaluate(
    adapter: Annotated[str | None, typer.Argument(help="Adapter: a folder, a hub name or builtin:harm.")] = None,
    data: EvalData = None,
    suite: Annotated[str | None, typer.Option(help="A named suite, such as 'demo'.")] = None,
    strengths: Strengths = None,
    gate: Annotated[str | None, typer.Option(help="Guard that gates the aligner (targeted alignment).")] = None,
    preset: PresetName = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Prompts of each kind (default: the suite's).")] = None,
    judge: Annotated[str | None, typer.Option(help="Judge of the answers (default: the suite's).")] = None,
    endpoint: Annotated[str | None, typer.Option(help="Chat endpoint of a judge, such as http://host/v1.")] = None,
    judge_model: Annotated[str | None, typer.Option(help="What the endpoint calls its model.")] = None,
    judge_key: JudgeKey = None,
    judge_tokens: Annotated[int, typer.Option(min=1, help="Most tokens to spend on the endpoint.")] = 2_000_000,
    records: Annotated[Path | None, typer.Option(help="Keep every answer here; a killed run goes on.")] = None,
    rejudge: Annotated[Path | None, typer.Option(help="Judge the records of this file again: no adapter.")] = None,
    compare: Annotated[Path | None, typer.Option(help="Count wins and ties against these records.")] = None,
    base: BaseName = None,
    allow_mismatch: Mismatch = None,
    as_json: Json = False,
) -> None:
    """Measure a guard on labelled rows, or an adapter on a suite. Unscored answers are counted, and exit 1."""
    _check_eval(adapter, data, suite, rejudge)
    with extra("eval"):
        from safeside.evals.command import EvalOptions, JudgeChoice, evaluate_command, rejudge_command
        from safeside.evals.endpoint import endpoint_of
        from safeside.evals.judges import JudgeOptions
    asked = JudgeOptions(data, endpoint_of(endpoint, judge_model, judge_key, judge_tokens))
    choice = JudgeChoice(judge, asked, records, compare)
    if rejudge is not None:
        rows, failed = rejudge_command(rejudge, choice)
    else:
        options = EvalOptions(data, suite, parse_strengths(strengths), gate, allow_mismatch, preset, limit, choice)
        rows, failed = evaluate_command(*load_with_base(str(adapter), base, allow_mismatch), options, str(adapter))
    print_rows(rows, str(adapter or rejudge), as_json)
    if failed:
        raise typer.Exit(1)


def _check_eval(adapter: str | None, data: Path | None, suite: str | None, rejudge: Path | None) -> None:
    if (adapter is None) == (rejudge is None):
        raise InputError("eval needs one of ADAPTER and --rejudge FILE; got neither or both.")
    if rejudge is not None and suite is not None:
        raise InputError("--rejudge judges the records of one file; --suite is for adapters. Leave it out.")
    if rejudge is None and data is None and suite is None:
        raise InputError("eval needs one of --data FILE and --suite NAME, or a suite and --data FOLDER; got neither.")


@app.command()
def guard(
    adapter: Annotated[str, typer.Argument(help="Guard: a folder, a hub name or builtin:harm.")],
    file: Annotated[Path | None, typer.Argument(help="Rows, .jsonl or .jsonl.gz; standard input if left out.")] = None,
    also: Annotated[list[str] | None, typer.Option(help="A further guard, scored in the same pass.")] = None,
    preset: PresetName = None,
    base: BaseName = None,
    allow_mismatch: Mismatch = None,
    output: Annotated[
        Path | None, typer.Option(help="Keep the lines here, with progress; a killed run goes on.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object with all lines and counts.")] = False,
) -> None:
    """Score rows: one JSON line each, in order. Rows that cannot be scored are flagged, counted, and exit 1."""
    from safeside.artifact import load_adapter
    from safeside.guards.lines import guard_lines

    loaded_base, first = load_with_base(adapter, base, allow_mismatch)
    others = [load_adapter(name, loaded_base, allow_mismatch=allow_mismatch) for name in also or []]
    guards = [guard.with_preset(preset) for guard in (first, *others)]
    if output is not None:
        _guard_into(output, loaded_base, guards, file, as_json)
        return
    collected: list[dict[str, object]] = []
    n_rows = n_bad = 0
    for line, problem in guard_lines(loaded_base, guards, file):
        n_rows += 1
        if problem is not None:
            n_bad += 1
            print(f"safeside: line {line['line']}: {problem}", file=sys.stderr)
        if as_json:
            collected.append(line)
        else:
            print(json.dumps(line), flush=True)
    if as_json:
        print_json({"rows": collected, "n_bad": n_bad})
    if not n_rows:
        _say_no_rows(file)
    if n_bad:
        print(f"safeside: {n_bad} bad rows; each was flagged unscored", file=sys.stderr)
        raise typer.Exit(1)


def _guard_into(output: Path, base: Any, guards: Any, file: Path | None, as_json: bool) -> None:
    """Keep the lines in a file; what was bad in it before counts as well."""
    from safeside.guards.lines import keep_lines, n_unscored
    from safeside.terminal import progress_bar

    if file is None or as_json:
        raise InputError("--output reads rows from a file, so that it can go on, and prints none. Leave --json out.")
    with progress_bar(str(file), None) as advance:
        for line, problem in keep_lines(base, guards, file, output, advance):
            if problem is not None:
                print(f"safeside: line {line['line']}: {problem}", file=sys.stderr)
    if not output.stat().st_size:
        _say_no_rows(file)
    if n_bad := n_unscored(output):
        print(f"safeside: {n_bad} bad rows; each was flagged unscored", file=sys.stderr)
        raise typer.Exit(1)


def _say_no_rows(file: Path | None) -> None:
    print(f"safeside: 0 rows in {file or 'standard input'}: nothing was judged", file=sys.stderr)


@app.command()
def chat(
    prompt: Annotated[str | None, typer.Argument(help="One prompt; left out: lines from standard input.")] = None,
    base: BaseName = None,
    aligner: Annotated[list[str] | None, typer.Option(help="Aligner to attach (repeatable).")] = None,
    guard: Annotated[list[str] | None, typer.Option(help="Guard to attach (repeatable).")] = None,
    strengths: Annotated[
        str | None, typer.Option(help="One answer for each strength, comma-separated; 1 unless given.")
    ] = None,
    gated: Annotated[bool, typer.Option("--gated", help="Let the first guard set the strength up to these.")] = False,
    preset: PresetName = None,
    stop: Annotated[bool, typer.Option("--stop", help="End answers by the guards' own stop rules.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer in tokens.")] = 96,
    allow_mismatch: Mismatch = None,
    as_json: Json = False,
) -> None:
    """Chat with a base and its adapters, at one or several strengths.

    A typed line that cannot be answered is reported; the session goes on and exits with 1.
    """
    from safeside.conversation import ChatOptions, chat_command

    options = ChatOptions(
        base,
        aligner or [],
        guard or [],
        parse_strengths(strengths),
        gated,
        max_new_tokens,
        allow_mismatch,
        preset,
        stop,
    )
    if not chat_command(options, prompt, as_json):
        raise typer.Exit(1)


@app.command()
def calibrate(
    adapter: Annotated[str, typer.Argument(help="Guard: a folder, a hub name or builtin:harm.")],
    benign: Annotated[Path, typer.Option(help="Harmless rows of your traffic, .jsonl or .jsonl.gz.")],
    fpr: Annotated[float, typer.Option(help="Share of harmless texts to be flagged under a label, at most.")] = 0.01,
    harmful: Annotated[Path | None, typer.Option(help="Harmful rows, for probabilities.")] = None,
    mode: Annotated[ReadMode | None, typer.Option(help="Reading mode (default: all the rows have but stream).")] = None,
    consecutive: Annotated[int | None, typer.Option(min=1, help="With --mode stream: risky tokens that stop.")] = None,
    output: Annotated[Path | None, typer.Option(help="New folder (default: NAME-calibrated).")] = None,
    base: BaseName = None,
    as_json: Json = False,
) -> None:
    """Set a guard's thresholds on your own traffic, at a promised false-positive rate."""
    with extra("eval"):
        from safeside.guards.recalibrate import Traffic, calibrate_command
    rows, summary = calibrate_command(adapter, base, Traffic(benign, harmful, fpr, mode, consecutive), output)
    if as_json:
        print_json({**summary, "thresholds": rows})
    else:
        print_rows(rows, str(summary["adapter"]), as_json)
    if summary["n_skipped"]:
        raise typer.Exit(1)


@app.command()
def info(
    adapter: Annotated[str | None, typer.Argument(help="Adapter; left out: only the base.")] = None,
    base: BaseName = None,
    allow_mismatch: Mismatch = None,
    as_json: Json = False,
) -> None:
    """Say what an adapter or a base is: layers, widths, exact cost, thresholds, origin."""
    from safeside.facts import adapter_facts, base_facts

    facts = base_facts(base or "builtin") if adapter is None else adapter_facts(adapter, base, allow_mismatch)
    if as_json:
        print_json(facts)
    else:
        from safeside.terminal import table

        table(["fact", "value"], [[key, cell(value)] for key, value in facts.items()])


@app.command()
def patch(
    adapter: Annotated[str, typer.Argument(help="Guard: a folder, a hub name or builtin:harm.")],
    examples: Annotated[Path | None, typer.Option(help="Labelled rows of the new family, 16 to 64 or more.")] = None,
    replay: Annotated[
        Path | None, typer.Option(help="Labelled rows like those it learnt from; half of them measure.")
    ] = None,
    held_out: Annotated[Path | None, typer.Option(help="More of the family, only measured.")] = None,
    output: Annotated[Path | None, typer.Option(help="A new folder (default: the adapter's own).")] = None,
    rollback: Annotated[bool, typer.Option("--rollback", help="Undo the last patch, bit for bit.")] = False,
    base: BaseName = None,
    seed: Annotated[int, typer.Option(min=0, help="Of every draw.")] = 0,
    as_json: Json = False,
) -> None:
    """Teach a guard a new family of unsafe texts from a few examples; --rollback undoes the last patch."""
    if (examples is None) == (not rollback):
        raise InputError("patch needs one of --examples FILE and --rollback; got neither or both.")
    if rollback:
        from safeside.guards.versions import rollback_command

        given = {"--replay": replay, "--held-out": held_out, "--base": base, "--seed": seed or None}
        if unread := [option for option, value in given.items() if value is not None]:
            raise InputError(
                f"--rollback copies files and reads no {', '.join(unread)}. Leave out what it does not read."
            )
        summary = rollback_command(adapter, output)
    else:
        assert examples is not None
        with extra("train"):
            from safeside.train.patch_command import PatchFiles, patch_command
        summary = patch_command(adapter, PatchFiles(examples, replay, held_out), output, base, seed)
    print_summary(summary, adapter, as_json)
    if summary.get("bad_rows"):
        raise typer.Exit(1)


@app.command()
def port(
    adapter: Annotated[str, typer.Argument(help="Adapter: a folder, a hub name or builtin:harm.")],
    to: Annotated[str, typer.Option(help="The new base: 'builtin', a folder or a hub name.")],
    text: Annotated[Path, typer.Option(help="Rows of text without labels, .jsonl or .jsonl.gz.")],
    output: Annotated[Path | None, typer.Option(help="New folder (default: NAME-on-BASE).")] = None,
    method: Annotated[str | None, typer.Option(help="map, distill or both (default: both where maps can be).")] = None,
    size: Annotated[float | None, typer.Option(help="Most of the new base's compute: 0.01 is 1%. By distill.")] = None,
    base: BaseName = None,
    seed: Annotated[int, typer.Option(min=0, help="Of first weights and every draw.")] = 0,
    as_json: Json = False,
) -> None:
    """Carry an adapter over to another base, with text but no labels."""
    with extra("train"):
        from safeside.train.port_command import PortOptions, port_command
    summary = port_command(adapter, PortOptions(to, text, output, method, base, size, seed))
    print_summary(summary, adapter, as_json)
    if summary["bad_rows"]:
        raise typer.Exit(1)


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(help="An adapter's folder.")],
    repository: Annotated[str, typer.Argument(help="owner/name on the model hub.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    as_json: Json = False,
) -> None:
    """Check an adapter's folder and upload it to the model hub."""
    from safeside.artifact import push_adapter

    address = push_adapter(folder, repository, private=private)
    if as_json:
        print_json({"address": address})
    else:
        print(address)


app.add_typer(policy_app, name="policy")
app.add_typer(gene_app, name="gene")
app.command()(score)
app.command()(serve)
app.command()(key)


def parse_strengths(text: str | None) -> list[float] | None:
    """``"0,0.5,1"`` as numbers that an aligner can have; anything else is an InputError."""
    if text is None:
        return None
    from safeside.mixing import fixed

    try:
        return list(fixed([float(part) for part in text.split(",")]).values)
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"Strengths must be numbers like 0,0.5,1; got {text!r}.") from error
