"""The commands of serving: the server, policies and keys, and scoring in bulk."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from safeside.cli_shared import BaseName, Json, Mismatch, PresetName, extra, print_json, print_rows, print_summary
from safeside.errors import InputError

policy_app = typer.Typer(help="Check a file of policies, or try it on rows.", no_args_is_help=True)
PolicyFile = Annotated[Path, typer.Argument(help="A YAML file of policies, as serve takes it.")]
ServedBase = Annotated[str, typer.Option("--base", help="Base: 'builtin', a folder or a hub name.")]
Rate = Annotated[int | None, typer.Option(min=1, help="Most in a minute (default: no limit).")]
Engine = Literal["hf", "vllm"]
OPTIONS_OF_ONE = {
    "hf": (
        "policy", "keys", "audit", "device", "adapter_root", "origin", "max_rows", "max_waiting", "deadline",
        "guard_timeout", "judge_every", "max_body", "max_judged", "max_tokens", "drain",
    ),
    "vllm": ("guard", "aligner", "strength", "spare_token", "vllm_flag", "print_command"),
}  # fmt: skip
"""Options of ``serve`` that one engine alone reads."""
Size = Annotated[int | None, typer.Option(min=1, help="Most in one request (default: no limit).")]


def serve(
    context: typer.Context,
    policy: Annotated[Path | None, typer.Option(help="A YAML file of policies; it names the adapters.")] = None,
    base: ServedBase = "builtin",
    keys: Annotated[Path | None, typer.Option(help="The file of keys (see key); without it only on this host.")] = None,
    audit: Annotated[str, typer.Option(help="Audit log: a SQLAlchemy URL.")] = "sqlite:///safeside-audit.db",
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 for any.")] = 8000,
    model_name: Annotated[str | None, typer.Option(help="What clients call the model (default: the base).")] = None,
    device: Annotated[str, typer.Option(help="Where the base runs, such as cuda.")] = "cpu",
    dtype: Annotated[str | None, typer.Option(help="Of the weights, such as bfloat16.")] = None,
    adapter_root: Annotated[list[Path] | None, typer.Option(help="Genes and adapters may be loaded from here.")] = None,
    origin: Annotated[list[str] | None, typer.Option(help="Web origin that may call from a browser.")] = None,
    max_rows: Annotated[int, typer.Option(min=1, help="Answers written at the same time.")] = 32,
    max_waiting: Annotated[int, typer.Option(min=1, help="Requests that wait; one more gets 429.")] = 64,
    deadline: Annotated[float, typer.Option(min=0.1, help="Seconds that one answer may take.")] = 120.0,
    guard_timeout: Annotated[float, typer.Option(min=0.001, help="Seconds after which a guard is too late.")] = 10.0,
    judge_every: Annotated[int, typer.Option(min=1, help="Tokens of an answer that guards judge together.")] = 1,
    max_body: Annotated[int, typer.Option(min=1024, help="Most bytes of a request.")] = 1 << 20,
    max_judged: Annotated[int, typer.Option(min=1, help="Most tokens that one moderation reads.")] = 65_536,
    max_tokens: Annotated[int, typer.Option(min=1, help="Of an answer whose request says nothing.")] = 256,
    drain: Annotated[float, typer.Option(min=0, help="Seconds that answers may go on after SIGTERM.")] = 30.0,
    engine_name: Annotated[Engine, typer.Option("--engine", help="'vllm' becomes vLLM's own server.")] = "hf",
    guard: Annotated[list[str] | None, typer.Option(help="vllm: a guard (may be repeated).")] = None,
    aligner: Annotated[str | None, typer.Option(help="vllm: the aligner.")] = None,
    strength: Annotated[str | None, typer.Option(help="vllm: number or JSON, where a request has none (1.0).")] = None,
    spare_token: Annotated[list[str] | None, typer.Option(help="vllm: a token never written, to carry scores.")] = None,
    vllm_flag: Annotated[list[str] | None, typer.Option(help="vllm: a flag of its own, with =.")] = None,
    print_command: Annotated[bool, typer.Option("--print-command", help="vllm: print it, start nothing.")] = False,
) -> None:
    """Serve a base with its guards and aligners to OpenAI's clients. SIGHUP reads policies and keys again."""
    _check_engine(context, engine_name)
    at: dict[str, object] = {"base": base, "host": host, "port": port, "model": model_name, "dtype": dtype}
    if engine_name == "vllm":
        return _serve_vllm({**at, "aligner": aligner}, (guard, spare_token, vllm_flag), strength, print_command)
    files: dict[str, object] = {"policy": policy, "keys": keys, "audit": audit, "device": device, "drain_s": drain}
    guards = {"guard_timeout_s": guard_timeout, "judge_every": judge_every}
    engine = {"max_rows": max_rows, "max_waiting": max_waiting, **guards}
    service = {"deadline_s": deadline, "max_body_bytes": max_body, "max_judged_tokens": max_judged}
    service["default_max_tokens"] = max_tokens
    return _serve_embedded({**at, **files}, (adapter_root, origin), engine, service)


