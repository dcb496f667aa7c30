"""Make the built-in base and its adapters from their text and rows, in one command (`make builtin`).

    python scripts/builtin/make.py --data ../shared/data --text ../shared/pretrain/text --only adapters

The base: tokens (prepare.py), training from nothing (train.py, on every GPU there is, else on two CPU processes), its
card (card.py).  The adapters: rows (rows.py), the base's own answers to harmless prompts, training by the recipes in
recipes/builtin/, cards with sources, limits and validation figures (``--only cards`` writes these anew).
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from rows import (
    DEMO,
    GUARD_SOURCES,
    KEPT_SOURCES,
    Row,
    benign_rows,
    data_facts,
    guard_rows,
    kept_rows,
    refusal_rows,
    write,
)

from safeside.adapters.adapter import Adapter
from safeside.adapters.config import log_odds
from safeside.artifact import annotate_adapter, copy_adapter, load_adapter, read_provenance
from safeside.base.model import Base, load_base
from safeside.evals.guards import report_on
from safeside.evals.metrics import guard_figures
from safeside.evals.runs import run_aligner_suite
from safeside.evals.suites import Suite
from safeside.guards.calibrate import fit_mode
from safeside.guards.score import place_of, score_conversations
from safeside.guards.stream import calibrate_stream
from safeside.tasks.learnt import save_learnt
from safeside.tasks.rows import example_of
from safeside.terminal import note, progress_bar
from safeside.train.recipe import read_recipe
from safeside.train.run import run_recipe
from safeside.types import Example, Message, Mode

BUILTIN = Path("src/safeside/builtin")
MODEL_FILES = (
    "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    "chat_template.jinja", "log.csv", "README.md",
)  # fmt: skip
LICENCE = "weights: Apache-2.0; the data sources keep their own licences and are to be credited"
LIMITS = {
    "harm": "for trying out, not for protecting anyone: English, one label for every kind of harm, a tiny base; its "
    "validation rows come from the sources that it learnt from, so expect less elsewhere",
    "refuse": "for trying out, not for protecting anyone: English, a tiny base that could not help with harm in "
    "substance anyway; refusals come from templates, so they sound alike, and it over-refuses as shown",
}


def main() -> None:
    """Parse the options and make what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="labelled sets")
    parser.add_argument("--text", type=Path, default=Path("../shared/pretrain/text"), help="pretraining text")
    parser.add_argument("--work", type=Path, default=Path("runs/builtin"), help="folder for everything in between")
    parser.add_argument("--minutes", type=float, default=10.0 if torch.cuda.is_available() else 180.0)
    parser.add_argument(
        "--only", choices=("base", "adapters", "harm", "presets", "refuse", "cards"), help="make only this"
    )
    options = parser.parse_args()
    if options.only in (None, "base"):
        make_base(options.data, options.text, options.work, options.minutes)
    if options.only in (None, "adapters", "harm"):
        make_harm(options.data, options.work)
    if options.only in (None, "adapters", "harm", "presets"):
        promise_harm(options.data)
    if options.only in (None, "adapters", "refuse"):
        make_refuse(options.data, options.work)
    if options.only in (None, "adapters", "harm", "presets", "cards"):
        describe_harm(options.data)
    if options.only in (None, "adapters", "refuse", "cards"):
        describe_refuse(options.data)


def run(*command: str) -> None:
    """Run one command of this project, showing it first; its failure is ours."""
    note("$ " + " ".join(command))
    subprocess.run(command, check=True)


