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
from pathlib import Path

import torch
from rows import DEMO, Row, guard_rows, kept_prompts, read, write

from safeside.base.model import Base, load_base
from safeside.terminal import note, progress_bar
from safeside.train.recipe import read_recipe
from safeside.train.run import run_recipe
from safeside.types import Message

BUILTIN = Path("src/safeside/builtin")
MODEL_FILES = (
    "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    "chat_template.jinja", "log.csv", "README.md",
)  # fmt: skip


def main() -> None:
    """Parse the options and make what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="labelled sets")
    parser.add_argument("--text", type=Path, default=Path("../shared/pretrain/text"), help="pretraining text")
    parser.add_argument("--work", type=Path, default=Path("runs/builtin"), help="folder for everything in between")
    parser.add_argument("--minutes", type=float, default=10.0 if torch.cuda.is_available() else 180.0)
    parser.add_argument("--only", choices=("base", "adapters", "harm", "refuse"), help="make only this part")
    options = parser.parse_args()
    if options.only in (None, "base"):
        make_base(options.data, options.text, options.work, options.minutes)
    if options.only in (None, "adapters", "harm"):
        make_harm(options.data, options.work)
    if options.only in (None, "adapters", "refuse"):
        make_refuse(options.data, options.work)


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
    samples = work / "samples.txt"
    with samples.open("w", encoding="utf-8") as handle:
        subprocess.run([sys.executable, "scripts/pretrain/sample.py", str(model)], check=True, stdout=handle)
    run(
        sys.executable, "scripts/pretrain/card.py", "--tokens", str(tokens), "--log", str(model / "log.csv"),
        "--samples", str(samples), "--model", str(model), "--route", "from-nothing",
    )  # fmt: skip
        shutil.copyfile(output / file, target / file)
    size = (target / "adapter.safetensors").stat().st_size
    note(f"builtin:{recipe_name}: {size / 1e6:.2f} MB")


def make_harm(data: Path, work: Path) -> None:
    """``builtin:harm``, the guard of prompts and answers."""
    for split, rows in zip(("train", "validation"), guard_rows(data), strict=True):
        write(work / "rows" / f"harm_{split}.jsonl.gz", rows)
    train("harm", work / "rows", work)


def make_refuse(data: Path, work: Path) -> None:
    """``builtin:refuse``, the aligner: refusals on harmful prompts, the base's own answers on harmless ones."""
    base = load_base("builtin")
    for split, prompts in zip(("train", "validation"), kept_prompts(data), strict=True):
        path = work / "rows" / f"refuse_{split}.jsonl.gz"
        refusals = [
            {"prompt": row["prompt"], "response": row["response"]} for row in read(DEMO / f"refusals_{split}.jsonl.gz")
        ]
        write(path, [*refusals, *own_answers(base, prompts)])
    train("refuse", work / "rows", work)


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