def _serve_embedded(
    options: dict[str, object],
    lists: tuple[list[Path] | None, list[str] | None],
    engine: dict[str, Any],
    service: dict[str, Any],
) -> None:
    roots, origins = lists
    options |= {"adapter_roots": tuple(roots or ()), "origins": tuple(origins or ())}
    with extra("serve"):
        from safeside.serve.command import ServeOptions, serve_command
        from safeside.serve.engine import EngineLimits
        from safeside.serve.service import ServiceLimits
    limits = {"engine": EngineLimits(**engine), "service": ServiceLimits(**service)}
    serve_command(ServeOptions(**options, **limits, add_genes=_add_genes))  # type: ignore[arg-type]


def _check_engine(context: typer.Context, engine: Engine) -> None:
    """Raise where options are given that the engine would not read, or one that it needs is missing."""
    other = "hf" if engine == "vllm" else "vllm"
    wrong = _given(context, OPTIONS_OF_ONE[other])
    if wrong and engine == "vllm":
        raise InputError(
            f"{', '.join(wrong)} would not be read: it belongs to the embedded server. With --engine vllm name "
            "--guard and --aligner, and let each request say its strength; vLLM's own limits go into --vllm-flag."
        )
    if wrong:
        raise InputError(
            f"{', '.join(wrong)} would not be read: it is for --engine vllm. Use --policy, or that engine."
        )
    if engine == "hf" and not _given(context, ["policy"]):
        raise InputError("No policies were given; expected --policy FILE, or --engine vllm with --guard or --aligner.")


def _given(context: typer.Context, names: Sequence[str]) -> list[str]:
    """The options among ``names`` that were given, be it with their default."""
    sources = {name: context.get_parameter_source(name) for name in names}
    given = [name for name, source in sources.items() if source is not None and source.name != "DEFAULT"]
    return [f"--{name.replace('_', '-')}" for name in given]


def _serve_vllm(
    options: dict[str, object], lists: tuple[list[str] | None, ...], strength: str | None, only_prints: bool
) -> None:
    guards, spare_tokens, more = (given or () for given in lists)
    options |= {"guards": guards, "spare_tokens": spare_tokens, "more": more}
    with extra("vllm"):
        from safeside.vllm_plugin.launch import VllmOptions, serve_on_vllm
        from safeside.vllm_plugin.strengths import spelled
    serve_on_vllm(VllmOptions(**options, strength=spelled(strength or "1.0")), only_prints=only_prints)  # type: ignore[arg-type]


def score(
    source: Annotated[str, typer.Option("--input", help="Rows, .parquet or .jsonl: a file, folder, pattern or URL.")],
    output: Annotated[str, typer.Option(help="A folder or URL for the scored rows; a killed run goes on.")],
    guard: Annotated[list[str], typer.Option(help="Guard: a folder, a hub name or builtin:harm (repeatable).")],
    engine: Annotated[Engine, typer.Option(help="What runs the base.")] = "hf",
    workers: Annotated[int, typer.Option(min=1, help="Processes, each with the base and a core of its own.")] = 1,
    preset: PresetName = None,
    base: BaseName = None,
    device: Annotated[str, typer.Option(help="Where each worker runs the base, such as cuda.")] = "cpu",
    allow_mismatch: Mismatch = None,
    vllm_option: Annotated[list[str] | None, typer.Option(help="vllm: name=value for its engine.")] = None,
    shard_rows: Annotated[int, typer.Option(min=1, help="Rows in each file of the output.")] = 1000,
    as_json: Json = False,
) -> None:
    """Score files of any size: one output row for each row. Rows that cannot be scored are quarantined, and exit 1."""
    with extra("ray"):
        from safeside.guards.setup import Setup
        from safeside.scale.bulk import BulkOptions, score_command
    if engine == "vllm":
        _add_vllm_engine()
    setup = Setup(tuple(guard), base, preset, allow_mismatch, device, tuple(vllm_option or ()))
    summary = score_command(BulkOptions(source, output, setup, engine, workers, shard_rows))
    print_summary(summary, source, as_json)
    if summary["n_bad"]:
        raise typer.Exit(1)


