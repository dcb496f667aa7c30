"""vLLM with adapters beside ``attach`` (are tokens and scores the same?) and beside vLLM alone (what do they cost?).

    python benchmarks/vllm_bench.py              # both parts, in the environment of make setup-vllm
    python benchmarks/vllm_bench.py --only cost --geometries toy --rounds 12 --clock cpu    # the other rows stay

Costs are measured on random weights in bfloat16: every round times each engine once, in an order that rotates, and a
ratio is taken within a round.  ``tokens_per_s`` counts prompt tokens in prefill and drawn tokens in decoding.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from safeside import create_adapter, load_base, save_adapter, sized_config
from safeside.errors import InputError
from safeside.provenance import config_hash, git_commit
from safeside.terminal import note
from safeside.vllm_plugin.plan import Plan, installed_version, plan_engine
from tidy import RESULTS, Row, figure_row, ratio_figure, result_of, write_json
from vllm_matrix import Case, compare, execute, matrix, randomise, tiny_tokenizer

# Qwen/Qwen2.5-0.5B's config.json, and a toy of which more fits in an hour.
GEOMETRIES: dict[str, dict[str, Any]] = {
    "Qwen2.5-0.5B": {
        "hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
        "intermediate_size": 4864, "vocab_size": 151936, "tie_word_embeddings": True,
    },
    "toy": {
        "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "num_key_value_heads": 2,
        "intermediate_size": 2048, "vocab_size": 16384, "tie_word_embeddings": True,
    },
}  # fmt: skip
Timings = dict[str, list[dict[str, float]]]
TAPS = {"": 6, "_3_taps": 3}  # by ending of a variant's name: how many layers its adapters read
VARIANTS = ("stock", *(f"{name}{ending}" for ending in TAPS for name in ("guard", "guard_aligner")))
GOALS = {"guard": 0.95, "guard_aligner": 0.90}  # of stock decoding
SIZE = 0.01  # share of the base's multiply-adds of each adapter


def parity_rows(cases: Sequence[Case]) -> list[Row]:
    """The figures of every case."""
    rows: list[Row] = []
    for case in cases:
        labels: dict[str, object] = {"case": case.name, "runner": case.runner, "model": case.model}
        with tempfile.TemporaryDirectory() as root:
            compared = compare(case, Path(root))
        counts: dict[str, object] = {"n": len(case.lengths) * case.rounds, "config_hash": config_hash(labels)}
        values = {
            "tokens_equal_share": compared.tokens_equal, "score_diff": compared.score_diff,
            "kept_diff": compared.kept_diff, "preemptions": compared.preemptions, "hits": compared.hits,
        }  # fmt: skip
        rows += [figure_row(labels, metric, value, **counts) for metric, value in values.items()]
        note(f"{case.name} {case.model} {case.runner}: {compared}")
    return rows


def make_engines(geometry: str, root: Path) -> dict[str, dict[str, Any]]:
    """By variant an engine: a base of random weights, and ``lst`` adapters beside it."""
    values = GEOMETRIES[geometry]
    config = CONFIG_MAPPING["qwen2"](**values, max_position_embeddings=4096)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(root / "base")
    del model
    tiny_tokenizer().save_pretrained(root / "base")
    engines, base = {"stock": engine_of({"model": str(root / "base")})}, load_base(root / "base", dtype="bfloat16")
    for ending, n_taps in TAPS.items():
        folders = {}
        for role in ("guard", "align"):
            made = create_adapter(base, sized_config(base, SIZE, n_taps, role=role, name=role))
            folders[role] = save_adapter(randomise(made), root / f"{role}{ending}")
        engines[f"guard{ending}"] = planned(plan_engine(root / "base", [folders["guard"]]))
        engines[f"guard_aligner{ending}"] = planned(plan_engine(root / "base", [folders["guard"]], folders["align"]))
    return engines


def planned(plan: Plan) -> dict[str, Any]:
    """A planned engine, whose requests read every score: what nobody reads is not what a guard costs."""
    return engine_of(plan.engine_options(), plan.config.slots, plan.config.tells_strength)


def engine_of(options: dict[str, Any], slots: Sequence[int] = (), tells_strength: bool = False) -> dict[str, Any]:
    """Arguments of ``vllm.LLM``, and what each request asks it for."""
    return {"options": options, "slots": list(slots), "tells_strength": tells_strength}


def cost_rows(geometry: str, options: argparse.Namespace) -> list[Row]:
    """Speed of every variant and its ratio to stock, by phase."""
    with tempfile.TemporaryDirectory() as name:
        seconds = timings(make_engines(geometry, Path(name)), options, Path(name))
    rows: list[Row] = []
    n_tokens = {"prefill": options.batch * options.tokens, "decode": options.batch}
    for phase, count in n_tokens.items():
        for variant in VARIANTS:
            labels: dict[str, object] = {"variant": variant, "phase": phase, "geometry": geometry}
            mine, stock = (np.array([found[phase] for found in seconds[each]]) for each in (variant, "stock"))
            counts: dict[str, object] = {"n": len(mine), "config_hash": config_hash(labels)}
            speeds = count / mine
            spread = float(speeds.min()), float(speeds.max())
            rows.append(figure_row(labels, "tokens_per_s", float(np.median(speeds)), spread, **counts))
            ratio, interval = ratio_figure(stock, mine)
            rows.append(figure_row(labels, "ratio_to_stock", ratio, interval, **counts))
    return rows


def timings(engines: dict[str, dict[str, Any]], options: argparse.Namespace, root: Path) -> Timings:
    """By variant and round, seconds by phase."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 250, (options.batch, options.tokens), generator=generator).tolist()
    settings = {
        "dtype": "bfloat16",
        "max_model_len": 2048,
        "max_num_seqs": options.batch,
        "enforce_eager": options.eager,
        "enable_prefix_caching": False,
    }
    job = {
        "engines": {name: {**engine, "options": {**settings, **engine["options"]}} for name, engine in engines.items()},
        "rounds": options.rounds,
        "clock": options.clock,
        "n_steps": options.steps,
        "prompts": [{"ids": row} for row in ids],
    }
    found: Timings = execute(job, Case("cost"), root)
    return found