def make_base(data: Path, text: Path, work: Path, minutes: float) -> None:
    """Tokens, training, packaging.  A run that was killed goes on from its last checkpoint."""
    tokens, model = work / "tokens", work / "model"
    if not (tokens / "meta.json").exists():
        run(
            sys.executable,
            "scripts/pretrain/prepare.py",
            "--data",
            str(data),
            "--text",
            str(text),
            "--out",
            str(tokens),
        )
    on_gpu = torch.cuda.is_available()
    processes = torch.cuda.device_count() if on_gpu else 2
    size = ["--hidden", "384", "--layers", "8", "--micro", "64", "--batch", "64"] if on_gpu else ["--layers", "8"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    run(
        *launcher, "scripts/pretrain/train.py", "--data", str(tokens), "--out", str(model), "--resume",
        "--minutes", str(minutes), *size,
    )  # fmt: skip
    samples = work / "samples.txt"
    with samples.open("w", encoding="utf-8") as handle:
        subprocess.run([sys.executable, "scripts/pretrain/sample.py", str(model)], check=True, stdout=handle)
    run(
        sys.executable, "scripts/pretrain/card.py", "--tokens", str(tokens), "--log", str(model / "log.csv"),
        "--samples", str(samples), "--model", str(model), "--route", "from-nothing",
    )  # fmt: skip
    for file in MODEL_FILES:
        shutil.copyfile(model / file, BUILTIN / "base" / file)
    note("the base has changed: make the adapters, then every figure, again")


def train(recipe_name: str, rows: Path, work: Path) -> None:
    """Train by the recipe and package the artifact."""
    recipe = read_recipe(Path("recipes/builtin") / f"{recipe_name}.toml")
    output = work / recipe_name

    def report(progress: object) -> None:
        if progress.loss != progress.loss:  # type: ignore[attr-defined]
            note(f"{recipe_name}, epoch {progress.epoch}: validation {progress.metric:.4f}")  # type: ignore[attr-defined]

    run_recipe(recipe, data_root=rows, output=output, report=report)
    target = BUILTIN / "adapters" / recipe_name
    target.mkdir(parents=True, exist_ok=True)
    for file in ("safeside_config.json", "adapter.safetensors", "provenance.json", "README.md"):
        shutil.copyfile(output / file, target / file)
    size = (target / "adapter.safetensors").stat().st_size
    note(f"builtin:{recipe_name}: {size / 1e6:.2f} MB")


def make_harm(data: Path, work: Path) -> None:
    """``builtin:harm``, the guard of prompts and answers."""
    for split, rows in zip(("train", "validation"), guard_rows(data), strict=True):
        write(work / "rows" / f"harm_{split}.jsonl.gz", rows)
    train("harm", work / "rows", work)


def promise_harm(data: Path) -> None:
    """The presets and stop rules that unseen harmless rows can promise, and the record of the rows it learnt from."""
    train_rows, validation = guard_rows(data)
    base, folder = load_base("builtin"), BUILTIN / "adapters" / "harm"
    guard = load_adapter(folder, base)
    labels = guard.config.labels
    rows, benign = ([example_of(row, labels) for row in some] for some in (validation, benign_rows(data)))
    guard.config = guard.config.model_copy(update={"modes": {}})
    modes: tuple[Mode, ...] = ("prompt", "answer")
    for mode in modes:
        parts = [[example for example in some if place_of(example.messages) == mode] for some in (rows, benign)]
        scores = [scores_of(base, guard, part) for part in parts]
        own = np.array([example.labels for example in parts[0]], dtype=np.float64)
        guard.set_mode(mode, fit_mode(scores[0], own, benign=scores[1], uncalibrated=uncalibrated(guard, scores[0])))
    calibrate_stream(base, guard, rows, benign)
    source = f"{len(benign):,} rows of databricks-dolly-15k that it has not seen, CC-BY-SA-3.0"
    copy_adapter(folder, folder, guard.config, {"presets": f"promised on {source}"})
    save_learnt(folder, [example_of(row, labels) for row in train_rows])
    for mode, found in guard.config.modes.items():
        note(f"{mode}: {found.summary}")


def scores_of(base: Base, guard: Adapter, examples: Sequence[Example]) -> np.ndarray:
    """Scores (n, K) at the ends of the texts."""
    found = score_conversations(base, [guard], [example.messages for example in examples])
    return np.array([row.by_guard[guard.name] for row in found], dtype=np.float64)


def uncalibrated(guard: Adapter, scores: np.ndarray) -> np.ndarray:
    """What (n, K) scores were before training calibrated them on these very rows: the sigmoid of the raw logits."""
    found = guard.config.calibration
    assert found is not None
    logits = (log_odds(scores) - np.array(found.bias)) / np.array(found.scale)
    return np.asarray(1 / (1 + np.exp(-logits)))


def make_refuse(data: Path, work: Path) -> None:
    """``builtin:refuse``, the aligner: refusals on harmful prompts, the base's own answers on harmless ones."""
    base = load_base("builtin")
    for split, kept in zip(("train", "validation"), kept_rows(data), strict=True):
        prompts = [str(row["prompt"]) for row in kept]
        write(work / "rows" / f"refuse_{split}.jsonl.gz", [*refusal_rows(split), *own_answers(base, prompts)])
    train("refuse", work / "rows", work)


def describe_harm(data: Path) -> None:
    """Sources, limits and validation figures into the guard's card."""
    train_rows, validation = guard_rows(data)
    base = load_base("builtin")
    folder = BUILTIN / "adapters" / "harm"
    figures = guard_facts(base, load_adapter(folder, base), validation)
    facts = {**data_facts(train_rows, validation, GUARD_SOURCES), **figures, **left_out(folder, train_rows)}
    annotate_adapter(folder, {**facts, "licence": LICENCE, "limits": LIMITS["harm"]})


def left_out(folder: Path, rows: list[Row]) -> dict[str, str]:
    """How many of the training rows the run could not take."""
    n_used = int(read_provenance(folder)["train_rows"])
    return {"rows left out": f"{len(rows) - n_used} training rows, longer than the base's context or without an answer"}


def guard_facts(base: Base, guard: Adapter, rows: list[Row]) -> dict[str, str]:
    """AUROC, and rates at the threshold that was set on these very rows: all of them, prompts alone, answers."""
    report = report_on(base, guard, [example_of(row, guard.config.labels) for row in rows])
    labels, scores = report.labels[:, 0], report.scores[:, 0]
    is_answer = np.array(["response" in row for row in rows])
    facts = {}
    for part, chosen in (("all", np.ones_like(is_answer)), ("prompts", ~is_answer), ("answers", is_answer)):
        kept = chosen & np.isfinite(scores)
        found = guard_figures(labels[kept], scores[kept], guard.thresholds[0])
        figures = ", ".join(
            f"{name} {found[name].value:.3f} ({found[name].low:.3f} to {found[name].high:.3f})"
            for name in ("auroc", "tpr", "fpr")
        )
        facts[f"validation, {part}"] = f"{figures}, n = {kept.sum():,}, unscored {(chosen & ~kept).sum()}"
    return facts


def describe_refuse(data: Path) -> None:
    """Sources, limits and validation figures into the aligner's card."""
    base = load_base("builtin")
    folder = BUILTIN / "adapters" / "refuse"
    rows = [[*refusal_rows(split), *kept] for split, kept in zip(("train", "validation"), kept_rows(data), strict=True)]
    facts = {**data_facts(*rows, KEPT_SOURCES), **left_out(folder, rows[0])}
    facts["data, answers"] = "refusals from the project's own generator; on harmless prompts the base's own answers"
    suite = Suite("validation", DEMO / "validation.jsonl.gz", limit=100)
    for result in run_aligner_suite(base, load_adapter(folder, base), suite, (0.0, 0.5, 1.0)):
        strength = result.provenance["strength"]
        facts[f"validation, {result.metric} at strength {strength}"] = (
            f"{result.value:.2f} ({result.low:.2f} to {result.high:.2f}), n = {result.n}"
        )
    annotate_adapter(folder, {**facts, "licence": LICENCE, "limits": LIMITS["refuse"]})


def own_answers(base: Base, prompts: list[str], batch_size: int = 50) -> list[Row]:
    """What the base itself answers, greedily, to harmless prompts: the aligner's target where it should not act."""
    rows: list[Row] = []
    ordered = sorted(prompts, key=len)
    with progress_bar("the base's own answers", len(ordered), "prompts") as advance:
        for start in range(0, len(ordered), batch_size):
            some = ordered[start : start + batch_size]
            answers = base.chat_batch([[Message("user", prompt)] for prompt in some], max_new_tokens=48)
            rows += [
                {"prompt": prompt, "response": answer.text}
                for prompt, answer in zip(some, answers, strict=True)
                if answer.text
            ]
            advance(len(some))
    return rows


if __name__ == "__main__":
    main()