def _add_vllm_engine() -> None:
    """The engine that the plugin has: Ray and vLLM are extras that do not know each other."""
    with extra("vllm"):
        from safeside.scale.engines import ENGINES, ScoringEngine
        from safeside.vllm_plugin.scorer import make_scorer, settings_of
    if "vllm" not in ENGINES:
        ENGINES.register("vllm", ScoringEngine(make_scorer, settings_of))


@policy_app.command("check")
def policy_check(file: PolicyFile, base: BaseName = None, as_json: Json = False) -> None:
    """Say what a file of policies holds, or what is wrong with it. With --base its adapters are checked as well."""
    with extra("serve"):
        from safeside.serve.simulate import check_command
    print_rows(check_command(file, base, _add_genes), str(file), as_json)


@policy_app.command("simulate")
def policy_simulate(
    file: PolicyFile,
    data: Annotated[Path, typer.Option(help="Prompts or whole exchanges, .jsonl or .jsonl.gz.")],
    tenant: Annotated[str, typer.Option(help="Whose requests these would have been.")] = "",
    policy: Annotated[str | None, typer.Option(help="A policy that every request would have named.")] = None,
    base: Annotated[str, typer.Option(help="Base: 'builtin', a folder or a hub name.")] = "builtin",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object with all lines and counts.")] = False,
) -> None:
    """Say what a policy would have done with each row, and why. Rows that cannot be scored are counted, and exit 1."""
    with extra("serve"):
        from safeside.serve.simulate import Asked, Served, simulate_command, summary_of
    lines, n_bad = [], 0
    for line, is_good in simulate_command(file, data, Asked(policy), Served(base, tenant, _add_genes)):
        lines.append(line)
        n_bad += not is_good
        if not as_json:
            print(json.dumps(line), flush=True)
    summary = {**summary_of(lines), "n_bad": n_bad}
    if as_json:
        print_json({"rows": lines, "summary": summary})
    else:
        print(f"safeside: {json.dumps(summary)}", file=sys.stderr)
    if n_bad:
        raise typer.Exit(1)


def key(
    file: Annotated[Path, typer.Argument(help="The file of keys, made if missing.")],
    name: Annotated[str, typer.Argument(help="What the key is called.")],
    tenant: Annotated[str, typer.Option(help="Whose key it is.")],
    admin: Annotated[bool, typer.Option("--admin", help="May load and unload adapters.")] = False,
    may_loosen: Annotated[bool, typer.Option("--may-loosen", help="May ask for less than its policy.")] = False,
    requests_per_minute: Rate = None,
    tokens_per_minute: Rate = None,
    max_prompt_tokens: Size = None,
    max_new_tokens: Size = None,
    as_json: Json = False,
) -> None:
    """Make an API key. It is shown once; the file keeps its hash."""
    with extra("serve"):
        from safeside.serve.keys import make_key
    limits = {
        "requests_per_minute": requests_per_minute,
        "tokens_per_minute": tokens_per_minute,
        "max_prompt_tokens": max_prompt_tokens,
        "max_new_tokens": max_new_tokens,
    }
    rights = {"tenant": tenant, "is_admin": admin, "may_loosen": may_loosen, "limits": limits}
    made = make_key(file, name, rights)
    if as_json:
        print_json({"name": name, "tenant": tenant, "key": made})
    else:
        print(made)  # alone on its line, so that no table cuts it


def _add_genes(base: Any, folders: Mapping[str, Path]) -> dict[str, str]:
    """Make a policy file's genes live in a base; gives a fingerprint for each."""
    if not folders:
        return {}
    with extra("lora"):
        from safeside.genes.command import add_genes
    return add_genes(base, folders)