def goals_of(rows: Sequence[Row]) -> list[dict[str, object]]:
    """Which goals of decoding are met, by the median."""
    asked = [row for row in rows if row["metric"] == "ratio_to_stock" and row["phase"] == "decode"]
    named = [{name: row[name] for name in ("geometry", "variant", "value")} for row in asked]
    goals = {f"{name}{ending}": goal for name, goal in GOALS.items() for ending in TAPS}
    return [
        {**row, "goal": (goal := goals[str(row["variant"])]), "met": float(str(row["value"])) >= goal}
        for row in named
        if row["variant"] in goals
    ]


def cost_settings(options: argparse.Namespace) -> dict[str, object]:
    """How costs were measured."""
    names = ("batch", "tokens", "steps", "rounds", "clock", "eager")
    return {**{name: vars(options)[name] for name in names}, "reads_scores": True}


def title(case: Case) -> str:
    """What a case is called on the command line."""
    return f"{case.name}-{case.model}-{case.runner}"


def chosen_cases(titles: Sequence[str] | None) -> list[Case]:
    """The cases of these titles, all of the matrix without any; an unknown title is an InputError."""
    known = {title(case): case for case in matrix()}
    if unknown := [name for name in titles or () if name not in known]:
        raise InputError(f"There is no case {', '.join(unknown)}; expected some of {', '.join(known)}.")
    return [known[name] for name in titles or known]


def place_of(row: Row) -> tuple[object, ...]:
    """What a figure is of, so that a new one replaces it."""
    return tuple(row.get(name) for name in ("case", "runner", "model", "variant", "phase", "geometry", "metric"))


def main(arguments: Sequence[str] | None = None) -> Path:
    """Parse, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", choices=("parity", "cost"), help="one part; the other's rows stay")
    parser.add_argument("--cases", nargs="*", help="some cases, such as eager-llama-v1; the others' rows stay")
    parser.add_argument("--geometries", nargs="+", default=list(GEOMETRIES), choices=list(GEOMETRIES))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128, help="of each prompt")
    parser.add_argument("--steps", type=int, default=32, help="decoded tokens of one timing")
    parser.add_argument("--rounds", type=int, default=10, help="timings of each variant")
    parser.add_argument("--clock", default="wall", choices=("wall", "cpu"), help="cpu: seconds of the process's own")
    parser.add_argument("--compiled", dest="eager", action="store_false", help="with torch.compile")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the result file")
    options = parser.parse_args(arguments)
    path, commit = options.output / "vllm.json", git_commit()  # before results change the tree
    for case in chosen_cases(options.cases) if options.only != "cost" else ():
        started = time.perf_counter()
        add_rows(path, parity_rows([case]), {title(case): {"commit": commit}}, started)
    for geometry in options.geometries if options.only != "parity" else ():
        started = time.perf_counter()
        add_rows(path, cost_rows(geometry, options), {geometry: {"commit": commit, **cost_settings(options)}}, started)
    note(f"wrote {path}")
    return path


def add_rows(path: Path, new: Sequence[Row], settings: dict[str, dict[str, object]], started: float) -> None:
    """Write rows in place of those of the same figures: a run that fails later has lost nothing, others' rows stay."""
    before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"rows": [], "notes": {"settings": {}}}
    rows: list[Row] = [*(row for row in before["rows"] if place_of(row) not in set(map(place_of, new))), *new]
    notes = {
        "goals": goals_of(rows), "vllm": installed_version(),
        "settings": {**before["notes"]["settings"], **settings},
        "adapters": f"lst, each at most {SIZE:.0%} of the base's multiply-adds, on {TAPS['']} taps or as named",
        "interval": "ratio_to_stock: 95% bootstrap over rounds of the median; tokens_per_s: lowest and highest round",
        "seconds": "of the case or geometry that was measured last",
        "not_verified": "anything on CUDA: graphs, FlashAttention, NCCL, runner V2 on a GPU (see tests/gpu)",
    }  # fmt: skip
    write_json(path, result_of("vllm", time.perf_counter() - started, rows, notes))


if __name__ == "__main__":
    main(sys.argv[1:])
